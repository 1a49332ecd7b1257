"""Who trains on what: the training set is dealt to the regions, and a region's part to its slots.

Two settings say how, REGION_PARTITION and PARTITION, each one of

- `iid`: equal parts of a random order.
- `dirichlet:ALPHA`: shares of each class, drawn from a symmetric Dirichlet distribution (Yurochkin
  et al. 2019, arXiv:1905.12022; Hsu et al. 2019, arXiv:1909.06335, draw the classes of each holder
  instead). The smaller ALPHA, the more the holders differ.
- `sizes:ALPHA`: such shares of the whole, so that only the sizes differ (Li et al. 2022,
  arXiv:2102.02079).
- `shards:K`: K classes for each holder, in nearly equal shards (as McMahan et al. 2017,
  arXiv:1602.05629, but no shard holds the end of one class and the beginning of the next).
- `group`: whole groups (a subject, a file: `Task.training_groups`), as many for each holder.

A region need not know how many slots the others have. With `dirichlet:3a` for 3 regions and
`dirichlet:a` for 3 slots in each, the shares are those of `dirichlet:a` for 9 slots (the
aggregation property of the distribution).

Nobody goes without. Dirichlet shares are drawn again until each holder has 10 examples (as Li et
al. 2022 do), a thousand times at most. After that, or if 10 are more than half of an equal part,
whoever has less than 10, or than that half, gets the rest from whoever has most.

All is drawn from the run's seed, so that everybody arrives at the same split.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

LEAST = 10  # examples of a holder of Dirichlet shares
DRAWS = 1000  # of Dirichlet shares, until nobody has less


def parse(spec: str) -> tuple[str, float]:
    """Kind of a partition, and its ALPHA or K (else 0).

    Raises:
        ValueError: there is no such partition.
    """
    kind, _, text = spec.partition(":")
    try:
        number = float(text or "0")
    except ValueError:
        number = -1.0
    if (
        (kind in ("iid", "group") and spec == kind)
        or (kind in ("dirichlet", "sizes") and 0 < number <= 1e6)
        or (kind == "shards" and number >= 1 and number.is_integer())
    ):
        return kind, number
    raise ValueError(
        f"{spec!r} is none of iid, dirichlet:ALPHA, sizes:ALPHA (0 < ALPHA <= 1e6), shards:K "
        "(K = 1, 2, ...) and group"
    )


def slot_indices(
    labels: NDArray[np.int64],
    groups: NDArray[np.int64] | None,
    *,
    slot: int,
    slots: int,
    region_index: int,
    regions: int,
    seed: int,
    partition: str = "iid",
    region_partition: str = "iid",
) -> Indices:
    """Indices of the training examples of one slot.

    `labels` and `groups`, int64 of shape (n,), are those of the whole training set. All slots of
    all regions are disjoint and together hold every index once - unless the region has more slots
    than examples, and PARTITION is `iid`: then each slot holds one example and some hold the same,
    which counts once for each of them.

    Raises:
        ValueError: there is no such slot or region, or the examples cannot be dealt so; the text
            names the setting.
    """
    if not (0 <= slot < slots and 0 <= region_index < regions):
        raise ValueError(f"no slot {slot} of {slots} in region {region_index} of {regions}")
    rng = np.random.default_rng(seed)
    part: Indices = rng.permutation(len(labels))
    setting = ("REGION_PARTITION", region_partition)
    owners = _owners(setting, labels, groups, part, regions, "regions", rng)
    part = part[owners == region_index]
    if partition == "iid" and len(part) < slots:
        return part[slot % len(part) :][:1]
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(region_index,)))
    setting = ("PARTITION", partition)
    mine: Indices = part[_owners(setting, labels, groups, part, slots, "slots", rng) == slot]
    return mine


def deal(
    labels: NDArray[np.int64],
    groups: NDArray[np.int64] | None,
    slots: Sequence[int],
    *,
    seed: int,
    partition: str = "iid",
    region_partition: str = "iid",
) -> list[list[Indices]]:
    """`slot_indices` of all slots of all regions; `slots` are their numbers, by region."""
    return [
        [
            slot_indices(
                labels,
                groups,
                slot=slot,
                slots=of_region,
                region_index=region_index,
                regions=len(slots),
                seed=seed,
                partition=partition,
                region_partition=region_partition,
            )
            for slot in range(of_region)
        ]
        for region_index, of_region in enumerate(slots)
    ]


def _owners(
    setting: tuple[str, str],
    labels: NDArray[np.int64],
    groups: NDArray[np.int64] | None,
    indices: Indices,
    holders: int,
    called: str,
    rng: np.random.Generator,
) -> Indices:
    """Which of the holders, from 0, gets each of `indices`, which are in random order."""
    try:
        kind, number = parse(setting[1])
        if len(indices) < holders:
            raise ValueError(f"{len(indices)} examples are too few for {holders} {called}")
        match kind:
            case "dirichlet":
                return _dirichlet(labels[indices], holders, number, rng)
            case "sizes":
                return _dirichlet(np.zeros_like(indices), holders, number, rng)
            case "shards":
                return _shards(labels[indices], holders, int(number), rng)
            case "group":
                if groups is None:
                    raise ValueError("the task does not say to which groups its examples belong")
                names, group_of = np.unique(groups[indices], return_inverse=True)
                if len(names) < holders:
                    raise ValueError(f"{len(names)} groups are too few for {holders} {called}")
                return rng.permutation(_equal(len(names), holders))[group_of]
        return _equal(len(indices), holders)
    except ValueError as error:
        raise ValueError(f"{'='.join(setting)}: {error}") from error


def _equal(number: int, holders: int) -> Indices:
    holder = np.arange(holders)
    return np.repeat(holder, number // holders + (holder < number % holders))


def _dirichlet(
    classes: NDArray[np.int64], holders: int, alpha: float, rng: np.random.Generator
) -> Indices:
    least = max(1, min(LEAST, len(classes) // (2 * holders)))
    members = [np.flatnonzero(classes == name) for name in np.unique(classes)]
    examples = np.array([[len(indices)] for indices in members])
    for _ in range(DRAWS if least == LEAST else 1):
        shares = rng.dirichlet(np.full(holders, alpha), len(members))
        ends = np.rint(shares.cumsum(axis=1) * examples).astype(np.int64)
        counts = np.diff(ends, axis=1, prepend=0)
        if counts.sum(axis=0).min() >= least:
            break
    owners = np.empty(len(classes), np.int64)
    for indices, count in zip(members, counts, strict=True):
        owners[indices] = np.repeat(np.arange(holders), count)
    sizes = counts.sum(axis=0)
    while sizes.min() < least:
        poor, rich = sizes.argmin(), sizes.argmax()
        missing = least - sizes[poor]
        owners[np.flatnonzero(owners == rich)[:missing]] = poor
        sizes[poor] += missing
        sizes[rich] -= missing
    return owners


def _shards(
    classes: NDArray[np.int64], holders: int, per_holder: int, rng: np.random.Generator
) -> Indices:
    names, examples = np.unique(classes, return_counts=True)
    most = np.minimum(examples, holders)
    if per_holder > len(names):
        raise ValueError(f"there are examples of {len(names)} classes only")
    if not len(names) <= per_holder * holders <= most.sum():
        raise ValueError(
            f"{len(classes)} examples of {len(names)} classes cannot be cut into "
            f"{per_holder * holders} shards"
        )
    # One shard for each class, and another one of whichever class has the largest shards.
    shards = np.ones(len(names), np.int64)
    for _ in range(per_holder * holders - len(names)):
        shards[np.argmax(np.where(shards < most, examples / shards, 0))] += 1
    owners = np.empty(len(classes), np.int64)
    held = np.zeros(holders, np.int64)
    for index in rng.permutation(len(names)):
        # To whoever has fewest so far: in the end all have as many, of different classes.
        takers = np.lexsort((rng.random(holders), held))[: shards[index]]
        held[takers] += 1
        members = np.flatnonzero(classes == names[index])
        owners[members] = takers[_equal(len(members), len(takers))]
    return owners
