"""Robust rules: what they give where it is known, and how far a minority can move them."""

import itertools
import tracemalloc
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedfog.core import robust
from fedfog.core.aggregation import WeightedSum
from fedfog.core.robust import Aggregate, Rule, Updates, aggregate, attackers, weakness

RULES: tuple[Rule, ...] = get_args(Rule)
FLOATS = st.floats(-1e3, 1e3, width=32)
EXAMPLES = st.integers(1, 10**6)


def random(seed: int, n: int, size: int, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """A base model, and n updates around it."""
    generator = np.random.default_rng(seed)
    base = generator.normal(size=size).astype(np.float32)
    moved = generator.normal(size=(n, size)) * scale
    return base, (base + moved).astype(np.float32)


def fedavg(updates: np.ndarray, examples: list[int]) -> np.ndarray:
    total = WeightedSum(updates.shape[1])
    for update, number in zip(updates, examples, strict=True):
        total.add(update, number)
    return total.mean()


@pytest.mark.parametrize("rule", RULES)
@given(data=st.data())
def test_equal_updates_give_that_update_and_nobody_is_suspected(
    rule: Rule, data: st.DataObject
) -> None:
    size, n = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 9))
    base, update = (data.draw(hnp.arrays(np.float32, size, elements=FLOATS)) for _ in range(2))
    examples = data.draw(st.lists(st.integers(5, 7), min_size=n, max_size=n))
    found = aggregate(rule, [update] * n, base, examples, 0.2)
    np.testing.assert_allclose(found.vector, update, rtol=1e-6, atol=1e-9)
    assert rule in ("krum", "multi_krum") or not found.suspicious


@pytest.mark.parametrize("rule", RULES)
@given(seed=st.integers(0, 2**32), n=st.integers(5, 9), data=st.data())
def test_order_of_the_updates_is_without_effect(
    rule: Rule, seed: int, n: int, data: st.DataObject
) -> None:
    base, updates = random(seed, n, 6)
    examples = data.draw(st.lists(EXAMPLES, min_size=n, max_size=n))
    order = data.draw(st.permutations(range(n)))
    one = aggregate(rule, updates, base, examples, 0.2)
    other = aggregate(rule, updates[order], base, [examples[i] for i in order], 0.2)
    np.testing.assert_allclose(other.vector, one.vector, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(other.influence, one.influence[order], atol=1e-4)
    assert other.examples == [one.examples[i] for i in order]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("distance", [10.0, 1e6, 1e37])
@given(seed=st.integers(0, 2**32), n=st.integers(5, 15))
@settings(deadline=None, max_examples=25)
def test_minority_far_away_moves_the_result_no_further_than_the_honest_reach(
    rule: Rule, distance: float, seed: int, n: int
) -> None:
    """Attackers agree with one another, and claim all the examples that they can."""
    base, updates = random(seed, n, 40, scale=0.1)
    f = attackers(0.2, n)
    assert weakness(rule, 0.2, n) is None
    updates[:f] = -distance
    examples = [10**6] * f + [10] * (n - f)
    found = aggregate(rule, updates, base, examples, 0.2)
    honest = updates[f:]
    reach = max(np.linalg.norm(honest - base, axis=1))  # of one honest client
    assert np.linalg.norm(found.vector - base) <= 2 * reach
    assert set(range(f)) <= found.suspicious.keys()
    assert found.examples == [15] * f + [10] * (n - f)
    if rule not in ("krum", "multi_krum"):  # which leave somebody out in any case
        assert set(found.suspicious) == set(range(f))


@given(seed=st.integers(0, 2**32), n=st.integers(3, 7), data=st.data())
@settings(deadline=None, max_examples=50)
def test_geometric_median_has_the_least_sum_of_distances(
    seed: int, n: int, data: st.DataObject
) -> None:
    """To the updates at the progress of the median client; then it goes as far as the largest."""
    base, updates = random(seed, n, 2)
    examples = data.draw(st.lists(st.integers(8, 10), min_size=n, max_size=n))
    moved = updates.astype(np.float64) - base
    lengths = np.linalg.norm(moved, axis=1)
    ahead = np.minimum(lengths / np.median(lengths), np.array(examples) / np.median(examples))
    progress = np.maximum(1, ahead)
    points = moved / progress[:, None]
    cost = 0.0

    def cost_of(candidates: np.ndarray) -> np.ndarray:
        distances = np.linalg.norm(candidates[:, None] - points, axis=2)
        return np.asarray(distances @ np.minimum(examples, np.median(examples)))

    found = aggregate("geometric_median", updates, base, examples, 0.2)
    assert found.examples == examples
    # The optimum by brute force: ever finer grids around the best point.
    best, width = points.mean(axis=0), float(np.ptp(points))
    steps = np.linspace(-1, 1, 21)
    for _ in range(12):
        grid = best + width * np.array(list(itertools.product(steps, steps)))
        costs = cost_of(grid)
        best, cost, width = grid[np.argmin(costs)], costs.min(), width / 4
    middle = (found.vector.astype(np.float64) - base) / progress.max()
    assert cost_of(middle[None])[0] <= cost * (1 + 1e-3)  # smoothed


@given(seed=st.integers(0, 2**32), n=st.integers(5, 15), data=st.data())
def test_geometric_median_bears_attackers_that_have_most_of_the_examples(
    seed: int, n: int, data: st.DataObject
) -> None:
    """By their examples they would have half of the weight, as often as the median is of few."""
    f = attackers(0.2, n)
    few = data.draw(st.integers(0, n - f))
    honest = [1] * few + [100] * (n - f - few)
    base, updates = random(seed, n, 200, scale=0.1)
    updates[:f] = -1e6
    found = aggregate("geometric_median", updates, base, [10**6] * f + honest, 0.2)
    reach = max(np.linalg.norm(updates[f:] - base, axis=1))
    assert np.linalg.norm(found.vector - base) <= robust.MEDIANS * reach


@given(seed=st.integers(0, 2**32), n=st.integers(1, 9))
def test_coordinates_median_and_trimmed_mean_are_those_of_numpy(seed: int, n: int) -> None:
    base, updates = random(seed, n, 30)
    median = aggregate("median", updates, base, [5] * n, 0.2).vector
    np.testing.assert_allclose(median, np.median(updates.astype(np.float64), axis=0), rtol=1e-6)
    f = min(attackers(0.2, n), (n - 1) // 2)
    kept = np.sort(updates.astype(np.float64), axis=0)[f : n - f]
    trimmed = aggregate("trimmed_mean", updates, base, [5] * n, 0.2).vector
    np.testing.assert_allclose(trimmed, kept.mean(axis=0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rule", ["median", "trimmed_mean"])
def test_parameters_that_nobody_moved_hide_no_attacker(rule: Rule) -> None:
    """Idle units, at which all updates are the same, are most of some models."""
    base, updates = random(0, 10, 100)
    updates[:, 10:] = base[10:]
    updates[3, :10] = -50
    found = aggregate(rule, updates, base, [5] * 10, 0.2)
    assert list(found.suspicious) == [3]


@given(seed=st.integers(0, 2**32))
def test_krum_takes_one_update_and_multi_krum_the_mean_of_those_chosen(seed: int) -> None:
    """Against the definition, written out."""
    n, f = 9, 1
    base, updates = random(seed, n, 5)
    examples = [int(x) for x in np.random.default_rng(seed).integers(10, 15, n)]
    scores = [
        sum(sorted(np.linalg.norm(updates[i].astype(float) - u) ** 2 for u in updates)[: n - f - 1])
        for i in range(n)  # the nearest is the update itself
    ]
    order = [int(i) for i in np.argsort(np.array(scores))]
    krum = aggregate("krum", updates, base, examples, 0.2)
    np.testing.assert_array_equal(krum.vector, updates[order[0]])
    assert set(krum.suspicious) == set(order[1:])
    multi = aggregate("multi_krum", updates, base, examples, 0.2)
    chosen = order[: n - f]
    expected = fedavg(updates[chosen], [examples[i] for i in chosen])
    np.testing.assert_allclose(multi.vector, expected, rtol=1e-5, atol=1e-6)
    assert set(multi.suspicious) == {order[-1]}


@pytest.mark.parametrize("rule", ["norm_clip", "centered_clip", "geometric_median", "multi_krum"])
@given(seed=st.integers(0, 2**32), n=st.integers(2, 8), data=st.data())
def test_updates_that_are_equally_far_give_fedavg(
    rule: Rule, seed: int, n: int, data: st.DataObject
) -> None:
    """On axes of their own, of one length, each is as far from the mean as the others: nothing is
    damped or chosen, if nobody is assumed to be hostile."""
    size = n + 2
    base = np.random.default_rng(seed).normal(size=size).astype(np.float32)
    updates = (base + 0.5 * np.eye(n, size)).astype(np.float32)
    examples = [data.draw(st.integers(10, 15))] * n
    found = aggregate(rule, updates, base, examples, 0.0)
    np.testing.assert_allclose(found.vector, fedavg(updates, examples), rtol=1e-5, atol=1e-6)
    assert not found.suspicious


def test_norm_clip_shortens_to_the_median_length() -> None:
    base = np.zeros(2, np.float32)
    updates = [np.array(u, np.float32) for u in ([1, 0], [0, 2], [-40, 0])]
    found = aggregate("norm_clip", updates, base, [10, 10, 10], 0.2)
    np.testing.assert_allclose(found.vector, [(1 - 2) / 3, 2 / 3], rtol=1e-6)
    np.testing.assert_allclose(found.influence, [1, 1, 0.05])
    assert found.suspicious == {
        2: "it is 20.0 times as far from the base model as the median update; its influence was 5%"
    }


def test_centered_clip_is_the_algorithm_of_the_paper() -> None:
    """With explicit vectors, where the rule has inner products only."""
    base, updates = random(3, 7, 50)
    examples = [10, 12, 9, 11, 10, 14, 8]
    centre, weights = np.zeros(50), np.array(examples) / sum(examples)
    for _ in range(10):
        offsets = updates.astype(np.float64) - base - centre
        lengths = np.linalg.norm(offsets, axis=1)
        shortened = np.minimum(1, np.median(lengths) / lengths)
        centre = centre + (weights * shortened) @ offsets
    found = aggregate("centered_clip", updates, base, examples, 0.2)
    np.testing.assert_allclose(found.vector, base + centre, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_number_of_examples_counts_up_to_a_limit_that_no_claim_raises(rule: Rule) -> None:
    base, updates = random(1, 5, 4)
    # The second largest is an honest one if one client lies: 1.5 times it; and 3 medians.
    for honest, limit in (([10, 10, 10, 18], 27), ([10, 10, 10, 50], 30), ([1, 1, 2, 4], 6)):
        found = aggregate(rule, updates, base, [*honest, 1_000_000], 0.2)
        assert found.examples == [min(number, limit) for number in (*honest, 1_000_000)]
        assert f"it claims 1000000 examples, {limit} were counted" in found.suspicious[4]
        assert ("it claims" in found.suspicious.get(3, "")) == (honest[3] > limit)


@pytest.mark.parametrize("rule", RULES)
def test_few_updates_and_no_parameters_are_no_errors(rule: Rule) -> None:
    for n in (1, 2, 3):
        base, updates = random(n, n, 4)
        assert np.isfinite(aggregate(rule, updates, base, [5] * n, 0.4).vector).all()
    empty = np.zeros(0, np.float32)
    assert aggregate(rule, [empty] * 3, empty, [1] * 3, 0.2).vector.size == 0


def test_no_more_are_named_than_a_record_holds() -> None:
    n = robust.NAMED + 200
    found = aggregate("krum", np.eye(n, 3, dtype=np.float32), np.zeros(3, np.float32), [1] * n, 0.2)
    assert len(found.suspicious) == robust.NAMED
    assert found.unnamed == n - 1 - robust.NAMED
    assert list(found.suspicious) == sorted(found.suspicious)


def test_share_of_attackers_is_rounded_down_to_one_at_least() -> None:
    assert [attackers(0.2, n) for n in (1, 3, 5, 9, 10, 15, 35)] == [1, 1, 1, 1, 2, 3, 7]
    assert attackers(0.0, 10) == 0


def test_rules_that_protect_nobody_say_how_many_they_need() -> None:
    def least(rule: Rule) -> int:
        return next(n for n in range(1, 20) if weakness(rule, 0.2, n) is None)

    needed = {rule: least(rule) for rule in RULES}
    assert needed == {
        "median": 3,
        "trimmed_mean": 3,
        "krum": 5,
        "multi_krum": 5,
        "norm_clip": 5,
        "centered_clip": 5,
        "geometric_median": 5,
    }
    assert weakness("krum", 0.2, 3) == "against 1 poisoned it needs 5 updates, and there are 3"


@pytest.mark.parametrize("rule", RULES)
def test_beside_the_updates_memory_is_for_one_more_model_and_a_block(rule: Rule) -> None:
    base, vectors = random(0, 10, 1_000_000)
    examples = [5] * 10
    tracemalloc.start()
    updates = Updates(rule, 0.2, base)
    for vector, number in zip(vectors, examples, strict=True):
        updates.add(vector, number)
    found = updates.mean()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < found.nbytes + 5 * 8 * robust._BLOCK < 7 * found.nbytes


def test_updates_refuse_what_does_not_fit_and_make_room() -> None:
    base, vectors = random(0, 3, 4)
    updates = Updates("median", 0.2, base)
    with pytest.raises(ValueError, match="nothing"):
        updates.aggregate()
    for vector in vectors:
        updates.add(vector, 3)
    with pytest.raises(ValueError, match="shape"):
        updates.add(np.zeros(5, np.float32), 3)
    with pytest.raises(ValueError, match="weight"):
        updates.add(vectors[0], 0)
    found: Aggregate = updates.aggregate()
    np.testing.assert_array_equal(found.vector, np.median(vectors, axis=0))
    assert updates.weight == 9
    with pytest.raises(ValueError, match="taken"):
        updates.add(vectors[0], 3)
    assert updates.aggregate() is found
