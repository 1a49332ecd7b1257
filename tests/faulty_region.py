"""A region in a model of the world, for model checking: the rules of aggregator and clients over a
network that loses, doubles and reorders, while each party crashes at any step. The promises are
the invariants."""

import random

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fedfog.core import participation as edge
from fedfog.core import rounds
from fedfog.core.slots import SlotTable

CLIENTS = ("a", "b", "c")
SIZE = 3
KEEP_ROUNDS = 1
RUN = "run"


def examples_of(client: str) -> int:
    return 10 + CLIENTS.index(client)


def vector_of(client: str, round: int) -> np.ndarray:
    """What this client trains in this round: whole numbers, so that every sum is exact."""
    return np.full(SIZE, (CLIENTS.index(client) + 1) * 7 ** (round % 8), np.float32)


class Store:
    """The aggregator's disk."""

    def __init__(self) -> None:
        self.cohorts: dict[int, frozenset[str]] = {}
        self.partials: dict[int, tuple[np.ndarray, dict[str, int]]] = {}
        self.slots: SlotTable | None = None
        self.newest: rounds.Newest | None = None

    def stored(self, round: int) -> rounds.Stored | None:
        if round < max(self.cohorts, default=0) - KEEP_ROUNDS:
            return None  # forgotten; `partials` has it for the checks only
        if round in self.partials:
            return rounds.Stored(self.cohorts.get(round, frozenset()), self.partials[round][1])
        if round in self.cohorts:
            return rounds.Stored(self.cohorts[round], None)
        return None


class FaultyRegion(RuleBasedStateMachine):
    """One region, three clients and a server that publishes a model for every new partial."""

    @initialize(quorum=st.sampled_from([None, 2]), robust=st.booleans())
    def begin(self, quorum: int | None, robust: bool) -> None:
        self._begin_above()
        self.policy = rounds.Policy(
            quorum=quorum,
            deadline=10,
            settle=1,
            limit=20,
            expected=3,
            aggregation="median" if robust else "fedavg",
        )
        self.now = 0.0
        self.boot = 0
        self.server_away = False
        self.store = Store()
        self.model = 0  # newest global model, retained at the broker
        self.presence: dict[str, rounds.PresenceSeen] = {}  # retained at the broker
        self.to_region: list[rounds.Event] = []
        self.to_client: dict[str, list[edge.Event]] = {c: [] for c in CLIENTS}
        self.client_boot = dict.fromkeys(CLIENTS, 0)
        self.outbox: dict[str, tuple[str, int]] = {}
        self.accepted: set[tuple[str, int]] = set()
        self.clients: dict[str, edge.Participation] = {}
        for client in CLIENTS:
            self._start_client(client)
        self._start_region()

    # The world around the rules

    def _begin_above(self) -> None:
        """For those who look further up than the region."""

    def _arrived(self, model: int | None = None) -> rounds.ModelArrived:
        model = self.model if model is None else model
        next_round = model + 1
        stored = self.store.stored(next_round)
        slots, vector = self.store.slots, np.zeros(SIZE, np.float32)
        return rounds.ModelArrived(
            RUN, 1, next_round, f"m{model}", SIZE, False, stored, slots, vector
        )

    def _start_region(self, retained: int | None = None) -> None:
        """`retained`: the model that an old broker hands out before the newest comes again."""
        self.boot += 1
        self.region = rounds.RegionRounds("r", self.policy, self.boot, self.store.newest)
        self.to_region = []
        self._to_rules(rounds.Connected())
        self._to_rules(self._arrived(retained))
        for presence in self.presence.values():
            self._to_rules(presence)

    def _start_client(self, client: str, retained: int | None = None) -> None:
        self.client_boot[client] += 1
        outbox = self.outbox.get(client)
        self.clients[client] = edge.Participation(random.Random(0), outbox=outbox)
        self.to_client[client] = []
        self._to_client(client, edge.Connected())
        model = self.model if retained is None else retained
        self._to_client(client, edge.ModelArrived(RUN, 1, model + 1))

    def _to_rules(self, event: rounds.Event, die_after_commit: bool = False) -> None:
        actions = self.region.handle(event, self.now)
        while actions:
            action = actions.pop(0)
            match action:
                case rounds.StoreCohort(newest, cohort, slots):
                    self.store.cohorts[newest.round] = cohort
                    self.store.newest = newest
                    self.store.slots = slots
                case rounds.StoreSlots(slots):
                    self.store.slots = slots
                case rounds.Commit(_, round, total, members):
                    assert round not in self.store.partials, "a round has two partials"
                    self.store.partials[round] = (total.mean(), dict(members))
                    if die_after_commit:
                        self._start_region()
                        return
                    actions += self.region.handle(rounds.Committed(), self.now)
                case rounds.Answer(client, run, round, verdict):
                    said = edge.VerdictArrived(run, round, verdict, self.boot)
                    self.to_client[client].append(said)
                case rounds.AnswerMembers(run, round, members):
                    for client in members:
                        said = edge.VerdictArrived(run, round, "accepted", self.boot)
                        self.to_client[client].append(said)
                case rounds.DealSlot(client, run, slot):
                    self.to_client[client].append(edge.SlotDealt(run, slot))
                case rounds.PublishStatus():
                    for queue in self.to_client.values():
                        queue.append(edge.AggregatorSeen(self.boot))
                case rounds.PublishPartial(_, round):
                    assert round in self.store.partials, "published before it was committed"
                    self._partial_published(round)
                case rounds.Exit():
                    raise AssertionError("nobody else owns the region")
                case rounds.Log():
                    pass

    def _partial_published(self, round: int) -> None:
        """For those who look further up, too."""

    def _to_client(self, client: str, event: edge.Event) -> None:
        machine = self.clients[client]
        for action in machine.handle(event, self.now):
            match action:
                case edge.Announce():
                    boot = self.client_boot[client]
                    birth = rounds.PresenceSeen(client, True, boot, machine.current_slot)
                    self.presence[client] = birth
                    self.to_region.append(birth)
                case edge.Send(run, round):
                    assert self.outbox[client] == (run, round)
                    self.to_region.append(self._update(client, round))
                case edge.EmptyOutbox(_, round, verdict):
                    del self.outbox[client]
                    if verdict == "accepted":
                        self.accepted.add((client, round))

    @staticmethod
    def _update(client: str, round: int) -> rounds.UpdateArrived:
        n, vector = examples_of(client), vector_of(client, round)
        return rounds.UpdateArrived(RUN, round, client, f"m{round - 1}", n, vector, {"loss": 1})

    def _publish_model(self, round: int) -> None:
        self.model = round
        self._to_rules(self._arrived())
        for client in CLIENTS:
            self._to_client(client, edge.ModelArrived(RUN, 1, round + 1))

    # What may happen, in any order. Faults are one rule among seven, so that rounds do close.

    @rule(data=st.data())
    def deliver_to_region(self, data: st.DataObject) -> None:
        if self.to_region:
            index = data.draw(st.integers(0, len(self.to_region) - 1))
            die = data.draw(st.sampled_from([False, False, False, True]))
            self._to_rules(self.to_region.pop(index), die_after_commit=die)

    @rule(data=st.data(), client=st.sampled_from(CLIENTS))
    def deliver_to_client(self, data: st.DataObject, client: str) -> None:
        queue = self.to_client[client]
        if queue:
            self._to_client(client, queue.pop(data.draw(st.integers(0, len(queue) - 1))))

    @rule(client=st.sampled_from(CLIENTS))
    def finish_training(self, client: str) -> None:
        machine = self.clients[client]
        if machine.duty is edge.Duty.TRAINING:
            self.outbox[client] = (RUN, machine.round)
            self._to_client(client, edge.Trained(RUN, machine.round))

    @rule(clients=st.sets(st.sampled_from(CLIENTS), min_size=1))
    def go_on_in_order(self, clients: set[str]) -> None:
        """Some clients do all they can, and the region takes everything that is under way."""
        for client in sorted(clients):
            while self.to_client[client]:
                self._to_client(client, self.to_client[client].pop(0))
            self.finish_training(client)
        while self.to_region:
            self._to_rules(self.to_region.pop(0))

    @rule(seconds=st.sampled_from([0.5, 5.0, 30.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self._to_rules(rounds.Tick())
        for client in CLIENTS:
            self._to_client(client, edge.Tick())

    @rule()
    def publish_next_model(self) -> None:
        if self.model + 1 in self.store.partials and not self.server_away:
            self._publish_model(self.model + 1)

    @rule(
        fault=st.sampled_from(
            [
                "lose",
                "lose to region",
                "double",
                "old model",
                "old model at start",
                "broker",
                "region",
                "client",
                "will",
            ]
        ),
        client=st.sampled_from(CLIENTS),
    )
    def suffer(self, fault: str, client: str) -> None:
        match fault:
            case "lose":  # a client's connection breaks, and what was on its way is lost
                self.to_client[client].clear()
                self._to_client(client, edge.Connected())
            case "lose to region":  # the aggregator's breaks; retained messages come again
                self.to_region.clear()
                self._to_rules(rounds.Connected())
                self.to_region += [self._arrived(), *self.presence.values()]
            case "double":
                self.to_region += self.to_region[:5]
                for queue in self.to_client.values():
                    queue += queue[:5]
            case "old model":  # from a broker that was restored from an old state
                self._to_rules(rounds.ModelArrived(RUN, 1, max(1, self.model), "m", SIZE))
                for name in CLIENTS:
                    self._to_client(name, edge.ModelArrived(RUN, 1, max(1, self.model)))
            case "old model at start":
                old = max(0, self.model - 3)
                self._start_region(retained=old)
                for name in CLIENTS:  # so do they, and what they trained is not in their outbox
                    self.outbox.pop(name, None)
                    self._start_client(name, retained=old)
                self.server_away = True
            case "broker":  # restarts without a memory
                self.to_region.clear()
                self.presence.clear()
                self._to_rules(rounds.Connected())
                self.to_region.append(self._arrived())  # published again by the server
                for name in CLIENTS:
                    self.to_client[name].clear()
                    self._to_client(name, edge.Connected())
            case "region":
                self._start_region()
            case "client":
                self._start_client(client)
            case "will":
                death = rounds.PresenceSeen(client, False, self.client_boot[client])
                self.presence[client] = death
                self.to_region.append(death)
                self._start_client(client)

    # The promises

    @invariant()
    def partials_are_exact(self) -> None:
        for round, (mean, members) in self.store.partials.items():
            vectors = [vector_of(c, round).astype(np.float64) for c in members]
            expected = np.average(vectors, axis=0, weights=list(members.values()))
            if self.policy.aggregation == "median":
                expected = np.median(vectors, axis=0)
            assert mean.tobytes() == expected.astype(np.float32).tobytes()
            assert members == {c: examples_of(c) for c in members}

    @invariant()
    def accepted_updates_are_in_the_partial(self) -> None:
        for client, round in self.accepted:
            assert client in self.store.partials[round][1]

    def teardown(self) -> None:
        """When the faults end, the round closes by itself."""
        if not hasattr(self, "region"):
            return
        target = self.model + 1
        for _ in range(60):
            self._calm_second()
            if self._reached(target):
                return
        raise AssertionError(f"round {target} does not close: {self.region.phase}")

    @rule()
    def server_returns(self) -> None:
        """It connects to the old broker, and publishes the newest model again."""
        if self.server_away:
            self.server_away = False
            self._publish_model(self.model)

    def _calm_second(self) -> None:
        self.server_returns()
        self.now += 1.0
        self._to_rules(rounds.Tick())
        for client in CLIENTS:
            self._to_client(client, edge.Tick())
            self.finish_training(client)
            while self.to_client[client]:
                self._to_client(client, self.to_client[client].pop(0))
        while self.to_region:
            self._to_rules(self.to_region.pop(0))

    def _reached(self, target: int) -> bool:
        return target in self.store.partials
