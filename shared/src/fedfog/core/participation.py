"""What one client owes to a round, as a pure state machine: events in, actions out.

    idle -model-> (waiting for its slot) -> training -done-> sending -received-> held
    held -new boot of the aggregator, or a reconnect-> sending
    accepted, late, rejected -> idle;  a newer model, from anywhere -> training

The update lies in the outbox from the end of the training to the verdict. A PUBACK of the broker
is no verdict. `received` ends the repeats as long as the aggregator that said it lives. A newer
model makes an unanswered update void: that is normal, not a loss.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

# What is not answered yet may still be on a slow way, or in a long queue. An update is given twice
# the time that the last one took, at most this long. (A new boot of the aggregator, or a reconnect,
# is reason enough to repeat it at once.)
RESEND_SECONDS = (4.0, 8.0)
LONGEST_PATIENCE = 120.0


class Duty(StrEnum):
    IDLE = "idle"
    NEEDS_SLOT = "needs_slot"
    TRAINING = "training"
    SENDING = "sending"
    HELD = "held"


# Events


@dataclass(frozen=True)
class Connected:
    pass


@dataclass(frozen=True)
class ModelArrived:
    """Global model `round - 1`, or its region's model of `fog_round - 1` of `round`: the client is
    to train for `fog_round` of `round`."""

    run: str
    run_started: int
    round: int
    finished: bool = False
    fog_round: int = 1


@dataclass(frozen=True)
class SlotDealt:
    run: str
    slot: int


@dataclass(frozen=True)
class Trained:
    """The update of this round is in the outbox."""

    run: str
    round: int
    fog_round: int = 1


@dataclass(frozen=True)
class VerdictArrived:
    """The aggregator's word: received, accepted, late or rejected."""

    run: str
    round: int
    verdict: str
    boot: int
    reason: str = ""
    fog_round: int = 1


@dataclass(frozen=True)
class AggregatorSeen:
    """The region's status shows this boot of the aggregator."""

    boot: int


@dataclass(frozen=True)
class Tick:
    """`sending`: what was sent last is still on its way to the broker."""

    sending: bool = False


Event = Connected | ModelArrived | SlotDealt | Trained | VerdictArrived | AggregatorSeen | Tick


# Actions


@dataclass(frozen=True)
class Announce:
    """Publish the birth; without a slot it asks for one."""


@dataclass(frozen=True)
class Train:
    run: str
    round: int
    fog_round: int = 1


@dataclass(frozen=True)
class CancelTraining:
    pass


@dataclass(frozen=True)
class Send:
    """Publish the update that lies in the outbox."""

    run: str
    round: int
    attempt: int
    why: str
    fog_round: int = 1


@dataclass(frozen=True)
class EmptyOutbox:
    run: str
    round: int
    verdict: str
    reason: str
    fog_round: int = 1


@dataclass(frozen=True)
class RunFinished:
    run: str
    took_part: bool


Action = Announce | Train | CancelTraining | Send | EmptyOutbox | RunFinished


@dataclass
class Backoff:
    """Delays that double from first to last, each drawn within 20 % so that a fleet spreads."""

    rng: random.Random
    _delay: float = RESEND_SECONDS[0]

    def reset(self, first: float = RESEND_SECONDS[0]) -> None:
        self._delay = first

    def next(self) -> float:
        delay = self._delay
        self._delay = max(delay, min(2 * delay, RESEND_SECONDS[1]))
        return delay * self.rng.uniform(0.8, 1.2)


@dataclass
class Participation:
    """One client in all rounds.

    Args:
        rng: for the jitter of the repeats.
        own_data: the client has data of its own and needs no slot.
        outbox: (run, round, fog_round) of an update that an earlier life of the client left there.
    """

    rng: random.Random
    own_data: bool = False
    outbox: tuple[str, int, int] | None = None
    duty: Duty = Duty.IDLE
    run: str | None = None
    round: int = 0
    fog_round: int = 1
    slot: SlotDealt | None = None
    took_part: bool = False
    _run_started: int = 0
    _held_by: int | None = None
    _aggregator: int | None = None
    _attempt: int = 0
    _due: float | None = None
    _sent_at: float = 0.0
    _was_sending: bool = False
    _trained_at: float | None = None
    _patience: float = RESEND_SECONDS[0]
    _backoff: Backoff = field(init=False)

    def __post_init__(self) -> None:
        self._backoff = Backoff(self.rng)
        if self.outbox:
            self.run, self.round, self.fog_round = self.outbox
            self.duty, self.took_part = Duty.SENDING, True

    def handle(self, event: Event, now: float) -> list[Action]:
        """Apply one event at time `now` (seconds, monotonic) and say what is to be done."""
        return _HANDLERS[type(event)](self, event, now)

    def wake_at(self) -> float | None:
        """When `Tick` is due next; None if nothing is waited for."""
        return self._due

    @property
    def current_slot(self) -> int | None:
        """The slot in the present run, if it was dealt."""
        return self.slot.slot if self.slot and self.slot.run == self.run else None

    def is_news(self, event: ModelArrived) -> bool:
        """True if the model is newer than all that the client has seen."""
        if event.run_started < self._run_started:
            return False
        at = (self.round, self.fog_round)
        return event.run != self.run or (event.round, event.fog_round) > at

    def _is_present(self, event: Trained | VerdictArrived) -> bool:
        at = (self.run, self.round, self.fog_round)
        return (event.run, event.round, event.fog_round) == at

    def _connected(self, _event: Connected, now: float) -> list[Action]:
        actions: list[Action] = [Announce()]
        if self.duty in (Duty.SENDING, Duty.HELD):
            actions += self._send("reconnect", now)
        elif self.duty is Duty.NEEDS_SLOT:
            self._due = now + self._backoff.next()
        return actions

    def _model(self, event: ModelArrived, now: float) -> list[Action]:
        same_run = event.run == self.run
        if not self.is_news(event):
            if same_run and event.round == self.round:  # the outbox did not say when its run began
                self._run_started = event.run_started
            return []
        actions = self._void()
        if not same_run:
            self.took_part = False
        self.run, self._run_started = event.run, event.run_started
        self.round, self.fog_round = event.round, event.fog_round
        if event.finished:
            self.duty, self._due = Duty.IDLE, None
            return [*actions, RunFinished(event.run, self.took_part)]
        if self.own_data or self.current_slot is not None:
            return actions + self._train()
        self.duty = Duty.NEEDS_SLOT
        self._backoff.reset()
        # The slot usually comes by itself; ask only if it does not.
        self._due = now + self._backoff.next()
        return actions

    def _void(self) -> list[Action]:
        """Drop what a newer model has overtaken."""
        if self.duty is Duty.TRAINING:
            return [CancelTraining()]
        if self.duty in (Duty.SENDING, Duty.HELD) and self.run is not None:
            why = "a newer model came first"
            return [EmptyOutbox(self.run, self.round, "void", why, self.fog_round)]
        return []

    def _train(self) -> list[Action]:
        assert self.run is not None
        self.duty, self._due = Duty.TRAINING, None
        return [Train(self.run, self.round, self.fog_round)]

    def _slot_dealt(self, event: SlotDealt, _now: float) -> list[Action]:
        changed = event != self.slot
        self.slot = event
        if self.duty is Duty.NEEDS_SLOT and event.run == self.run:
            return [Announce(), *self._train()]
        # A slot that changes during a round counts from the next one.
        return [Announce()] if changed and event.run == self.run else []

    def _trained(self, event: Trained, now: float) -> list[Action]:
        if self.duty is not Duty.TRAINING or not self._is_present(event):
            return []
        self.duty, self.took_part = Duty.SENDING, True
        self._attempt, self._trained_at = 0, now
        self._backoff.reset(self._patience)
        return self._send("trained", now)

    def _send(self, why: str, now: float) -> list[Action]:
        assert self.run is not None
        self.duty, self._held_by = Duty.SENDING, None
        self._attempt += 1
        self._sent_at, self._was_sending = now, False
        self._due = now + self._backoff.next()
        return [Send(self.run, self.round, self._attempt, why, self.fog_round)]

    def _verdict(self, event: VerdictArrived, now: float) -> list[Action]:
        if not self._is_present(event) or self.duty not in (Duty.SENDING, Duty.HELD):
            return []
        if event.verdict == "received":
            if self._trained_at is not None:
                took = now - self._trained_at
                self._patience = min(max(2 * took, RESEND_SECONDS[0]), LONGEST_PATIENCE)
                self._trained_at = None  # what follows is about a repeat
            self.duty, self._held_by, self._due = Duty.HELD, event.boot, None
            self._backoff.reset()
            if self._aggregator is not None and self._aggregator > event.boot:
                return self._send("new boot of the aggregator", now)
            return []
        self.duty, self._due = Duty.IDLE, None
        at = event.run, event.round
        return [EmptyOutbox(*at, event.verdict, event.reason, event.fog_round)]

    def _aggregator_seen(self, event: AggregatorSeen, now: float) -> list[Action]:
        new = self._aggregator is None or event.boot > self._aggregator
        self._aggregator = max(event.boot, self._aggregator or 0)
        if not new or self.duty not in (Duty.SENDING, Duty.HELD):
            return []
        if self._held_by == event.boot:
            return []
        self._backoff.reset()
        return self._send("new boot of the aggregator", now)

    def _tick(self, event: Tick, now: float) -> list[Action]:
        if self._due is None or now < self._due:
            return []
        if self.duty is Duty.NEEDS_SLOT:
            self._due = now + self._backoff.next()
            return [Announce()]
        if self.duty is Duty.SENDING:
            if event.sending or self._was_sending:
                # A repeat would only be in the way of the first. What took long to the broker may
                # take as long from there.
                self._was_sending = event.sending
                self._due = 2 * now - self._sent_at
                return []
            return self._send("no answer", now)
        self._due = None
        return []


_HANDLERS: dict[type, Callable[[Participation, Any, float], list[Action]]] = {
    Connected: Participation._connected,
    ModelArrived: Participation._model,
    SlotDealt: Participation._slot_dealt,
    Trained: Participation._trained,
    VerdictArrived: Participation._verdict,
    AggregatorSeen: Participation._aggregator_seen,
    Tick: Participation._tick,
}
