"""An aggregator above others: whom it waits for, whom it names."""

import numpy as np

from fedfog.cli.regions import Regions
from fedfog.core import rounds
from fedfog.core.phases import Phase
from fedfog.messages.catalog import read
from fedfog.messages.schemas import Presence
from fedfog.messages.topics import Topics

SIZE = 3
CHILDREN = frozenset({"left", "right"})


def model(round: int) -> rounds.ModelArrived:
    return rounds.ModelArrived("run", 1, round, f"m{round - 1}", SIZE)


def partial(child: str, round: int, examples: int = 10, clients: int = 2) -> rounds.UpdateArrived:
    vector = np.ones(SIZE, np.float32)
    base = f"m{round - 1}"
    return rounds.UpdateArrived("run", round, child, base, examples, vector, {}, clients)


def seen(child: str, online: bool = True, boot: int = 1) -> rounds.PresenceSeen:
    return rounds.PresenceSeen(child, online, boot, own_data=True)


def parent(*present: str, **policy: object) -> rounds.RegionRounds:
    """A parent of `CHILDREN` that has got model 0."""
    defaults: dict[str, object] = {"children": CHILDREN, "deadline": 10, "limit": 20, "settle": 1}
    region = rounds.RegionRounds("top", rounds.Policy(**defaults | policy), boot=1)  # type: ignore[arg-type]
    for child in present:
        region.handle(seen(child), 0.0)
    region.handle(model(1), 0.0)
    return region


def commit_of(actions: list[rounds.Action]) -> rounds.Commit:
    (commit,) = (action for action in actions if isinstance(action, rounds.Commit))
    return commit


def close(region: rounds.RegionRounds, actions: list[rounds.Action], now: float) -> rounds.Commit:
    commit = commit_of(actions)
    region.handle(rounds.Committed(), now)
    return commit


def test_first_round_waits_for_all_children_without_clients_expected() -> None:
    region = parent("left")
    region.handle(rounds.Tick(), 5.0)  # longer than the settling time
    assert region.wake_at() == 20.0  # COHORT_LIMIT
    region.handle(seen("right"), 6.0)
    assert region.phase is Phase.OPEN


def test_death_of_a_child_does_not_end_the_wait_for_it_before_the_deadline() -> None:
    region = parent("left", "right")
    region.handle(partial("left", 1), 1.0)
    region.handle(seen("right", online=False), 2.0)
    assert region.phase is Phase.OPEN
    assert region.missing == ["right"]
    region.handle(seen("right", boot=2), 3.0)
    commit = commit_of(region.handle(partial("right", 1), 4.0))
    assert commit.members == {"left": 10, "right": 10}
    assert (commit.num_clients, commit.left_out) == (4, {})


def test_child_that_is_away_when_the_next_round_opens_is_waited_for_until_one_deadline() -> None:
    region = parent("left", "right")
    region.handle(partial("left", 1), 1.0)
    close(region, region.handle(partial("right", 1), 1.0), 1.0)
    region.handle(seen("right", online=False), 2.0)
    region.handle(model(2), 2.0)
    assert region.missing == ["left", "right"]
    region.handle(partial("left", 2), 3.0)
    assert close(region, region.handle(rounds.Tick(), 12.0), 12.0).left_out == {"right": "offline"}
    region.handle(model(3), 13.0)  # it did not come, so this round does not wait for it
    commit = commit_of(region.handle(partial("left", 3), 14.0))
    assert commit.left_out == {"right": "offline"}


def test_child_that_never_came_is_named_in_every_partial() -> None:
    region = parent("left")
    region.handle(rounds.Tick(), 20.0)
    assert region.phase is Phase.OPEN
    assert commit_of(region.handle(partial("left", 1), 21.0)).left_out == {"right": "offline"}


def test_child_that_comes_during_a_round_and_is_not_in_it_is_named() -> None:
    region = parent("left")
    region.handle(rounds.Tick(), 20.0)
    region.handle(seen("right"), 21.0)
    commit = commit_of(region.handle(partial("left", 1), 22.0))
    assert commit.left_out == {"right": "no update in time"}


def test_max_examples_is_that_of_one_client() -> None:
    region = parent("left", "right", max_examples=100)
    (refused,) = region.handle(partial("left", 1, examples=201), 1.0)
    assert isinstance(refused, rounds.Answer)
    assert (refused.verdict, "MAX_EXAMPLES" in refused.reason) == ("rejected", True)
    region.handle(partial("left", 1, examples=200), 1.0)
    assert region.members == {"left": 200}


def test_table_of_regions_has_a_child_under_its_parent_and_knows_its_death() -> None:
    regions, topics = Regions({"left": 3}), Topics()
    for online in (True, False):
        told = Presence(online=online, boot=1, own_data=True, deadline=5.0).to_json()
        regions.see(read(topics, topics.presence("top", "left"), told))
        assert regions.by_name["left"].parent == "top"
        assert regions.by_name["top"].online == ({"left"} if online else set())
    assert regions.by_name["left"].phase == "offline"
