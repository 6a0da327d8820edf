"""Numbers and names as people read them: three digits and a unit, and long names shortened where they say least."""

from __future__ import annotations

from collections.abc import Sequence


def short(count: float) -> str:
    """Three digits and a power of thousand: ``1.81 G``."""
    for power, unit in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(count) >= 10**power:
            return f"{count / 10**power:.3g} {unit}"
    return f"{count:.4g}"


def size(count: float) -> str:
    """Bytes in powers of thousand: ``2.35 MB``."""
    text = short(count)
    return f"{text}B" if " " in text else f"{text} B"


def signed(points: float) -> str:
    """``+0.31``, ``−1.20``."""
    return f"{points:+.2f}".replace("-", "−")


def points(count: float) -> str:
    """``1 point``, ``0.5 points``: of accuracy."""
    return f"{count:g} point{'s' if count != 1 else ''}"


def near_chance(chance: float) -> float:
    """The top-1 in % up to which nothing was learned, where guessing has ``chance`` %."""
    return min(1.5 * chance, chance + 5)


def middle(text: str, width: int, *, mark: str = "…") -> str:
    """``text`` in at most ``width`` characters, shortened in the middle: both ends of a layer's name tell it apart."""
    if len(text) <= width:
        return text
    kept = max(width - len(mark), 1)
    end = (kept + 1) // 2 if kept > 1 else 0  # the end of a name says more than its beginning
    return f"{text[: kept - end]}{mark}{text[len(text) - end :]}"[: max(width, 0)]


def layer_names(names: Sequence[str]) -> list[str]:
    """Names of weights without the ``.weight`` that nearly every one ends in, where all do."""
    suffix = ".weight"
    return [name.removesuffix(suffix) for name in names] if all(n.endswith(suffix) for n in names) else list(names)
