"""How a case ends: it works, or is refused in one clean line; anything else is a failure."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from typing import Any


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


def command(*arguments: Any, lines: int | None = 1, steers: bool = False) -> str:
    """The same for a command line: exit code 0, or 2 and so many lines on stderr, the last of them an error's.

    None is for runs that say how they get on, and for CSQ_DEBUG. ``steers``: the environment asks for a terminal's signs.
    """
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
    assert text.endswith("\n"), text
    assert text.splitlines()[-1].startswith("csq: error: "), text
    assert lines is None or text.count("\n") == lines, f"not one line: {text}"
    assert steers or "\x1b" not in text, f"the terminal is steered: {text!r}"
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
