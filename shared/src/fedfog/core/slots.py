"""Data slots: which client trains on which part of the training set.

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

import numpy as np
from numpy.typing import NDArray


def slot_indices(
    num_examples: int, slot: int, slots: int, region_index: int, regions: int, seed: int
) -> NDArray[np.int64]:
    """Indices of the training examples of one slot, shape (about num_examples/regions/slots,).

    A seeded permutation (an IID partition) is cut into `regions` parts and each of these into
    `slots`. All slots of all regions are disjoint and together hold every index once - unless a
    region has more slots than examples: then each slot holds one example and some hold the same,
    which counts once for each of them.

    Raises:
        ValueError: there is no such slot or region, or no example for the region.
    """
    if not (0 <= slot < slots and 0 <= region_index < regions):
        raise ValueError(f"no slot {slot} of {slots} in region {region_index} of {regions}")
    order = np.random.default_rng(seed).permutation(num_examples)
    part = np.array_split(order, regions)[region_index]
    if len(part) == 0:
        raise ValueError(f"{num_examples} examples are too few for {regions} regions")
    if len(part) < slots:
        return part[slot % len(part) :][:1]
    return np.array_split(part, slots)[slot]


def slots_share(num_examples: int, slots: int, region_index: int, regions: int) -> bool:
    """True if the region has more slots than examples, so that some slots hold the same one."""
    return slots > num_examples // regions + (region_index < num_examples % regions)


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
