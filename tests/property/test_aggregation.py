"""Weighted means: any grouping of the clients gives flat FedAvg, in memory for one model."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedfog.core.aggregation import WeightedSum, all_finite

FLOATS = st.floats(-1e3, 1e3, width=32)


def mean(vectors: list[np.ndarray], weights: list[int]) -> np.ndarray:
    total = WeightedSum(vectors[0].size)
    for vector, weight in zip(vectors, weights, strict=True):
        total.add(vector, weight)
    return total.mean()


@given(data=st.data())
def test_mean_of_partials_is_the_mean_over_all_clients(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 20))
    count = data.draw(st.integers(1, 12))
    vectors = [data.draw(hnp.arrays(np.float32, size, elements=FLOATS)) for _ in range(count)]
    weights = data.draw(st.lists(st.integers(1, 10**6), min_size=count, max_size=count))
    region_of = data.draw(st.lists(st.integers(0, 4), min_size=count, max_size=count))

    partials, partial_weights = [], []
    for region in sorted(set(region_of)):
        members = [i for i in range(count) if region_of[i] == region]
        partials.append(mean([vectors[i] for i in members], [weights[i] for i in members]))
        partial_weights.append(sum(weights[i] for i in members))

    products = [w * v.astype(np.longdouble) for v, w in zip(vectors, weights, strict=True)]
    exact = np.sum(products, axis=0) / sum(weights)
    # Two roundings to float32, each relative to the largest partial, not to a sum that cancels.
    scale = max(1e-30, *(float(np.abs(partial).max()) for partial in partials))
    error = np.abs(mean(partials, partial_weights) - exact).max()
    assert error <= 2 * np.finfo(np.float32).eps * scale


def test_large_weights_are_multiplied_in_float64() -> None:
    """float32 holds 24 bits: 1/3 times 2**24 + 1 examples would lose the one."""
    third = np.array([1 / 3], np.float32)
    total = WeightedSum(1)
    total.add(third, 2**24 + 1)
    total.add(-third, 2**24)
    assert total.mean()[0] == np.float32(float(third[0]) / (2**25 + 1))


def test_memory_does_not_grow_with_the_clients() -> None:
    size = 500_000
    vector = np.ones(size, np.float32)
    tracemalloc.start()
    total = WeightedSum(size)
    for _ in range(50):
        total.add(vector, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 8 * size  # the float64 sum, and room for blocks


@pytest.mark.parametrize(("shape", "weight"), [(4, 1), (3, 0), (3, -2)])
def test_what_does_not_fit_is_refused_and_changes_nothing(shape: int, weight: int) -> None:
    total = WeightedSum(3)
    total.add(np.ones(3, np.float32), 2)
    with pytest.raises(ValueError, match=r"weight|shape"):
        total.add(np.ones(shape, np.float32), weight)
    assert total.mean().tolist() == [1, 1, 1]


def test_mean_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing"):
        WeightedSum(3).mean()


def test_nothing_is_added_once_the_mean_was_taken() -> None:
    """The mean lies where the sum was."""
    total = WeightedSum(3)
    total.add(np.ones(3, np.float32), 2)
    assert total.mean().tolist() == total.mean().tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="the mean was taken"):
        total.add(np.ones(3, np.float32), 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(bad: float) -> None:
    vector = np.zeros(200_000, np.float32)
    assert all_finite(vector)
    for index in (0, 65_536, 199_999):
        vector[index] = bad
        assert not all_finite(vector)
        vector[index] = 0
