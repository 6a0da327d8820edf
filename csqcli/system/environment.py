"""What this machine and its Python bring: versions, extras, devices, memory, disk. Nothing heavy is imported to learn a version."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

CORE = ("torch", "torchvision", "timm", "typer", "rich", "safetensors", "pydantic", "numpy", "pillow")
EXTRAS = {  # extra of the distribution: the packages that it brings
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "openvino": ("openvino",),
    "litert": ("ai-edge-litert", "flatbuffers"),
    "torchao": ("torchao",),
    "hf": ("pyarrow",),
}


def version_of(package: str) -> str | None:
    """A distribution's version; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe(folder: Path) -> dict[str, Any]:
    """Versions, extras, CPU count, devices with memory in bytes, and the bytes free where ``folder`` lies. Imports torch."""
    import torch

    from csqcli.system.memory import free_bytes

    what = {"cpu": platform.machine()}
    what |= {f"cuda:{number}": torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())}
    what |= {"mps": "Apple GPU"} if torch.backends.mps.is_available() else {}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version_of(name) for name in CORE},
        "extras": {extra: {name: version_of(name) for name in names} for extra, names in EXTRAS.items()},
        "threads": torch.get_num_threads(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "devices": [
            {"name": name, "what": kind, "free_bytes": free_bytes(torch.device(name))} for name, kind in what.items()
        ],
        "disk_free_bytes": shutil.disk_usage(folder).free,
    }
