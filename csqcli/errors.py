"""The one exception that reaches the user as one line instead of a traceback."""

from __future__ import annotations

import difflib
import re
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError

_MAX_LINE = 2000  # characters; names out of damaged files can be any length
_ALIKE, _AS_GOOD, _SUGGESTED = 0.6, 0.08, 3  # likeness of what is suggested, and how far from the nearest
_LOADER_DIED = (
    re.compile(  # torch's own words; an exception inside a worker says "in DataLoader worker process 0" instead
        r"DataLoader worker (\(pid(\(s\))? [\d, ]+\)|gone\b|exited)|Pin memory thread"
    )
)
_LIBRARIES = {  # whose frames say nothing about where a mistake is
    *sys.stdlib_module_names,
    *("csqcli", "__main__", "torch", "torchvision", "timm", "numpy", "PIL", "safetensors", "pydantic", "pydantic_core"),
    *("yaml", "typer", "click", "rich", "huggingface_hub", "onnx", "onnxruntime", "onnxscript", "onnx_ir", "openvino"),
}
# what a network raises over an image that it was not made for
FORWARD_ERRORS = (RuntimeError, ValueError, AssertionError, TypeError, LookupError, AttributeError)
_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")  # torch's allocators, CUDA and CPU


class UserError(Exception):
    """Bad input: what was wrong, where, and what to do about it. The CLI prints it as one line and exits with 2."""

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        self.what, self.where, self.hint = what, where, hint
        super().__init__(self.line())

    def line(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        text = f"{text}; {self.hint}" if self.hint else text
        return printable(" ".join(text.split()))[:_MAX_LINE]  # library messages inside may span lines


@dataclass(frozen=True)
class Problem:
    """One mistake that pydantic found."""

    loc: tuple[str, ...]  # keys and indices down to the value, outermost first; empty for the whole
    message: str
    given: Any
    kind: str  # pydantic's name of it: "extra_forbidden"

    @property
    def key(self) -> str:
        """Where it is: ``layers.0.bits``."""
        return ".".join(self.loc)

    @property
    def text(self) -> str:
        """``layers.0.bits: Input should be a valid integer``."""
        return f"{self.key}: {self.message}" if self.loc else self.message


def first_problem(error: ValidationError) -> Problem:
    """The first of a pydantic error's mistakes, in the words of whoever raised it."""
    found = error.errors(include_url=False, include_context=False)[0]
    message = found["msg"].removeprefix("Value error, ")
    return Problem(tuple(map(str, found["loc"])), message, found.get("input"), found["type"])


def printable(text: str) -> str:
    """``text`` with escapes for what would steer a terminal or cannot be encoded: names come out of files."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def machine_fault(error: BaseException) -> UserError | None:
    """What the machine refuses (memory, disk, processes), as one line; None for anything else, which is a bug."""
    text = str(error)
    if isinstance(error, MemoryError) or any(sign in text for sign in _NO_MEMORY):
        return UserError("out of memory", hint="free some, or lower data.batch_size and data.eval_batch_size")
    if _LOADER_DIED.match(text):
        hint = "most often for lack of memory: lower data.workers, then --resume"
        return UserError(f"a loader process died ({text.split('. ')[0].rstrip('.')})", hint=hint)
    if isinstance(error, OSError) and error.strerror:
        return UserError(error.strerror, where=str(error.filename or ""))
    return None


def user_code_location(error: BaseException) -> str:
    """Where code that the user brought (a factory, a forward pass, a plug-in) was when it raised: ``nets.py, line 7 in build``.

    Its last line before the libraries that it called; empty where csq itself called them.
    """
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return f"{error.filename}, line {error.lineno}"
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package == "csqcli":
            return ""
        if package not in _LIBRARIES:
            return f"{frame.f_code.co_filename}, line {line} in {frame.f_code.co_name}"
    return ""


def user_code_error(error: BaseException) -> UserError | None:
    """An exception out of code that the user brought, as one line that says where; None for any other."""
    place, kind = user_code_location(error), type(error).__name__
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return UserError(f"{kind}: {text}", where=place, hint="CSQ_DEBUG=1 shows the traceback") if place else None


def cannot_run(error: BaseException, input_size: Sequence[int]) -> str:
    """One of :data:`FORWARD_ERRORS` that a network raised over an image of ``input_size``, in words; raised anew where the machine is
    what failed."""
    if machine_fault(error) is not None:
        raise error
    place, size = user_code_location(error), "×".join(map(str, input_size))
    return f"cannot run on an image of {size} ({f'{place}: ' if place else ''}{error})"


def as_line(error: BaseException) -> UserError | None:
    """What the machine or somebody else's code did, as one line; None for a mistake of csq's own."""
    if isinstance(error, OSError):  # a stranger's own says where it was raised
        return user_code_error(error) or machine_fault(error)
    return machine_fault(error) or user_code_error(error)


def no_such_file(path: Path) -> UserError:
    """For a path that is not a file: missing, or a folder, perhaps with the file inside."""
    if not path.is_dir():
        return UserError("no such file", where=str(path))
    inside = path / "model.safetensors"
    hint = f"give the file in it, {inside}" if inside.is_file() else "give a file"
    return UserError("is a folder", where=str(path), hint=hint)


def no_data_given() -> UserError:
    """For a command that needs images and was told of none."""
    return UserError("no data given", hint="pass --data FOLDER, or another kind of data that `csq search --help` lists")


def install(extra: str) -> str:
    """``pip install 'csq[onnx]'``: what puts the packages of an extra beside csq, whichever way csq was installed."""
    return f"pip install 'csq[{extra}]'"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``did you mean `x`?`` for the nearest known words, nearest first, or an empty string.

    Three at most, and none that is much farther than the first. What begins with the word, or ends with it after a prefix, is
    near, and a letter is the same in upper and lower case.
    """
    likeness = {name: _likeness(word, name) for name in sorted(set(known))}
    close = sorted((name for name in likeness if likeness[name][0] >= _ALIKE), key=likeness.__getitem__, reverse=True)
    close = [name for name in close[:_SUGGESTED] if likeness[name][0] >= likeness[close[0]][0] - _AS_GOOD]
    return f"did you mean {' or '.join(f'`{name}`' for name in close)}?" if close else ""


def _likeness(word: str, name: str) -> tuple[float, float]:
    """0 to 1, 1 for the same word; and among those that are as near, the shorter ones first."""
    word, name = word.lower(), name.lower()
    ratio = difflib.SequenceMatcher(None, name, word).ratio()
    holds = len(word) > 2 and (name.startswith(word) or name.endswith((f"_{word}", f"-{word}")))
    return max(ratio, 0.9 if holds else 0.0), ratio
