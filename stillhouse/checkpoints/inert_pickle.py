"""Pickles read as data: a small machine that imports nothing and calls nothing but what it was handed.

Python's own reader resolves names and calls what it finds; here a name is only looked up in the caller's table. Every
argument must fit into what is left of the file, and a file may not hold more instructions than a network could need, so
memory stays within a small multiple of the file's size.
"""

import pickletools
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

MOST_INSTRUCTIONS = 1 << 20  # EDM's largest network has some 10^5
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring = 2, 100
_KEYS = (str, bytes, int, float, type(None))


class DamagedPickle(Exception):
    """Bytes that are no whole pickle."""


class RefusedPickle(Exception):
    """A pickle that asks for something that is not in the table."""


@dataclass(frozen=True)
class Global:
    """A name such as "torch.FloatStorage", of which nothing was imported."""

    name: str


@dataclass(repr=False)
class Record:
    """An object of a class that is known by name alone, with the state that it would have been given."""

    name: str
    state: Any = None

    def __repr__(self) -> str:
        return f"an object of {self.name[:50]!r}"  # the state may be longer than any memory


class _Bounded:
    """The file as `pickletools.genops` reads it: a length beyond its end is refused before memory is asked for."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size = file, size

    def read(self, count: int) -> bytes:
        if not 0 <= count <= self._size - self.tell():
            raise DamagedPickle(f"{count} bytes are announced where {self._size - self.tell()} are left")
        return self._file.read(count)

    def readline(self) -> bytes:
        return self._file.readline(1 << 16)

    def tell(self) -> int:
        return self._file.tell()


def shown(value: Any) -> str:
    """Show a value of a file in a message, in 100 letters at most: nested tuples may be longer than any memory."""
    return _SHORT.repr(value).encode("ascii", "backslashreplace").decode()[:100]


def read_pickle(
    file: BinaryIO,
    size: int,
    makers: Mapping[str, Callable[..., Any] | None],
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Read the object that a file holds from where it stands, and leave the file behind that object's end.

    Containers are plain: an object's items and attributes become a dict.

    Args:
        file: the pickle.
        size: bytes of the whole file.
        makers: what a pickle may mention, by full name, and what is called in its place; None: it may be mentioned only.
        persistent: what a persistent id stands for.

    Raises:
        RefusedPickle: for a name or an instruction beyond these.
        DamagedPickle: for bytes that make no sense.
    """
    try:
        return _Machine(makers, persistent).run(pickletools.genops(_Bounded(file, size)))
    except (ValueError, TypeError, LookupError, AttributeError, AssertionError, EOFError, RuntimeError) as error:
        raise DamagedPickle(str(error).splitlines()[0][:200] if str(error) else type(error).__name__) from error


class _Machine:
    def __init__(self, makers: Mapping[str, Callable[..., Any] | None], persistent: Callable[[Any], Any] | None):
        self._makers, self._persistent = makers, persistent
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, instructions: Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]]) -> Any:
        for count, (opcode, argument, _) in enumerate(instructions):
            if count == MOST_INSTRUCTIONS:
                raise RefusedPickle(f"more than {MOST_INSTRUCTIONS} instructions")
            if opcode.name == "STOP":
                (value,) = self._stack
                return value
            self._step(opcode.name, argument)
        raise DamagedPickle("it has no end")

    def _step(self, opcode: str, argument: Any) -> None:
        stack = self._stack
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self._marks.append(len(stack))
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8":
                stack.append(argument)
            case "BINSTRING" | "SHORT_BINSTRING":  # text of Python 2, as `pickletools` decodes it
                stack.append(argument.encode("latin1"))
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_SET" | "EMPTY_TUPLE":
                stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set, "EMPTY_TUPLE": tuple}[opcode]())
            case "TUPLE":
                stack.append(tuple(self._from_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._pop(int(opcode[-1]))))
            case "APPEND" | "APPENDS":
                items = self._from_mark() if opcode == "APPENDS" else self._pop(1)
                self._top(list).extend(items)
            case "ADDITEMS":
                items = self._from_mark()
                self._top(set).update(map(_key, items))
            case "SETITEM" | "SETITEMS":
                items = self._from_mark() if opcode == "SETITEMS" else self._pop(2)
                self._top(dict).update(zip(map(_key, items[::2]), items[1::2], strict=True))
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "GLOBAL":
                stack.append(self._global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(self._global(*self._pop(2)))
            case "REDUCE" | "NEWOBJ":
                function, arguments = self._pop(2)
                stack.append(self._call(function, arguments))
            case "BUILD":
                (state,) = self._pop(1)
                # Python before 3.11 writes that a dict has no attributes.
                if state != {} or not isinstance(stack[-1], dict):
                    self._top(Record).state = state
            case "BINPERSID" if self._persistent is not None:
                stack.append(self._persistent(*self._pop(1)))
            case _:
                raise RefusedPickle(f"the instruction {opcode}")

    def _global(self, module: Any, name: Any) -> Global:
        if not (isinstance(module, str) and isinstance(name, str)) or f"{module}.{name}" not in self._makers:
            raise RefusedPickle(shown(f"{module}.{name}").strip("'") if isinstance(name, str) else type(name).__name__)
        return Global(f"{module}.{name}")

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Global) or self._makers[function.name] is None:
            what = function.name if isinstance(function, Global) else type(function).__name__
            raise RefusedPickle(f"a call of {what}")
        if not isinstance(arguments, tuple):
            raise DamagedPickle(f"{function.name} is given a {type(arguments).__name__}")
        return self._makers[function.name](*arguments)

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) - (self._marks[-1] if self._marks else 0) < count:
            raise DamagedPickle("it takes what is not there")
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def _from_mark(self) -> list[Any]:
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _top(self, kind: type) -> Any:
        if not isinstance(self._stack[-1], kind):
            raise DamagedPickle(f"a {type(self._stack[-1]).__name__} stands where a {kind.__name__} should")
        return self._stack[-1]


def _key(value: Any) -> Any:
    # Hashing what nests a million tuples would end the process.
    if not isinstance(value, _KEYS):
        raise DamagedPickle(f"a {type(value).__name__} as a key")
    return value
