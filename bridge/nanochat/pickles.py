"""Reads a pickle without Python's unpickler: an interpreter of the data opcodes, with bounds, that can call nothing."""

import io
import pickletools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, final

from bridge.nanochat.names import shown

_MAX_STACK = 2**16  # CPython's pickler writes at most a thousand items of a dict before it collects them
_CONSTANTS = "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES"
_VALUES: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_BY_CODE = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
_SILENT = frozenset(("PROTO", "FRAME"))


class ForbiddenError(ValueError):
    """The pickle asks for something that data does not need."""


@final
class Global:
    """A name that a pickle refers to, "module.name". It stands for itself: nothing is imported."""

    def __init__(self, name: str):
        self.name = name


def read(
    data: bytes,
    *,
    opcodes: str,
    names: Collection[str],
    max_opcodes: int,
    call: Callable[[str, tuple], Any] | None = None,
    build: Callable[[Any, Any], Any] | None = None,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Return what a pickle describes, as dicts, lists, tuples, numbers, strings, bytes and what the callbacks return.

    Args:
        data: the pickle, whole.
        opcodes: names of the opcodes that may occur, with blanks between them.
        names: "module.name" of what it may refer to.
        max_opcodes: how many opcodes are read before the pickle is refused.
        call: what stands for the call of a name with arguments (REDUCE and NEWOBJ).
        build: what stands for the setting of a state (BUILD); returns the object.
        persistent: what stands for an object outside the pickle (BINPERSID).

    Raises:
        ForbiddenError: another opcode or name, or a call of something that is not a name.
        ValueError: the pickle is damaged, too long or too deep.
    """
    allowed = frozenset(opcodes.split())
    machine = _Machine(frozenset(names), {"call": call, "build": build, "persistent": persistent})
    try:
        for name, argument in _opcodes(io.BytesIO(data), allowed, max_opcodes):
            machine.step(name, argument)
            if len(machine.stack) > _MAX_STACK or len(machine.marks) > _MAX_STACK:
                raise ValueError(f"it piles up more than {_MAX_STACK} values")
        return machine.stack.pop()
    except (IndexError, KeyError) as error:
        raise ValueError("it is broken: it takes a value that it never put down") from error


def _opcodes(file: io.BytesIO, allowed: frozenset[str], most: int) -> Iterator[tuple[str, Any]]:
    """Yield name and argument of each opcode up to STOP; that of a forbidden one is not read."""
    for _ in range(most):
        code = file.read(1)
        opcode = _BY_CODE.get(code)
        if opcode is None:
            raise ValueError(f"it is broken: no opcode is {code!r}" if code else "it is broken: it ends without STOP")
        if opcode.name not in allowed:
            raise ForbiddenError(f"it holds the pickle opcode {opcode.name}")
        if opcode.name == "STOP":
            return
        yield opcode.name, None if opcode.arg is None else opcode.arg.reader(file)
    raise ValueError(f"it has more than {most} pickle opcodes")


class _Machine:
    """The stack, the marks on it and the memo of a pickle that is being read."""

    def __init__(self, names: frozenset[str], callbacks: Mapping[str, Callable | None]):
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._names = names
        self._constants = frozenset(_CONSTANTS.split())
        self._callbacks = callbacks

    def step(self, name: str, argument: Any) -> None:
        """Do what one opcode says."""
        stack = self.stack
        if name in self._constants:
            stack.append(argument)
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name in _VALUES:
            stack.append(_VALUES[name]())
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in _TUPLES:
            stack.append(tuple(self._take(_TUPLES[name])))
        elif name not in _SILENT:
            getattr(self, f"_{name.lower()}")(argument)

    def _take(self, count: int) -> list[Any]:
        """The last values, which must lie above the last mark."""
        start = len(self.stack) - count
        if start < (self.marks[-1] if self.marks else 0):
            raise IndexError
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def _marked(self) -> list[Any]:
        """The values above the last mark, which goes."""
        start = self.marks.pop()
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def _tuple(self, _: Any) -> None:
        self.stack.append(tuple(self._marked()))

    def _append(self, _: Any) -> None:
        self._extend(self._take(1))

    def _appends(self, _: Any) -> None:
        self._extend(self._marked())

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("it is broken: it appends to something that is no list")
        self.stack[-1].extend(items)

    def _setitem(self, _: Any) -> None:
        self._update(self._take(2))

    def _setitems(self, _: Any) -> None:
        self._update(self._marked())

    def _update(self, items: list[Any]) -> None:
        table = self.stack[-1]
        if type(table) is not dict or len(items) % 2:
            raise ValueError("it is broken: it sets items of something that is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, bytes, int):  # to hash nested tuples may take forever
                raise ValueError(f"it has a key that is no string and no number, but {type(key).__name__}")
            table[key] = value

    def _global(self, argument: str) -> None:
        self._refer(argument.replace(" ", ".", 1))

    def _stack_global(self, _: Any) -> None:
        module, name = self._take(2)
        if type(module) is not str or type(name) is not str:
            raise ForbiddenError("it asks for a name that is no string")
        self._refer(f"{module}.{name}")

    def _refer(self, name: str) -> None:
        if name not in self._names:
            raise ForbiddenError(f"it asks for {shown(name)}")
        self.stack.append(Global(name))

    def _reduce(self, _: Any) -> None:
        function, arguments = self._take(2)
        if type(function) is not Global or type(arguments) is not tuple:
            raise ForbiddenError("it calls something that has no name")
        self.stack.append(self._callback("call")(function.name, arguments))

    _newobj = _reduce

    def _build(self, _: Any) -> None:
        target, state = self._take(2)
        self.stack.append(self._callback("build")(target, state))

    def _binpersid(self, _: Any) -> None:
        self.stack.append(self._callback("persistent")(*self._take(1)))

    def _callback(self, name: str) -> Callable:
        callback = self._callbacks[name]
        if callback is None:
            raise ForbiddenError(f"it holds a pickle opcode of the kind {name}")
        return callback
