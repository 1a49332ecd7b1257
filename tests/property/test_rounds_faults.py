"""Model checking: the rules of a region over a network that loses, doubles and reorders, while each
party crashes at any step (`tests/faulty_region.py` has the world and the promises)."""

from collections.abc import Mapping

from hypothesis import settings

from faulty_region import RUN, SIZE, FaultyRegion
from fedfog.core import rounds
from fedfog.core.aggregation import WeightedSum
from fedfog.core.phases import Phase

FaultyRegion.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestFaultyRegion = FaultyRegion.TestCase


def test_every_cell_of_the_table_is_handled_or_refused_without_a_change() -> None:
    """All phases times all events: what the table lacks raises, and changes nothing."""
    events: Mapping[type, rounds.Event] = {
        type(e): e
        for e in (
            rounds.Connected(),
            rounds.ModelArrived(RUN, 1, 1, "m", SIZE),
            FaultyRegion._update("a", 1),
            rounds.PresenceSeen("a", True, 1),
            rounds.OwnStatusSeen(0, True),
            rounds.Tick(),
            rounds.Committed(),
            rounds.CommitFailed("disk full"),
        )
    }
    assert set(events) == set(rounds.TABLE)
    for phase in Phase:
        for kind, event in events.items():
            region = rounds.RegionRounds("r", rounds.Policy(), boot=1)
            region.run, region.round, region.phase = RUN, 1, phase
            region._total = WeightedSum(SIZE)
            before = dict(vars(region))
            if phase in rounds.TABLE[kind]:
                region.handle(event, 5.0)
            else:
                try:
                    region.handle(event, 5.0)
                except rounds.IllegalEventError:
                    assert vars(region) == before
                else:
                    raise AssertionError(f"{kind.__name__} while {phase} was taken")
