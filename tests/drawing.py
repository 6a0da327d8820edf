"""What drawing pixels needs."""

from __future__ import annotations

import pytest

from csqcli.errors import UserError


def needs_png() -> None:
    """Skip where the extra ``png`` is not installed, or no font is: a bare machine has none."""
    pytest.importorskip("resvg_py")
    from csqcli.reporting.png import png

    try:
        png('<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>')
    except UserError as error:
        pytest.skip(error.what)
