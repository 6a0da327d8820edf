"""What torch.save and CIFAR's batches are made of: archives, pickles with code and without, states."""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import random
import re
import struct
import zipfile
from collections.abc import Callable
from typing import Any

from tests.fuzz.values import CANARY, SECRET, hostile, mutate_bytes


class Code:
    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def mutate_archive(data: bytes, rng: random.Random, other: bytes) -> bytes:
    kind = rng.randrange(8)
    if kind == 0 or not zipfile.is_zipfile(io.BytesIO(data)):
        return mutate_bytes(data, rng, other)
    if kind == 1:
        return pickle.dumps({"state_dict": evil(rng)}, protocol=rng.choice([2, 4]))
    source, out = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    method = zipfile.ZIP_DEFLATED if kind == 2 else zipfile.ZIP_STORED
    large = 2**26  # once: deflating it for every tensor takes the case's five seconds
    with zipfile.ZipFile(out, "w", method) as archive:
        for entry in source.infolist():
            content, name = source.read(entry), entry.filename
            if name.endswith("data.pkl"):
                if kind == 3:
                    content = mutate_bytes(content, rng, other)
                elif kind == 4:
                    content = pickle.dumps(evil(rng), protocol=2)
                elif kind == 5:  # shapes, strides and sizes are BININT1 and BININT2
                    spots = [match.start() for match in re.finditer(rb"K.|M..", content)]
                    for _ in range(rng.choice([1, 2, 5])):
                        at = rng.choice(spots)
                        lie = b"M\xff\xff" if rng.random() < 0.5 else b"J\xff\xff\xff\x7f"
                        content = content[:at] + lie + content[at + (2 if content[at : at + 1] == b"K" else 3) :]
                        spots = [match.start() for match in re.finditer(rb"K.|M..", content)]
            elif kind == 2 and rng.random() < 0.5:
                size = rng.choice([2**16, large])
                content, large = bytes(size), large if size == 2**16 else 2**16
            elif kind == 6 and rng.random() < 0.3:
                content = mutate_bytes(content, rng) if rng.random() < 0.5 else b""
            elif kind == 7 and rng.random() < 0.3:
                name = rng.choice(["../../evil", "/tmp/evil", name + "x", "data.pkl", "archive/data.pkl"])
            archive.writestr(name, content)
    return out.getvalue()


def evil(rng: random.Random) -> Any:
    return rng.choice(
        [
            Code(os.system, f"touch {SECRET}"),
            Code(__import__, CANARY),
            Code(eval, f"__import__({CANARY!r})"),
            Code(bytearray, 10**11),
            {"x": [Code(os.getcwd)]},
        ]
    )


def odd_tensors(rng: random.Random) -> dict[str, Any]:
    """Tensors that a state dict may hold and a model cannot take."""
    import torch

    shape = rng.choice([(16, 1, 3, 3), (10**9,), (0,), (), (2**20, 2**20)])
    small = shape if math.prod(shape) < 10**6 else (3,)
    makers: list[Callable[[], Any]] = [
        lambda: torch.zeros(1).expand(shape),
        lambda: torch.zeros(small).to_sparse(),
        lambda: torch.zeros(shape, device="meta"),
        lambda: torch.zeros(small, dtype=torch.complex64),
        lambda: torch.zeros(small, dtype=torch.float8_e4m3fn),
        lambda: torch.full(small, 1e300, dtype=torch.float64),
        lambda: torch.full(small, math.nan),
        lambda: torch.quantize_per_tensor(torch.zeros(small), 1.0, 0, torch.qint8),
        lambda: torch.zeros(small, dtype=torch.int64),
        lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        lambda: "text",
        lambda: hostile(rng),
    ]
    return {
        rng.choice(["conv1.weight", "fc.bias", "bn1.running_mean", "module.conv1.weight", "\ud800", ""]): rng.choice(
            makers
        )()
    }


def mutate_state(state: Any, rng: random.Random) -> Any:
    """A resume state with one of its entries changed, or one tensor of the model."""
    import torch

    state = copy.deepcopy(state)
    for _ in range(rng.choice([1, 1, 2])):
        container = state["model"] if isinstance(state.get("model"), dict) and rng.random() < 0.4 else state
        key = rng.choice([key for key in container if key != "inputs"])
        value = container[key]
        if isinstance(value, torch.Tensor) and rng.random() < 0.7:
            container[key] = rng.choice(
                [value.flatten()[:1], value.double(), value * math.nan, value.to(torch.int64), value[None]]
            )
        elif rng.random() < 0.2:
            del container[key]
        else:
            container[key] = hostile(rng)
    return state


# ---- programs for the pickle machine

_NAMES = [
    *("collections OrderedDict", "collections Counter", "collections defaultdict", "_codecs encode", "builtins set"),
    *("torch Size", "torch device", "torch Tensor", "torch.nn.parameter Parameter", "torch.serialization _get_layout"),
    *("torch FloatStorage", "torch LongStorage", "torch.storage UntypedStorage", "torch float32", "torch int8"),
    *(f"torch._utils _rebuild_{kind}" for kind in ("tensor", "tensor_v2", "parameter", "qtensor", "sparse_tensor")),
    *("torch._utils _rebuild_nested_tensor", "torch._utils _rebuild_parameter_with_state"),
    *("torch._utils _rebuild_meta_tensor_no_storage", "torch._tensor _rebuild_from_type_v2"),
    *("argparse Namespace", "functools partial", "builtins bytearray", "builtins complex", "__builtin__ eval"),
    *("os system", "posix system", "builtins getattr", "operator attrgetter", "copyreg _reconstructor"),
    *("numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype", "numpy.core.multiarray scalar"),
    *("torch.nn.modules.conv Conv2d", "mine.nets Net", f"{CANARY} boom"),
]
_TEXTS = [
    "a",
    "latin1",
    "hex",
    "zlib",
    "unicode_escape",
    "storage",
    "0",
    "1",
    "cpu",
    "cuda:0",
    "state_dict",
    "a" * 5000,
]


def program(rng: random.Random) -> bytes:
    """Opcodes in an order that a stack machine can follow, for the most part: names, values, containers, calls, memos."""
    out, memo = [b"\x80\x02"], 0
    for _ in range(rng.choice([5, 40, 300])):
        kind = rng.randrange(14)
        if kind == 0:
            out.append(f"c{rng.choice(_NAMES)}\n".replace(" ", "\n", 1).encode())
        elif kind == 1:
            text = rng.choice(_TEXTS).encode()
            out.append(b"X" + struct.pack("<I", len(text)) + text)
        elif kind == 2:
            out.append(rng.choice([b"K\x07", b"K\x00", b"M\xff\xff", b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff", b"N"]))
        elif kind == 3:
            out.append(rng.choice([b"]", b"}", b")", b"\x8f", b"("]))
        elif kind == 4:
            out.append(rng.choice([b"t", b"\x85", b"\x86", b"\x87", b"\x87"]))
        elif kind == 5:
            out.append(rng.choice([b"a", b"e", b"s", b"u", b"b"]))
        elif kind == 6:
            number = rng.choice([memo, memo, 0, 2**31 - 1])
            out.append(b"r" + struct.pack("<I", number))
            memo += 1
        elif kind in (7, 8) and memo:
            out.append(b"j" + struct.pack("<I", rng.randrange(memo)))
        elif kind in (9, 10):
            out.append(rng.choice([b"R", b"\x81", b"\x85R", b"\x86R", b"Q", b"b"]))
        elif kind == 11:  # a whole call
            out.append(f"c{rng.choice(_NAMES)}\n".replace(" ", "\n", 1).encode() + b"(")
            out += [
                rng.choice([b"K\x03", b"K\x01\x85", b"]", b"N", b"X\x01\x00\x00\x00a"]) for _ in range(rng.randrange(5))
            ]
            out.append(b"tR")
        elif kind == 12:
            out.append(_storage(rng))
        else:
            out.append(
                rng.choice([b"0", b"2", b"l", b"d", b"I1\n", b"S'x'\n", b"V\\ud800\n", b"\x94", b"\x93", b"P0\n"])
            )
    return b"".join(out) + b"."


def _storage(rng: random.Random) -> bytes:
    """A persistent id of torch.save, and perhaps the call that makes a tensor of it."""
    count = rng.choice([b"K\x07", b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff", b"K\x00"])
    kind = rng.choice([b"ctorch\nFloatStorage\n", b"ctorch\nLongStorage\n", b"ctorch.storage\nUntypedStorage\n"])
    key = rng.choice([b"0", b"1", b"9"])
    made = b"(X\x07\x00\x00\x00storage" + kind + b"X\x01\x00\x00\x00" + key + b"X\x03\x00\x00\x00cpu" + count + b"tQ"
    if rng.random() < 0.4:
        return made
    size = rng.choice([b"K\x07\x85", b"J\xff\xff\xff\x7f\x85", b"K\x02K\x03\x86", b")", b"J\xff\xff\xff\x7fK\x00\x86"])
    stride = rng.choice([b"K\x01\x85", b"K\x00\x85", b"K\x03K\x01\x86", b")", b"J\xff\xff\xff\x7f\x85"])
    call = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return (
        call
        + made
        + rng.choice([b"K\x00", b"J\xff\xff\xff\x7f"])
        + size
        + stride
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def with_program(data: bytes, rng: random.Random) -> bytes:
    """A file of torch.save whose object is a program, or whose program is one with the object's own bytes in it."""
    written = program(rng)
    if not zipfile.is_zipfile(io.BytesIO(data)):
        start = data.index(b"\x80\x02}")  # after the three small pickles of the older format
        return data[:start] + written + data[rng.choice([start, len(data)]) :]
    source, out = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                at = rng.randrange(2, len(content))
                content = rng.choice([written, content[:at] + written[2:-1] + content[at:]])
            archive.writestr(entry.filename, content)
    return out.getvalue()
