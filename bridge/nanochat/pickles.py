"""Read pickles without Python's unpickler: a bounded interpreter of data opcodes that cannot call anything."""

import io
import pickletools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, final

from bridge.nanochat.names import shown

_MAX_STACK = 2**16  # CPython's pickler puts at most a thousand items of a dict on the stack
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
    """The pickle uses a feature that pure data does not need."""


@final
class Global:
    """A reference to "module.name" in a pickle. Nothing is imported."""

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
    """Return the value in a pickle: dicts, lists, tuples, numbers, strings, bytes and the results of the callbacks.

    Args:
        data: the complete pickle.
        opcodes: names of the permitted opcodes, separated by spaces.
        names: the permitted references, as "module.name".
        max_opcodes: the largest number of opcodes.
        call: called instead of a function, with its name and arguments (REDUCE and NEWOBJ).
        build: called instead of setting a state, with object and state (BUILD); returns the object.
        persistent: called with the id of an object outside the pickle (BINPERSID); returns the object.

    Raises:
        ForbiddenError: the pickle has another opcode or name, or calls something that is not a name.
        ValueError: the pickle is damaged, too long or too deep.
    """
    allowed = frozenset(opcodes.split())
    machine = _Machine(frozenset(names), {"call": call, "build": build, "persistent": persistent})
    try:
        for name, argument in _opcodes(io.BytesIO(data), allowed, max_opcodes):
            machine.step(name, argument)
            if len(machine.stack) > _MAX_STACK or len(machine.marks) > _MAX_STACK:
                raise ValueError(f"it has more than {_MAX_STACK} values on its stack")
        return machine.stack.pop()
    except (IndexError, KeyError) as error:
        raise ValueError("it is broken: it uses a value that it has not stored") from error


def _opcodes(file: io.BytesIO, allowed: frozenset[str], limit: int) -> Iterator[tuple[str, Any]]:
    """Yield (name, argument) of each opcode up to STOP; the argument of a forbidden opcode is not read."""
    for _ in range(limit):
        code = file.read(1)
        opcode = _BY_CODE.get(code)
        if opcode is None:
            raise ValueError(f"it is broken: no opcode is {code!r}" if code else "it is broken: it ends without STOP")
        if opcode.name not in allowed:
            raise ForbiddenError(f"it contains the pickle opcode {opcode.name}")
        if opcode.name == "STOP":
            return
        yield opcode.name, None if opcode.arg is None else opcode.arg.reader(file)
    raise ValueError(f"it has more than {limit} pickle opcodes")


class _Machine:
    """The state of the interpreter: stack, marks and memo."""

    def __init__(self, names: frozenset[str], callbacks: Mapping[str, Callable | None]):
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._names = names
        self._constants = frozenset(_CONSTANTS.split())
        self._callbacks = callbacks

    def step(self, name: str, argument: Any) -> None:
        """Execute one opcode."""
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
            stack.append(tuple(self._pop(_TUPLES[name])))
        elif name not in _SILENT:
            getattr(self, f"_{name.lower()}")(argument)

    def _pop(self, count: int) -> list[Any]:
        """Pop and return the last values, which must be above the last mark."""
        start = len(self.stack) - count
        if start < (self.marks[-1] if self.marks else 0):
            raise IndexError
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def _pop_to_mark(self) -> list[Any]:
        """Pop the last mark; pop and return the values above it."""
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def _tuple(self, _: Any) -> None:
        self.stack.append(tuple(self._pop_to_mark()))

    def _append(self, _: Any) -> None:
        self._extend(self._pop(1))

    def _appends(self, _: Any) -> None:
        self._extend(self._pop_to_mark())

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("it is broken: it appends to something that is not a list")
        self.stack[-1].extend(items)

    def _setitem(self, _: Any) -> None:
        self._update(self._pop(2))

    def _setitems(self, _: Any) -> None:
        self._update(self._pop_to_mark())

    def _update(self, items: list[Any]) -> None:
        table = self.stack[-1]
        if type(table) is not dict or len(items) % 2:
            raise ValueError("it is broken: it sets items of something that is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, bytes, int):  # hashing nested tuples may take exponential time
                raise ValueError(f"it has a key of type {type(key).__name__}; only strings and integers are read")
            table[key] = value

    def _global(self, argument: str) -> None:
        self._refer(argument.replace(" ", ".", 1))

    def _stack_global(self, _: Any) -> None:
        module, name = self._pop(2)
        if type(module) is not str or type(name) is not str:
            raise ForbiddenError("it refers to a name that is not a string")
        self._refer(f"{module}.{name}")

    def _refer(self, name: str) -> None:
        if name not in self._names:
            raise ForbiddenError(f"it refers to {shown(name)}")
        self.stack.append(Global(name))

    def _reduce(self, _: Any) -> None:
        function, arguments = self._pop(2)
        if type(function) is not Global or type(arguments) is not tuple:
            raise ForbiddenError("it calls something that is not a name")
        self.stack.append(self._callback("call")(function.name, arguments))

    _newobj = _reduce

    def _build(self, _: Any) -> None:
        target, state = self._pop(2)
        self.stack.append(self._callback("build")(target, state))

    def _binpersid(self, _: Any) -> None:
        self.stack.append(self._callback("persistent")(*self._pop(1)))

    def _callback(self, name: str) -> Callable:
        callback = self._callbacks[name]
        if callback is None:
            raise ForbiddenError(f"it contains a pickle opcode of the kind {name}")
        return callback
