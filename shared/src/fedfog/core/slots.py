"""Data slots: which client has which part of the training set (`partition` cuts it).

A replica started by `docker compose up --scale client=N` knows neither its number nor N. So the
aggregator deals slots to the first cohort of a run: slot i of n to the i-th client in order of
names. The rule for everything later:

- the number of slots stays as it is for the whole run, and a client that returns has its slot back;
- a newcomer gets a slot without a holder, else the slot of a client that has been gone for
  longer than a limit, else it shares the slot with the fewest holders, whose examples then count
  once for each of them. The next run deals anew to everybody present.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class SlotTable:
    """Slots of one run in one region: who holds which, and who has been gone since when."""

    run: str
    slots: int
    holders: dict[str, int] = field(default_factory=dict)
    gone_since: dict[str, float] = field(default_factory=dict)

    @classmethod
    def deal(cls, run: str, clients: Iterable[str]) -> "SlotTable":
        """One slot for each client, in order of names."""
        names = sorted(clients)
        return cls(run, max(1, len(names)), {name: slot for slot, name in enumerate(names)})

    def join(self, client: str, now: float, limit: float) -> int:
        """The slot of a client that is there; `limit` is how many seconds a client may be gone
        before its slot can go to a newcomer."""
        self.gone_since.pop(client, None)
        if client not in self.holders:
            self.holders[client] = self._slot_for_newcomer(now, limit)
        return self.holders[client]

    def leave(self, client: str, now: float) -> None:
        if client in self.holders:
            self.gone_since[client] = now

    def shared(self, slot: int) -> bool:
        return sum(held == slot for held in self.holders.values()) > 1

    def _slot_for_newcomer(self, now: float, limit: float) -> int:
        load = dict.fromkeys(range(self.slots), 0)
        for slot in self.holders.values():
            load[slot] += 1
        least = min(load, key=lambda slot: (load[slot], slot))
        if load[least] > 0:
            expired = [c for c, since in self.gone_since.items() if now - since > limit]
            if expired:
                longest = min(expired, key=lambda c: (self.gone_since[c], c))
                del self.gone_since[longest]
                return self.holders.pop(longest)
        return least
