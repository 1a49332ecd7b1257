"""A payload costs no more than its size, whatever it claims to be."""

import json
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from fedfog.messages.codec import REASON_CHARACTERS, CodecError, decode, decode_json
from fedfog.messages.schemas import ModelMeta, Presence, UpdateMeta
from wire import BASE_META, TABLE, constant, model, update

META = {"__metadata__": {"fedfog": BASE_META.model_dump_json()}}


def message(header: str, body: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header.encode() + body


def fields(number: int) -> str:
    return "{" + ",".join(f'"{i}":1' for i in range(number)) + "}"


HOSTILE: dict[str, Callable[[], object]] = {
    "a presence of 100,000 fields": lambda: decode_json(fields(100_000).encode(), Presence),
    "a presence of 300,000 lists": lambda: decode_json(
        ('{"online":[' + "[]," * 300_000).encode(), Presence
    ),
    "an update with a header of 300,000 lists": lambda: decode(
        message('{"x":[' + "[]," * 300_000 + "[]]}", bytes(52)), UpdateMeta, TABLE
    ),
    "an update that is too short for its model": lambda: decode(
        message(json.dumps(META)[:-1] + "," + fields(100)[1:]), UpdateMeta, TABLE
    ),
    "a name of 500 kB": lambda: decode_json(('{"' + "x" * 500_000 + '":1}').encode(), Presence),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_it_is_refused_in_a_line_and_in_little_memory(what: str) -> None:
    read = HOSTILE[what]
    with pytest.raises(CodecError):
        read()  # what is imported or cached once
    tracemalloc.start()
    try:
        with pytest.raises(CodecError) as refused:
            read()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(str(refused.value)) <= REASON_CHARACTERS
    assert peak < 16 << 20  # the payload itself is made in it


@pytest.mark.parametrize(
    "shape",
    [[9] * 200_000, [10**300] * 200, [1] * 33, [0, 2**26, 2**26], [2**27], [2**14, 2**14]],
    ids=["long", "of large numbers", "of 33 dimensions", "overflows", "large", "large product"],
)
def test_a_shape_that_no_message_can_have_is_not_multiplied_out(shape: list[int]) -> None:
    header = META | {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
    with pytest.raises(CodecError, match="tensors are not"):
        decode(message(json.dumps(header)), UpdateMeta)


def test_every_table_that_is_read_can_be_taken_apart() -> None:
    for shape in ([], [1] * 32, [0, 2**26], [2, 3]):
        size = int(np.prod(shape))
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * size]}
        read = decode(message(json.dumps(META | {"a": entry}), bytes(4 * size)), UpdateMeta)
        assert read.table.unflatten(read.vector)["a"].shape == tuple(shape)


def test_another_tool_may_write_the_header_with_blanks() -> None:
    payload = update(constant(0), constant(1.5), "a")
    length = int.from_bytes(payload[:8], "little")
    header = json.dumps(json.loads(payload[8 : 8 + length]), indent=1)
    read = decode(message(header, payload[8 + length :]), UpdateMeta, TABLE)
    assert (read.vector == 1.5).all()


@pytest.mark.parametrize("number", ["9223372036854775808", "1" + "0" * 400])
def test_a_number_that_the_store_cannot_hold_is_refused(number: str) -> None:
    payload = model(constant(0), started=7)
    changed = payload.replace(b'run_started\\":7', b'run_started\\":' + number.encode())
    length = int.from_bytes(payload[:8], "little") + len(changed) - len(payload)
    with pytest.raises(CodecError, match="run_started"):
        decode(length.to_bytes(8, "little") + changed[8:], ModelMeta)
