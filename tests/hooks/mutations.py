"""What the chaos suite must be able to catch: each function takes one safeguard out of a service
(see `sitecustomize.py`).

A service's main module runs under the name `__main__`, so a patch has to change what that imports.
"""

import time
from dataclasses import replace
from typing import Any


def count_again() -> None:
    """The aggregator does not know a second copy of an update."""
    from fedfog.core import rounds

    original = rounds.RegionRounds._update

    def update(self: rounds.RegionRounds, event: Any, now: float) -> list[rounds.Action]:
        known = self.members.pop(event.client, None)
        actions = original(self, event, now)
        if known is not None:
            self.members.setdefault(event.client, known)
        return actions

    for phase, handler in rounds.TABLE[rounds.UpdateArrived].items():
        if handler is original:
            rounds.TABLE[rounds.UpdateArrived][phase] = update


def count_late() -> None:
    """The aggregator counts an update of an earlier regional round in the one at hand."""
    from fedfog.core import rounds

    original = rounds.RegionRounds._update

    def update(self: rounds.RegionRounds, event: Any, now: float) -> list[rounds.Action]:
        if (event.run, event.round) == (self.run, self.round) and event.fog_round < self.fog_round:
            event = replace(event, fog_round=self.fog_round, base_digest=self._digest)
        return original(self, event, now)

    for phase, handler in rounds.TABLE[rounds.UpdateArrived].items():
        if handler is original:
            rounds.TABLE[rounds.UpdateArrived][phase] = update


def late_to_members() -> None:
    """The aggregator does not know who was in an earlier regional round."""
    from fedfog.core import rounds

    original = rounds.RegionRounds._stale

    def stale(self: rounds.RegionRounds, event: Any) -> list[rounds.Action] | None:
        if (event.run, event.round) == (self.run, self.round) and event.fog_round < self.fog_round:
            return [self._answer(event, "late")]
        return original(self, event)

    rounds.RegionRounds._stale = stale  # type: ignore[method-assign]


def receipt_before_commit() -> None:
    """The aggregator says `accepted` before it has stored the partial, on a disk that is slow."""
    from fedfog.core import rounds
    from fedfog_aggregator.store import PartialStore

    close, commit = rounds.RegionRounds._close, PartialStore.commit

    def close_early(self: rounds.RegionRounds, now: float) -> list[rounds.Action]:
        assert self.run is not None
        members = tuple(sorted(self.members))
        return [rounds.AnswerMembers(self.run, self.round, members), *close(self, now)]

    def commit_slowly(self: PartialStore, *arguments: Any) -> None:
        time.sleep(3.0)
        commit(self, *arguments)

    rounds.RegionRounds._close = close_early  # type: ignore[method-assign]
    PartialStore.commit = commit_slowly  # type: ignore[method-assign, assignment]


def no_outbox() -> None:
    """The client forgets its update once the aggregator has received it."""
    from fedfog.core import participation

    original = participation.Participation._verdict

    def verdict(self: participation.Participation, event: Any, now: float) -> list[Any]:
        if event.verdict == "received":
            event = replace(event, verdict="accepted")
        return original(self, event, now)

    participation._HANDLERS[participation.VerdictArrived] = verdict


def forget_partials() -> None:
    """An aggregator that starts again does not look for a partial of the round, and would write
    over it."""
    import sqlite3

    from fedfog.core import rounds
    from fedfog_aggregator.store import AnotherOwnerError, PartialStore

    original, commit = PartialStore.stored, PartialStore.commit

    def stored(self: PartialStore, run: str, round_: int) -> rounds.Stored | None:
        found = original(self, run, round_)
        return replace(found, members=None) if found else None

    def commit_anew(self: PartialStore, run: str, round_: int, *rest: Any) -> None:
        try:
            commit(self, run, round_, *rest)
        except AnotherOwnerError:
            with sqlite3.connect(self.path) as other:
                other.execute("delete from partial where run = ? and round = ?", (run, round_))
            other.close()
            commit(self, run, round_, *rest)

    PartialStore.stored = stored  # type: ignore[method-assign]
    PartialStore.commit = commit_anew  # type: ignore[method-assign, assignment]


def begin_anew() -> None:
    """A central server that starts again does not look for checkpoints."""
    from fedfog_central_server.runs import Run

    Run.recover = lambda self: None  # type: ignore[method-assign]
