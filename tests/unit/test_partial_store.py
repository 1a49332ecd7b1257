"""The aggregator's store over many rounds."""

from pathlib import Path

import pytest

from fedfog.core.rounds import Newest
from fedfog.core.slots import SlotTable
from fedfog.messages.codec import decode
from fedfog.messages.schemas import PartialMeta
from fedfog_aggregator.store import AnotherOwnerError, PartialStore
from flower import partial

CLIENTS = frozenset({"a", "b"})
SLOTS = SlotTable("run", 2, {"a": 0, "b": 1})


def do_round(store: PartialStore, round: int, run: str = "run") -> None:
    slots = SlotTable(run, 2, dict(SLOTS.holders))
    store.save_cohort(Newest(run, 1, round), CLIENTS, slots, keep=2)
    store.commit(run, round, [partial(round, round, run=run, parameters=2000)], {"c": 10})


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_store_is_no_larger_after_3000_rounds_than_after_10(tmp_path: Path) -> None:
    """Everything in the folder, also journals; and after a second run."""
    store = PartialStore(tmp_path)
    # Nothing here is about power loss, and syncs are slow.
    store._db.execute("pragma synchronous = off")
    for round in range(1, 11):
        do_round(store, round)
    early = size(tmp_path)
    for round in range(11, 3001):
        do_round(store, round)
    for round in range(1, 11):
        do_round(store, round, "second")
    assert size(tmp_path) <= early
    assert store.partial("run", 3000) is None
    assert store.partial("second", 10) is not None


def test_rounds_that_are_kept_can_be_read_after_a_restart(tmp_path: Path) -> None:
    store = PartialStore(tmp_path)
    for round in range(1, 6):
        do_round(store, round)
    store.close()
    again = PartialStore(tmp_path)
    kept = [round for round in range(1, 6) if again.partial("run", round)]
    assert kept == [3, 4, 5]
    assert again.partial("run", 5) == partial(5, 5, parameters=2000)
    closed = again.stored("run", 5)
    assert closed is not None
    assert (closed.cohort, closed.members) == (CLIENTS, {"c": 10})
    assert again.slots("run") == SLOTS


def test_second_partial_of_a_round_is_refused(tmp_path: Path) -> None:
    store = PartialStore(tmp_path)
    do_round(store, 1)
    with pytest.raises(AnotherOwnerError, match=r"aggregator\.db already has a partial of round 1"):
        store.commit("run", 1, [partial(9.0, 1)], {"c": 10})
    assert store.partial("run", 1) == partial(1, 1, parameters=2000)


def test_of_regional_rounds_the_newest_model_is_kept_and_of_those_before_what_they_say(
    tmp_path: Path,
) -> None:
    store = PartialStore(tmp_path)
    store.save_cohort(Newest("run", 1, 1), CLIENTS, SLOTS, keep=2)
    for fog_round in (1, 2):
        payload = partial(fog_round, 1, members={f"c{fog_round}": 10})
        store.commit_regional(fog_round, decode(payload, PartialMeta).meta, [payload])
    with pytest.raises(AnotherOwnerError, match="regional round 2 of 1"):
        store.commit_regional(2, decode(payload, PartialMeta).meta, [payload])
    store.close()
    again = PartialStore(tmp_path)
    stored = again.stored("run", 1)
    assert stored is not None
    assert stored.vector is not None
    assert (stored.members, stored.regional) == (None, (frozenset({"c1"}), frozenset({"c2"})))
    assert stored.vector.tolist() == [2.0] * 13
    assert [meta.metrics.train_loss for meta in again.regional("run", 1)] == [1.0, 2.0]
    again.commit("run", 1, [partial(3, 1)], {"c": 10})
    closed = again.stored("run", 1)
    assert closed is not None
    assert closed.members == {"c": 10}
    cohort_lost = PartialStore(tmp_path / "other")  # when it opened, the disk was full
    cohort_lost.commit_regional(1, decode(payload, PartialMeta).meta, [payload])
    assert cohort_lost.stored("run", 1) is not None
    again.save_cohort(Newest("run", 1, 2), CLIENTS, SLOTS, keep=2)
    assert again.regional("run", 1) == []
    assert again.partial("run", 1) is not None


def test_store_knows_the_newest_round_that_was_opened(tmp_path: Path) -> None:
    assert PartialStore(tmp_path).newest() is None
    store = PartialStore(tmp_path)
    for round in range(1, 6):
        do_round(store, round)
    assert PartialStore(tmp_path).newest() == Newest("run", 1, 5)
