"""Writes pickles as Python 2 with NumPy 1 did, which wrote WESAD's recordings."""

from typing import Any

import numpy as np


def dumps(value: dict[str, Any], protocol: int = 0) -> bytes:
    """A dictionary of text, numbers, tuples, arrays and again such dictionaries."""
    return _Writer(protocol).pickle(value)


class _Writer:
    def __init__(self, protocol: int) -> None:
        self._binary = protocol == 2
        self._memos = 0

    def pickle(self, value: Any) -> bytes:
        return (b"\x80\x02" if self._binary else b"") + self._any(value) + b"."

    def _any(self, value: Any) -> bytes:
        match value:
            case None:
                return b"N"
            case bool():
                return (b"\x88" if value else b"\x89") if self._binary else b"I0%d\n" % value
            case int():
                return self._int(value)
            case str() | bytes():
                return self._string(value) + self._memo()
            case tuple():
                return b"(" + b"".join(map(self._any, value)) + b"t" + self._memo()
            case dict():
                items = [self._any(key) + self._any(item) for key, item in value.items()]
                if self._binary:
                    return b"}" + self._memo() + b"(" + b"".join(items) + b"u"
                return b"(d" + self._memo() + b"".join(item + b"s" for item in items)
            case np.ndarray():
                return self._array(value)
        raise TypeError(type(value))

    def _int(self, value: int) -> bytes:
        if not self._binary:
            return b"I%d\n" % value
        if 0 <= value < 256:
            return b"K%c" % value
        return b"J" + value.to_bytes(4, "little", signed=True)

    def _string(self, value: str | bytes) -> bytes:
        data = value.encode("latin1") if isinstance(value, str) else value
        if not self._binary:
            return b"S" + repr(data)[1:].encode() + b"\n"
        if len(data) < 256:
            return b"U%c" % len(data) + data
        return b"T" + len(data).to_bytes(4, "little") + data

    def _array(self, array: np.ndarray) -> bytes:
        dtype = array.dtype.newbyteorder("<")
        fortran = array.flags.f_contiguous and array.ndim > 1 and not array.flags.c_contiguous
        order = "|" if dtype.itemsize == 1 else "<"
        return b"".join(
            [
                b"cnumpy.core.multiarray\n_reconstruct\n" + self._memo(),
                b"(cnumpy\nndarray\n" + self._memo() + self._any((0,)) + self._any("b"),
                b"t" + self._memo() + b"R" + self._memo(),
                b"(" + self._any(1) + self._any(array.shape),
                b"cnumpy\ndtype\n" + self._memo(),
                self._any((dtype.str[1:], 0, 1)) + b"R" + self._memo(),
                self._any((3, order, None, None, None, -1, -1, 0)) + b"b",
                self._any(fortran) + self._any(array.tobytes("F" if fortran else "C")),
                b"tb",
            ]
        )

    def _memo(self) -> bytes:
        self._memos += 1
        if not self._binary:
            return b"p%d\n" % self._memos
        if self._memos < 256:
            return b"q%c" % self._memos
        return b"r" + self._memos.to_bytes(4, "little")
