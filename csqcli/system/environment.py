"""What this machine and its Python bring: versions, extras, devices, memory, disk. Nothing heavy is imported to learn a version."""

from __future__ import annotations

import os
import platform
import re
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

_CSQ = "csq"  # the distribution
_FOR_DEVELOPERS = ("dev", "docs", "rivals")  # extras that no command needs


def version_of(package: str) -> str | None:
    """A distribution's version; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def declared() -> tuple[list[str], dict[str, list[str]]]:
    """The packages that csq needs, and those that each of its extras brings on top, as the installed distribution declares
    them; nothing where csq runs from a folder that was not installed. What an extra takes from another stands there only."""
    try:
        lines = metadata.requires(_CSQ) or []
    except metadata.PackageNotFoundError:
        lines = []
    core: list[str] = []
    extras: dict[str, list[str]] = {}
    for line in lines:
        package, extra = re.match(r"[\w.-]+", line), re.search(r"""extra == ['"]([\w.-]+)['"]""", line)
        assert package is not None, line
        if extra is None:
            core.append(package[0])
        elif extra[1] not in _FOR_DEVELOPERS and package[0] not in (_CSQ, *core):
            extras.setdefault(extra[1], []).append(package[0])
    return core, extras


_INSTRUCTIONS = (  # of a processor, those that speed of inference depends on; as Linux names them
    *("sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)


def processor() -> dict[str, Any]:
    """``name`` of the processor, and ``instructions``: the instruction sets that it has of those that engines' kernels use,
    as Linux names them (elsewhere the widest that PyTorch found). Imports torch."""
    import torch

    found: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    has = (found.get("flags") or found.get("Features") or "").split()
    instructions = [name for name in _INSTRUCTIONS if name in has] or [torch.backends.cpu.get_cpu_capability()]
    return {"name": found.get("model name") or platform.processor() or platform.machine(), "instructions": instructions}


def describe(folder: Path) -> dict[str, Any]:
    """Versions, extras, CPU count, devices with memory in bytes, and the bytes free where ``folder`` lies. Imports torch."""
    import torch

    from csqcli.system.memory import free_bytes

    core, extras = declared()
    what = {"cpu": platform.machine()}
    what |= {f"cuda:{number}": torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())}
    what |= {"mps": "Apple GPU"} if torch.backends.mps.is_available() else {}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version_of(name) for name in core},
        "extras": {extra: {name: version_of(name) for name in names} for extra, names in extras.items()},
        "threads": torch.get_num_threads(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "devices": [
            {"name": name, "what": kind, "free_bytes": free_bytes(torch.device(name))} for name, kind in what.items()
        ],
        "disk_free_bytes": shutil.disk_usage(folder).free,
    }
