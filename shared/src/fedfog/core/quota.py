"""How many messages of each sender are looked at, so that one who floods costs the others little.

An honest client sends one update in a round, and repeats it every few seconds at the most. So the
limit holds for a round or a minute, whichever is shorter: it is not met by rounds of a tenth of a
second, nor by an update that is repeated for an hour. What exceeds it gets no answer. `rejected`
would have an honest owner drop its update; without a word it repeats it, and the next minute or
round takes it.
"""

from collections import Counter
from collections.abc import Hashable

WINDOW_SECONDS = 60.0
REPORT_SECONDS = 10.0
# Unknown senders whose messages are counted in a window. A name costs nothing where nobody checks
# it, so there may be any number of them.
MAX_UNKNOWN = 10_000


class Quota:
    """At most `limit` messages of each sender in a window; it ends after a minute or with the
    round."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._round: Hashable = None
        self._ends = 0.0
        self._taken: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._report_at = 0.0

    def take(self, sender: str, known: bool, round_: Hashable, now: float) -> bool:
        """Whether one more message is to be looked at, at time `now` (seconds, monotonic).

        Args:
            known: the sender has a place in the table, whatever others make up.
            round_: the present one; a change begins a new window.
        """
        if round_ != self._round or now >= self._ends:
            self._round, self._ends = round_, now + WINDOW_SECONDS
            self._taken.clear()
        if not known and sender not in self._taken and len(self._taken) >= MAX_UNKNOWN:
            sender = ""  # all of them together
        self._taken[sender] += 1
        if self._taken[sender] <= self._limit:
            return True
        self._refused[sender if len(self._refused) < MAX_UNKNOWN else ""] += 1
        return False

    def report(self, now: float) -> Counter[str]:
        """Messages that were refused since the last report, by sender; every `REPORT_SECONDS`, in
        between and if there were none it is empty."""
        if not self._refused or now < self._report_at:
            return Counter()
        refused, self._refused = self._refused, Counter()
        self._report_at = now + REPORT_SECONDS
        return refused
