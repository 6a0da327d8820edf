"""Which augmentation fits a data set, and timm's transform for a model's data config."""

from __future__ import annotations

from typing import Any

from csqcli.data.splits import DataSet

IN_MEMORY_SIDE = 64  # pixels: larger inputs stream from disk through worker processes
UNFLIPPED = "imagenet-no-flip"  # random resized crops of data whose mirrored images are another class
RESIZED_CROPS = ("imagenet", UNFLIPPED)


def choose_augment(setting: str, data: DataSet, config: dict[str, Any]) -> str:
    """What :func:`image_transform` and the loaders take: ``auto`` resolved, and no mirrors that were not asked for by name."""
    if setting == "imagenet" and not data.flips:
        return UNFLIPPED
    if setting != "auto":
        return setting
    if max(config["input_size"][1:]) > IN_MEMORY_SIDE:
        return "imagenet"
    return "crop-flip" if data.flips else "crop"


def image_transform(config: dict[str, Any], augment: str | None, *, normalize: bool = True) -> Any:
    """timm's transform for the data config; ``augment`` None is the evaluation transform. Not normalised, it gives uint8."""
    from timm.data import create_transform

    shared = {key: config[key] for key in ("input_size", "mean", "std", "interpolation")}
    shared["input_size"] = tuple(shared["input_size"])
    if augment in (None, "none"):
        crop = {"crop_pct": config.get("crop_pct", 1.0), "crop_mode": config.get("crop_mode", "center")}
        return create_transform(**shared, **crop, is_training=False, normalize=normalize)
    options: dict[str, Any] = {} if augment in RESIZED_CROPS else {"train_crop_mode": "rkrc"}
    flip = 0.0 if augment in ("crop", UNFLIPPED) else 0.5
    return create_transform(**shared, is_training=True, hflip=flip, color_jitter=None, normalize=normalize, **options)  # type: ignore[arg-type]
