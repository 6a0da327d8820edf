"""Options of few values that commands, recipes and functions share: each written once, and read without PyTorch or pydantic."""

from __future__ import annotations

from typing import Literal, TypeAlias

Amp: TypeAlias = Literal["auto", "off", "bf16"]  # precision of training
Head: TypeAlias = Literal["auto", "keep", "subset", "new"]  # what becomes of a checkpoint's classifier
Weights: TypeAlias = Literal["auto", "ema", "raw"]  # which of a checkpoint's are wanted; auto prefers averaged ones
EngineName: TypeAlias = Literal["ort", "openvino", "litert", "torch"]  # what latencies are measured in

# Of `csq export`.
Activations: TypeAlias = Literal["float", "int8"]  # their type in a graph
Target: TypeAlias = Literal["ort", "openvino", "tensorrt"]  # the engine that a graph is made for
WeightType: TypeAlias = Literal["int8", "int4"]  # in a graph for TensorRT, of the layers that it can hold
Prefer: TypeAlias = Literal["speed", "size"]  # what a LiteRT file is made for, where these want different kernels
