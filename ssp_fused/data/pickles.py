"""Reads pickles of plain values and numpy arrays of bytes, running nothing that they ask for.

A pickle is a program for a stack machine, and Python's own machine calls whatever the program
names. This one knows the opcodes of protocols 0 to 2 that build numbers, strings, lists, tuples
and dictionaries, and four names of numpy, for which records stand in: numpy itself is not needed.
"""

from __future__ import annotations

import math
import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_RECONSTRUCT = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
_NDARRAY, _DTYPE = "numpy.ndarray", "numpy.dtype"
_MAX_DIMENSIONS = 8


@dataclass
class ByteArray:
    """What the pickle says about a numpy array of unsigned bytes, in C order.

    Attributes:
        shape: its dimensions; their product is the length of `data`.
        data: its elements.
    """

    shape: tuple[int, ...] = ()
    data: bytes = b""


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _DataType:
    code: object


def read_pickle(payload: bytes, name: str) -> Any:
    """Read a pickle without executing anything.

    Args:
        payload: the pickle, of protocol 0, 1 or 2.
        name: the file's name, for the errors.

    Returns:
        Numbers, str, bytes (the strings of Python 2), lists, tuples, dictionaries with str or
        bytes keys, and `ByteArray`.

    Raises:
        ValueError: the pickle is truncated or garbled, or asks for anything else; names the file
            and what it asks for.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(payload):
            machine.step(opcode.name, argument)
        return machine.stack.pop()
    except (ValueError, TypeError, LookupError, struct.error) as error:
        raise ValueError(f"{name}: not a pickle of plain values ({error})") from error


class _Machine:
    """The stack, the memo, and a method for every kind of opcode."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        if opcode in _STRINGS:
            # The lengths were checked against what is left of the pickle when it was parsed.
            self.stack.append(argument.encode("latin-1"))
        elif opcode in _VALUES:
            self.stack.append(argument)
        elif opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode]())
        elif opcode in _ACTIONS:
            _ACTIONS[opcode](self, argument)
        elif opcode not in _IGNORED:
            raise ValueError(f"opcode {opcode} {argument or ''} is not allowed")

    def mark(self, _: object) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def memoize(self, _: object) -> None:
        self.put(len(self.memo))

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def append(self, _: object) -> None:
        item = self.stack.pop()
        self.extend([item])

    def extend(self, items: list[Any]) -> None:
        _expect(self.stack[-1], list, "APPEND to").extend(items)

    def make_tuple(self, length: int) -> None:
        if len(self.stack) < length:
            raise ValueError("the stack is empty")
        items = [self.stack.pop() for _ in range(length)]
        self.stack.append(tuple(reversed(items)))

    def make_list(self, _: object) -> None:
        items = self.since_mark()
        self.stack.append(items)

    def make_marked_tuple(self, _: object) -> None:
        items = self.since_mark()
        self.stack.append(tuple(items))

    def make_dict(self, _: object) -> None:
        items = self.since_mark()
        self.stack.append({})
        self.update(items)

    def set_item(self, _: object) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.update([key, value])

    def update(self, items: list[Any]) -> None:
        target = _expect(self.stack[-1], dict, "SETITEM of")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Keys are hashed: of a deeply nested tuple that would overrun the C stack.
            target[_expect(key, (str, bytes), "key")] = value

    def named(self, argument: str) -> None:
        name = argument.replace(" ", ".", 1)
        if name not in (*_RECONSTRUCT, _NDARRAY, _DTYPE):
            raise ValueError(f"asks for {name}, which is not allowed")
        self.stack.append(_Global(name))

    def stack_named(self, _: object) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.named(f"{module} {name}")

    def call(self, _: object) -> None:
        """What calling one of the four names would give, as a record."""
        arguments, function = self.stack.pop(), _expect(self.stack.pop(), _Global, "call of")
        _expect(arguments, tuple, "arguments")
        if function.name in _RECONSTRUCT and arguments[0] == _Global(_NDARRAY):
            self.stack.append(ByteArray())
        elif function.name == _DTYPE:
            self.stack.append(_DataType(arguments[0]))
        else:
            raise ValueError(f"asks to call {function.name} with other arguments than an array's")

    def build(self, _: object) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _DataType):
            return  # byte order and alignment: of no meaning to bytes
        _expect(target, ByteArray, "BUILD of")
        _version, shape, dtype, fortran, data = _expect(state, tuple, "state")
        if not isinstance(dtype, _DataType) or dtype.code not in (b"u1", "u1") or fortran:
            raise ValueError("an array that is not of unsigned bytes in C order")
        _check_shape(shape, _expect(data, bytes, "array data"))
        target.shape, target.data = shape, data


def _check_shape(shape: object, data: bytes) -> None:
    sizes = _expect(shape, tuple, "shape")
    # Checked in this order: neither a product of huge numbers nor the text of a deep tuple is made.
    if len(sizes) > _MAX_DIMENSIONS or not all(type(size) is int for size in sizes):
        raise ValueError("an array whose shape is not a few integers")
    if not all(0 <= size <= len(data) for size in sizes) or math.prod(sizes) != len(data):
        raise ValueError(f"an array of shape {sizes} with {len(data)} bytes of data")


def _expect(value: Any, kind: type | tuple[type, ...], what: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{what} a {type(value).__name__}, which is not allowed")
    return value


_STRINGS = {"STRING", "BINSTRING", "SHORT_BINSTRING"}
_VALUES = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "UNICODE", "BINUNICODE"}
_IGNORED = {"PROTO", "STOP"}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
}
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "GET": _Machine.get,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "LIST": _Machine.make_list,
    "APPEND": _Machine.append,
    "APPENDS": lambda machine, _: machine.extend(machine.since_mark()),
    "TUPLE": _Machine.make_marked_tuple,
    "TUPLE1": lambda machine, _: machine.make_tuple(1),
    "TUPLE2": lambda machine, _: machine.make_tuple(2),
    "TUPLE3": lambda machine, _: machine.make_tuple(3),
    "DICT": _Machine.make_dict,
    "SETITEM": _Machine.set_item,
    "SETITEMS": lambda machine, _: machine.update(machine.since_mark()),
    "GLOBAL": _Machine.named,
    "STACK_GLOBAL": _Machine.stack_named,
    "REDUCE": _Machine.call,
    "BUILD": _Machine.build,
}
