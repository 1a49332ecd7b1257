"""A fog in virtual time: the rules of clients, aggregators and bridges are the real ones, of
`fedfog.core`; cores and links are played, from `Costs`.

So 10^5 clients fit into a process, and a round shows what the rules do at that size: who waits for
whom, what is sent twice, and which process has the most to do.
"""

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np

from fedfog.core import participation as edge
from fedfog.core import rounds
from fedfog.core.aggregation import WeightedSum
from fedfog.core.bridge import Decision, Matcher
from fedfog.messages import schemas
from fedfog.messages.codec import TensorTable, encode

RUN = "run"
DIGEST = "0" * 64
FOREVER = 1e9  # seconds; deadlines are not what is looked at
PUSH = 1 / 3  # of a region's time at the SuperLink: pushed at once, the reply comes after it
KINDS = 61  # different updates

Then = Callable[[], None]


@dataclass(frozen=True)
class Costs:
    """Seconds of one core, for one size of the model; `bench.scaling` measures them."""

    base: float = 0.0  # the server's, of a round of any width
    region: float = 0.0  # the SuperLink's, per bridge
    broker_message: float = 0.0  # per message in or out
    broker_mb: float = 0.0  # per megabyte in or out
    aggregator: float = 0.0  # per update
    client: float = 0.0  # a client's in a round, beside its training
    link_mb: float = 0.0  # per megabyte in or out of a broker, each way; 0: loopback


@dataclass(frozen=True)
class Layout:
    """Who is where. `tiers` counts those that average, as in `fedfog demo`."""

    clients: int
    regions: int
    tiers: int = 2
    fan_in: int = 2  # regions below an aggregator of a higher tier
    broker_per_region: bool = False
    cores: float = math.inf  # that all processes share, and a region's clients share a process;
    # infinite: each process and each client has a core of its own


@dataclass(frozen=True)
class Sizes:
    """Bytes of the messages, as the real codec makes them."""

    update: int
    receipt: int
    status: int
    member: int  # one more client, in a region's receipt
    partial_member: int  # and in a partial

    @classmethod
    def of(cls, parameters: int) -> "Sizes":
        metrics = schemas.ClientMetrics(train_loss=0.1234567890123456)
        update = schemas.UpdateMeta(
            run=RUN,
            round=1,
            region="region_1",
            client="client-12345",
            base_digest=DIGEST,
            num_examples=100,
            metrics=metrics,
        )
        table = TensorTable((("weights", (parameters,)),))
        tensors = np.zeros(parameters, np.float32)
        one, two = (partial_meta(n) for n in (1, 2))
        partials = [len(encode(meta, table, tensors)) for meta in (one, partial_meta(1001))]
        receipts = [
            len(schemas.RegionReceipt(run=RUN, round=1, boot=1, members=list(m)).to_json())
            for m in (one.members, two.members)
        ]
        receipt = schemas.Receipt(run=RUN, round=1, verdict=schemas.Verdict.RECEIVED, boot=1)
        status = schemas.Status(online=True, boot=1, run=RUN, round=1)
        return cls(
            update=len(encode(update, table, tensors)),
            receipt=len(receipt.to_json()),
            status=len(status.to_json()),
            member=receipts[1] - receipts[0],
            partial_member=(partials[1] - partials[0]) // 1000,
        )


def partial_meta(members: int) -> schemas.PartialMeta:
    """Fields of a partial with so many members."""
    return schemas.PartialMeta(
        run=RUN,
        round=1,
        region="region_1",
        digest=DIGEST,
        num_clients=members,
        num_examples=100 * members,
        members={name_of(10**5 + i): 100 for i in range(members)},
        metrics=schemas.ClientMetrics(train_loss=0.1),
    )


def examples_of(client: int) -> int:
    return 1 + client % 97


def kind_of(client: int, round: int) -> int:
    """Which of the updates a client has in a round."""
    return (7 * client + round) % KINDS


def digest(model: int) -> str:
    return f"m{model}"


def name_of(client: int) -> str:
    return f"client-{client}"


class Clock:
    """What happens when, in seconds of virtual time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._count = itertools.count()
        self._due: list[tuple[float, int, Then]] = []

    def at(self, when: float, then: Then) -> None:
        heapq.heappush(self._due, (max(when, self.now), next(self._count), then))

    def step(self) -> None:
        self.now, _, then = heapq.heappop(self._due)
        then()


class Machine:
    """Cores that serve their processes in turn, a job at a time."""

    def __init__(self, clock: Clock, cores: float) -> None:
        self._clock, self._free = clock, cores
        self._ready: deque[Process] = deque()

    def wake(self, process: "Process") -> None:
        self._ready.append(process)
        while self._free and self._ready:
            process = self._ready.popleft()
            seconds, then = process.jobs.popleft()
            self._free -= 1
            self._clock.at(self._clock.now + seconds, partial(self._done, process, then))

    def _done(self, process: "Process", then: Then) -> None:
        self._free += 1
        then()
        if process.jobs:
            self._ready.append(process)
        else:
            process.idle = True
        if self._ready:
            self.wake(self._ready.popleft())


@dataclass
class Process:
    """One thread: its jobs are done one after the other."""

    machine: Machine
    jobs: deque[tuple[float, Then]] = field(default_factory=deque)
    idle: bool = True
    busy: float = 0.0  # seconds of all jobs until now

    def do(self, seconds: float, then: Then) -> None:
        self.busy += seconds
        self.jobs.append((seconds, then))
        if self.idle:
            self.idle = False
            self.machine.wake(self)


class Broker:
    """A broker of one thread and its link, which carries as much in as out. Aggregators, bridges
    and server are on the broker's side of the link."""

    def __init__(self, fog: "Fog") -> None:
        self.process = Process(fog.machine)
        self.bytes_in = self.bytes_out = 0
        self._costs = fog.costs
        self._inward, self._outward = Process(fog.machine), Process(fog.machine)

    def take(self, size: int, then: Then) -> None:
        """Take a message of `size` bytes over the link, and hand it on behind it."""
        self.bytes_in += size
        self.bytes_out += size
        work = partial(self.process.do, self._seconds(size, 2), then)
        self._carry(self._inward, size, work)

    def hand_out(self, size: int, everybody: Iterable[Then]) -> None:
        """Take a message from behind the link, and hand it to everybody over the link."""
        self.bytes_in += size
        self.process.do(self._seconds(size, 1), _nothing)
        for then in everybody:
            self.bytes_out += size
            carry = partial(self._carry, self._outward, size, then)
            self.process.do(self._seconds(size, 1), carry)

    def _seconds(self, size: int, times: int) -> float:
        return times * (self._costs.broker_message + self._costs.broker_mb * size / 1e6)

    def _carry(self, direction: Process, size: int, then: Then) -> None:
        if seconds := self._costs.link_mb * size / 1e6:
            direction.do(seconds, then)
        else:
            then()


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Round:
    """What a global round took and moved; of each kind of process, the busiest."""

    seconds: float
    members: int  # clients whose update is in the model
    copies: float  # of an update that were sent, in the mean
    bytes_in: int
    bytes_out: int
    broker_seconds: float
    aggregator_seconds: float
    superlink_seconds: float


class Timed:
    """A party with rules that ask to be woken."""

    rules: edge.Participation | rounds.RegionRounds

    def __init__(self, fog: "Fog") -> None:
        self.fog = fog
        self._due: float | None = None

    def tick(self) -> None:
        raise NotImplementedError

    def remind(self) -> None:
        due = self.rules.wake_at()
        if due is not None and due != self._due:
            self._due = due
            self.fog.clock.at(due, self.tick)


class Client(Timed):
    """An edge client."""

    rules: edge.Participation

    def __init__(self, fog: "Fog", region: "Region", number: int) -> None:
        super().__init__(fog)
        self._region, self._number = region, number
        self.name = name_of(number)
        self.rules = edge.Participation(fog.rng)
        shared = math.isfinite(fog.layout.cores)
        self._process = region.swarm if shared else Process(fog.machine)

    def handle(self, event: edge.Event) -> None:
        fog = self.fog
        for action in self.rules.handle(event, fog.clock.now):
            match action:
                case edge.Announce():
                    slot = self.rules.current_slot
                    birth = rounds.PresenceSeen(self.name, True, 1, slot)
                    self._region.send_in(fog.sizes.status, birth)
                case edge.Train(run, round):
                    self._process.do(fog.costs.client, partial(self._train, run, round))
                case edge.Send(run, round):
                    fog.sent += 1
                    n, kind = examples_of(self._number), kind_of(self._number, round)
                    update = rounds.UpdateArrived(
                        run, round, self.name, digest(round - 1), n, fog.updates[kind], {"loss": 1}
                    )
                    self._region.send_in(fog.sizes.update, update)
        self.remind()

    def _train(self, run: str, round: int) -> None:
        seconds = self.fog.training * self.fog.rng.uniform(0.5, 1.5)
        trained = partial(self.handle, edge.Trained(run, round))
        self.fog.clock.at(self.fog.clock.now + seconds, trained)

    def tick(self) -> None:
        self.handle(edge.Tick())


class Region(Timed):
    """A fog aggregator, of clients or of other aggregators; the topmost has a bridge."""

    rules: rounds.RegionRounds

    def __init__(self, fog: "Fog", name: str, broker: Broker, below: "list[Region]") -> None:
        super().__init__(fog)
        self.name, self.broker, self.below = name, broker, below
        self.clients: list[Client] = []
        self.parent: Region | None = None
        self.up = edge.Participation(fog.rng, own_data=True)  # towards the parent
        self.process, self.swarm = Process(fog.machine), Process(fog.machine)
        self.partial: rounds.Commit | None = None  # the newest
        self.mean = np.zeros(0, np.float32)
        self.matcher: Matcher[int] = Matcher()
        for child in below:
            child.parent = self

    def start(self) -> None:
        """Its clients are known now."""
        policy = rounds.Policy(
            expected=len(self.clients),
            children=frozenset(child.name for child in self.below),
            deadline=FOREVER,
            limit=FOREVER,
        )
        self.rules = rounds.RegionRounds(self.name, policy, boot=1)
        self.handle(rounds.Connected())
        if self.parent:
            self._climb(edge.Connected())
        for client in self.clients:
            client.handle(edge.Connected())

    def send_in(self, size: int, event: rounds.Event) -> None:
        """Send it a message of `size` bytes over its broker."""
        seconds = self.fog.costs.aggregator * isinstance(event, rounds.UpdateArrived)
        do = partial(self.process.do, seconds, partial(self.handle, event))
        self.broker.take(size, do)

    def model(self, event: rounds.ModelArrived) -> None:
        if self.parent:
            self._climb(edge.ModelArrived(RUN, 1, event.round))
        self.handle(event)

    def _tell(self, said: edge.Event, size: int, names: Iterable[str] | None = None) -> None:
        """Publish to all below it, or to one of them."""
        chosen = self._below.values() if names is None else (self._below[n] for n in names)
        self.broker.hand_out(size, [partial(handle, said) for handle in chosen])

    @cached_property
    def _below(self) -> dict[str, Callable[[edge.Event], None]]:
        below: dict[str, Callable[[edge.Event], None]]
        below = {client.name: client.handle for client in self.clients}
        below |= {child.name: child._climb for child in self.below}
        return below

    def handle(self, event: rounds.Event) -> None:
        fog, sizes = self.fog, self.fog.sizes
        actions = deque(self.rules.handle(event, fog.clock.now))
        while actions:
            match actions.popleft():
                case rounds.PublishStatus():
                    self._tell(edge.AggregatorSeen(1), sizes.status)
                case rounds.Answer(client, run, round, verdict):
                    said = edge.VerdictArrived(run, round, verdict, 1)
                    self._tell(said, sizes.receipt, [client])
                case rounds.AnswerMembers(run, round, members):
                    said = edge.VerdictArrived(run, round, "accepted", 1)
                    self._tell(said, sizes.receipt + sizes.member * len(members))
                case rounds.DealSlot(client, run, slot):
                    self._tell(edge.SlotDealt(run, slot), sizes.status, [client])
                case rounds.Commit() as commit:
                    assert not self.partial or commit.round > self.partial.round
                    self.partial, self.mean = commit, commit.total.mean()
                    actions += self.rules.handle(rounds.Committed(), fog.clock.now)
                case rounds.PublishPartial():
                    self._publish()
                case rounds.Exit(reason):
                    raise AssertionError(reason)
        self.remind()

    def tick(self) -> None:
        self.handle(rounds.Tick())

    def _publish(self) -> None:
        assert self.partial
        key = self.partial.run, self.partial.round
        if self.parent:
            self._climb(edge.Trained(*key))
            return
        arrived = partial(self.matcher.on_partial, key, self.mean.tobytes())
        self.broker.take(self._partial_size, lambda: self._carry_out(arrived()))

    @property
    def _partial_size(self) -> int:
        assert self.partial
        sizes = self.fog.sizes
        return sizes.update + sizes.partial_member * len(self.partial.members)

    def _climb(self, event: edge.Event) -> None:
        """What happens to it as a child of its parent."""
        assert self.parent
        for action in self.up.handle(event, self.fog.clock.now):
            match action:
                case edge.Announce():
                    birth = rounds.PresenceSeen(self.name, True, 1, own_data=True)
                    self.parent.send_in(self.fog.sizes.status, birth)
                case edge.Send(run, round):
                    assert self.partial and self.partial.round == round
                    mine = self.partial
                    update = rounds.UpdateArrived(
                        run,
                        round,
                        self.name,
                        mine.base_digest,
                        sum(mine.members.values()),
                        self.mean,
                        mine.metrics,
                        mine.num_clients,
                    )
                    self.parent.send_in(self._partial_size, update)

    def message(self, run: str, round: int) -> None:
        """A train message has come to its bridge."""
        self._carry_out(self.matcher.on_message((run, round), round))

    def _carry_out(self, decision: Decision[int]) -> None:
        if decision.reply:
            self.fog.reply(self, decision.reply[0])


class Fog:
    """A federation, from the server down to the clients.

    Args:
        parameters: of the model whose messages are sent.
        size: of the vectors that are summed for it; a small one saves time and changes no rule.
        training: seconds that a client trains, give or take the half.
    """

    def __init__(
        self, layout: Layout, costs: Costs, parameters: int, size: int, training: float = 0.0
    ) -> None:
        self.layout, self.costs, self.training = layout, costs, training
        self.sizes = Sizes.of(parameters)
        self.clock, self.rng = Clock(), random.Random(1)
        self.machine = Machine(self.clock, layout.cores)
        draw = np.random.default_rng(1)
        self.updates = draw.standard_normal((KINDS, size), np.float32)
        self.sent = 0
        self.model = np.zeros(size, np.float32)
        self.round = 0
        self.rounds: list[Round] = []
        self._server, self._superlink = Process(self.machine), Process(self.machine)
        self.brokers = [Broker(self)]
        self.regions = [self._region(f"region_{i}", []) for i in range(layout.regions)]
        self.all_regions, self.top = list(self.regions), self.regions
        for tier in range(2, layout.tiers):
            below, step = self.top, layout.fan_in
            groups = [below[i : i + step] for i in range(0, len(below), step)]
            self.top = [self._region(f"fog-{tier}-{i}", g) for i, g in enumerate(groups)]
            self.all_regions += self.top
        for number in range(layout.clients):
            region = self.regions[number % layout.regions]
            region.clients.append(Client(self, region, number))
        self._processes = [self._superlink, *(broker.process for broker in self.brokers)]
        self._processes += [region.process for region in self.all_regions]
        for region in reversed(self.all_regions):
            region.start()
        self._publish()

    def run(self, rounds: int) -> list[Round]:
        """Go on for so many rounds; returns those of all so far."""
        while self.round < rounds:
            self.clock.step()
        return self.rounds

    def _region(self, name: str, below: list[Region]) -> Region:
        if self.layout.broker_per_region:
            self.brokers.append(Broker(self))
        return Region(self, name, self.brokers[-1], below)

    def _publish(self) -> None:
        """Publish model `self.round`, and push the train messages of the next round."""
        self._began, self._replies, self.sent = self.clock.now, 0, 0
        for process in self._processes:
            process.busy = 0.0
        for broker in self.brokers:
            broker.bytes_in = broker.bytes_out = 0
        # Each of the others takes the model from the first one.
        receivers: dict[Broker, list[Then]] = {broker: [] for broker in self.brokers}
        next_round = self.round + 1
        for region in self.all_regions:
            arrived = rounds.ModelArrived(
                RUN, 1, next_round, digest(self.round), len(self.model), slots=region.rules.slots
            )
            news = edge.ModelArrived(RUN, 1, next_round)
            receivers[region.broker].append(partial(region.model, arrived))
            receivers[region.broker] += [partial(c.handle, news) for c in region.clients]
        first, *others = self.brokers
        receivers[first] += [
            partial(broker.hand_out, self.sizes.update, receivers[broker]) for broker in others
        ]
        first.hand_out(self.sizes.update, receivers[first])
        for region in self.top:
            pushed = partial(region.message, RUN, next_round)
            self._superlink.do(PUSH * self.costs.region, pushed)

    def reply(self, region: Region, round: int) -> None:
        """The bridge of a region answers the train message of a round."""
        self._superlink.do((1 - PUSH) * self.costs.region, partial(self._replied, region, round))

    def _replied(self, region: Region, round: int) -> None:
        assert round == self.round + 1 and region.partial and region.partial.round == round
        self._replies += 1
        if self._replies == len(self.top):
            self._server.do(self.costs.base, self._aggregate)

    def _aggregate(self) -> None:
        total, members = WeightedSum(len(self.model)), 0
        for region in self.top:
            assert region.partial
            total.add(region.mean, sum(region.partial.members.values()))
            members += region.partial.num_clients
        self.model, self.round = total.mean(), self.round + 1
        self.rounds.append(
            Round(
                seconds=self.clock.now - self._began,
                members=members,
                copies=self.sent / self.layout.clients,
                bytes_in=max(broker.bytes_in for broker in self.brokers),
                bytes_out=max(broker.bytes_out for broker in self.brokers),
                broker_seconds=max(broker.process.busy for broker in self.brokers),
                aggregator_seconds=max(region.process.busy for region in self.all_regions),
                superlink_seconds=self._superlink.busy,
            )
        )
        self._publish()
