"""Rules of a region's rounds that need no network to be seen."""

import numpy as np

from fedfog.core import rounds
from fedfog.core.phases import Phase
from fedfog.core.slots import SlotTable


def closing(policy: rounds.Policy) -> rounds.RegionRounds:
    """A region that has just asked for its partial to be stored, at second 0."""
    region = rounds.RegionRounds("r", policy, boot=1)
    region.handle(rounds.PresenceSeen("a", True, 1), 0.0)
    region.handle(rounds.ModelArrived("run", 1, 1, "m", 3), 0.0)
    update = rounds.UpdateArrived("run", 1, "a", "m", 10, np.ones(3, np.float32), {})
    actions = region.handle(update, 0.0)
    assert isinstance(actions[-1], rounds.Commit)
    return region


def test_partial_that_cannot_be_stored_is_tried_again_until_store_timeout() -> None:
    region = closing(rounds.Policy(expected=1, store_limit=100.0))
    now, retries = 0.0, []
    while region.phase is not Phase.STOPPED:
        actions = region.handle(rounds.CommitFailed("disk full"), now)
        if region.phase is Phase.DEGRADED:
            due = region.wake_at()
            assert due is not None
            retries.append(due - now)
            now = due
            [commit] = region.handle(rounds.Tick(), now)
            assert isinstance(commit, rounds.Commit)
    assert 100.0 <= now <= 100.0 + rounds.RETRY_SECONDS[1]
    assert retries == sorted(retries), "the tries do not become rarer"
    [end] = actions
    assert isinstance(end, rounds.Exit)
    assert not end.another_owner
    assert "STORE_TIMEOUT" in end.reason
    assert "disk full" in end.reason


def test_nothing_is_accepted_while_the_partial_is_not_stored() -> None:
    region = closing(rounds.Policy(expected=1))
    region.handle(rounds.CommitFailed("disk full"), 0.0)
    again = rounds.UpdateArrived("run", 1, "a", "m", 10, np.ones(3, np.float32), {})
    assert region.handle(again, 0.5) == []
    [commit] = region.handle(rounds.Tick(), 1.0)
    assert isinstance(commit, rounds.Commit)
    assert commit.members == {"a": 10}
    said = region.handle(rounds.Committed(), 1.0)
    assert rounds.AnswerMembers("run", 1, ("a",)) in said


def test_a_round_that_began_with_more_regional_rounds_ends_with_one_more_after_a_restart() -> None:
    """FOG_ROUNDS of the server was lowered in between: what was accepted still reaches the partial,
    and what is a partial stays it if it was raised."""
    regional = rounds.Stored(frozenset("a"), None, (frozenset("a"), frozenset("a")), "m2")
    region = rounds.RegionRounds("r", rounds.Policy(), boot=2)
    began = region.handle(rounds.ModelArrived("run", 1, 1, "m", 3, stored=regional), 0.0)
    assert rounds.PublishRegional("run", 1, 2) in began
    update = rounds.UpdateArrived("run", 1, "a", "m2", 10, np.ones(3, np.float32), {}, fog_round=3)
    *_, commit = region.handle(update, 0.0)
    assert isinstance(commit, rounds.Commit)
    assert (commit.fog_round, commit.last, commit.base_digest) == (3, True, "m")

    closed = rounds.Stored(frozenset("a"), {"a": 10})
    region = rounds.RegionRounds("r", rounds.Policy(), boot=2)
    more = rounds.ModelArrived("run", 1, 1, "m", 3, stored=closed, fog_rounds=5)
    assert rounds.PublishPartial("run", 1) in region.handle(more, 0.0)


def test_a_regional_round_without_enough_clients_waits_for_them() -> None:
    policy = rounds.Policy(minimum=2, deadline=10)
    region = rounds.RegionRounds("r", policy, boot=1)
    for client in "ab":
        region.handle(rounds.PresenceSeen(client, True, 1), 0.0)
    region.handle(rounds.ModelArrived("run", 1, 1, "m", 3, fog_rounds=2), 0.0)
    region.handle(rounds.Tick(), policy.settle)
    for client in "ab":
        update = rounds.UpdateArrived("run", 1, client, "m", 10, np.ones(3, np.float32), {})
        region.handle(update, 4.0)
        region.handle(rounds.PresenceSeen(client, False, 1), 4.0)
    region.handle(rounds.Committed("m.1"), 4.0)
    assert (region.phase, region.fog_round) == (Phase.FORMING, 2)
    for client in "ab":
        region.handle(rounds.PresenceSeen(client, True, 2), 5.0)
    assert region.phase is Phase.OPEN


def test_slots_are_dealt_among_the_clients_without_data_of_their_own() -> None:
    region = rounds.RegionRounds("r", rounds.Policy(expected=3), boot=1)
    for name, own_data in (("a", True), ("b", False), ("c", False)):
        region.handle(rounds.PresenceSeen(name, True, 1, own_data=own_data), 0.0)
    actions = region.handle(rounds.ModelArrived("run", 1, 1, "m", 3), 0.0)
    dealt = [action for action in actions if isinstance(action, rounds.DealSlot)]
    assert dealt == [rounds.DealSlot("b", "run", 0, 2), rounds.DealSlot("c", "run", 1, 2)]
    assert region.cohort == {"a", "b", "c"}


def test_next_run_deals_slots_to_clients_that_had_the_same_in_the_last_one() -> None:
    """A client asks for a slot that does not come, but only after seconds."""
    region = rounds.RegionRounds("r", rounds.Policy(expected=2), boot=1)
    for slot, name in enumerate("ab"):
        region.handle(rounds.PresenceSeen(name, True, 1, slot=slot), 0.0)
    actions = region.handle(rounds.ModelArrived("second", 2, 1, "m", 3), 0.0)
    dealt = [action for action in actions if isinstance(action, rounds.DealSlot)]
    assert dealt == [rounds.DealSlot("a", "second", 0, 2), rounds.DealSlot("b", "second", 1, 2)]


def test_round_of_clients_with_their_own_data_needs_no_slot() -> None:
    region = rounds.RegionRounds("r", rounds.Policy(settle=3.0), boot=1)
    region.handle(rounds.ModelArrived("run", 1, 1, "m", 3), 0.0)
    for at, name in enumerate("ab"):
        region.handle(rounds.PresenceSeen(name, True, 1, own_data=True), float(at))
    actions = region.handle(rounds.Tick(), 4.0)
    assert region.phase is Phase.OPEN
    assert not [action for action in actions if isinstance(action, rounds.DealSlot)]
    for name in "ab":
        update = rounds.UpdateArrived("run", 1, name, "m", 10, np.ones(3, np.float32), {})
        last = region.handle(update, 5.0)[-1]
    assert isinstance(last, rounds.Commit)
    assert last.members == {"a": 10, "b": 10}


def test_after_a_restart_clients_with_their_own_data_do_not_stand_for_holders_of_slots() -> None:
    region = rounds.RegionRounds("r", rounds.Policy(settle=3.0), boot=2)
    slots = SlotTable.deal("run", ["a", "b"])
    region.handle(rounds.ModelArrived("run", 1, 2, "m", 3, slots=slots), 0.0)
    for name, own_data in (("a", False), ("x", True), ("b", False), ("y", True)):
        region.handle(rounds.PresenceSeen(name, True, 1, slots.holders.get(name), own_data), 0.1)
        assert region.phase is Phase.FORMING
    region.handle(rounds.Tick(), 3.1)
    assert region.cohort == {"a", "b", "x", "y"}
