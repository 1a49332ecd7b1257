"""Model checking of one more tier: a region whose parent is another aggregator, each of which
crashes at any step, over a network that loses, doubles and reorders. The parent has a second child,
`s`."""

import random

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule

from faulty_region import RUN, SIZE, FaultyRegion
from fedfog.core import participation as edge
from fedfog.core import rounds
from fedfog.core.slots import SlotTable

OTHER_EXAMPLES = 50
Partial = tuple[np.ndarray, dict[str, int], dict[str, str]]


def other_vector(round: int) -> np.ndarray:
    return np.full(SIZE, 5.0 * round, np.float32)


class FaultyTree(FaultyRegion):
    """The parent's partials make the global models."""

    def _begin_above(self) -> None:
        self.now, self.model, self.boot = 0.0, 0, 0
        self.top_policy = rounds.Policy(
            deadline=15, settle=1, limit=20, children=frozenset({"r", "s"})
        )
        self.top_boot = 0
        self.top_cohorts: dict[int, frozenset[str]] = {}  # the parent's disk
        self.top_newest: rounds.Newest | None = None
        self.top_slots: SlotTable | None = None
        self.top_partials: dict[int, Partial] = {}
        self.birth = rounds.PresenceSeen("r", False, 0, own_data=True)  # retained at the broker
        self.to_child: list[edge.Event] = []
        self.verdicts: dict[int, str] = {}  # of the parent, on the region's partials
        self._start_top()

    # The world around the rules

    def _top_arrived(self) -> rounds.ModelArrived:
        next_round = self.model + 1
        stored = None
        if next_round in self.top_cohorts or next_round in self.top_partials:
            partial = self.top_partials.get(next_round)
            members = partial[1] if partial else None
            stored = rounds.Stored(self.top_cohorts.get(next_round, frozenset()), members)
        return rounds.ModelArrived(
            RUN, 1, next_round, f"m{self.model}", SIZE, False, stored, self.top_slots
        )

    def _start_top(self) -> None:
        self.top_boot += 1
        self.top = rounds.RegionRounds("top", self.top_policy, self.top_boot, self.top_newest)
        self.to_top: list[rounds.Event] = []
        self._subscribe_top()

    def _subscribe_top(self) -> None:
        self._to_top(rounds.Connected())
        self._to_top(self._top_arrived())
        self._to_top(self.birth)
        self._to_top(rounds.PresenceSeen("s", True, 1, own_data=True))

    def _to_top(self, event: rounds.Event, die_after_commit: bool = False) -> None:
        actions = self.top.handle(event, self.now)
        while actions:
            match actions.pop(0):
                case rounds.StoreCohort(newest, cohort, slots):
                    self.top_cohorts[newest.round] = cohort
                    self.top_newest, self.top_slots = newest, slots
                case rounds.Commit(_, round, total, members, left_out):
                    assert round not in self.top_partials, "a round has two partials"
                    self.top_partials[round] = (total.mean(), dict(members), dict(left_out))
                    if die_after_commit:
                        self._start_top()
                        return
                    actions += self.top.handle(rounds.Committed(), self.now)
                case rounds.Answer("r", run, round, verdict):
                    self.to_child.append(edge.VerdictArrived(run, round, verdict, self.top_boot))
                case rounds.AnswerMembers(run, round, names) if "r" in names:
                    self.to_child.append(edge.VerdictArrived(run, round, "accepted", self.top_boot))
                case rounds.PublishStatus():
                    self.to_child.append(edge.AggregatorSeen(self.top_boot))
                case rounds.DealSlot() | rounds.Exit():
                    raise AssertionError("a parent deals no slots, and has no rival here")

    def _start_region(self, retained: int | None = None) -> None:
        self.up = edge.Participation(random.Random(0), own_data=True)
        self.to_child = [edge.AggregatorSeen(self.top_boot)]
        super()._start_region(retained)

    def _to_rules(self, event: rounds.Event, die_after_commit: bool = False) -> None:
        if isinstance(event, rounds.Connected):
            self._to_up(edge.Connected())
        elif isinstance(event, rounds.ModelArrived):
            self._to_up(edge.ModelArrived(event.run, event.run_started, event.round))
        super()._to_rules(event, die_after_commit)

    def _partial_published(self, round: int) -> None:
        self._to_up(edge.Trained(RUN, round))

    def _to_up(self, event: edge.Event) -> None:
        for action in self.up.handle(event, self.now):
            match action:
                case edge.Announce():
                    self.birth = rounds.PresenceSeen("r", True, self.boot, own_data=True)
                    self.to_top.append(self.birth)
                case edge.Send(_, round):
                    mean, members = self.store.partials[round]
                    n = sum(members.values())
                    self.to_top.append(self._partial("r", round, n, mean, len(members)))
                case edge.EmptyOutbox(_, round, verdict) if verdict != "void":
                    self.verdicts[round] = verdict

    @staticmethod
    def _partial(
        child: str, round: int, n: int, mean: np.ndarray, clients: int
    ) -> rounds.UpdateArrived:
        base = f"m{round - 1}"
        return rounds.UpdateArrived(RUN, round, child, base, n, mean, {"loss": 1}, clients)

    def _publish_model(self, round: int) -> None:
        super()._publish_model(round)
        self._to_top(self._top_arrived())

    def _send_other(self) -> None:
        round = self.model + 1
        self.to_top.append(self._partial("s", round, OTHER_EXAMPLES, other_vector(round), 3))

    # What may happen

    @rule()
    def publish_next_model(self) -> None:
        if self.model + 1 in self.top_partials and not self.server_away:
            self._publish_model(self.model + 1)

    @rule(data=st.data())
    def deliver_to_top(self, data: st.DataObject) -> None:
        if self.to_top:
            index = data.draw(st.integers(0, len(self.to_top) - 1))
            die = data.draw(st.sampled_from([False, False, False, True]))
            self._to_top(self.to_top.pop(index), die_after_commit=die)

    @rule(data=st.data())
    def deliver_to_child(self, data: st.DataObject) -> None:
        if self.to_child:
            self._to_up(self.to_child.pop(data.draw(st.integers(0, len(self.to_child) - 1))))

    @rule(seconds=st.sampled_from([0.5, 5.0, 30.0]))
    def pass_time(self, seconds: float) -> None:
        super().pass_time(seconds)
        self._tick_above()

    def _tick_above(self) -> None:
        self._to_up(edge.Tick())
        self._to_top(rounds.Tick())

    @rule()
    def send_other(self) -> None:
        self._send_other()

    @rule(seconds=st.integers(1, 4))
    def be_calm(self, seconds: int) -> None:
        """Without it hardly a round would come to its end between the faults."""
        for _ in range(seconds):
            self._calm_second()

    @rule(
        fault=st.sampled_from(["top", "lose to top", "double", "lose to child", "will", "broker"])
    )
    def suffer_above(self, fault: str) -> None:
        match fault:
            case "top":
                self._start_top()
            case "lose to top":
                self.to_top.clear()
                self._subscribe_top()
            case "double":
                self.to_top += self.to_top[:5]
                self.to_child += self.to_child[:5]
            case "lose to child":
                self.to_child = [edge.AggregatorSeen(self.top_boot)]
                self.suffer("lose to region", "a")
            case "will":  # the region's
                self.birth = rounds.PresenceSeen("r", False, self.boot, own_data=True)
                self.to_top.append(self.birth)
                self._start_region()
            case "broker":
                self.to_top.clear()
                self.to_child.clear()
                self._to_top(rounds.Connected())
                self.suffer("broker", "a")

    # The promises

    @invariant()
    def partials_of_the_parent_are_exact_and_name_whom_they_lack(self) -> None:
        for round, (mean, members, left_out) in self.top_partials.items():
            assert members.keys() | left_out.keys() == {"r", "s"}
            assert not members.keys() & left_out.keys()
            parts = []
            if "r" in members:
                vector, own = self.store.partials[round]
                assert members["r"] == sum(own.values())
                parts.append((vector, members["r"]))
            if "s" in members:
                parts.append((other_vector(round), OTHER_EXAMPLES))
            products = [n * vector.astype(np.float64) for vector, n in parts]
            expected = (np.sum(products, axis=0) / sum(members.values())).astype(np.float32)
            assert mean.tobytes() == expected.tobytes()

    @invariant()
    def verdicts_of_the_parent_are_true(self) -> None:
        for round, verdict in self.verdicts.items():
            assert verdict in ("accepted", "late")
            if verdict == "accepted":
                assert "r" in self.top_partials[round][1]
            else:
                assert "r" in self.top_partials[round][2]

    def _reached(self, target: int) -> bool:
        return target in self.top_partials

    def _calm_second(self) -> None:
        super()._calm_second()
        self._tick_above()
        self._send_other()
        while self.to_child:
            self._to_up(self.to_child.pop(0))
        while self.to_top:
            self._to_top(self.to_top.pop(0))


FaultyTree.TestCase.settings = settings(max_examples=150, stateful_step_count=80, deadline=None)
TestFaultyTree = FaultyTree.TestCase
