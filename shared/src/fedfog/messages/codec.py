"""Wire format of every message that carries tensors: one valid `.safetensors` file.

Layout (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length, a JSON
header, then the tensors. FedFog keeps its own fields as one JSON string under the key `fedfog` of
the header's `__metadata__`, and lays all tensors out in order of their names without a gap, so
that the body is one flat float32 vector that can be read without a copy.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from fedfog.messages.schemas import Payload

MAX_HEADER_BYTES = 1 << 20
# No tensor of a message has more dimensions, or more elements than MQTT has a length for. Without
# these limits the product of a shape that a header claims could take minutes.
MAX_DIMENSIONS, MAX_ELEMENTS = 32, 1 << 26
# Errors of a payload are described one by one up to this number; to describe a million of them
# would cost far more than the payload.
DESCRIBED_ERRORS = 100
REASON_CHARACTERS = 200
_LENGTH = 8

Vector = NDArray[np.float32]
M = TypeVar("M", bound=Payload)


class CodecError(ValueError):
    """The payload is not a message of this format; the text says why."""


@dataclass(frozen=True)
class TensorTable:
    """Names and shapes of a model's float32 tensors, in order of their names."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, tensors: Mapping[str, NDArray[Any]]) -> "TensorTable":
        return cls(tuple((name, tuple(tensors[name].shape)) for name in sorted(tensors)))

    @cached_property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for _, shape in self.shapes)

    @cached_property
    def header(self) -> dict[str, dict[str, Any]]:
        """The tensors' part of the safetensors header."""
        entries: dict[str, dict[str, Any]] = {}
        start = 0
        for name, shape in self.shapes:
            end = start + 4 * math.prod(shape)
            entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
            start = end
        return entries

    @cached_property
    def tail(self) -> bytes:
        """The end of the header as `encode` writes it: the table, and what closes the header."""
        return b"," + json.dumps(self.header, separators=(",", ":")).encode()[1:]

    def flatten(self, tensors: Mapping[str, NDArray[np.float32]]) -> Vector:
        """One float32 vector of shape (num_parameters,) out of this table's tensors."""
        return np.concatenate([np.ravel(tensors[name]) for name, _ in self.shapes]).astype(
            np.float32, copy=False
        )

    def unflatten(self, vector: Vector) -> dict[str, Vector]:
        """Views of `vector` with this table's names and shapes."""
        tensors: dict[str, Vector] = {}
        start = 0
        for name, shape in self.shapes:
            end = start + math.prod(shape)
            tensors[name] = vector[start:end].reshape(shape)
            start = end
        return tensors


@dataclass(frozen=True)
class TensorMessage(Generic[M]):
    """A decoded message: its fields, its tensor table and the flat float32 body (read-only)."""

    meta: M
    table: TensorTable
    vector: Vector


def digest_of(vector: Vector) -> str:
    """SHA-256 of the tensors' bytes, in hex."""
    return hashlib.sha256(np.ascontiguousarray(vector, np.float32).data).hexdigest()


def encode(meta: BaseModel, table: TensorTable, vector: Vector) -> bytes:
    """The message as bytes. `vector` is float32 of shape (table.num_parameters,)."""
    body = np.ascontiguousarray(vector, np.float32)
    return b"".join((encode_header(meta, table), body.data))


def encode_header(meta: BaseModel, table: TensorTable) -> bytes:
    """All of the message that comes before its tensors."""
    fields = {"__metadata__": {"fedfog": meta.model_dump_json()}}
    header = json.dumps(fields, separators=(",", ":")).encode()[:-1] + table.tail
    header += b" " * (-len(header) % _LENGTH)
    return len(header).to_bytes(_LENGTH, "little") + header


def decode(
    payload: bytes, schema: type[M], expected: TensorTable | None = None
) -> TensorMessage[M]:
    """Read a message without copying its tensors.

    Nothing is allocated from a size that the payload claims, and no more is parsed than a message
    of this kind may have. With `expected`, the tensor table must be that one; without, any table
    of gapless float32 tensors in order of names is taken.

    Raises:
        CodecError: if the payload is anything else.
    """
    if expected is None:
        text, body = _split(payload, max(MAX_HEADER_BYTES, schema.max_bytes))
    else:
        # Another tool may write the same table with blanks.
        text, body = _split(payload, 2 * len(expected.tail) + schema.max_bytes)
        _check_size(payload, body, expected)
    # The table is the longest part, and most senders write it as `encode` does.
    if expected is not None and text.endswith(expected.tail):
        meta = _meta(header := _object(text.removesuffix(expected.tail) + b"}"), schema)
        same = not header
    else:
        meta = _meta(header := _object(text), schema)
        same = expected is not None and header == expected.header
    if expected is not None and not same:
        raise CodecError("the tensor table (names, dtypes, shapes) is not the model's")
    table = expected or _table(header)
    _check_size(payload, body, table)
    vector = np.frombuffer(payload, np.float32, offset=body)
    vector.flags.writeable = False
    return TensorMessage(meta, table, vector)


def decode_meta(payload: bytes, schema: type[M]) -> M:
    """Only the fields of a message; its tensors are not looked at.

    Raises:
        CodecError: if the header is not one of this format.
    """
    return _meta(_object(_split(payload, max(MAX_HEADER_BYTES, schema.max_bytes))[0]), schema)


def decode_json(payload: bytes, schema: type[M]) -> M:
    """Read a message without tensors.

    Raises:
        CodecError: if the payload does not fit the schema.
    """
    return _fields(payload, schema)


def _check_size(payload: bytes, body: int, table: TensorTable) -> None:
    size, wanted = len(payload) - body, 4 * table.num_parameters
    if size != wanted:
        raise CodecError(f"{size} bytes of tensors, not the {wanted} of the tensor table")


def _split(payload: bytes, limit: int) -> tuple[bytes, int]:
    """The header, of at most `limit` bytes, without its padding, and the offset of the body."""
    length = int.from_bytes(payload[:_LENGTH], "little")
    if len(payload) < _LENGTH or length > min(len(payload) - _LENGTH, limit):
        raise CodecError("not a safetensors message: bad header length")
    return bytes(payload[_LENGTH : _LENGTH + length]).rstrip(b" "), _LENGTH + length


def _object(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CodecError("not a safetensors message: the header is not JSON") from error
    if not isinstance(header, dict):
        raise CodecError("not a safetensors message: the header is not an object")
    return header


def _meta(header: dict[str, Any], schema: type[M]) -> M:
    """Take the message's own fields out of the header."""
    metadata = header.pop("__metadata__", None)
    fields = metadata.get("fedfog") if isinstance(metadata, dict) else None
    if not isinstance(fields, str):
        raise CodecError("the header's __metadata__ has no `fedfog` string")
    return _fields(fields, schema)


def _fields(text: str | bytes, schema: type[M]) -> M:
    if len(text) > schema.max_bytes:
        raise CodecError(f"fields of {len(text)} bytes, more than {schema.max_bytes}")
    try:
        return schema.model_validate_json(text)
    except ValidationError as error:
        raise CodecError(_first(error)) from error


def _table(header: dict[str, Any]) -> TensorTable:
    try:
        shapes = tuple((name, tuple(header[name]["shape"])) for name in sorted(header))
        sound = all(_is_shape(shape) for _, shape in shapes)
    except (KeyError, TypeError) as error:
        raise CodecError("the tensor table is malformed") from error
    table = TensorTable(shapes)
    if not sound or not shapes or header != table.header:
        raise CodecError("the tensors are not gapless float32 in order of their names")
    return table


def _is_shape(shape: tuple[Any, ...]) -> bool:
    return (
        len(shape) <= MAX_DIMENSIONS
        and all(type(n) is int and 0 <= n <= MAX_ELEMENTS for n in shape)
        and math.prod(n or 1 for n in shape) <= MAX_ELEMENTS
    )


def _first(error: ValidationError) -> str:
    """The first thing that is wrong with a message, in a line."""
    if error.error_count() > DESCRIBED_ERRORS:
        return f"{error.error_count()} of its fields are not as they have to be"
    detail = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in detail["loc"]) or "message"
    return f"{where}: {detail['msg']}"[:REASON_CHARACTERS]
