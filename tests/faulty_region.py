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


def vector_of(client: str, round: int, fog_round: int = 1) -> np.ndarray:
    """What this client trains in this round: whole numbers, so that every sum is exact."""
    value = (CLIENTS.index(client) + 1 + 4 * (fog_round - 1)) * 7 ** (round % 8)
    return np.full(SIZE, value, np.float32)


Aggregate = tuple[np.ndarray, dict[str, int]]


class Store:
    """The aggregator's disk."""

    def __init__(self) -> None:
        self.cohorts: dict[int, frozenset[str]] = {}
        self.partials: dict[int, Aggregate] = {}
        self.regional: dict[tuple[int, int], Aggregate] = {}
        self.slots: SlotTable | None = None
        self.newest: rounds.Newest | None = None

    def stored(self, round: int) -> rounds.Stored | None:
        if round < max(self.cohorts, default=0) - KEEP_ROUNDS:
            return None  # forgotten; `partials` has it for the checks only
        if round not in self.partials and round not in self.cohorts:
            return None
        before = [members for (of, _), (_, members) in self.regional.items() if of == round]
        return rounds.Stored(
            self.cohorts.get(round, frozenset()),
            self.partials[round][1] if round in self.partials else None,
            tuple(map(frozenset, before)),
            self.digest(round, len(before) + 1),
            np.zeros(SIZE, np.float32),
        )

    def digest(self, round: int, fog_round: int) -> str:
        """Of the model that the clients train from."""
        model = f"m{round - 1}"
        if fog_round == 1:
            return model
        return f"{model}, {self.regional[round, fog_round - 1][0].tobytes().hex()}"

    def aggregates(self, fog_rounds: int) -> dict[tuple[int, int], Aggregate]:
        """All of them, by round and regional round."""
        last = {(round, fog_rounds): partial for round, partial in self.partials.items()}
        return self.regional | last


class FaultyRegion(RuleBasedStateMachine):
    """One region, three clients and a server that publishes a model for every new partial."""

    @initialize(
        quorum=st.sampled_from([None, 2]), robust=st.booleans(), fog_rounds=st.integers(1, 3)
    )
    def begin(self, quorum: int | None, robust: bool, fog_rounds: int) -> None:
        self.fog_rounds = fog_rounds
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
        self.regional: edge.ModelArrived | None = None  # the region's model, retained at the broker
        self.presence: dict[str, rounds.PresenceSeen] = {}  # likewise
        self.to_region: list[rounds.Event] = []
        self.to_client: dict[str, list[edge.Event]] = {c: [] for c in CLIENTS}
        self.client_boot = dict.fromkeys(CLIENTS, 0)
        self.outbox: dict[str, tuple[str, int, int]] = {}
        self.accepted: set[tuple[str, int, int]] = set()
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
            RUN, 1, next_round, f"m{model}", SIZE, False, stored, slots, vector, self.fog_rounds
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
        self._regional_to(client)

    def _regional_to(self, client: str) -> None:
        if self.regional:
            self.to_client[client].append(self.regional)

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
                case rounds.Commit(_, round, total, members, fog_round=fog_round) as commit:
                    assert round not in self.store.partials, "a round has two partials"
                    assert fog_round == 1 + sum(of == round for of, _ in self.store.regional)
                    assert commit.last == (fog_round == self.fog_rounds)
                    assert commit.base_digest == f"m{round - 1}"
                    if commit.last:
                        self.store.partials[round] = (total.mean(), dict(members))
                    else:
                        self.store.regional[round, fog_round] = (total.mean(), dict(members))
                    if die_after_commit:
                        self._start_region()
                        return
                    digest = "" if commit.last else self.store.digest(round, fog_round + 1)
                    committed = rounds.Committed(digest, np.zeros(SIZE, np.float32))
                    actions += self.region.handle(committed, self.now)
                case rounds.Answer(client, run, round, verdict, reason, fog_round):
                    said = edge.VerdictArrived(run, round, verdict, self.boot, reason, fog_round)
                    self.to_client[client].append(said)
                case rounds.AnswerMembers(run, round, members, fog_round):
                    for client in members:
                        said = edge.VerdictArrived(run, round, "accepted", self.boot, "", fog_round)
                        self.to_client[client].append(said)
                case rounds.DealSlot(client, run, slot):
                    self.to_client[client].append(edge.SlotDealt(run, slot))
                case rounds.PublishStatus():
                    for queue in self.to_client.values():
                        queue.append(edge.AggregatorSeen(self.boot))
                case rounds.PublishPartial(_, round):
                    assert round in self.store.partials, "published before it was committed"
                    self._partial_published(round)
                case rounds.PublishRegional(run, round, fog_round):
                    assert (round, fog_round) in self.store.regional, "published before the commit"
                    self.regional = edge.ModelArrived(run, 1, round, fog_round=fog_round + 1)
                    for client in CLIENTS:
                        self._regional_to(client)
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
                case edge.Send(run, round, fog_round=fog_round):
                    assert self.outbox[client] == (run, round, fog_round)
                    digest = self.store.digest(round, fog_round)
                    self.to_region.append(self._update(client, round, fog_round, digest))
                case edge.EmptyOutbox(_, round, verdict, _, fog_round):
                    del self.outbox[client]
                    assert verdict != "rejected"
                    if verdict == "accepted":
                        self.accepted.add((client, round, fog_round))
                    elif verdict == "late" and round == self.region.round:
                        aggregate = self.store.aggregates(self.fog_rounds)[round, fog_round]
                        assert client not in aggregate[1], "late, but it was counted"

    @staticmethod
    def _update(
        client: str, round: int, fog_round: int = 1, digest: str = ""
    ) -> rounds.UpdateArrived:
        n, vector = examples_of(client), vector_of(client, round, fog_round)
        return rounds.UpdateArrived(
            RUN, round, client, digest, n, vector, {"loss": 1}, fog_round=fog_round
        )

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
            self.outbox[client] = (RUN, machine.round, machine.fog_round)
            self._to_client(client, edge.Trained(RUN, machine.round, machine.fog_round))

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
                self._regional_to(client)
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
                if (old + 1, 1) in self.store.regional:
                    self.regional = edge.ModelArrived(RUN, 1, old + 1, fog_round=2)
                self._start_region(retained=old)
                for name in CLIENTS:  # so do they, and what they trained is not in their outbox
                    self.outbox.pop(name, None)
                    self._start_client(name, retained=old)
                self.server_away = True
            case "broker":  # restarts without a memory
                self.to_region.clear()
                self.presence.clear()
                self.regional = None
                for name in CLIENTS:
                    self.to_client[name].clear()
                    self._to_client(name, edge.Connected())
                self._to_rules(rounds.Connected())
                self.to_region.append(self._arrived())  # published again by the server
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
    def aggregates_are_exact(self) -> None:
        aggregates = self.store.aggregates(self.fog_rounds)
        for (round, fog_round), (mean, members) in aggregates.items():
            vectors = [vector_of(c, round, fog_round).astype(np.float64) for c in members]
            expected = np.average(vectors, axis=0, weights=list(members.values()))
            if self.policy.aggregation == "median":
                expected = np.median(vectors, axis=0)
            assert mean.tobytes() == expected.astype(np.float32).tobytes()
            assert members == {c: examples_of(c) for c in members}

    @invariant()
    def accepted_updates_are_in_their_aggregate(self) -> None:
        aggregates = self.store.aggregates(self.fog_rounds)
        for client, round, fog_round in self.accepted:
            assert client in aggregates[round, fog_round][1]

    def teardown(self) -> None:
        """When the faults end, the round closes by itself."""
        if not hasattr(self, "region"):
            return
        target = self.model + 1
        for _ in range(60 * self.fog_rounds):
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
