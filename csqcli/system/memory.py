"""How much memory a training step will take, found out before it is tried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from csqcli.errors import UserError
from csqcli.system import launcher

# What torch asks for is met within 12 % by most models; processes grow by 1.1 to 1.6 times as much, because glibc holds on
# to freed blocks: below 32 MiB, in csq's own process below 128 (`heap`). 1.3 is in the middle (docs/performance.md). A GPU's
# allocator was not measured.
_ALLOCATOR = {"cpu": 1.3}
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a training step takes beyond the weights themselves."""

    fixed: int  # gradients, the method's state, and what is kept whatever the number of images
    per_image: int

    def of(self, images: int) -> int:
        return self.fixed + images * self.per_image

    def most_images(self, free: int) -> int:
        """Images that fit at once into so many bytes; 0 when not even one does."""
        return max(0, free - self.fixed) // max(self.per_image, 1)


def estimate(
    model: nn.Module,
    input_size: Sequence[int],
    *,
    state_bytes: int,
    amp: bool,
    device: torch.device,
) -> StepMemory:
    """Gradients, the method's state (``state_bytes`` per weight), the activations kept for the backward pass, and what the
    allocator adds to them.

    Temporaries are not counted: at the peak of a backward pass they take about what was freed by then.
    """
    weights = sum(parameter.numel() for parameter in model.parameters())
    state = weights * (4 + state_bytes)
    one, two = (activation_bytes(model, input_size, images=count, amp=amp, device=device) for count in (1, 2))
    per_image = max(0, min(one, two - one))  # the rest does not grow: weights in bfloat16, tables of positions
    spread = _ALLOCATOR.get(device.type, 1.0)
    return StepMemory(state + int(spread * (one - per_image)), int(spread * per_image))


def check(step: StepMemory, images: int, free: int, device: torch.device) -> None:
    """UserError when a step on ``images`` at once does not fit into ``free`` bytes; it says how many do."""
    if step.of(images) <= free:
        return
    fitting = step.most_images(free)
    hint = (
        f"--batch-size auto takes it in parts that fit, as does --set micro_batch={2 ** (fitting.bit_length() - 1)}"
        if fitting > 0
        else "take a smaller model or a larger machine"
    )
    raise UserError(
        f"a step on {images} images needs about {gib(step.of(images))} ({gib(images * step.per_image)} of it "
        f"activations), {gib(free)} are free",
        where=f"memory of {device}",
        hint=hint,
    )


def activation_bytes(
    model: nn.Module, input_size: Sequence[int], *, images: int, amp: bool, device: torch.device
) -> int:
    """Bytes that autograd keeps for the backward pass of images of ``input_size`` (C, H, W), each storage once.

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
            model(torch.zeros(images, *input_size, device=device))
    finally:
        model.train(was_training)
    return sum(size for size, _ in kept.values())


def free_bytes(device: torch.device) -> int | None:
    """Memory that this process could still take: the GPU's, or its share of the machine's within its cgroup. None where unknown.

    torchrun's processes on one machine take equal shares.
    """
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reusable
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    processes = launcher.local_world_size()
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free // processes
    return (free if limit == "max" else min(free, int(limit) - int(used))) // processes


def gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
