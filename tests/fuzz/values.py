"""Values, bytes and trees that nobody expects."""

from __future__ import annotations

import copy
import json
import math
import random
import re
import struct
import zlib
from collections.abc import Iterator
from typing import Any

CANARY = "csq_fuzz_canary"
SECRET = "/tmp/csq-fuzz-secret"  # never there; reading it is noticed all the same
DEEP = "[" * 100_000


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
            container[odd_key(rng)] = container.pop(key)
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


def odd_key(rng: random.Random) -> str:
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
            f": {rng.choice(numbers)}", ": " + rng.choice(["9" * 6000, "1e999", "-1e999", "NaN", DEEP]), 1
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
