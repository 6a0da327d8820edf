"""What a pickle would do, found out by following its opcodes without doing it.

A pickle is a program for a small stack machine. Its names can be listed and its calls can be followed with sizes in the place
of values, so that a reader refuses what asks for code, or for more memory than the bytes account for, before any of it runs.
Everything here raises ValueError for bytes that are no pickle.
"""

from __future__ import annotations

import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # names of Python 2, which protocol 2 writes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

_SPARE, _COPIES = 2**16, 16  # values that calls may copy: at first, and per opcode and character
_MAX_OPCODES = 2**24


@dataclass
class Container:
    """A list, dictionary, set or tuple, of which only what can matter is kept: how many values, and those of a tuple."""

    kind: str
    count: int = 0
    values: Sequence[Any] = ()


@dataclass(frozen=True)
class Name:
    """Something that the pickle would import: ``module.name``, as of Python 3."""

    full: str


@dataclass
class Call:
    """A value that a call would give; ``about`` is what the follower of calls wants to know of it later."""

    name: str = ""
    about: Any = None


@dataclass
class Traced:
    """What one pickle names and asks for."""

    names: set[str] = field(default_factory=set)
    opcodes: int = 0


OnCall = Callable[[str, Sequence[Any]], Any]  # full name and arguments -> what is known of the result
OnStorage = Callable[[Any], Any]  # a persistent id -> what is known of the storage that it stands for


class Bounded:
    """A file that is never asked for more bytes than it has left: a pickle states how long its texts are before they come."""

    def __init__(self, stream: IO[bytes], size: int) -> None:
        """``size`` bytes in all, from the stream's beginning."""
        self._stream, self._size = stream, size

    def read(self, count: int) -> bytes:
        return self._stream.read(min(count, max(0, self._size - self._stream.tell())))

    def readline(self) -> bytes:
        return self._stream.readline()


def trace(stream: Bounded, *, on_call: OnCall, on_storage: OnStorage) -> Traced:
    """Follow one pickle to its end. ``on_call`` and ``on_storage`` may raise ValueError for what should not be done.

    Opcodes that torch's ``weights_only`` reader does not know end the following, not the listing of names: it refuses them.
    """
    found = Traced()
    machine: _Machine | None = _Machine(on_call, on_storage)
    try:
        for opcode, argument, _ in pickletools.genops(stream):  # type: ignore[arg-type]  # what it reads with
            found.opcodes += 1
            if found.opcodes > _MAX_OPCODES:
                raise ValueError(f"more than {_MAX_OPCODES:,} opcodes")
            if opcode.name == "GLOBAL":
                argument = _full_name(str(argument))
                found.names.add(argument)
            if machine is not None and not machine.follow(opcode.name, argument):
                machine = None
            if machine is not None and machine.copied > _SPARE + _COPIES * (found.opcodes + machine.characters):
                raise ValueError("calls that copy more than the file holds")
    except IndexError:
        raise ValueError("a pickle that takes more from its stack than is there") from None
    return found


def check_memo(data: bytes) -> None:
    """Refuse a pickle whose memo is numbered far beyond its opcodes: Python's reader would make room for all below."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data), 1):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > count:
            raise ValueError("a memo numbered beyond its opcodes")


def _full_name(text: str) -> str:
    module, _, name = text.partition(" ")
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


_EMPTY = {"EMPTY_LIST": "list", "EMPTY_DICT": "dict", "EMPTY_SET": "set", "EMPTY_TUPLE": "tuple"}
_MAPPINGS = {"collections.OrderedDict", "collections.Counter", "collections.defaultdict"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """The stack, the memo, how much calls would copy so far, and how much text there is."""

    def __init__(self, on_call: OnCall, on_storage: OnStorage) -> None:
        self.on_call, self.on_storage = on_call, on_storage
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # stacks under a MARK each
        self.memo: dict[int, Any] = {}
        self.copied = self.characters = 0

    def follow(self, name: str, argument: Any) -> bool:
        """Do one opcode; False for one that is not followed."""
        stack = self.stack
        if name in _VALUES:
            stack.append(argument)
            self.characters += _size(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "GLOBAL":
            stack.append(Name(argument))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo.get(argument))
        elif name in _EMPTY:
            stack.append(Container(_EMPTY[name]))
        elif name == "MARK":
            self.below.append(stack)
            self.stack = []
        elif name == "TUPLE":
            values = self._popped_to_mark()
            self.stack.append(Container("tuple", len(values), values))
        elif name in _TUPLES:
            values = stack[-_TUPLES[name] :]
            del stack[-_TUPLES[name] :]
            stack.append(Container("tuple", len(values), values))
        elif name in ("APPENDS", "SETITEMS"):
            self._grow(len(self._popped_to_mark()), name)
        elif name in ("APPEND", "SETITEM"):
            del stack[-1 if name == "APPEND" else -2 :]
            self._grow(1, name)
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            stack.append(self._called(function, arguments))
        elif name == "BUILD":
            self.copied += _size(stack.pop())
            if isinstance(stack[-1], Call) and stack[-1].name.startswith("torch._utils."):
                raise ValueError("a tensor that is changed once it is made")
        elif name == "BINPERSID":
            stack.append(Call("", self.on_storage(stack.pop())))
        elif name not in ("PROTO", "STOP"):
            return False
        return True

    def _popped_to_mark(self) -> list[Any]:
        values, self.stack = self.stack, self.below.pop()
        return values

    def _grow(self, count: int, opcode: str) -> None:
        """Only lists take values and only dictionaries take items: anything else would be written to by its numbers."""
        target = self.stack[-1]
        kind = target.kind if isinstance(target, Container) else ""
        if isinstance(target, Call) and target.name in _MAPPINGS:
            kind = "dict"
        if kind != ("list" if opcode.startswith("APPEND") else "dict"):
            raise ValueError(f"{opcode} on what is no {'list' if opcode.startswith('APPEND') else 'dictionary'}")
        if isinstance(target, Container):
            target.count += count

    def _called(self, function: Any, arguments: Any) -> Call:
        values = arguments.values if isinstance(arguments, Container) else ()
        self.copied += sum(map(_size, values))
        if not isinstance(function, Name):
            raise ValueError("a call of what is no name")
        return Call(function.full, self.on_call(function.full, values))


def _size(value: Any) -> int:
    if isinstance(value, Container):
        return value.count
    return len(value) if isinstance(value, str) else 0
