"""Hostile files: mutated copies of everything that csq reads must work or be refused in one line.

    python -m tests.fuzz --cases 20000 --seed 0

A corpus is made by csq itself (the digits network in every form, checkpoints, a resume state, recipes) and by hand. Each
case takes one file of it, mutates it, and gives it to one reader: a function of the package, or the command line in this
process. Case ``i`` of a seed is always the same input; ``--only i --keep DIR`` repeats it and keeps the file.

What counts as a failure: any exception but UserError, more than one line on stderr, five seconds of the processor, more than 512 MiB over
the process's size before (or what 4 GiB of address space refuse), a model delivered that is not finite or not what its
manifest says, and, by an audit hook: an import, a connection, a process, a file written outside the case's folder, or a
file read that only the input names. Cases run in a child process, so a crash or a kill is reported with its number.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import io
import json
import math
import os
import pickle
import random
import re
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SECONDS, GRACE = 5, 60  # of the processor: a hang; of the clock: when the parent ends a child that says nothing
MEMORY = 2**29  # bytes over the process's size before the case
CANARY = "csq_fuzz_canary"
SECRET = "/tmp/csq-fuzz-secret"  # never there; reading it is noticed all the same
_DEEP = "[" * 100_000


class Hang(BaseException):
    """The alarm. No reader may swallow it."""


# ---- values and bytes that nobody expects


def hostile(rng: random.Random) -> Any:
    """One value for a field, of any type."""
    nested: Any = 1
    for _ in range(rng.choice([3, 40, 400])):
        nested = [nested] if rng.random() < 0.5 else {"a": nested}
    return rng.choice(
        [
            *(
                0,
                -1,
                1,
                2,
                7,
                9,
                255,
                256,
                4097,
                2**16,
                2**31 - 1,
                2**31,
                2**53,
                2**63 - 1,
                2**63,
                10**30,
                -(2**63) - 1,
            ),
            *(0.0, -0.0, 0.5, 1e-300, 1e-45, 1e38, 1e39, 1e308, math.nan, math.inf, -math.inf),
            *(True, False, None, [], {}, [[]], [None], [0], [-1], [1, 1], [2**31] * 4, [1] * 3000, {"": ""}, {"a": 1}),
            *(
                "",
                " ",
                "0",
                "1",
                "NaN",
                "../../../etc/x",
                "/etc/passwd",
                SECRET,
                "a\0b",
                "x" * 5000,
                "\ud800",
                "é",
                "\u202e",
            ),
            *("[/red]", "[bold]", "\x1b[2J", "a\nb", "timm:resnet18", "csq:digits_cnn", f"{CANARY}:model", "os:getcwd"),
            *(
                "factory",
                "digits",
                "codes16",
                "codes2+huffman",
                "codes8",
                "float32",
                "int8",
                "huffman",
                "11111111",
                "00000000",
            ),
            *("bit-packed", "compact", "onnx", "{x.__class__}", "%s%s%n", "${HOME}", "conv1.weight", "fc", nested),
        ]
    )


def mutate_bytes(data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """Flips, cuts, splices, overwrites."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        if not out:
            break
        at = rng.randrange(len(out))
        kind = rng.randrange(8)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at] = rng.choice([0, 1, 127, 128, 255])
        elif kind == 2:
            del out[at:]
        elif kind == 3:
            del out[at : at + rng.choice([1, 2, 8, 100])]
        elif kind == 4:
            out[at:at] = rng.randbytes(rng.choice([1, 4, 64]))
        elif kind == 5 and other:
            start = rng.randrange(len(other))
            out[at : at + 200] = other[start : start + rng.choice([8, 200])]
        elif kind == 6:
            out[at:at] = out[at : at + rng.choice([8, 500])]
        else:
            out[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(out)]))
    return bytes(out)


def mutate_tree(value: Any, rng: random.Random) -> Any:
    """A JSON-like tree with one to three places changed to something else."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = list(_places(value))
        if not places:
            return hostile(rng)
        container, key = rng.choice(places)
        kind = rng.randrange(7)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[_key(rng)] = container.pop(key)
        elif kind == 2:
            source, name = rng.choice(places)
            container[key] = copy.deepcopy(source[name]) if _has(source, name) else hostile(rng)
        elif kind == 3 and isinstance(container, list):
            container.extend(copy.deepcopy(container) * rng.choice([1, 3]))
        elif kind == 4 and isinstance(container[key], (int, float)) and not isinstance(container[key], bool):
            container[key] = container[key] * rng.choice([-1, 2, 0.5, 1000]) + rng.choice([0, 1, -1])
        else:
            container[key] = hostile(rng)
    return value


def _key(rng: random.Random) -> str:
    value = hostile(rng)
    return value if isinstance(value, str) else "unknown"


def _has(container: Any, key: Any) -> bool:
    return key in container if isinstance(container, dict) else key < len(container)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    pending = [value]
    while pending:
        item = pending.pop()
        keys = list(item) if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ()
        for key in keys:
            yield item, key
            pending.append(item[key])


def dump(value: Any, rng: random.Random) -> str:
    """JSON text, now and then with a repeated key, a number without end, or nested beyond reason."""
    text = json.dumps(value)
    kind = rng.randrange(12)
    if kind == 0 and (keys := re.findall(r'"\w+":', text)):
        key = rng.choice(keys)
        text = text.replace(key, f"{key} {json.dumps(hostile(rng))}, {key}", 1)
    elif kind == 1 and (numbers := re.findall(r": (\d+)", text)):
        text = text.replace(
            f": {rng.choice(numbers)}", ": " + rng.choice(["9" * 6000, "1e999", "-1e999", "NaN", _DEEP]), 1
        )
    return text


def bomb(size: int, byte: int = 0) -> bytes:
    """Raw DEFLATE of ``size`` equal bytes."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    return coder.compress(bytes([byte]) * size) + coder.flush()


def bad_huffman(data: bytes, rng: random.Random) -> bytes:
    """A dynamic block whose code lengths are over- or under-subscribed, or simply random."""
    lengths = [rng.choice([0, 0, 1, 1, 2, 7]) for _ in range(19)]
    bits = "101" + "".join(f"{value:0{width}b}"[::-1] for value, width in ((29, 5), (29, 5), (15, 4)))
    bits += "".join(f"{value:03b}"[::-1] for value in lengths) + "".join(rng.choice("01") for _ in range(400))
    packed = bytes(int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8))
    return packed + data[: rng.choice([0, 50])]


# ---- safetensors


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header: Any, body: bytes, rng: random.Random, *, lie: bool = False) -> bytes:
    text = dump(header, rng).encode("utf-8", "surrogatepass")
    size = rng.choice([0, 1, len(text) - 1, len(text) + 1, 10**8, 2**63, 2**64 - 1]) if lie else len(text)
    return struct.pack("<Q", size) + text + body


def with_tensor(header: dict[str, Any], body: bytes, name: str, payload: bytes) -> bytes:
    """The body with one tensor's bytes replaced; the header is changed in place."""
    spans = sorted((entry["data_offsets"], key) for key, entry in header.items() if key != "__metadata__")
    out = b""
    for (start, end), key in spans:
        chunk = payload if key == name else body[start:end]
        header[key] = header[key] | {"data_offsets": [len(out), len(out) + len(chunk)]}
        if key == name:
            header[key] |= {"dtype": "U8", "shape": [len(chunk)]}
        out += chunk
    return out


def mutate_safetensors(data: bytes, rng: random.Random, other: bytes) -> bytes:
    kind = rng.randrange(10)
    if kind == 0:
        return mutate_bytes(data, rng, other)
    header, body = split(data)
    tensors = [name for name in header if name != "__metadata__"]
    name = rng.choice(tensors)
    if kind == 1:
        return join(header, body, rng, lie=True)
    if kind == 2:
        changed = rng.choice(tensors)
        entry = header[changed]
        entry[rng.choice(["dtype", "shape", "data_offsets"])] = rng.choice(
            [
                rng.choice(
                    "F64 F32 F16 BF16 F8_E4M3 F8_E5M2 F8_E8M0 F4 C64 I64 I32 I16 I8 U64 U32 U16 U8 BOOL".split()
                ),
                [rng.choice([0, 1, 2**31, 2**62, 10**12]) for _ in range(rng.randrange(4))],
                list(header[name]["data_offsets"]),
                hostile(rng),
            ]
        )
        return join(header, body, rng)
    if kind == 3:  # two tensors trade names, types and shapes stay
        other_name = rng.choice(tensors)
        header[name], header[other_name] = header[other_name], header[name]
        return join(header, body, rng)
    if kind == 4:
        header[_key(rng)] = header.pop(name)
        return join(header, body, rng)
    if kind == 5:
        start, end = header[name]["data_offsets"]
        return join(header, body[:start] + mutate_floats(body[start:end], rng) + body[end:], rng)
    metadata = header.get("__metadata__") or {"csq": "{}"}
    manifest = json.loads(metadata["csq"])
    if kind == 6:
        size = rng.choice([2**20, 2**24, 2**27])
        payload = rng.choice([bomb(size), bomb(size, 0xFF), bad_huffman(body[:100], rng), b"", rng.randbytes(40)])
        name = rng.choice([name for name in tensors if name.endswith("_packed") or name.startswith("csq_")] or tensors)
        body = with_tensor(header, body, name, payload)
        if rng.random() < 0.7 and manifest.get("layers"):
            layer = rng.choice(manifest["layers"])
            side = rng.choice([2**10, 2**12, 2**15, 2**20])
            layer |= {"shape": [side, side], "weights": side * side, "packed_bytes": len(payload)}
            layer["encoding"] = rng.choice(["codes2+huffman", "codes16+huffman", "codes8", "int8"])
            if rng.random() < 0.8:
                total = sum(entry["weights"] for entry in manifest["layers"])
                manifest["budget"]["total_weights"] = total
                manifest["budget"]["mean_bits"] = sum(e["weights"] * e["bits"] for e in manifest["layers"]) / total
    elif kind == 7 and "csq_manifest" in tensors:  # the larger part is deflated
        start, end = header["csq_manifest"]["data_offsets"]
        inner = json.loads(zlib.decompress(body[start:end], -15))
        text = dump(mutate_tree(inner, rng), rng).encode("utf-8", "surrogatepass")
        if rng.random() < 0.1:
            text = b"[" * 2**22 if rng.random() < 0.5 else b"[" + b"[]," * 2**22 + b"[]]"
        coder = zlib.compressobj(9, zlib.DEFLATED, -15)
        body = with_tensor(header, body, "csq_manifest", coder.compress(text) + coder.flush())
        return join(header, body, rng)
    else:
        manifest = mutate_tree(manifest, rng)
    header["__metadata__"] = rng.choice([metadata, metadata, metadata, {}]) | {"csq": dump(manifest, rng)}
    return join(header, body, rng)


def mutate_floats(data: bytes, rng: random.Random) -> bytes:
    values = [0x7FC00000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x00000001, 0x80000000, rng.getrandbits(32)]
    out = bytearray(data)
    for _ in range(rng.choice([1, 3])):
        if len(out) >= 4:
            at = rng.randrange(len(out) // 4) * 4
            out[at : at + 4] = struct.pack("<I", rng.choice(values))
    return bytes(out)


def forge(data: Path, rng: random.Random, target: Path) -> None:
    """A file whose hashes are right: integers, scales, masks, budget, model and names by somebody who means harm."""
    import torch

    from csqcli.file import io as file_io

    file = file_io.read(data)
    layer = rng.choice(file.layers)
    kind = rng.randrange(5)
    if kind == 0:
        layer.integers.view(-1)[rng.randrange(layer.integers.numel())] = rng.choice([-300, 255, 256, 127, 1, 2])
    elif kind == 1:
        layer.scale[0] = rng.choice([math.nan, math.inf, 3e38, 1e-45, 0.0, -1.0])
    elif kind == 2:
        name = rng.choice(list(file.others))
        value = file.others[name]
        file.others[name] = rng.choice(
            [
                value.double() * 1e300,
                torch.full_like(value, 1) / 0,
                value.reshape(1, *value.shape),
                value.to(torch.complex64),
            ]
        )
    elif kind == 3:
        object.__setattr__(layer, "mask", torch.tensor([rng.random() < 0.5 for _ in range(8)]))
        record = next(record for record in file.manifest.layers if record.name == layer.name)
        record.mask, record.bits = (
            "".join("01"[int(bit)] for bit in reversed(layer.mask.tolist())),
            int(layer.mask.sum()),
        )
    else:
        model = file.manifest.model
        arguments = {
            rng.choice(
                ["num_classes", "depth", "layers", "width", "checkpoint_path", "pretrained", "weights"]
            ): hostile(rng)
        }
        library, name = rng.choice(
            [("timm", "resnet18"), ("torchvision", "resnet18"), ("csq", "digits_cnn"), ("factory", CANARY)]
        )
        model.library, model.name, model.source, model.arguments = library, name, f"{library}:{name}", arguments
        model.num_classes = rng.choice([10, 1000, 10**6])
    file.manifest.payload_sha256 = file_io.payload_sha256(file.layers)
    total = sum(record.weights for record in file.manifest.layers)
    file.manifest.budget.mean_bits = sum(r.bits * r.weights for r in file.manifest.layers) / total
    file.manifest.sizes.file_bytes = None
    form = rng.choice(["compact", "int8-packed", "bit-packed", "state-dict"])
    with contextlib.suppress(Exception):  # what cannot be written is no attack
        file_io.write(target, file, form=form)


# ---- checkpoints and states in torch's format


class _Code:
    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def mutate_archive(data: bytes, rng: random.Random, other: bytes) -> bytes:
    kind = rng.randrange(8)
    if kind == 0 or not zipfile.is_zipfile(io.BytesIO(data)):
        return mutate_bytes(data, rng, other)
    if kind == 1:
        return pickle.dumps({"state_dict": _evil(rng)}, protocol=rng.choice([2, 4]))
    source, out = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    method = zipfile.ZIP_DEFLATED if kind == 2 else zipfile.ZIP_STORED
    with zipfile.ZipFile(out, "w", method) as archive:
        for entry in source.infolist():
            content, name = source.read(entry), entry.filename
            if name.endswith("data.pkl"):
                if kind == 3:
                    content = mutate_bytes(content, rng, other)
                elif kind == 4:
                    content = pickle.dumps(_evil(rng), protocol=2)
                elif kind == 5:  # shapes, strides and sizes are BININT1 and BININT2
                    spots = [match.start() for match in re.finditer(rb"K.|M..", content)]
                    for _ in range(rng.choice([1, 2, 5])):
                        at = rng.choice(spots)
                        lie = b"M\xff\xff" if rng.random() < 0.5 else b"J\xff\xff\xff\x7f"
                        content = content[:at] + lie + content[at + (2 if content[at : at + 1] == b"K" else 3) :]
                        spots = [match.start() for match in re.finditer(rb"K.|M..", content)]
            elif kind == 2 and rng.random() < 0.5:
                content = bytes(rng.choice([2**16, 2**26]))
            elif kind == 6 and rng.random() < 0.3:
                content = mutate_bytes(content, rng) if rng.random() < 0.5 else b""
            elif kind == 7 and rng.random() < 0.3:
                name = rng.choice(["../../evil", "/tmp/evil", name + "x", "data.pkl", "archive/data.pkl"])
            archive.writestr(name, content)
    return out.getvalue()


def _evil(rng: random.Random) -> Any:
    return rng.choice(
        [
            _Code(os.system, f"touch {SECRET}"),
            _Code(__import__, CANARY),
            _Code(eval, f"__import__({CANARY!r})"),
            _Code(bytearray, 10**11),
            {"x": [_Code(os.getcwd)]},
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
        key = rng.choice([key for key in container if key != "fingerprint"])
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


# ---- text

YAML_SNIPPETS = [
    "a: &a [x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b, *b, *b, *b, *b]\n"
    "d: &d [*c, *c, *c, *c, *c, *c, *c, *c]\ne: &e [*d, *d, *d, *d, *d, *d, *d, *d]\nf: [*e, *e, *e, *e, *e, *e, *e, *e]\n",
    "model: {arguments: &m {x: *m}}\n",
    "model:\n  arguments: &a [x,x,x,x,x,x,x,x,x]\n  b: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nlayers: {keep: *b}\n",
    f"x: !!python/object/apply:os.system ['touch {SECRET}']\n",
    f"x: !!python/name:{CANARY}.boom\n",
    "x: !!python/module:os\n",
    "seed: 0x" + "f" * 6000 + "\n",
    "seed: " + "9" * 5000 + "\n",
    "seed: 1" + ":59" * 3000 + "\n",
    "epochs: 1e400\n",
    "optimizer: {lr: .inf}\n",
    "optimizer: {lr: .nan}\n",
    'description: "\\ud800"\n',
    'description: "\\e[2J"\n',
    "x: " + _DEEP + "\n",
    "x: " + "{a: " * 2000 + "\n",
    "- " * 3000 + "\n",
    "? [a, b]\n: c\n",
    "? {a: b}\n: c\n",
    "x: !!timestamp nonsense\n",
    "x: 2001-99-99\n",
    "x: !!binary '@@'\n",
    "x: !!int ''\n",
    "x: !!float ''\n",
    "x: !!bool maybe\n",
    "x: !!set {a, b}\n",
    "1: 2\nnull: 3\ntrue: 4\n",
    "data: {workers: 1000000}\n",
    "data: [1]\n",
    "model: null\n",
    "data: 7\n",
    "\ttab: 1\n",
    "%YAML 9.9\n---\n",
    "--- a\n--- b\n",
    "<<: {epochs: 3}\n",
    "\0",
    "\ufeff",
    "layers: {min_bits: {fc: 99999999999999999999}}\n",
]


def mutate_yaml(text: str, rng: random.Random) -> bytes:
    import yaml

    kind = rng.randrange(4)
    if kind == 0:
        return mutate_bytes(text.encode(), rng, "".join(YAML_SNIPPETS).encode())
    if kind == 1:
        lines = text.splitlines(keepends=True)
        at = rng.randrange(len(lines) + 1)
        return "".join([*lines[:at], rng.choice(YAML_SNIPPETS), *lines[at:]]).encode("utf-8", "surrogatepass")
    if kind == 2:
        return rng.choice(YAML_SNIPPETS).encode("utf-8", "surrogatepass")
    with contextlib.suppress(yaml.YAMLError, RecursionError, ValueError):
        return yaml.safe_dump(mutate_tree(yaml.safe_load(text), rng)).encode("utf-8", "surrogatepass")
    return text.encode()


def assignment(rng: random.Random) -> str:
    from csqcli.quant.catalog import CARDS
    from csqcli.recipe.resolve import _leaves

    card = rng.choice(list(CARDS.values()))
    key = rng.choice([*_leaves(card), "lr", "max_bits", "model.arguments.x", "layers.min_bits.fc", "..", "", _key(rng)])
    values = [
        json.dumps(hostile(rng)),
        *(s.partition(": ")[2].strip() for s in YAML_SNIPPETS),
        "{",
        "*a",
        "&a",
        "!!x y",
    ]
    return f"{key}={rng.choice(values)}"


# ---- ONNX


def mutate_onnx(data: bytes, rng: random.Random, other: bytes) -> bytes:
    import onnx

    from csqcli.exporting import runtime

    kind = rng.randrange(5)
    if kind == 0:
        return mutate_bytes(data, rng, other)
    proto = onnx.ModelProto.FromString(data)
    entry = next(entry for entry in proto.metadata_props if entry.key == "csq")
    manifest = json.loads(entry.value)
    if kind in (1, 2):
        entry.value = dump(mutate_tree(manifest, rng), rng).encode("utf-8", "replace").decode()
        return proto.SerializeToString()
    graph = proto.graph
    value, node = rng.choice(graph.initializer), rng.choice(graph.node)
    change = rng.randrange(6)
    if change == 0:
        value.data_location = onnx.TensorProto.EXTERNAL
        value.ClearField("raw_data")
        value.external_data.add(key="location", value=rng.choice([SECRET, "../x", "/etc/passwd", "model.safetensors"]))
    elif change == 1:
        value.dims[:] = [rng.choice([0, 1, 2, 10, 2**31, 2**40]) for _ in range(rng.randrange(4))]
    elif change == 2:
        value.data_type = rng.randrange(0, 24)
    elif change == 3:
        node.op_type = rng.choice(["Loop", "If", "Nothing", "Expand", "ConstantOfShape", "Gather", "Identity", ""])
    elif change == 4 and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(["", "images", "nowhere", node.output[0], "logits"])
    else:
        graph.output[0].name = rng.choice(["x", "images", ""])
    if kind == 3:  # and the hash is made right
        manifest["parity"]["graph_sha256"] = runtime.graph_sha256(proto)
        entry.value = json.dumps(manifest)
    return proto.SerializeToString()


# ---- the corpus


def build_corpus(folder: Path) -> None:
    """Everything that csq reads, made by csq: about ten seconds, two thirds of them the ONNX export."""
    import safetensors.torch
    import torch

    from csqcli import pipeline
    from csqcli.exporting.run import export_file
    from csqcli.file import io as file_io
    from csqcli.models import networks as models
    from csqcli.recipe import resolve as recipe
    from csqcli.system.progress import Display
    from csqcli.training.loop import Trainer
    from tests.quantized_models import make_file

    settings = {"epochs": 2, "max_steps": 1, "data.val_limit": 20, "threads": 1, "bn_recalibration_batches": 1}
    settings |= {"data.train_limit": 40, "quantization.target_bits": 2, "quantization.act_bits": 8}
    run = recipe.resolve("digits", settings)
    for name in ("run", "unfinished"):
        (folder / name).mkdir()
    pipeline.search(run, folder / "run", display=Display(quiet=True), force=True)
    original, done = Trainer.run_epoch, iter(range(9))

    def interrupted(self: Any, epoch: int, **more: Any) -> Any:
        if next(done) == 1:
            raise KeyboardInterrupt
        return original(self, epoch, **more)

    Trainer.run_epoch = interrupted  # type: ignore[method-assign]
    try:
        with contextlib.suppress(KeyboardInterrupt):
            pipeline.search(run, folder / "unfinished", display=Display(quiet=True), force=True)
    finally:
        Trainer.run_epoch = original  # type: ignore[method-assign]
    file = file_io.read(folder / "run" / "model.safetensors")
    holes = make_file("csq:digits_cnn")
    for form in ("compact", "int8-packed", "bit-packed", "state-dict"):
        for name, content in (("search", file), ("holes", holes)):
            content.manifest.sizes.file_bytes = None
            file_io.write(folder / f"{name}-{form}.safetensors", content, form=form)  # type: ignore[arg-type]
    if importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxscript"):
        export_file(folder / "search-compact.safetensors", folder / "search.onnx", form="onnx")
    torch.manual_seed(0)
    state = models.digits_cnn().state_dict()
    safetensors.torch.save_file(state, folder / "plain.safetensors")
    safetensors.torch.save_file(
        {k: v.half() if v.is_floating_point() else v for k, v in state.items()}, folder / "half.safetensors"
    )
    torch.save({"state_dict": state, "epoch": 3}, folder / "wrapped.pth")
    torch.save(state, folder / "plain.tar")
    torch.save(state, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    (folder / "full.yaml").write_text(recipe.to_yaml(run))
    for name in recipe.builtin_names():
        (folder / f"{name}.yaml").write_text((recipe._folder() / f"{name}.yaml").read_text())


# ---- one case


class Case:
    """Input ``index`` of ``seed``: made in ``folder``, given to one reader."""

    def __init__(self, corpus: Path, folder: Path, rng: random.Random) -> None:
        self.corpus, self.folder, self.rng = corpus, folder, rng
        self.kinds = {
            "file": (self.safetensors, 50),
            "checkpoint": (self.checkpoint, 16),
            "recipe": (self.recipe, 12),
            "set": (self.set, 8),
            "onnx": (self.onnx, 8 if (corpus / "search.onnx").exists() else 0),
            "state": (self.state, 5),
            "history": (self.history, 1),
        }

    def run(self) -> str:
        """Its outcome: ``file: works`` or ``file: refused``. AssertionError, or whatever else comes, is a failure."""
        kind = self.rng.choices(list(self.kinds), [weight for _, weight in self.kinds.values()])[0]
        return f"{kind}: {self.kinds[kind][0]()}"

    def _pick(self, pattern: str) -> tuple[Path, bytes, bytes]:
        found = sorted(self.corpus.glob(pattern))
        one, two = self.rng.choice(found), self.rng.choice(found)
        return one, one.read_bytes(), two.read_bytes()

    def safetensors(self) -> str:
        path, data, other = self._pick("*-*.safetensors")
        target = self.folder / "in.safetensors"
        if self.rng.random() < 0.15:
            forge(path, self.rng, target)
            if not target.exists():
                return "unwritable"
        else:
            target.write_bytes(mutate_safetensors(data, self.rng, other))
        reader = self.rng.choices(
            [self._manifest, self._read, self._load, self._read_layer, self._as_checkpoint, self._command],
            [2, 3, 3, 1, 1, 2],
        )[0]
        return reader(target)

    def _manifest(self, path: Path) -> str:
        from rich.console import Console

        from csqcli.reporting.build import describe, history_beside
        from csqcli.reporting.recompute import recomputed
        from csqcli.reporting.report_page import report_page
        from csqcli.reporting.terminal import print_report

        def read() -> None:
            manifest = recomputed(path).manifest
            out = io.StringIO()
            print_report(manifest, Console(file=out, width=80), history=history_beside(path), as_stated=True)
            report_page(path).encode()
            out.getvalue().encode()
            json.dumps(describe(path)).encode()

        return allowed(read)

    def _read(self, path: Path) -> str:
        from csqcli.file import io as file_io

        return allowed(lambda: sound(file_io.read(path)))

    def _read_layer(self, path: Path) -> str:
        from csqcli.file import io as file_io

        return allowed(lambda: file_io.read_layer(path, "conv2.weight").weight())

    def _load(self, path: Path) -> str:
        import torch

        import csqcli

        def load() -> None:
            model = csqcli.load(path)
            for name, value in model.state_dict().items():
                if value.is_floating_point():
                    assert torch.isfinite(value).all() or torch.isinf(value).all(), f"{name} is not finite"

        return allowed(load)

    def _as_checkpoint(self, path: Path) -> str:
        from csqcli.file.checkpoint import open_checkpoint
        from csqcli.models import libraries

        return allowed(lambda: libraries.load("digits_cnn", num_classes=10, checkpoint=open_checkpoint(str(path))))

    def _command(self, path: Path) -> str:
        out = self.folder / "out"
        train = ("--set", "max_steps=1", "--set", "val_limit=20", "--set", "train_limit=40", "--epochs", 1, "--quiet")
        commands: list[tuple[Any, ...]] = [
            ("report", path),
            ("report", path, "--json"),
            ("evaluate", path, "--data", "digits", "--val-limit", 8),
            ("export", path, "--bit-packed", "-o", self.folder / "out.safetensors"),
            ("finetune", path, "--data", "digits", "-o", out, *train),
            ("finetune", path, "-o", out, *train),
            ("search", "--recipe", "digits", "--checkpoint", path, "-o", out, "--target-bits", 2, *train),
        ]
        return command(*self.rng.choices(commands, [3, 2, 3, 1, 1, 1, 1])[0])

    def checkpoint(self) -> str:
        import torch

        path, data, other = self._pick(
            self.rng.choice(["*.pth", "*.tar", "*.pt", "plain.safetensors", "half.safetensors"])
        )
        target = self.folder / f"in{path.suffix}"
        if path.suffix == ".safetensors":
            top, _ = split(data)
            target.write_bytes(mutate_safetensors(data, self.rng, other) if top else data)
        elif self.rng.random() < 0.25:
            state = torch.load(path, weights_only=True)
            inner = state.get("state_dict", state)
            with contextlib.suppress(Exception):  # torch cannot save some of them itself
                torch.save(dict(inner) | odd_tensors(self.rng), target)
            if not target.exists():
                return "unwritable"
        else:
            target.write_bytes(mutate_archive(data, self.rng, other))
        return self._as_checkpoint(target)

    def recipe(self) -> str:
        from csqcli.recipe import resolve as recipe

        path, data, _ = self._pick("*.yaml")
        target = self.folder / path.name
        target.write_bytes(mutate_yaml(data.decode(), self.rng))
        if self.rng.random() < 0.2:
            return command("recipes", "show", target)
        return allowed(lambda: recipe.to_yaml(recipe.resolve(str(target), {})))

    def set(self) -> str:
        from csqcli.recipe import resolve as recipe

        texts = [assignment(self.rng) for _ in range(self.rng.choice([1, 1, 2]))]
        return allowed(lambda: recipe.to_yaml(recipe.resolve("digits", recipe.parse_assignments(texts))))

    def onnx(self) -> str:
        from csqcli.file import header

        _, data, other = self._pick("*.onnx")
        target = self.folder / "in.onnx"
        target.write_bytes(mutate_onnx(data, self.rng, other))
        if self.rng.random() < 0.4:
            return allowed(lambda: header.read_manifest(target))
        if self.rng.random() < 0.3:
            return command("report", target)
        return command("evaluate", target, "--data", "digits", "--val-limit", 8)

    def state(self) -> str:
        import torch

        from csqcli import pipeline
        from csqcli.recipe import resolve as recipe
        from csqcli.system import files
        from csqcli.system.progress import Display

        output = self.folder / "out"
        shutil.copytree(self.corpus / "unfinished", output)
        run = recipe.resolve(str(self.corpus / "full.yaml"), {})
        state = output / "resume.pt"
        for previous in output.glob("resume.previous*"):
            previous.unlink()
        kind = self.rng.random()
        if kind < 0.3:
            state.write_bytes(mutate_bytes(state.read_bytes(), self.rng))
        else:
            if kind < 0.8:
                torch.save(mutate_state(torch.load(state, weights_only=True), self.rng), state)
            else:
                state.write_bytes(mutate_archive(state.read_bytes()[:-64], self.rng, b""))
            files.seal(state)
        return allowed(lambda: pipeline.search(run, output, display=Display(quiet=True), resume=True))

    def history(self) -> str:
        shutil.copy(self.corpus / "run" / "model.safetensors", self.folder)
        lines = (self.corpus / "run" / "metrics.jsonl").read_bytes()
        deep = (_DEEP + "\n").encode()
        (self.folder / "metrics.jsonl").write_bytes(self.rng.choice([mutate_bytes(lines, self.rng), deep, lines * 50]))
        return command("report", self.folder / "model.safetensors", "--json")


def allowed(reader: Callable[[], Any]) -> str:
    """Works, or is refused in one clean line."""
    from csqcli.errors import UserError

    try:
        reader()
    except UserError as error:
        line = error.line()
        assert line
        assert line.isprintable(), f"not one printable line: {line!r}"
        assert len(line) <= 2000
        return "refused"
    return "works"


def command(*arguments: Any) -> str:
    """The same for a command line: exit code 0, or 2 and one line on stderr."""
    from csqcli.cli import app as cli

    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["csq", *map(str, arguments)]
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = before
    text = err.getvalue()
    out.getvalue().encode()
    if code == 0:
        return "works"
    assert code == 2, f"exit code {code}: {text}"
    assert text.startswith("csq: error: "), text
    assert text.count("\n") == 1, f"not one line: {text}"
    return "refused"


def sound(file: Any) -> None:
    """What was read is finite and is what its manifest says."""
    import torch

    assert len(file.layers) == len(file.manifest.layers)
    for layer, record in zip(file.layers, file.manifest.layers, strict=True):
        assert list(layer.integers.shape) == record.shape
        assert torch.isfinite(layer.weight()).all(), layer.name
        span = record.mask.strip("0")
        assert int(layer.integers.abs().max()) <= int(span or "0", 2), layer.name
        assert record.bits == record.mask.count("1")
    for name, value in file.others.items():
        assert not value.is_floating_point() or torch.isfinite(value).all() or torch.isinf(value).all(), name
    total = sum(record.weights for record in file.manifest.layers)
    assert total == file.manifest.budget.total_weights


# ---- watching


class Watch:
    """Alarm, memory and audit hook around a case."""

    def __init__(self) -> None:
        self.armed, self.folder, self.seen = False, "", list[str]()
        sys.addaudithook(self._audit)
        signal.signal(signal.SIGPROF, self._alarm)
        limit = self._status("VmSize") + 2**32
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    @contextlib.contextmanager
    def __call__(self, folder: Path) -> Iterator[None]:
        self.folder, self.seen = str(folder), []
        before = self._status("VmRSS")
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        self.armed = True
        try:
            yield
        finally:
            self.armed = False
            signal.setitimer(signal.ITIMER_PROF, 0)
        grown = self._status("VmHWM") - before
        assert grown <= MEMORY, f"{grown / 2**20:.0f} MiB more memory"
        assert not self.seen, f"side effects: {self.seen[:3]}"

    @staticmethod
    def _status(field: str) -> int:
        text = Path("/proc/self/status").read_text() if Path("/proc/self/status").exists() else ""
        match = re.search(rf"{field}:\s+(\d+) kB", text)
        return int(match[1]) * 1024 if match else 0

    @staticmethod
    def _alarm(*_: Any) -> None:
        raise Hang(f"more than {SECONDS} s")

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event == "import" and arguments[0].partition(".")[0] in (CANARY, "antigravity"):
            self.seen.append(f"import {arguments[0]}")
        elif event in (
            "os.system",
            "os.exec",
            "os.posix_spawn",
            "subprocess.Popen",
            "socket.connect",
            "socket.getaddrinfo",
        ):
            self.seen.append(f"{event} {arguments}")
        elif event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            writes = (
                bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or (arguments[1] or "r")[0] in "wax"
            )
            if path in (SECRET, "/etc/passwd") or (writes and self._outside(path)):
                self.seen.append(f"open {path} {arguments[1]}")
        elif event in ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree"):
            places = [value for value in arguments[:2] if isinstance(value, (str, bytes, os.PathLike))]
            if any(self._outside(os.path.abspath(os.fsdecode(place))) for place in places):
                self.seen.append(f"{event} {places}")

    def _outside(self, path: str) -> bool:
        return not path.startswith((self.folder, "/dev/null", "/proc/self", "/dev/shm")) and "__pycache__" not in path


def child(corpus: Path, seed: int, first: int, last: int, keep: Path | None) -> None:
    """Run cases and print a line before and after each; parent() reads them."""
    import logging
    import warnings

    import torch

    import csqcli.exporting.runtime
    import csqcli.pipeline
    from csqcli.cli import app as cli  # noqa: F401

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        warm = Path(scratch) / "warm"
        warm.mkdir()
        for name in ("search-compact.safetensors", "search.onnx"):
            if (corpus / name).exists():
                command("report", corpus / name)
                command("evaluate", corpus / name, "--data", "digits", "--val-limit", 8)
        csqcli.load(corpus / "search-compact.safetensors")
        run = ("--recipe", corpus / "full.yaml", "--quiet", "-o", warm)
        assert command("search", *run) == "works"
        watch = Watch()
        for index in range(first, last):
            print(f"start {index}", flush=True)
            folder = Path(scratch) / "case"
            folder.mkdir()
            started = time.process_time()
            try:
                case = Case(corpus, folder, random.Random(f"{seed}:{index}"))
                with watch(folder):
                    outcome = case.run()
            except (Exception, Hang) as error:
                trace = traceback.format_exc(limit=-4)
                outcome = f"FAILED {type(error).__name__}: {str(error)[:300]}\n{trace}"
                if keep is not None:
                    shutil.copytree(folder, keep / f"case-{seed}-{index}", dirs_exist_ok=True)
            shutil.rmtree(folder)
            print(json.dumps({"case": index, "outcome": outcome, "seconds": time.process_time() - started}), flush=True)


def run(
    cases: int, seed: int, *, first: int = 0, keep: Path | None = None, corpus: Path | None = None, say: bool = False
) -> Counter[str]:
    """All cases in child processes; counts per outcome, those that start with FAILED are failures."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        if corpus is None:
            corpus = Path(scratch) / "corpus"
            subprocess.run([sys.executable, "-m", "tests.fuzz", "--build", str(corpus)], check=True)
        index, last = first, first + cases
        slowest, started = 0.0, time.monotonic()
        while index < last:
            arguments = [
                "--child",
                str(corpus),
                "--seed",
                str(seed),
                "--first",
                str(index),
                "--cases",
                str(last - index),
            ]
            arguments += ["--keep", str(keep)] if keep is not None else []
            with subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz", *arguments], stdout=subprocess.PIPE, bufsize=0
            ) as process:
                assert process.stdout is not None
                current, trouble = -1, ""
                while True:
                    ready, _, _ = select.select([process.stdout], [], [], GRACE)
                    line = process.stdout.readline().decode() if ready else ""
                    if not ready:
                        trouble = f"FAILED no answer within {GRACE} s"
                        process.kill()
                    if not line:
                        break
                    if line.startswith("start "):
                        current = int(line.split()[1])
                    elif line.startswith("{"):
                        result = json.loads(line)
                        index, current = result["case"] + 1, -1
                        slowest = max(slowest, result["seconds"])
                        _count(counts, result["outcome"], f"case {result['case']}", say)
                        if say and index % 1000 == 0:
                            spent = time.monotonic() - started
                            print(f"{index - first} cases, {spent:.0f} s, slowest {slowest:.1f} s", flush=True)
            code = process.returncode
            if index < last and current < 0:
                raise RuntimeError(f"the child ended between cases with code {code}")
            if current >= 0:
                _count(counts, trouble or f"FAILED the process ended with code {code}", f"case {current}", say)
                index = current + 1
    return counts


def _count(counts: Counter[str], outcome: str, where: str, say: bool) -> None:
    if outcome.startswith("FAILED"):
        print(f"{where}: {outcome}".encode("utf-8", "backslashreplace").decode(), flush=True)
        outcome = outcome.splitlines()[0]
    counts[outcome] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", type=int, help="run this case alone")
    parser.add_argument("--keep", type=Path, help="folder for inputs that fail")
    parser.add_argument("--corpus", type=Path, help="folder of a corpus made before")
    parser.add_argument("--build", type=Path, help="only make the corpus, here")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.seed, options.first, options.first + options.cases, options.keep)
        return
    if options.build:
        options.build.mkdir(parents=True)
        build_corpus(options.build)
        return
    first, cases = (options.only, 1) if options.only is not None else (options.first, options.cases)
    started = time.monotonic()
    counts = run(cases, options.seed, first=first, keep=options.keep, corpus=options.corpus, say=True)
    for outcome, count in sorted(counts.items()):
        print(f"{count:6} {outcome}")
    failures = sum(count for outcome, count in counts.items() if outcome.startswith("FAILED"))
    print(f"{cases} cases of seed {options.seed}, {failures} failures, {time.monotonic() - started:.0f} s")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
