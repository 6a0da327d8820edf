"""A pickle's calls are followed without being made, and what asks for more than the file holds is refused."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from csqcli.data.specs import open_data
from csqcli.errors import UserError
from csqcli.models import networks
from csqcli.models.checkpoints import read_checkpoint
from csqcli.system import pickled


def traced(data: bytes) -> tuple[set[str], list[str]]:
    """Names, and the calls in order."""
    calls: list[str] = []
    found = pickled.trace(
        pickled.Bounded(io.BytesIO(data), len(data)),
        on_call=lambda name, _: calls.append(name),
        on_storage=lambda _: None,
    )
    return found.names, calls


def test_names_and_calls_are_those_that_unpickling_would_make() -> None:
    value = OrderedDict(a=Counter("aab"), b={1, 2}, c=[b"bytes", (1.5, None, True, "text", 2**40)])
    names, calls = traced(pickle.dumps(value, protocol=2))
    assert names == {"collections.OrderedDict", "collections.Counter", "builtins.set", "_codecs.encode"}
    assert sorted(calls) == ["_codecs.encode", "builtins.set", "collections.Counter", "collections.OrderedDict"]


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def reduced(name: str, *arguments: bytes) -> bytes:
    """``name(*arguments)``"""
    module, _, last = name.rpartition(".")
    return f"c{module}\n{last}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def archive(path: Path, content: bytes) -> Path:
    """A file of torch.save with another pickle in it."""
    buffer = io.BytesIO()
    torch.save({"fc.weight": torch.zeros(3)}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
        for entry in source.infolist():
            target.writestr(entry.filename, content if entry.filename.endswith("data.pkl") else source.read(entry))
    return path


DOUBLED = reduced("_codecs.encode", text("a" * 64), text("latin1"))
for _ in range(26):  # 4 GiB out of a kilobyte
    DOUBLED = reduced("_codecs.encode", DOUBLED, text("hex"))
COPIED = b"(" + b"K\x01" * 20_000 + b"tq\x01]" + (reduced("torch.Size", b"h\x01") + b"a") * 20_000
ENCODED = text("a" * 2**20) + b"q\x01]" + (reduced("_codecs.encode", b"h\x01", text("latin1")) + b"a") * 5_000
BUILT = b"}(" + b"K\x01K\x01" * 20_000 + b"uq\x01]" + (b"ccollections\nOrderedDict\n)Rh\x01b" + b"a") * 20_000


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Refuses a file before torch's reader is given it."""

    def check(path: Path) -> None:
        asked: list[Any] = []
        with monkeypatch.context() as patched:
            patched.setattr(torch, "load", lambda file, **_: asked.append(file))
            with pytest.raises(UserError, match="not a readable checkpoint"):
                read_checkpoint(str(path))
        assert not asked

    return check


@pytest.mark.parametrize("content", [DOUBLED, COPIED, ENCODED, BUILT], ids=["hex", "copies", "bytes", "states"])
def test_calls_that_copy_more_than_the_file_holds_are_refused_before_they_are_made(
    tmp_path: Path, unread: Callable[[Path], None], content: bytes
) -> None:
    unread(archive(tmp_path / "bomb.pth", b"\x80\x02" + content + b"."))


def test_no_text_is_asked_for_that_the_file_does_not_hold() -> None:
    class Asked(io.BytesIO):
        most = 0

        def read(self, count: int | None = -1) -> bytes:
            self.most = max(self.most, count or 0)
            return super().read(count)

    stream = Asked(b"\x80\x02X\xff\xff\xff\xff" + b"a" * 50)
    with pytest.raises(ValueError, match="remain"):
        pickled.trace(pickled.Bounded(stream, 57), on_call=lambda *_: None, on_storage=lambda _: None)
    assert stream.most <= 57


def test_a_tensor_beyond_its_storage_is_refused_in_both_formats_of_torch_save(
    tmp_path: Path, unread: Callable[[Path], None]
) -> None:
    """torch enlarges the storage of its older format to what the tensor asks for."""
    for new in (True, False):
        path = tmp_path / f"lie{new}.pth"
        torch.save({"fc.weight": torch.zeros(7)}, path, _use_new_zipfile_serialization=new)
        read_checkpoint(str(path))
        wanted = b"K\x07\x85q"  # the tuple (7,)
        content = path.read_bytes()
        assert content.count(wanted) == 1
        lie = content.replace(wanted, b"J\xff\xff\xff\x7f\x85q")
        if new:
            with zipfile.ZipFile(path) as source:
                pickle_ = next(source.read(e) for e in source.infolist() if e.filename.endswith("data.pkl"))
            archive(path, pickle_.replace(wanted, b"J\xff\xff\xff\x7f\x85q"))
        else:
            path.write_bytes(lie)
        unread(path)


def test_a_storage_larger_than_the_file_is_refused(tmp_path: Path, unread: Callable[[Path], None]) -> None:
    path = tmp_path / "lie.pth"
    torch.save({"fc.weight": torch.zeros(7)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert content.count(b"K\x07N") == 1  # elements, and no view
    path.write_bytes(content.replace(b"K\x07N", b"J\xff\xff\xff\x7fN"))
    unread(path)


def test_the_last_pickle_of_the_older_format_is_looked_into_too(tmp_path: Path, unread: Callable[[Path], None]) -> None:
    path = tmp_path / "keys.pth"
    torch.save({"fc.weight": torch.zeros(7)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    keys = content.rindex(b"\x80\x02]q")
    path.write_bytes(content[:keys] + b"\x80\x02" + DOUBLED + b".")
    unread(path)


TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
    b"X\x03\x00\x00\x00cpuK\x03tQK\x00K\x03\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR"
)  # of the three numbers that `archive` holds


@pytest.mark.parametrize(
    "content",
    [
        TENSOR + b"K\x00K\x07s",  # tensor[0] = 7
        TENSOR + b"(K\x00K\x07u",
        TENSOR + b"K\x07a",
        TENSOR + b"]b",  # tensor.__setstate__
        TENSOR.replace(b"K\x03t", b"K\x02t"),  # two numbers in the place of three
        TENSOR.replace(b"K\x03t", b"K\x04t"),
        TENSOR.replace(b"FloatStorage", b"DoubleStorage"),
        TENSOR.replace(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x009"),  # no such entry
        TENSOR.replace(b"K\x00K\x03\x85", b"K\x01K\x03\x85"),  # an offset
        TENSOR.replace(b"K\x03\x85K\x01\x85", b"K\x03\x85J\xff\xff\xff\xff\x85"),  # a step back
        b"NNR",  # a call of nothing
    ],
)
def test_what_older_releases_of_torch_do_not_check_is_refused_on_any(
    tmp_path: Path, unread: Callable[[Path], None], content: bytes
) -> None:
    """CVE-2026-24747, mended in torch 2.10: items written into tensors, storages of another size than stated."""
    unread(archive(tmp_path / "odd.pth", b"\x80\x02" + content + b"."))
    path = archive(tmp_path / "good.pth", b"\x80\x02}X\x09\x00\x00\x00fc.weight" + TENSOR + b"s.")
    assert torch.equal(read_checkpoint(str(path)).groups[""]["fc.weight"], torch.zeros(3))


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (torch.zeros(3).to_sparse(), "a sparse tensor"),
        (torch.zeros(3, dtype=torch.float8_e4m3fn), r"a tensor of a newer type \(8-bit floats"),
        (torch.zeros(3, device="meta"), "a tensor without memory"),
    ],
)
def test_tensors_that_are_no_weights_are_named_before_they_are_made(
    tmp_path: Path, value: torch.Tensor, what: str
) -> None:
    torch.save({"fc.weight": value}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=f"holds {what}"):
        read_checkpoint(str(tmp_path / "odd.pth"))


def test_mappings_that_unfold_without_end_are_refused(tmp_path: Path) -> None:
    inner: dict[str, Any] = {"fc.weight": torch.zeros(1)}
    for _ in range(4):
        inner = {str(number): inner for number in range(300)}
    torch.save(inner, tmp_path / "graph.pth")
    with pytest.raises(UserError, match=r"more than 262,144 entries"):
        read_checkpoint(str(tmp_path / "graph.pth"))


def test_a_name_of_a_million_characters_is_refused(tmp_path: Path) -> None:
    torch.save({"a." * 500_000: torch.zeros(1)}, tmp_path / "long.pth")
    with pytest.raises(UserError, match=r"called by 1,000,000 characters") as caught:
        read_checkpoint(str(tmp_path / "long.pth"))
    assert len(caught.value.line()) <= 2000


def test_what_training_leaves_beside_the_weights_is_read_as_before(tmp_path: Path) -> None:
    net = networks.digits_cnn()
    optimizer = {"state": {0: {"exp_avg": torch.ones(3), "step": 7}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    beside = {
        "best": np.float64(76.3),
        "rng": np.random.default_rng(0).bit_generator.state,
        "numbers": np.arange(500),
        "raw": b"\x00\xff" * 100,
        "optimizer": optimizer,
        "names": Counter({"a": 3}),
        "tied": [net.fc.weight, net.fc.weight],
        "view": torch.zeros(4, 5).t(),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.0),
    }
    for new in (True, False):
        path = tmp_path / f"{new}.pth"
        torch.save(beside | {"state_dict": net.state_dict()}, path, _use_new_zipfile_serialization=new)
        state = read_checkpoint(str(path)).groups["state_dict"]
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


# ---- CIFAR's batches


def cifar(root: Path, content: bytes) -> None:
    for name in ("train", "test"):
        (root / name).write_bytes(content)


def batch(data: bytes, labels: bytes) -> bytes:
    return b"\x80\x02}(" + text("data") + data + text("fine_labels") + labels + b"u."


PIXELS = pickle.dumps(np.zeros((3, 3072), np.uint8), protocol=2)[2:-1]
LABELS = b"](K\x00K\x01K\x02e"
HUGE = struct.pack("<i", 2**31 - 1)


@pytest.mark.parametrize(
    ("data", "labels"),
    [
        (b"cnumpy\nndarray\n(J" + HUGE + b"tR", LABELS),  # an array of 2 GiB
        (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nJ" + HUGE + b"\x85U\x01btR", LABELS),
        (PIXELS.replace(b"M\x00\x0c", b"J" + HUGE), LABELS),  # a shape beyond its bytes
        (b"](" * 3 + b"K\x01eeq\x05h\x05h\x05e", LABELS),  # lists within lists
        (PIXELS, b"](](K\x00K\x01K\x02eq\x07h\x07h\x07e"),  # labels within labels
        (PIXELS, b"](K\x00G?\xf0\x00\x00\x00\x00\x00\x00K\x02e"),  # a fraction
        (PIXELS, b"]r" + HUGE + b"(K\x00K\x01K\x02e"),  # a memo of 32 GiB
        (PIXELS, reduced("_codecs.encode", text("a" * 9), text("hex"))),
        (PIXELS.replace(b"U\x02u1" if b"U\x02u1" in PIXELS else text("u1"), text("O8")), LABELS),
    ],
)  # fmt: skip
def test_a_cifar_batch_is_arrays_of_integers_that_are_there(tmp_path: Path, data: bytes, labels: bytes) -> None:
    cifar(tmp_path, batch(data, labels))
    with pytest.raises(UserError, match="not a CIFAR python batch"):
        open_data(f"cifar100:{tmp_path}")


def test_cifar_s_own_batches_of_python_2_are_read(tmp_path: Path) -> None:
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    kind = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    raw = b"T" + struct.pack("<i", 3 * 3072) + bytes(range(256)) * 36
    cifar(tmp_path, batch(array + b"(K\x01K\x03M\x00\x0c\x86" + kind + b"\x89" + raw + b"tb", LABELS))
    opened = open_data(f"cifar100:{tmp_path}")
    assert opened.train.labels.tolist() == [0, 1, 2]
    assert opened.train.pixels.flatten()[:300].tolist() == [*range(256), *range(44)]
    cifar(tmp_path, pickle.dumps({"data": np.zeros((3, 3072), np.uint8), "fine_labels": np.array([0, 1, 2])}))
    assert open_data(f"cifar100:{tmp_path}").val.labels.tolist() == [0, 1, 2]
