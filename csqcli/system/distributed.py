"""torchrun's ranks: summed counts, equal state, one writer. Everything is a no-op in a single process."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from csqcli.errors import UserError
from csqcli.system import launcher
from csqcli.system.interrupt import Interrupted

_is_held = False  # whether a process group outlives the runs in it


@dataclass(frozen=True)
class Shard:
    """Which part of every global batch belongs to this process."""

    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """The one process that writes files and talks."""
        return self.rank == 0


def start(device: torch.device) -> tuple[Shard, torch.device]:
    """Join torchrun's process group when there is one; this process's shard, and its own device."""
    world, rank = launcher.world_size(), launcher.number("RANK", default=0)
    if world == 1:
        return Shard(), device
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing and not dist.is_initialized():
        raise UserError(f"WORLD_SIZE is {world}, and {missing[0]} is not set", hint=launcher.HINT)
    if rank >= world:
        raise UserError(f"RANK is {rank} and WORLD_SIZE {world}", hint=launcher.HINT)
    if device.type == "cuda":
        device = torch.device("cuda", launcher.number("LOCAL_RANK", default=0))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        except (ValueError, RuntimeError) as error:  # an address or a port that is none; nobody there
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"the processes do not find each other ({reason})", hint=launcher.HINT) from error
    return Shard(dist.get_rank(), world), device


@contextlib.contextmanager
def held(device: torch.device) -> Iterator[Shard]:
    """One process group for all runs of the body, which each start and stop it otherwise: processes that join a second group at
    the address of the first may meet what is left of it."""
    global _is_held
    shard, _ = start(device)
    _is_held = True
    try:
        yield shard
    except Interrupted:
        _is_held = False
        stop()
        raise
    finally:
        _is_held = False
    stop()


def stop() -> None:
    """Leave the process group, if any, unless it is held."""
    if _is_held:
        return
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def sum_counts(counts: Sequence[int], device: torch.device) -> list[int]:
    """Element-wise sum over all processes; never an average of averages."""
    if not _running():
        return list(counts)
    total = torch.tensor(counts, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    return [int(value) for value in total]


def all_reduce_min(count: int, device: torch.device) -> int:
    """The smallest of all processes' values, everywhere."""
    if not _running():
        return count
    least = torch.tensor(count, dtype=torch.int64, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return int(least)


def all_reduce_max(count: int, device: torch.device) -> int:
    """The largest of all processes' values, everywhere."""
    return -all_reduce_min(-count, device)


def wait_for_all(device: torch.device) -> None:
    """Return once every process is here."""
    sum_counts([0], device)


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _running() else 1


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Mean over processes of the gradients of parameters that live outside the data-parallel model."""
    if not _running():
        return
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def from_main(value: Any) -> Any:
    """The main process's value, everywhere."""
    if not _running():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def copy_from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with the main process's."""
    if _running():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def check_equal(state: Any, *, what: str) -> None:
    """RuntimeError when any two processes hold different bytes."""
    if not _running():
        return
    digest = fingerprint(state)
    gathered: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(gathered, digest)
    if len(set(gathered)) > 1:
        raise RuntimeError(f"{what} differs between ranks: {gathered}")


def fingerprint(state: Any) -> str:
    """SHA-256 over all tensors and numbers of a nested state."""
    digest = hashlib.sha256()

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            for key in value:
                digest.update(str(key).encode())
                visit(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)
        else:
            digest.update(repr(value).encode())

    visit(state)
    return digest.hexdigest()


def _running() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
