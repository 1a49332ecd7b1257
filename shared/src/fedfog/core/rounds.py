"""A round in a region, as a pure state machine: events in, actions out.

Everything that decides when a round opens, what counts in it and when it closes is in this file.
It has no clock, socket or file: `now` is an argument, and the fog aggregator's shell carries the
actions out and reports back. `TABLE` names the handler of every event in every phase; what is not
in it is an `IllegalEventError` and leaves the machine as it was.

Why an accepted update is in exactly one partial, whatever dies when (the end-to-end argument:
Saltzer, Reed and Clark 1984):

- `received` only says that this boot holds the update in memory. Its owner keeps it, and sends it
  again to any other boot.
- `accepted` is said after the partial and its members are committed in one transaction, never
  before. If the aggregator dies before the commit, nothing was accepted and all owners send
  again; if it dies after it, the stored members answer every copy that is still under way.
- A second copy from a member gets the first one's verdict and is not summed again.

With `fog_rounds` F > 1 (HierFAVG: Liu et al. 2020, https://arxiv.org/abs/1905.06641) a region
averages its clients F times in each global round. All of this holds for each of these regional
rounds: 1 to F - 1 are committed and published as the region's model, which the next one trains
from, and only F is the partial. Members and examples of the partial are those of regional round F:
they are the weight of the region in the global model. An aggregator above others has one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedfog.core.aggregation import WeightedSum, all_finite
from fedfog.core.metrics import Federated, merge
from fedfog.core.phases import Phase
from fedfog.core.robust import Rule, Updates
from fedfog.core.slots import SlotTable

RETRY_SECONDS = (1.0, 30.0)
# Clients that a region remembers. Their names come from outside; a partial lists them, in a header
# of limited size (`fedfog.messages.codec`).
MAX_CLIENTS = 10_000
# Of a partial, in its message.
MAX_EXAMPLES = 10**15


@dataclass(frozen=True)
class Policy:
    """When a round closes. All times are in seconds."""

    quorum: int | None = None  # None: every client present when the round opened
    minimum: int = 1
    deadline: float = 60.0
    expected: int = 0  # clients before round 1; 0: whoever is there after `settle`
    settle: float = 3.0
    limit: float = 60.0
    max_examples: int = 1_000_000  # of one client
    children: frozenset[str] = frozenset()  # clients that are regions: waited for and named
    store_limit: float = 600.0  # of tries to store a partial
    aggregation: Literal["fedavg"] | Rule = "fedavg"
    byzantine: float = 0.2  # share of the clients that the rule has to bear


# Events


@dataclass(frozen=True)
class Connected:
    """The session with the broker is new: its retained messages may be gone or old."""


@dataclass(frozen=True)
class Newest:
    """The newest round that was opened, by any boot. A broker that was restored from an old state
    hands out older models, of rounds that the store has forgotten: opened again, they would give
    a second partial."""

    run: str
    run_started: int
    round: int


@dataclass(frozen=True)
class Stored:
    """What the store has of a round: the committed members, or only the cohort.

    `regional` has the members of its committed regional rounds before the last one, `digest` and
    `vector` are of the newest of these.
    """

    cohort: frozenset[str]
    members: Mapping[str, int] | None  # None: not closed yet
    regional: tuple[frozenset[str], ...] = ()
    digest: str = ""
    vector: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class ModelArrived:
    """Global model `round - 1` of `run`: it opens `round`.

    `stored` is what the store has of that round, `slots` the run's slots if they were dealt,
    `vector` the model itself, which every aggregation but fedavg needs.
    """

    run: str
    run_started: int  # orders the runs; a broker restored from an old state hands out old ones
    round: int
    digest: str
    num_parameters: int
    finished: bool = False
    stored: Stored | None = None
    slots: SlotTable | None = None
    vector: NDArray[np.float32] | None = None
    fog_rounds: int = 1


@dataclass(frozen=True)
class UpdateArrived:
    """A well-formed update: schema, size, identity and tensor table were checked."""

    run: str
    round: int
    client: str
    base_digest: str
    num_examples: int
    vector: NDArray[np.float32]
    metrics: Mapping[str, float]
    num_clients: int = 1  # whose updates are in it: more if it is the partial of a region
    federated: Federated | None = None  # of the global model that the round began with
    fog_round: int = 1


@dataclass(frozen=True)
class PresenceSeen:
    client: str
    online: bool
    boot: int
    slot: int | None = None
    own_data: bool = False


@dataclass(frozen=True)
class OwnStatusSeen:
    """The region's retained status shows this boot."""

    boot: int
    online: bool


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True)
class Committed:
    """The aggregate is in the store. `digest` and, if the rule needs it, `vector` are its own."""

    digest: str = ""
    vector: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class CommitFailed:
    reason: str
    another_owner: bool = False


Event = (
    Connected
    | ModelArrived
    | UpdateArrived
    | PresenceSeen
    | OwnStatusSeen
    | Tick
    | Committed
    | CommitFailed
)


# Actions


@dataclass(frozen=True)
class PublishStatus:
    pass


@dataclass(frozen=True)
class PublishPartial:
    """Publish the stored partial of this round."""

    run: str
    round: int


@dataclass(frozen=True)
class PublishRegional:
    """Publish the stored aggregate of this regional round, which the next one trains from."""

    run: str
    round: int
    fog_round: int


@dataclass(frozen=True)
class Answer:
    client: str
    run: str
    round: int
    verdict: Literal["received", "accepted", "late", "rejected"]
    reason: str = ""
    fog_round: int = 1


@dataclass(frozen=True)
class AnswerMembers:
    """`accepted` for all members at once."""

    run: str
    round: int
    members: tuple[str, ...]
    fog_round: int = 1


@dataclass(frozen=True)
class DealSlot:
    client: str
    run: str
    slot: int
    slots: int


@dataclass(frozen=True)
class StoreCohort:
    newest: Newest
    cohort: frozenset[str]
    slots: SlotTable


@dataclass(frozen=True)
class StoreSlots:
    slots: SlotTable


@dataclass(frozen=True)
class Commit:
    """Store the aggregate and its members in one transaction, and answer `Committed` or
    `CommitFailed`."""

    run: str
    round: int
    total: WeightedSum | Updates  # of the members, in their order
    members: Mapping[str, int]
    left_out: Mapping[str, str]
    metrics: Mapping[str, float]
    collect_seconds: float
    num_clients: int
    base_digest: str  # of the global model
    federated: Federated | None
    fog_round: int
    last: bool  # it is the partial


@dataclass(frozen=True)
class Log:
    level: Literal["debug", "info", "warning", "error"]
    event: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Exit:
    reason: str
    another_owner: bool


Action = (
    PublishStatus
    | PublishPartial
    | PublishRegional
    | Answer
    | AnswerMembers
    | DealSlot
    | StoreCohort
    | StoreSlots
    | Commit
    | Log
    | Exit
)


class IllegalEventError(Exception):
    """The shell reported something that cannot happen in this phase."""


class RegionRounds:
    """All rounds of one region in one boot of its aggregator."""

    def __init__(
        self, region: str, policy: Policy, boot: int, newest: Newest | None = None
    ) -> None:
        self.region = region
        self.policy = policy
        self.boot = boot
        self.phase = Phase.WAITING
        self.run: str | None = None
        self.round = 0
        self.fog_round = self.fog_rounds = 1
        self.present: dict[str, PresenceSeen] = {}
        self.cohort: frozenset[str] = frozenset()
        self.members: dict[str, int] = {}
        self.slots: SlotTable | None = None
        self.deadline = 0.0
        self._newest = newest or Newest("", 0, 0)
        self._model_digest = self._digest = ""  # of the global model; of what is trained from
        self._regional: list[frozenset[str]] = []  # members of the regional rounds before
        self._total: WeightedSum | Updates = WeightedSum(0)
        self._num_parameters = 0
        self._base: NDArray[np.float32] | None = None
        self._weakness: str | None = None
        self._num_clients = 0
        self._metrics: dict[str, tuple[float, int]] = {}
        self._federated: Federated | None = None
        self._awaited: set[str] = set()  # of the cohort: neither members nor departed
        self._departed: set[str] = set()
        self._boots: dict[str, int] = {}
        self._full = self._said_full = False
        self._newest_arrival = 0.0
        self._opened = 0.0
        self._retry_at = 0.0
        self._retry_after = RETRY_SECONDS[0]
        self._retry_until: float | None = None

    def handle(self, event: Event, now: float) -> list[Action]:
        """Apply one event at time `now` (seconds, monotonic) and say what is to be done.

        Raises:
            IllegalEventError: the event cannot happen in this phase; nothing was changed.
        """
        handler = TABLE[type(event)].get(self.phase)
        if handler is None:
            raise IllegalEventError(f"{type(event).__name__} while {self.phase}")
        return handler(self, event, now)

    @property
    def expected(self) -> int:
        """Updates that close the present round."""
        if self.policy.quorum is not None:
            return self.policy.quorum
        return len(self.members) + len(self._awaited)

    @property
    def last(self) -> bool:
        """True in the regional round that makes the partial."""
        return self.fog_round >= self.fog_rounds

    @property
    def missing(self) -> list[str]:
        """Clients of the cohort that the round is waiting for, in order of names."""
        return sorted(self._awaited)

    def wake_at(self) -> float | None:
        """When `Tick` is due next; None if nothing is waited for."""
        if self.phase in (Phase.OPEN, Phase.STARVING):
            return self.deadline
        if self.phase is Phase.DEGRADED:
            return self._retry_at
        if self.phase is Phase.FORMING:
            if self._settles and self._enough_to_form():
                return min(self._newest_arrival + self.policy.settle, self.deadline)
            return self.deadline
        return None

    # Models

    def is_news(self, event: ModelArrived) -> bool:
        """True if the model is newer than all that the region has seen."""
        newest = self._newest
        if event.run_started < newest.run_started:
            return False
        if event.run == newest.run and event.round < newest.round:
            return False
        return (event.run, event.round) != (self.run, self.round)

    def _model(self, event: ModelArrived, now: float) -> list[Action]:
        if not self.is_news(event):
            fields = {"run": event.run, "round": event.round}
            again = (event.run, event.round) == (self.run, self.round)
            return [] if again else [Log("info", "older_model_ignored", fields)]
        same_run = event.run == self.run
        actions: list[Action] = []
        if self.phase in _OPEN and (self.members or self._regional):
            void = {"round": self._name, "updates": sorted(self.members)}
            actions.append(Log("warning", "round_overtaken_updates_void", void))
        # Right after a start it is not known yet who is there, and in a new run who will come.
        cohort_known = same_run and self.phase not in (Phase.WAITING, Phase.FORMING)
        self.run, self.round, self._full = event.run, event.round, False
        self._newest = Newest(event.run, event.run_started, event.round)
        self._model_digest = self._digest = event.digest
        self._num_parameters, self._base = event.num_parameters, event.vector
        self.fog_rounds = 1 if self.policy.children else event.fog_rounds
        self.fog_round, self._regional = 1, []
        if event.stored and event.stored.regional:
            self._regional = list(event.stored.regional)
            self.fog_round += len(self._regional)
            self._digest, self._base = event.stored.digest, event.stored.vector
        # A child that was in the last round may be just starting again.
        children = self.policy.children & self.members.keys()
        self.members, self.cohort, self._awaited, self._departed = {}, frozenset(), set(), set()
        self.slots = (self.slots if same_run else None) or event.slots
        if event.finished:
            self.phase = Phase.FINISHED
            return [*actions, PublishStatus()]
        if event.stored and event.stored.members is not None:
            self.phase = Phase.CLOSED
            self.members, self.cohort = dict(event.stored.members), event.stored.cohort
            return [*actions, PublishPartial(self.run, self.round), PublishStatus()]
        actions += self._publish_regional()
        if event.stored and event.stored.cohort:
            return actions + self._open(event.stored.cohort, now)
        if not cohort_known:
            return actions + self._gather(now)
        return actions + self._open_with(children | self.present.keys(), now)

    def _open_with(self, cohort: frozenset[str], now: float) -> list[Action]:
        """Open the round with those who are known to be there, if they are enough."""
        return self._open(cohort, now) if self._enough_to_form() else self._gather(now)

    def _gather(self, now: float) -> list[Action]:
        self.phase = Phase.FORMING
        self.deadline = now + self.policy.limit
        # A round that opens at once publishes its status itself.
        return self._form(now) or [PublishStatus()]

    def _publish_regional(self) -> list[Action]:
        """The model of the regional round before, if there is one; `accepted` goes first, because
        a newer model makes void what is unanswered."""
        if self.run is None or not self._regional:
            return []
        before, members = self.fog_round - 1, tuple(sorted(self._regional[-1]))
        return [
            AnswerMembers(self.run, self.round, members, before),
            PublishRegional(self.run, self.round, before),
        ]

    @property
    def _name(self) -> int | str:
        """The round as it is named in logs."""
        return self.round if self.fog_rounds == 1 else f"{self.round}.{self.fog_round}"

    def _enough_to_form(self) -> bool:
        return len(self.present) >= max(1, self.policy.minimum)

    @property
    def _clients_expected(self) -> int:
        """Clients without whom the cohort is not complete; 0 if that is not known."""
        if self.policy.children:
            return len(self.policy.children)
        return len(self.slots.holders) if self.slots else self.policy.expected

    @property
    def _settles(self) -> bool:
        """An expected number of clients is waited for; otherwise whoever comes in time is in, but
        a quorum that is a number has to be there."""
        return self.slots is not None or (
            self._clients_expected == 0 and len(self.present) >= (self.policy.quorum or 0)
        )

    def _form(self, now: float) -> list[Action]:
        """Open the round if its cohort is complete."""
        complete = 0 < self._clients_expected <= len(self.present)
        if complete and self.slots and not self.policy.children:
            # Clients with data of their own hold no slot: how many will come is not known.
            complete = not any(seen.own_data for seen in self.present.values())
        settled = self._settles and now - self._newest_arrival >= self.policy.settle
        if self._enough_to_form() and (complete or settled or now >= self.deadline):
            return self._open(frozenset(self.present), now)
        if now >= self.deadline:
            self.deadline = now + self.policy.limit
            wanted = {
                "present": sorted(self.present),
                "minimum": self.policy.minimum,
                "setting": "MIN_CLIENTS",
            }
            return [Log("warning", "waiting_for_clients", wanted)]
        return []

    def _open(self, cohort: frozenset[str], now: float) -> list[Action]:
        assert self.run is not None
        self.phase = Phase.OPEN
        self.cohort, self.members = cohort, {}
        self._awaited, self._departed = set(cohort), set()
        self._total, self._metrics = self._new_total(), {}
        self._num_clients, self._federated = 0, None
        self._opened, self.deadline = now, now + self.policy.deadline
        self._retry_after, self._retry_until = RETRY_SECONDS[0], None
        dealt: list[Action] = []
        anew = self.slots is None
        if self.slots is None:
            needy = [c for c, p in self.present.items() if not p.own_data]
            self.slots = SlotTable.deal(self.run, needy)
        for client in sorted(cohort & self.present.keys()):
            dealt += self._deal(client, now, anew)
        opened = {"round": self._name, "cohort": sorted(cohort), "quorum": self.expected}
        return [
            StoreCohort(self._newest, cohort, self.slots),
            PublishStatus(),
            *dealt,
            Log("info", "round_open", opened),
            *self._warn_of_weakness(),
        ]

    def _new_total(self) -> WeightedSum | Updates:
        if self.policy.aggregation == "fedavg":
            return WeightedSum(self._num_parameters)
        assert self._base is not None
        return Updates(self.policy.aggregation, self.policy.byzantine, self._base)

    def _warn_of_weakness(self) -> list[Action]:
        """Say it, once for each number of clients, if the rule protects nobody among so many."""
        if isinstance(self._total, WeightedSum):
            return []
        before, self._weakness = self._weakness, self._total.weakness(self.expected)
        if self._weakness in (None, before):
            return []
        fields = {"reason": self._weakness, "setting": f"AGGREGATION={self.policy.aggregation}"}
        return [Log("warning", "aggregation_protects_nobody", fields)]

    def _deal(self, client: str, now: float, anew: bool = False) -> list[Action]:
        """Tell a client its slot unless it has it; what it had in the run before is void."""
        presence = self.present[client]
        if presence.own_data or self.slots is None or self.run is None:
            return []
        known = client in self.slots.holders
        slot = self.slots.join(client, now, self.policy.deadline)
        actions: list[Action] = []
        if not known:
            fields = {"client": client, "slot": slot, "shared": self.slots.shared(slot)}
            actions = [StoreSlots(self.slots), Log("info", "newcomer_given_slot", fields)]
        if anew or presence.slot != slot:
            actions.append(DealSlot(client, self.run, slot, self.slots.slots))
        return actions

    # Updates

    def _update(self, event: UpdateArrived, now: float) -> list[Action]:
        verdict = self._stale(event)
        if verdict is not None:
            return verdict
        if event.client in self.members:
            return [self._answer(event, "received")]
        if event.base_digest != self._digest:
            return [self._answer(event, "rejected", "trained from another model (base digest)")]
        most = self.policy.max_examples * event.num_clients
        if self.policy.children:  # so that their sum can be sent, whatever one of them claims
            most = min(most, MAX_EXAMPLES // len(self.policy.children))
        if not 0 < event.num_examples <= most:
            limit = f"num_examples is not within 1..{most} (MAX_EXAMPLES)"
            return [self._answer(event, "rejected", limit)]
        if event.federated and event.federated.num_examples > most:
            limit = f"more than {most} validation examples (MAX_EXAMPLES)"
            return [self._answer(event, "rejected", limit)]
        if not all_finite(event.vector):
            return [self._answer(event, "rejected", "the tensors hold NaN or infinity")]
        self._total.add(event.vector, event.num_examples)
        self.members[event.client] = event.num_examples
        self._awaited.discard(event.client)
        self._num_clients += event.num_clients
        self._federated = merge(self._federated, event.federated)
        for name, value in event.metrics.items():
            total, weight = self._metrics.get(name, (0.0, 0))
            n = event.num_examples
            self._metrics[name] = (total + n * value, weight + n)
        fields = {
            "update": f"{event.run}/{event.round}/{self.region}/{event.client}",
            "received": len(self.members),
            "expected": self.expected,
        }
        answer = self._answer(event, "received")
        return [answer, Log("debug", "update_received", fields), *self._close_if_due(now)]

    def _update_when_closed(self, event: UpdateArrived, _now: float) -> list[Action]:
        verdict = self._stale(event)
        if verdict is not None:
            return verdict
        if event.client in self.members:
            return [self._answer(event, "accepted")]
        return [self._answer(event, "late", "the round is closed")]

    def _stale(self, event: UpdateArrived) -> list[Action] | None:
        """The answer to an update that is not of the present round, if it is not."""
        if event.run != self.run:
            return [self._answer(event, "late", f"the run is {self.run}")]
        if event.round < self.round:
            return [self._answer(event, "late", f"the round is {self.round}")]
        if (event.round, event.fog_round) > (self.round, self.fog_round):
            # Its model has not come here yet. The owner repeats; a verdict would lose the update.
            return []
        if event.fog_round < self.fog_round:
            if event.client in self._regional[event.fog_round - 1]:
                return [self._answer(event, "accepted")]
            return [self._answer(event, "late", f"the round is {self._name}")]
        return None

    @staticmethod
    def _answer(
        event: UpdateArrived,
        verdict: Literal["received", "accepted", "late", "rejected"],
        reason: str = "",
    ) -> Answer:
        return Answer(event.client, event.run, event.round, verdict, reason, event.fog_round)

    # Presence and time

    def _presence(self, event: PresenceSeen, now: float) -> list[Action]:
        if not self._has_room_for(event.client):
            said, self._said_full = self._said_full, True
            fields = {"refused": event.client, "most_clients": MAX_CLIENTS}
            return [] if said else [Log("error", "region_is_full", fields)]
        newest = self._boots.get(event.client, 0)
        if event.boot < newest:  # a stale will, or an old retained message
            return []
        self._boots[event.client] = event.boot
        if not event.online:
            if self.present.pop(event.client, None) is None:
                return []
            self._full = False
            if self.slots:
                self.slots.leave(event.client, now)
            if self.phase not in _OPEN or event.client in self.members:
                return []
            if event.client in self.policy.children:  # it has accepted updates, and comes again
                return [Log("info", "child_region_away", {"child": event.client})]
            self._awaited.discard(event.client)
            self._departed.add(event.client)
            missing = len(self._awaited)  # names, in order, would cost all deaths together a square
            fields = {"client": event.client, "round": self._name, "missing": missing}
            return [Log("info", "client_left_cohort", fields), *self._close_if_due(now)]
        if event.client not in self.present:
            self._newest_arrival = now
        self.present[event.client] = event
        if self.phase is Phase.FORMING:
            return self._form(now)
        if self.phase in (*_OPEN, Phase.CLOSED):
            return self._deal(event.client, now)
        return []

    def _has_room_for(self, client: str) -> bool:
        """The client is known, or one more may be; forgets those that have no part any more."""
        if client in self._boots or len(self._boots) < MAX_CLIENTS:
            return True
        if self._full:  # nobody has left since that was found
            return client in self.cohort
        holders = self.slots.holders if self.slots else {}
        kept = self.present.keys() | self.cohort | holders.keys()
        self._boots = {name: self._boots.get(name, 0) for name in kept}
        self._full = len(kept) >= MAX_CLIENTS
        return client in kept or not self._full

    def _own_status(self, event: OwnStatusSeen, _now: float) -> list[Action]:
        if event.boot > self.boot:
            self.phase = Phase.STOPPED
            return [Exit(f"another aggregator (boot {event.boot}) has taken the region over", True)]
        if event.boot < self.boot or not event.online:  # a stale will or an old message
            return [PublishStatus()]
        return []

    def _tick_forming(self, _event: Tick, now: float) -> list[Action]:
        return self._form(now)

    def _tick_open(self, _event: Tick, now: float) -> list[Action]:
        if now < self.deadline:
            return []
        if len(self.members) >= self.policy.minimum:
            return self._close(now)
        self.phase = Phase.STARVING
        self.deadline = now + self.policy.deadline
        fields = {
            "round": self._name,
            "received": len(self.members),
            "minimum": self.policy.minimum,
            "waiting_for": self.missing[:10],
            "setting": "MIN_CLIENTS",
        }
        return [Log("warning", "round_starving", fields), PublishStatus()]

    def _close_if_due(self, now: float) -> list[Action]:
        enough = len(self.members) >= self.policy.minimum
        if self.policy.quorum is None:
            complete = not self._awaited
        else:
            complete = len(self.members) >= self.policy.quorum
        if enough and (complete or self.phase is Phase.STARVING):
            return self._close(now)
        return []

    # Closing

    def _close(self, now: float) -> list[Action]:
        assert self.run is not None
        self.phase = Phase.CLOSING
        away = self._departed | self.policy.children - self.present.keys()
        left_out = {
            client: "offline" if client in away else "no update in time"
            for client in sorted((self.cohort | self.policy.children) - self.members.keys())
        }
        metrics = {name: total / weight for name, (total, weight) in self._metrics.items()}
        return [
            Commit(
                self.run,
                self.round,
                self._total,
                dict(self.members),
                left_out,
                metrics,
                now - self._opened,
                self._num_clients,
                self._model_digest,
                self._federated,
                self.fog_round,
                self.last,
            )
        ]

    def _committed(self, event: Committed, now: float) -> list[Action]:
        assert self.run is not None
        self.phase = Phase.CLOSED
        self._total = WeightedSum(0)
        if not self.last:
            self._regional.append(frozenset(self.members))
            self._digest, self._base = event.digest, event.vector
            self.fog_round += 1
            return self._publish_regional() + self._open_with(frozenset(self.present), now)
        return [
            PublishPartial(self.run, self.round),
            AnswerMembers(self.run, self.round, tuple(sorted(self.members)), self.fog_round),
            PublishStatus(),
        ]

    def _commit_failed(self, event: CommitFailed, now: float) -> list[Action]:
        if event.another_owner:
            self.phase = Phase.STOPPED
            return [Exit(event.reason, another_owner=True)]
        if self._retry_until is None:
            self._retry_until = now + self.policy.store_limit
        if now >= self._retry_until:  # nothing was accepted: all owners send to the next boot
            self.phase = Phase.STOPPED
            limit = f"{self.policy.store_limit:.0f} s (STORE_TIMEOUT)"
            return [Exit(f"the partial cannot be stored for {limit}: {event.reason}", False)]
        self.phase = Phase.DEGRADED
        self._retry_at = now + self._retry_after
        fields = {"error": event.reason, "retry_seconds": self._retry_after}
        self._retry_after = min(2 * self._retry_after, RETRY_SECONDS[1])
        return [Log("error", "partial_not_stored", fields), PublishStatus()]

    def _tick_degraded(self, _event: Tick, now: float) -> list[Action]:
        return self._close(now) if now >= self._retry_at else []

    # Anything

    def _connected(self, _event: Connected, _now: float) -> list[Action]:
        if self.phase is Phase.CLOSED and self.run is not None:
            return [PublishStatus(), PublishPartial(self.run, self.round)]
        return [PublishStatus(), *self._publish_regional()]

    def _ignore(self, _event: Event, _now: float) -> list[Action]:
        return []

    def _update_when_finished(self, event: UpdateArrived, _now: float) -> list[Action]:
        return [self._answer(event, "late", f"run {self.run} is finished")]


_OPEN = (Phase.OPEN, Phase.STARVING)
_R = RegionRounds
_Handler = Callable[[RegionRounds, Any, float], list[Action]]
_LIVE = [phase for phase in Phase if phase is not Phase.STOPPED]

# (event, phase) -> handler. An update that finds no open round because the aggregator is still
# gathering or is just committing is ignored: its owner repeats it.
TABLE: dict[type, dict[Phase, _Handler]] = {
    Connected: dict.fromkeys(_LIVE, _R._connected),
    ModelArrived: dict.fromkeys(_LIVE, _R._model),
    UpdateArrived: {
        Phase.WAITING: _R._ignore,
        Phase.FORMING: _R._ignore,
        Phase.OPEN: _R._update,
        Phase.STARVING: _R._update,
        Phase.CLOSING: _R._ignore,
        Phase.DEGRADED: _R._ignore,
        Phase.CLOSED: _R._update_when_closed,
        Phase.FINISHED: _R._update_when_finished,
    },
    PresenceSeen: dict.fromkeys(_LIVE, _R._presence),
    OwnStatusSeen: dict.fromkeys(_LIVE, _R._own_status),
    Tick: dict.fromkeys(_LIVE, _R._ignore)
    | {
        Phase.FORMING: _R._tick_forming,
        Phase.OPEN: _R._tick_open,
        Phase.STARVING: _R._tick_open,
        Phase.DEGRADED: _R._tick_degraded,
    },
    Committed: {Phase.CLOSING: _R._committed},
    CommitFailed: {Phase.CLOSING: _R._commit_failed},
}
