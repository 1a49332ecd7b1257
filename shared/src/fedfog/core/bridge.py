"""Which partial answers which train message: the rule of a fog bridge.

A train message of (run, round) is answered once, by the region's newest partial of that run and
round, in whichever order the two arrive. A message is confirmed to the SuperLink only when its
successor is in hand: a confirm deletes the message's objects, and before the successor exists
nobody knows that the server has finished pushing them (an earlier confirm ends the run with
"was not pre-registered").
"""

from dataclasses import dataclass
from typing import Generic, TypeVar

Key = tuple[str, int]
"""Run and round."""

KEEP_RUNS = 2

Message = TypeVar("Message")


@dataclass(frozen=True)
class Decision(Generic[Message]):
    """What to do now: confirm a message, and answer another with a partial's bytes."""

    confirm: Message | None = None
    reply: tuple[Message, bytes] | None = None


class Matcher(Generic[Message]):
    """The train message in hand and the newest partial of each of the latest runs."""

    def __init__(self) -> None:
        self._partials: dict[str, tuple[int, bytes]] = {}
        self._last: Message | None = None
        self._open: Key | None = None

    @property
    def waiting_for(self) -> Key | None:
        """Run and round of the message in hand that has no answer yet."""
        return self._open

    def on_message(self, key: Key, message: Message) -> Decision[Message]:
        """A train message came: it takes the place of the one before, answered or not."""
        before, self._last, self._open = self._last, message, key
        return Decision(confirm=before, reply=self._match())

    def on_partial(self, key: Key, payload: bytes) -> Decision[Message]:
        """A partial came. One of an earlier round of its run is ignored unless it is asked for:
        a broker that was restored from an old autosave hands such out again."""
        run, round_ = key
        known = self._partials.pop(run, None)
        stale = known is not None and known[0] > round_ and key != self._open
        # Put back at the end, so that the runs stand in order of their last partial.
        self._partials[run] = known if known is not None and stale else (round_, payload)
        for old in list(self._partials)[:-KEEP_RUNS]:
            del self._partials[old]
        return Decision(reply=self._match())

    def forget_messages(self) -> None:
        """The SuperLink connection is gone, and with it all messages of its node."""
        self._last = self._open = None

    def _match(self) -> tuple[Message, bytes] | None:
        if self._open is None or self._last is None:
            return None
        run, round_ = self._open
        newest, payload = self._partials.get(run, (-1, b""))
        if newest != round_:
            return None
        self._open = None
        return self._last, payload
