"""safetensors files: headers that lie, payloads that swell, and forgeries whose hashes are right."""

from __future__ import annotations

import contextlib
import json
import math
import random
import struct
import zlib
from pathlib import Path
from typing import Any

from tests.fuzz.values import (
    CANARY,
    bad_huffman,
    bomb,
    dump,
    hostile,
    mutate_bytes,
    mutate_tree,
    odd_key,
)


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
        header[odd_key(rng)] = header.pop(name)
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


def consistent(data: bytes, rng: random.Random) -> bytes:
    """A file whose manifest says something else in one place and agrees with itself: sums, products and counts made right.

    The integers and their hash are the file's own.
    """
    header, body = split(data)
    metadata = header["__metadata__"]
    manifest = mutate_tree(json.loads(metadata["csq"]), rng) if rng.random() < 0.5 else json.loads(metadata["csq"])
    with contextlib.suppress(
        KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, ZeroDivisionError
    ):
        layer, side = rng.choice(manifest["layers"]), rng.choice([1, 2, 3, 4096, 2**15, 2**31 - 1])
        kind = rng.randrange(9)
        if kind == 0:
            layer["shape"] = [side] * rng.choice([1, 2, 4, 8])
        elif kind == 1:
            layer["mask"] = rng.choice(["1" * 8, "0" * 8, "1", "0", "10000001", "01111111"])
        elif kind == 2:
            layer["scale"] = rng.choice([0.0, -1.0, 3e38, 1e-45, [1.0] * layer["shape"][0], []])
        elif kind == 3:
            layer["encoding"] = rng.choice(
                ["codes2", "codes4", "codes8", "codes16", "codes2+huffman", "codes16+huffman", "int8"]
            )
        elif kind == 4:
            layer["channel_dim"] = rng.choice([-8, -1, 0, 1, 3, 7])
        elif kind == 5:
            entry = {"module": rng.choice(["", "fc", "conv1", "nowhere"]), "signed": rng.random() < 0.5}
            entry |= {"bits": rng.choice([1, 2, 16]), "scale": rng.choice([1e-45, 1e-9, 1e-8, 1.0, 1e30, 3e38])}
            manifest["activations"] = [entry]
        elif kind == 6:
            manifest["data_config"] |= {
                "input_size": rng.choice(
                    [[1, 8, 8], [3, 8, 8], [1, 4096, 1], [4096, 1, 1], [1, 1, 1], [1, 3, 8, 8], [2, 8, 8]]
                ),
                "mean": [rng.choice([0.0, 1e6, -1e6])],
                "std": [rng.choice([1e-6, 1.0, 1e6])],
                "crop_pct": rng.choice([0.011, 0.5, 1.0]),
            }
        elif kind == 7:
            manifest["classes"] = rng.choice([[], ["a"] * 10, [str(n) for n in range(11)], ["\u202e"] * 10, [""] * 10])
            manifest["trained_outputs"] = rng.choice([None, [], [0], [9, 0, 0], list(range(10))])
        else:
            manifest["recipe"] = {
                rng.choice(
                    ["threads", "epochs", "seed", "optimizer", "quantization", "data", "layers", "csq", "staged"]
                ): hostile(rng)
            }
        for record in manifest["layers"]:
            record["weights"], record["bits"] = math.prod(record["shape"]), record["mask"].count("1")
        total = sum(record["weights"] for record in manifest["layers"])
        planes = sum(record["weights"] * record["bits"] for record in manifest["layers"])
        manifest["budget"] |= {"total_weights": total, "mean_bits": planes / total}
    text = json.dumps(manifest).encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    header["__metadata__"] = metadata | {"csq": text}
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + body
