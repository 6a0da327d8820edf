"""How much memory a training step will take, found out before it is tried."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from csqcli.errors import UserError

_METHOD_BYTES = {"csq": 12, "csq-paper": 128, "ste": 8, "lsq": 8, "float": 4}  # per weight: state, momentum included
_CGROUP = Path("/sys/fs/cgroup")


def check(
    model: nn.Module,
    input_size: Sequence[int],
    *,
    method: str,
    bits: int,
    images: int,
    amp: bool,
    device: torch.device,
) -> None:
    """UserError when a step on ``images`` at once cannot fit into the memory that is free now; it says how many can.

    Counted are gradients, the method's state and the activations kept for the backward pass; temporaries are not, so what
    passes may still fail, and what is refused could not have worked.
    """
    free = free_bytes(device)
    if free is None:
        return
    weights = sum(parameter.numel() for parameter in model.parameters())
    fixed = weights * (4 + (16 * bits if method == "csq-uniform" else _METHOD_BYTES[method]))
    per_image = activation_bytes(model, input_size, amp=amp, device=device)
    needed = fixed + images * per_image
    if needed <= free:
        return
    fitting = (free - fixed) // max(per_image, 1)
    hint = (
        f"--set micro_batch={2 ** (fitting.bit_length() - 1)} fits"
        if fitting > 0
        else "take a smaller model or a larger machine"
    )
    raise UserError(
        f"a step on {images} images needs at least {_gib(needed)} ({_gib(images * per_image)} of it activations), "
        f"{_gib(free)} are free",
        where=f"memory of {device}",
        hint=hint,
    )


def activation_bytes(model: nn.Module, input_size: Sequence[int], *, amp: bool, device: torch.device) -> int:
    """Bytes that autograd keeps for the backward pass of one image of ``input_size`` (C, H, W), each storage once.

    The model runs in eval mode, so that nothing in it changes.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[int, Any]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.device == device and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), storage  # held, so that no address is used twice
        return tensor

    was_training = model.training
    model.eval()
    try:
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast(device.type, torch.bfloat16, enabled=amp),
        ):
            model(torch.zeros(1, *input_size, device=device))
    finally:
        model.train(was_training)
    return sum(size for size, _ in kept.values())


def free_bytes(device: torch.device) -> int | None:
    """Memory that this process could still take: the GPU's, or the machine's within its cgroup. None where unknown."""
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reusable
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
