"""Arrays out of a pickle of Python 2, without unpickling it.

A pickle is a program for a stack machine, and `pickle.load` runs it: it calls whatever function
the file names. This machine has only the opcodes with which Python 2 (protocols 0 to 2) writes
dictionaries, strings, integers, tuples and NumPy arrays, and it calls nothing. Of all names a file
may give, it knows the three of an array, and an array is made of bytes that are in the file: its
memory is bounded by the file's size, whatever shape or length the file claims.
"""

import codecs
import math
import os
from dataclasses import dataclass
from enum import Enum
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

_MOST_OPCODES = 100_000  # a dozen arrays take some hundred
_NUMBERS = {b"b1", b"i1", b"i2", b"i4", b"i8", b"u1", b"u2", b"u4", b"u8", b"f4", b"f8"}


class PickleError(Exception):
    """The file holds something else than dictionaries of arrays; the text says where and what."""


class _Name(Enum):
    """What a GLOBAL opcode may name; it is never imported or called."""

    RECONSTRUCT = b"numpy.core.multiarray\n_reconstruct\n"
    NDARRAY = b"numpy\nndarray\n"
    DTYPE = b"numpy\ndtype\n"


@dataclass
class _Dtype:
    code: str
    dtype: np.dtype[Any] | None = None


@dataclass
class _Array:
    array: NDArray[Any] | None = None


def read_arrays(file: BinaryIO) -> dict[bytes, Any]:
    """The dictionary in a seekable `file`: its keys are bytes, as strings are in Python 2, its
    values read-only arrays, such bytes, integers, tuples, None or again dictionaries.

    Raises PickleError.
    """
    machine = _Machine(file)
    try:
        return machine.run()
    except (ValueError, TypeError, LookupError, OverflowError) as error:
        raise PickleError(f"{error} (before byte {file.tell()})") from error


class _Machine:
    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size = file, file.seek(0, os.SEEK_END)
        file.seek(0)
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> dict[bytes, Any]:
        for _ in range(_MOST_OPCODES):
            opcode = self._file.read(1)
            if opcode == b".":
                match self._stack:
                    case [dict(value)]:
                        return value
                raise ValueError("the pickle holds no dictionary")
            self._step(opcode)
        raise ValueError(f"more than {_MOST_OPCODES} opcodes")

    def _step(self, opcode: bytes) -> None:
        stack, push = self._stack, self._stack.append
        match opcode:
            case b"\x80":  # the protocol's number
                self._number(1)
            case b"(":
                self._marks.append(len(stack))
            case b"}":
                push({})
            case b"d":
                items = self._since_mark()
                push({})
                self._set_items(items)
            case b"s":
                self._set_items(self._pop(2))
            case b"u":
                self._set_items(self._since_mark())
            case b")":
                push(())
            case b"t":
                push(tuple(self._since_mark()))
            case b"\x85" | b"\x86" | b"\x87":
                push(tuple(self._pop(opcode[0] - 0x84)))
            case b"N":
                push(None)
            case b"\x88" | b"\x89":
                push(opcode == b"\x88")
            case b"I" | b"L":  # I01 and I00 are True and False, which are 1 and 0
                push(int(self._line().rstrip(b"L\n")))
            case b"K" | b"M":
                push(self._number(1 if opcode == b"K" else 2))
            case b"J":
                push(self._number(4, signed=True))
            case b"\x8a":
                push(self._number(self._number(1), signed=True))
            case b"S":
                quoted = memoryview(self._line())  # hundreds of MB: not to be copied
                push(codecs.escape_decode(quoted[1:-2])[0])
            case b"U":
                push(self._bytes(self._number(1)))
            case b"T":
                push(self._bytes(self._number(4)))
            case b"c":
                push(self._global())
            case b"R":
                push(self._reduced(*self._pop(2)))
            case b"b":
                [state] = self._pop(1)
                _build(stack[-1], state)
            case b"p":
                self._memo[int(self._line())] = stack[-1]
            case b"q" | b"r":
                self._memo[self._number(1 if opcode == b"q" else 4)] = stack[-1]
            case b"g":
                push(self._memo[int(self._line())])
            case b"h" | b"j":
                push(self._memo[self._number(1 if opcode == b"h" else 4)])
            case b"":
                raise ValueError("the file ends too early")
            case _:
                raise ValueError(f"opcode {opcode!r} is for something else than arrays")

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise ValueError("the stack is empty")
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _bytes(self, count: int) -> bytes:
        # Asked before, because read() would make room for all that is claimed.
        if count > self._size - self._file.tell():
            raise ValueError(f"{count} bytes are claimed, the file has {self._size}")
        return self._file.read(count)

    def _number(self, size: int, *, signed: bool = False) -> int:
        return int.from_bytes(self._bytes(size), "little", signed=signed)

    def _line(self) -> bytes:
        return self._file.readline()

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict):
            raise ValueError("items are set on something else than a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, bytes):
                raise ValueError("a key is no string")
            target[key] = _finished(value)

    def _global(self) -> _Name:
        name = self._line() + self._line()
        try:
            return _Name(name)
        except ValueError:
            shown = name.decode("latin1").strip().replace("\n", ".")
            raise ValueError(f"it asks for {shown[:100]}, which is no part of an array") from None

    def _reduced(self, name: Any, arguments: Any) -> _Array | _Dtype:
        match name, arguments:
            case _Name.RECONSTRUCT, (_Name.NDARRAY, (0,), b"b"):
                return _Array()
            case _Name.DTYPE, (bytes(code), 0, 1) if code in _NUMBERS:
                return _Dtype(code.decode())
        raise ValueError("a call that makes no array of numbers")


def _build(target: Any, state: Any) -> None:
    match target, state:
        case _Dtype(code), (3, b"<" | b">" | b"|" as order, None, None, None, -1, -1, 0):
            target.dtype = np.dtype(order.decode() + code)
        case _Array(), (1, tuple(shape), _Dtype(dtype=np.dtype() as dtype), 0 | 1 as fortran, data):
            target.array = _array(shape, dtype, "F" if fortran else "C", data)
        case _:
            raise ValueError("a state that no array of numbers has")


def _array(shape: tuple[Any, ...], dtype: np.dtype[Any], order: Any, data: Any) -> NDArray[Any]:
    if not (isinstance(data, bytes) and all(isinstance(length, int) for length in shape)):
        raise ValueError("an array without bytes or without a shape")
    if len(shape) not in (1, 2) or math.prod(shape) * dtype.itemsize != len(data) or not data:
        raise ValueError(f"an array of {len(data)} bytes claims another shape")
    return np.frombuffer(data, dtype).reshape(shape, order=order)


def _finished(value: Any) -> Any:
    match value:
        case _Array(None) | _Dtype() | _Name():
            raise ValueError("an unfinished array")
        case _Array(array):
            return array
    return value
