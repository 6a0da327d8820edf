"""A small ViT and a small ConvNeXt for CIFAR-10: timm's classes at sizes that train on one core, for layer_norm.py.

csq search benchmarks/accuracy/small_networks.py:vit --no-pretrained --method float --data cifar10:DIR --input-size 16 …
"""

from __future__ import annotations

from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer
from torch import nn


def vit(num_classes: int = 10) -> nn.Module:
    """Four blocks of width 64 over 16 patches of 4×4 pixels of a 16×16 image: 205k parameters."""
    return VisionTransformer(
        img_size=16,
        patch_size=4,
        embed_dim=64,
        depth=4,
        num_heads=4,
        num_classes=num_classes,
        global_pool="avg",
        class_token=False,
    )


def convnext(num_classes: int = 10) -> nn.Module:
    """Five blocks in four stages over a 32×32 image, stem of 4×4 patches: 320k parameters."""
    return ConvNeXt(depths=(1, 1, 2, 1), dims=(24, 48, 96, 128), num_classes=num_classes, patch_size=4)
