"""The wire format: open to any safetensors tool, closed to everything that is not a message."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load

from fedfog.messages.codec import (
    CodecError,
    TensorTable,
    decode,
    decode_json,
    decode_meta,
    digest_of,
    encode,
)
from fedfog.messages.schemas import ClientMetrics, PartialMeta, Receipt, UpdateMeta
from wire import BASE_META, TABLE, constant, update

GOOD = update(constant(0), constant(1.5), "a")


def test_any_safetensors_tool_opens_a_message() -> None:
    tensors = load(GOOD)
    assert {name: array.shape for name, array in tensors.items()} == dict(TABLE.shapes)
    assert all((array == 1.5).all() for array in tensors.values())


def test_message_comes_back_as_it_was_and_its_body_is_not_copied() -> None:
    vector = np.arange(TABLE.num_parameters, dtype=np.float32)
    message = decode(update(constant(0), vector, "a", num_examples=7), UpdateMeta, TABLE)
    assert message.meta.num_examples == 7
    assert (message.vector == vector).all()
    assert not message.vector.flags.owndata
    assert {n: a.tolist() for n, a in TABLE.unflatten(message.vector).items()} == {
        "bias": [0, 1, 2],
        "weight": [[3, 4], [5, 6], [7, 8], [9, 10], [11, 12]],
    }


def test_table_flattens_what_it_unflattens() -> None:
    vector = np.arange(TABLE.num_parameters, dtype=np.float32)
    assert (TABLE.flatten(TABLE.unflatten(vector)) == vector).all()
    assert TensorTable.of(TABLE.unflatten(vector)) == TABLE


def test_update_is_hardly_larger_than_its_numbers() -> None:
    """At most 1.01 times the float32 bytes of the ECG5000 model."""
    table = TensorTable((("w", (68_353,)),))
    payload = encode(BASE_META, table, np.zeros(68_353, np.float32))
    assert len(payload) <= 1.01 * 4 * 68_353


@given(st.data())
def test_mutated_message_is_read_or_refused_but_never_crashes(data: st.DataObject) -> None:
    payload = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 8))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(payload)))
    for candidate in (bytes(payload), bytes(payload[:cut])):
        try:
            message = decode(candidate, UpdateMeta, TABLE)
        except CodecError:
            continue
        assert message.vector.shape == (TABLE.num_parameters,)


@given(st.binary(max_size=300))
def test_noise_is_refused(noise: bytes) -> None:
    for read in (
        lambda: decode(noise, UpdateMeta),
        lambda: decode_meta(noise, PartialMeta),
        lambda: decode_json(noise, Receipt),
    ):
        with pytest.raises(CodecError):
            read()


@pytest.mark.parametrize(
    "header",
    [
        {"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"w": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}},
        {"w": {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 4]}},
        {"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"w": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}},
        {"w": 3},
        {"w": None},
        {},
    ],
)
def test_odd_tensor_table_is_refused(header: dict[str, object]) -> None:
    meta = {"__metadata__": {"fedfog": BASE_META.model_dump_json()}}
    text = json.dumps(meta | header).encode()
    payload = len(text).to_bytes(8, "little") + text + bytes(8)
    with pytest.raises(CodecError):
        decode(payload, UpdateMeta)


def test_nested_json_bomb_is_refused() -> None:
    text = b"[" * 100_000
    with pytest.raises(CodecError):
        decode(len(text).to_bytes(8, "little") + text, UpdateMeta)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", '"1"'])
def test_metric_that_is_no_number_is_refused(number: str) -> None:
    text = BASE_META.model_dump_json().replace('"train_loss":0.5', f'"train_loss":{number}')
    with pytest.raises(CodecError, match=r"train_loss|JSON"):
        decode_json(text.encode(), UpdateMeta)


def test_digest_tells_one_changed_bit() -> None:
    vector = constant(1)
    before = digest_of(vector)
    vector.view(np.uint32)[3] ^= 1
    assert digest_of(vector) != before


def test_metrics_carry_no_example() -> None:
    """What a client tells is a handful of means."""
    assert set(ClientMetrics.model_fields) == {
        "train_loss",
        "validation_examples",
        "validation_loss",
        "validation_accuracy",
    }
