"""A figure as pixels, by resvg (the extra ``png``): what papers' and slides' editors take that do not read SVG."""

from __future__ import annotations

from csqcli.errors import UserError, install

_ZOOM = 3  # pixels to one of the drawing: 300 dpi in a column of 7 inches
_WHERE = "--png"
_BLANK = '<svg xmlns="http://www.w3.org/2000/svg" width="20" height="20">{}</svg>'
_LETTER = '<text x="2" y="16" font-family="Helvetica, Arial, sans-serif" font-size="14">M</text>'
_FAMILIES = (  # to try for the drawing's sans-serif, in this order: resvg takes Arial for it unless told another
    "Arial",
    "Liberation Sans",
    "DejaVu Sans",
    "Noto Sans",
    "Segoe UI",
    "Helvetica Neue",
    "Roboto",
    "FreeSans",
)


def png(svg: str) -> bytes:
    """The bytes of a PNG of an SVG, at three pixels to one of the drawing. UserError without the package, and on a machine that
    has no font: text would be missing, in silence."""
    try:
        import resvg_py
    except ImportError:
        hint = f"{install('png')}, or take --svg"
        raise UserError("needs the package resvg_py", where=_WHERE, hint=hint) from None
    nothing = resvg_py.svg_to_bytes(svg_string=_BLANK.format(""))
    for family in _FAMILIES:
        if resvg_py.svg_to_bytes(svg_string=_BLANK.format(_LETTER), sans_serif_family=family) != nothing:
            return bytes(resvg_py.svg_to_bytes(svg_string=svg, zoom=_ZOOM, sans_serif_family=family))
    hint = "install one, such as DejaVu or Liberation, or take --svg"
    raise UserError("this machine has no font to draw text with", where=_WHERE, hint=hint)
