"""Rules for rounds in which some updates may be poisoned.

In a weighted mean one client can move the model anywhere. Each rule here bounds what a minority can
do, under the assumption in its docstring; none bears attackers that are as strong as the others
together. Words: n updates x_i (float32, shape (size,)) were trained from `base`, d_i = x_i - base,
w_i is the update's share of all examples, and f of the updates may be poisoned.

Except for the coordinate-wise rules a result is base + sum c_i d_i, with c_i that follow from the
inner products of the d_i alone. So a rule goes over the parameters twice, in blocks, and beside the
updates, which are there once, it needs n x n numbers and one more model.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]
Floats = NDArray[np.float64]
Stack = Sequence[Vector] | Vector  # float32, n of shape (size,), or (n, size)
Rule = Literal[
    "median",
    "trimmed_mean",
    "krum",
    "multi_krum",
    "norm_clip",
    "centered_clip",
    "geometric_median",
]

MEDIANS = 3  # of the examples, that an update may count
LARGEST = 1.5  # times the largest number that must be an honest one, likewise
SUSPICIOUS = 0.5  # an influence below this is put on record
NAMED = 1000  # updates at most, those of least influence: a record is a message, and has a limit

_BLOCK = 1 << 19  # float64 numbers that are looked at together


@dataclass(frozen=True)
class Aggregate:
    """What a rule made of the updates, in the order in which they were given."""

    vector: Vector  # float32, shape (size,)
    examples: list[int]  # that each update counted with
    influence: Floats  # shape (n,): 0 left out, 1 as much as its examples give it
    suspicious: dict[int, str]  # index of an update that was left out or damped, and why
    unnamed: int  # suspicious ones beyond `NAMED`


@dataclass(frozen=True)
class _Verdict:
    influence: Floats
    measure: Floats  # what the influence follows from
    words: str  # that put the measure into a sentence


class Updates:
    """The updates of a round, kept until its end: what a rule needs in the place of a sum.

    Args:
        base: the model that they were trained from, float32, shape (size,).
        byzantine: share of the updates that may be poisoned.
    """

    def __init__(self, rule: Rule, byzantine: float, base: Vector) -> None:
        self._rule, self._byzantine, self._base = rule, byzantine, base
        self._vectors: list[Vector] = []
        self._examples: list[int] = []
        self._aggregate: Aggregate | None = None

    def add(self, vector: Vector, weight: int) -> None:
        """Keep an update (float32, shape (size,)) of `weight` examples, above 0.

        Raises:
            ValueError: the shape or the weight does not fit, or the aggregate was taken.
        """
        if self._aggregate is not None:
            raise ValueError("the aggregate was taken")
        if vector.shape != self._base.shape:
            raise ValueError(f"a vector of shape {vector.shape}, not {self._base.shape}")
        if weight <= 0:
            raise ValueError(f"the weight is {weight}, not above 0")
        self._vectors.append(vector)
        self._examples.append(weight)

    def aggregate(self) -> Aggregate:
        """Apply the rule; the updates make room.

        Raises:
            ValueError: nothing was added.
        """
        if self._aggregate is None:
            self._aggregate = aggregate(
                self._rule, self._vectors, self._base, self._examples, self._byzantine
            )
            self._vectors.clear()
        return self._aggregate

    def weakness(self, n: int) -> str | None:
        """Why the rule protects nobody among n updates; None if it does."""
        return weakness(self._rule, self._byzantine, n)

    def mean(self) -> Vector:
        """The aggregate alone, as of a `WeightedSum`."""
        return self.aggregate().vector

    @property
    def weight(self) -> int:
        """The examples that the updates counted with."""
        return sum(self.aggregate().examples)


def aggregate(
    rule: Rule,
    updates: Stack,
    base: Vector,
    examples: Sequence[int],
    byzantine: float,
) -> Aggregate:
    """Apply a rule to updates (float32, finite, each of the base model's shape (size,)).

    A client may claim any number of examples. So none counts with more than `MEDIANS` times the
    median, which lets honest clients differ in size; nor with more than `LARGEST` times the largest
    but f, which binds liars where the honest are alike. The order of the updates is without effect
    but for rounding, and for equal scores in `krum` and `multi_krum`.

    Raises:
        ValueError: there is no update.
    """
    if len(updates) == 0:
        raise ValueError("the aggregate of nothing")
    n = len(updates)
    f = attackers(byzantine, n)
    largest = sorted(examples)[max(0, n - 1 - f)]
    cap = max(1, int(min(MEDIANS * np.median(examples), LARGEST * largest)))
    counted = [min(number, cap) for number in examples]
    if rule in ("median", "trimmed_mean"):
        vector, verdict = _coordinates(rule, updates, base, f)
    else:
        weights = np.array(counted, np.float64) / sum(counted)
        mix, verdict = _MIXES[rule](_inner_products(updates, base), weights, f)
        vector = _mixed(updates, base, mix)
    suspicious = {
        i: f"{verdict.words.format(verdict.measure[i])}; its influence was {influence:.0%}"
        for i, influence in enumerate(verdict.influence)
        if influence < SUSPICIOUS
    }
    for i, number in enumerate(examples):
        if number > cap:
            capped = f"it claims {number} examples, {cap} were counted"
            suspicious[i] = "; ".join(filter(None, [suspicious.get(i), capped]))
    named = sorted(suspicious, key=verdict.influence.__getitem__)[:NAMED]
    return Aggregate(
        vector,
        counted,
        verdict.influence,
        {i: suspicious[i] for i in sorted(named)},
        len(suspicious) - len(named),
    )


def attackers(byzantine: float, n: int) -> int:
    """f, the poisoned ones of n updates that a rule has to bear: the share `byzantine`, rounded
    down, but one at least if it is above 0."""
    return max(int(byzantine * n + 1e-9), int(byzantine > 0))


def weakness(rule: Rule, byzantine: float, n: int) -> str | None:
    """Why a rule protects nobody among n updates; None if it does.

    That n - f honest updates outweigh f others also when these count with `MEDIANS` times the
    examples, the rules that weigh by examples need n > (1 + MEDIANS) f.
    """
    f = attackers(byzantine, n)
    needed = 2 * f + 3 if rule in ("krum", "multi_krum") else 2 * f + 1
    if rule not in ("median", "trimmed_mean", "krum"):
        needed = max(needed, (1 + MEDIANS) * f + 1)
    if n >= needed:
        return None
    return f"against {f} poisoned it needs {needed} updates, and there are {n}"


# Coordinate by coordinate


def _coordinates(rule: Rule, updates: Stack, base: Vector, f: int) -> tuple[Vector, _Verdict]:
    """Coordinate-wise median and trimmed mean (Yin et al. 2018, https://arxiv.org/abs/1803.01498).

    Of each parameter the largest and the smallest f values are left out and the rest is averaged;
    the median leaves out all but the middle. The numbers of examples do not count, as in the paper.
    It assumes n > 2f, and that the honest clients' data are alike: under skew the parameters of a
    class that few clients have are trimmed away. Influence: how often a value is not among the f
    outermost, where some are, beside the share (n - 2f) / n that chance gives everybody.
    """
    n = len(updates)
    f = min(f, (n - 1) // 2)
    trim = (n - 1) // 2 if rule == "median" else f
    vector = np.empty_like(base)
    inside, contested = np.zeros(n), 0
    for block, values in _blocks(updates):
        ordered = np.sort(values, axis=0)
        vector[block] = ordered[trim : n - trim].mean(axis=0, dtype=np.float64)
        outside = (values < ordered[f]) | (values > ordered[n - 1 - f])
        differ = outside.any(axis=0)  # not where a fresh Adam or an idle unit makes all the same
        inside += (differ & ~outside).sum(axis=1)
        contested += int(differ.sum())
    share = inside / contested if contested else np.ones(n)
    words = "it is among the outermost at {:.0%} of the parameters that differ"
    return vector, _Verdict(np.minimum(1, share * n / (n - 2 * f)), 1 - share, words)


# By inner products: each rule gets them (n, n), the weights w (n,), which sum to 1, and f, and
# gives the coefficients c (n,).

_Mix = Callable[[Floats, Floats, int], tuple[Floats, _Verdict]]


def _krum(products: Floats, weights: Floats, f: int) -> tuple[Floats, _Verdict]:
    """Krum (Blanchard et al. 2017, https://arxiv.org/abs/1703.02757): the one update that has the
    least sum of squared distances to its n - f - 2 nearest others.

    It assumes n >= 2f + 3 and that honest updates lie close together. It trains on one client's
    data, so never take it for skewed data; numbers of examples do not count.
    """
    scores = _krum_scores(products, f)
    return _chosen(scores, 1, np.ones_like(weights))


def _multi_krum(products: Floats, weights: Floats, f: int) -> tuple[Floats, _Verdict]:
    """Multi-Krum (same paper): the weighted mean of the n - f updates with the best Krum scores.

    It assumes n >= 2f + 3. Attackers that agree with one another lie closer together than honest
    clients with skewed data, and are chosen then.
    """
    scores = _krum_scores(products, f)
    return _chosen(scores, max(1, len(weights) - f), weights)


def _norm_clip(products: Floats, weights: Floats, _f: int) -> tuple[Floats, _Verdict]:
    """Norm clipping (Sun et al. 2019, https://arxiv.org/abs/1911.07963): the weighted mean after
    each d_i longer than a bound was shortened to it.

    The bound is the median length, so it assumes n > 2f. It takes away what attackers gain by
    large updates and nothing else: a wrong direction of common length counts in full.
    """
    ratio = _in_medians(_lengths(products, np.zeros_like(weights)))
    influence = _damping(ratio)
    words = "it is {:.1f} times as far from the base model as the median update"
    return weights * influence, _Verdict(influence, ratio, words)


def _centered_clip(products: Floats, weights: Floats, _f: int) -> tuple[Floats, _Verdict]:
    """Centered clipping (Karimireddy et al. 2021, https://arxiv.org/abs/2012.10333): move a centre
    by the weighted mean of the d_i - centre, each shortened to a bound, and repeat.

    It begins at the base model, without the paper's momentum, and the bound is the median distance
    of the step; it assumes n > 2f. The paper's guarantee is for f / n < 0.1.
    """
    centre = np.zeros_like(weights)
    for _ in range(10):
        ratio = _in_medians(_lengths(products, centre))
        moved = weights * (influence := _damping(ratio))
        centre = centre * (1 - moved.sum()) + moved
    words = "it is {:.1f} times as far from the centre as the median update"
    return centre, _Verdict(influence, ratio, words)


def _geometric_median(products: Floats, weights: Floats, _f: int) -> tuple[Floats, _Verdict]:
    """RFA (Pillutla et al. 2022, https://arxiv.org/abs/1912.13445): the point with the least
    weighted sum of distances to all updates, by the smoothed algorithm of Weiszfeld; of updates
    that are first brought to one progress (FedNova, Wang et al. 2020,
    https://arxiv.org/abs/2007.07481).

    An update that has t > 1 times the median number of examples and is t times as long as the
    median one is divided by t, and the result is multiplied by the largest t. Otherwise the long
    updates of large clients would count as outliers, and it would learn slowly. None weighs more
    than the median. So f of n hold less than 2f / n of the weight, whatever they claim and
    whosever data they have: it assumes n > 4f, and knows no f. What f can do beside is to lengthen
    the step, by what the limit on examples lets t be.

    Each step is a mean with weights w_i / distance_i, so a far update counts little. The first step
    is taken from the update that is nearest to the others: from their mean, as in the paper, an
    attacker at distance L costs log L steps. Distances below 1e-3 of the median one are smoothed.
    """
    lengths = _in_medians(_lengths(products, np.zeros_like(weights)))
    progress = np.maximum(1, np.minimum(lengths, _in_medians(weights)))
    products = products / np.outer(progress, progress)
    weights = np.minimum(weights, np.median(weights))
    weights = weights / weights.sum()
    pairs = np.sqrt(_squared_pairs(products))
    distances = pairs[np.argmin(pairs @ weights)]
    smoothing, mix = np.sort(distances)[len(distances) // 2], np.zeros_like(weights)
    for _ in range(1000):
        before, pull = mix, weights / np.maximum(distances, smoothing)
        mix = pull / pull.sum()
        if np.abs(mix - before).max() < 1e-7:
            break
        distances = _lengths(products, mix)
        smoothing = 1e-3 * np.median(distances)
    ratio = _in_medians(distances)
    words = "it is {:.1f} times as far from the aggregate as the median update"
    return mix / progress * progress.max(), _Verdict(_damping(ratio), ratio, words)


_MIXES: dict[str, _Mix] = {
    "krum": _krum,
    "multi_krum": _multi_krum,
    "norm_clip": _norm_clip,
    "centered_clip": _centered_clip,
    "geometric_median": _geometric_median,
}


def _krum_scores(products: Floats, f: int) -> Floats:
    n = len(products)
    pairs = _squared_pairs(products)
    np.fill_diagonal(pairs, np.inf)
    near = min(max(1, n - f - 2), n - 1)
    scores: Floats = np.sort(pairs, axis=1)[:, :near].sum(axis=1)
    return scores


def _chosen(scores: Floats, count: int, weights: Floats) -> tuple[Floats, _Verdict]:
    influence = np.zeros_like(weights)
    influence[np.argsort(scores, kind="stable")[:count]] = 1
    mix = weights * influence
    ratio = _in_medians(scores) if len(scores) > 1 else np.ones_like(scores)
    return mix / mix.sum(), _Verdict(influence, ratio, "its Krum score is {:.1f} medians")


def _squared_pairs(products: Floats) -> Floats:
    """|d_i - d_j|^2, shape (n, n)."""
    squares = np.diag(products)
    return np.maximum(squares[:, None] + squares - 2 * products, _resolution(products))


def _lengths(products: Floats, mix: Floats) -> Floats:
    """|d_i - sum mix_j d_j|, shape (n,)."""
    squares = np.diag(products) - 2 * products @ mix + mix @ products @ mix
    return np.sqrt(np.maximum(squares, _resolution(products)))


def _resolution(products: Floats) -> float:
    """Squared distance below which updates are the same: it would be rounding alone."""
    return float(1e-12 * np.median(np.diag(products)) + 1e-200)


def _in_medians(values: Floats) -> Floats:
    return values / np.median(values)


def _damping(ratio: Floats) -> Floats:
    return np.minimum(1, 1 / ratio)


# Over the parameters, in blocks


def _blocks(updates: Stack) -> Iterator[tuple[slice, Vector]]:
    """Slices of the parameters, and the updates' values there, shape (n, length)."""
    step = max(1, _BLOCK // len(updates))
    for start in range(0, updates[0].size, step):
        block = slice(start, start + step)
        yield block, np.stack([update[block] for update in updates])


def _inner_products(updates: Stack, base: Vector) -> Floats:
    products = np.zeros((len(updates), len(updates)))
    for block, values in _blocks(updates):
        moved = np.subtract(values, base[block], dtype=np.float64)
        products += moved @ moved.T
    return products


def _mixed(updates: Stack, base: Vector, mix: Floats) -> Vector:
    """base + sum mix_i d_i, rounded once to float32."""
    vector = np.empty_like(base)
    rest = 1 - mix.sum()
    for block, values in _blocks(updates):
        vector[block] = mix @ values.astype(np.float64) + rest * base[block]
    return vector
