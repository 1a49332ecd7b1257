"""The aggregator's store over many rounds."""

from pathlib import Path

import pytest

from fedfog.core.rounds import Newest
from fedfog.core.slots import SlotTable
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


def test_store_knows_the_newest_round_that_was_opened(tmp_path: Path) -> None:
    assert PartialStore(tmp_path).newest() is None
    store = PartialStore(tmp_path)
    for round in range(1, 6):
        do_round(store, round)
    assert PartialStore(tmp_path).newest() == Newest("run", 1, 5)
