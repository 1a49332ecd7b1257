"""What a run is resumed from."""

from pathlib import Path

import numpy as np
import pytest
from flwr.serverapp.strategy import Strategy
from safetensors.numpy import load_file

from fedfog.flower.strategy import make_strategy
from fedfog.messages.codec import CodecError, TensorTable, Vector
from fedfog.messages.schemas import ClientMetrics, PartialMeta, RoundRecord
from fedfog_central_server import strategy_state
from fedfog_central_server.checkpoints import Checkpoint, CheckpointError, Checkpoints
from flower import round_of

TABLE = TensorTable((("0.weight", (3, 2)), ("conv.bias", (4,))))


def values(seed: int, *shape: int) -> Vector:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def checkpoint(round: int, **strategy: Vector) -> Checkpoint:
    partial = PartialMeta(
        run="run",
        round=round,
        region="north",
        digest="0" * 64,
        num_clients=1,
        num_examples=7,
        members={"c": 7},
        metrics=ClientMetrics(train_loss=0.1 + 0.2),
    )
    record = RoundRecord(
        run="run", round=round, regions={"north": partial}, num_clients=1, num_examples=7
    )
    state = {name.replace("__", "/"): array for name, array in strategy.items()}
    return Checkpoint(record, TABLE, values(round, TABLE.num_parameters), state)


@pytest.fixture
def store(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=3)


def test_checkpoint_comes_back_bit_for_bit(store: Checkpoints) -> None:
    saved = checkpoint(4, m_t__weight=values(1, 5, 2), v_t__weight=values(2, 5, 2))
    store.save(saved)
    loaded = store.load(4)
    assert loaded.record == saved.record
    assert loaded.table == TABLE
    assert loaded.vector.tobytes() == saved.vector.tobytes()
    assert loaded.digest == saved.digest
    assert loaded.strategy.keys() == saved.strategy.keys()
    for name, array in saved.strategy.items():
        np.testing.assert_array_equal(loaded.strategy[name], array)


def test_any_reader_of_safetensors_opens_a_checkpoint(store: Checkpoints) -> None:
    saved = checkpoint(1)
    store.save(saved)
    tensors = load_file(store.path(1))
    np.testing.assert_array_equal(TABLE.flatten(tensors), saved.vector)


def test_every_damaged_bit_is_noticed() -> None:
    """Of the tensors, of their names and shapes, and of the record."""
    data = bytearray(checkpoint(1, m__a=values(3, 2)).to_bytes())
    unnoticed = []
    for position in range(len(data)):
        data[position] ^= 0x04
        try:
            Checkpoint.from_bytes(bytes(data))
            unnoticed.append(position)
        except CodecError:
            pass
        data[position] ^= 0x04
    assert unnoticed == []


def test_a_file_cut_off_anywhere_is_refused() -> None:
    data = checkpoint(1).to_bytes()
    for length in range(len(data)):
        with pytest.raises(CodecError):
            Checkpoint.from_bytes(data[:length])


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(store: Checkpoints) -> None:
    for round in (1, 2, 3):
        store.save(checkpoint(round))
    store.path(3).write_bytes(store.path(3).read_bytes()[:-1])
    newest, damaged = store.newest()
    assert newest is not None
    assert newest.round == 2
    assert damaged == [3]
    store.set_aside(damaged)
    assert store.last_round == 2


def test_a_checkpoint_of_another_round_under_this_name_is_refused(store: Checkpoints) -> None:
    store.save(checkpoint(1))
    store.path(2).write_bytes(store.path(1).read_bytes())
    with pytest.raises(CheckpointError, match="round-000002"):
        store.load(2)


def test_nothing_is_computed_from_damage_alone(store: Checkpoints) -> None:
    store.save(checkpoint(0))
    store.path(0).write_bytes(b"")
    with pytest.raises(CheckpointError, match="RUN_ID"):
        store.newest()


def test_a_new_run_has_no_checkpoint(store: Checkpoints) -> None:
    assert store.newest() == (None, [])


def test_only_the_newest_checkpoints_are_kept(store: Checkpoints) -> None:
    for round in range(6):
        store.save(checkpoint(round))
    store.prune(written=5)
    assert [record.round for record in store.records()] == [3, 4, 5]


def test_a_checkpoint_that_has_the_only_record_of_its_round_is_kept(store: Checkpoints) -> None:
    for round in range(6):
        store.save(checkpoint(round))
    store.prune(written=1)
    assert [record.round for record in store.records()] == [2, 3, 4, 5]


def test_a_crash_while_writing_leaves_the_checkpoint_before(store: Checkpoints) -> None:
    """What is left of a write that was cut off is a temporary file, which is not read."""
    store.save(checkpoint(1))
    half = checkpoint(2).to_bytes()[:100]
    store.path(2).with_name(f".{store.path(2).name}.tmp").write_bytes(half)
    newest, damaged = store.newest()
    assert newest is not None
    assert newest.round == 1
    assert damaged == []


def strategy_of(name: str) -> Strategy:
    return make_strategy(name, 1, 0.1, server_momentum=0.9 if name == "FedAvgM" else None)


def one_round(strategy: Strategy, number: int, model: Vector) -> Vector:
    trained = model + values(number, TABLE.num_parameters)
    return round_of(strategy, number, model, [(trained, 10)])


@pytest.mark.parametrize("name", ["FedAvg", "FedAvgM", "FedAdam", "FedYogi", "FedAdagrad"])
def test_a_resumed_strategy_goes_on_as_if_nothing_had_happened(name: str) -> None:
    """Its moments and momenta come back, too: the models are the same to the last bit."""
    model, undisturbed = values(0, TABLE.num_parameters), strategy_of(name)
    for number in (1, 2):
        model = one_round(undisturbed, number, model)
    saved = Checkpoint(checkpoint(2).record, TABLE, model, strategy_state.arrays_of(undisturbed))
    loaded = Checkpoint.from_bytes(saved.to_bytes())
    resumed = strategy_of(name)
    strategy_state.restore(resumed, loaded.strategy)
    for number in (3, 4):
        again = one_round(resumed, number, loaded.vector if number == 3 else model)
        model = one_round(undisturbed, number, model)
        assert again.tobytes() == model.tobytes()
