"""Data slots: disjoint, covering, stable."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfog.core.slots import SlotTable, slot_indices, slots_share


@given(
    examples=st.integers(45, 600),
    slots_of_region=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    seed=st.integers(0, 2**32),
)
def test_slots_of_all_regions_are_disjoint_and_cover_the_training_set(
    examples: int, slots_of_region: list[int], seed: int
) -> None:
    regions = len(slots_of_region)
    parts = [
        slot_indices(examples, slot, slots, region, regions, seed)
        for region, slots in enumerate(slots_of_region)
        for slot in range(slots)
    ]
    assert sorted(np.concatenate(parts).tolist()) == list(range(examples))


@given(
    examples=st.integers(5, 100),
    slots=st.integers(1, 200),
    regions=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
def test_slots_without_an_example_of_their_own_share_one(
    examples: int, slots: int, regions: int, seed: int
) -> None:
    """More slots than examples: none is empty, none of the region's examples is left out, and no
    example is in more than one slot above the others."""
    every: list[int] = []
    for region in range(regions):
        held = [slot_indices(examples, slot, slots, region, regions, seed) for slot in range(slots)]
        assert all(len(indices) > 0 for indices in held)
        times = Counter(np.concatenate(held).tolist())
        assert max(times.values()) - min(times.values()) <= 1
        assert slots_share(examples, slots, region, regions) is (slots > len(times))
        every += times
    assert sorted(every) == list(range(examples))


def test_region_without_an_example_is_refused() -> None:
    with pytest.raises(ValueError, match="2 examples are too few for 3 regions"):
        slot_indices(2, 0, 1, 2, 3, seed=1)


@given(examples=st.integers(20, 600), slots=st.integers(1, 20), seed=st.integers(0, 2**32))
def test_slots_of_a_region_differ_by_at_most_one_example(
    examples: int, slots: int, seed: int
) -> None:
    sizes = [len(slot_indices(examples, slot, slots, 0, 1, seed)) for slot in range(slots)]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("wrong", [(3, 3, 0, 1), (-1, 3, 0, 1), (0, 3, 2, 2)])
def test_slot_that_does_not_exist_is_refused(wrong: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="no slot"):
        slot_indices(100, *wrong, seed=1)


def test_returning_client_has_its_slot_back() -> None:
    table = SlotTable.deal("run", ["c", "a", "b"])
    assert table.holders == {"a": 0, "b": 1, "c": 2}
    table.leave("b", now=10)
    assert table.join("b", now=1000, limit=60) == 1


def test_newcomer_gets_the_slot_of_a_client_that_is_gone_for_good() -> None:
    table = SlotTable.deal("run", ["a", "b"])
    table.leave("b", now=10)
    assert table.join("d", now=100, limit=60) == 1
    assert "b" not in table.holders


def test_newcomer_without_a_free_slot_shares_one_and_that_is_known() -> None:
    table = SlotTable.deal("run", ["a", "b"])
    table.leave("b", now=10)
    slot = table.join("d", now=20, limit=60)
    assert table.shared(slot)
    assert table.join("e", now=21, limit=60) != slot  # the one with the fewest holders


@given(
    moves=st.lists(
        st.tuples(st.sampled_from("abcdef"), st.booleans(), st.integers(0, 100)), max_size=40
    )
)
def test_nobody_is_without_a_slot_and_slots_never_change_under_a_client(
    moves: list[tuple[str, bool, int]],
) -> None:
    table = SlotTable.deal("run", "abc")
    now = 0
    present: dict[str, int] = {}
    for client, joins, seconds in moves:
        now += seconds
        if joins:
            slot = table.join(client, now, limit=60)
            assert present.get(client, slot) == slot
            present[client] = slot
            assert 0 <= slot < table.slots
        elif client in present:
            table.leave(client, now)
            del present[client]
