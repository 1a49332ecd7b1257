"""Who holds which data slot: stable, and nobody is without one."""

from hypothesis import given
from hypothesis import strategies as st

from fedfog.core.slots import SlotTable


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
