"""What is told of many clients' evaluations at once is what their own figures say."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfog.core.metrics import Federated, merge

Told = tuple[int, int, float, int]  # examples, right answers, loss, region
CLIENTS = st.lists(
    st.integers(1, 10**9).flatmap(
        lambda n: st.tuples(st.just(n), st.integers(0, n), st.floats(0, 1e6), st.integers(0, 3))
    ),
    min_size=1,
    max_size=30,
)


def told(clients: list[Told]) -> list[Federated]:
    return [
        Federated.of(f"r{region}/c{number:02d}", examples, loss, right / examples)
        for number, (examples, right, loss, region) in enumerate(clients)
    ]


def all_of(parts: list[Federated]) -> Federated:
    merged = merge(*parts)
    assert merged is not None
    return merged


def assert_same(one: Federated, other: Federated) -> None:
    for name, value in vars(one).items():
        wanted = getattr(other, name)
        if isinstance(value, float):
            # A spread of equal clients is the root of a rounding error.
            assert value == pytest.approx(wanted, rel=1e-9, abs=1e-7), name
        else:
            assert value == wanted, name


@given(CLIENTS)
def test_federated_metrics_are_those_of_the_clients_pooled(clients: list[Told]) -> None:
    merged = all_of(told(clients))
    examples, right, losses, _ = (np.array(column) for column in zip(*clients, strict=True))
    own = right / examples
    assert (merged.num_clients, merged.num_examples) == (len(clients), examples.sum())
    assert merged.accuracy == pytest.approx(right.sum() / examples.sum())
    assert merged.loss == pytest.approx(np.average(losses, weights=examples))
    assert merged.mean_accuracy == pytest.approx(own.mean())
    assert merged.std_accuracy == pytest.approx(own.std(), abs=1e-7)
    assert merged.best_accuracy == own.max()
    names = [f"r{region}/c{number:02d}" for number, (*_, region) in enumerate(clients)]
    assert (merged.worst_accuracy, merged.worst_client) == min(zip(own, names, strict=True))


@given(CLIENTS, st.randoms(use_true_random=False))
def test_neither_order_nor_grouping_of_clients_changes_federated_metrics(
    clients: list[Told], random: object
) -> None:
    """Regions one by one, a tier above them, and whoever comes first."""
    flat = told(clients)
    regions: dict[str, list[Federated]] = {}
    for one in flat:
        regions.setdefault(one.worst_client.partition("/")[0], []).append(one)
    partials = [all_of(members) for members in regions.values()]
    tree = all_of([all_of(partials[:2]), *partials[2:]])
    assert_same(tree, all_of(flat))
    random.shuffle(flat)  # type: ignore[attr-defined]
    assert_same(all_of(flat), tree)


@given(st.lists(st.tuples(st.integers(1, 10**15), st.booleans()), min_size=1, max_size=50))
def test_figures_at_the_bounds_of_a_message_do_not_leave_them(ends: list[tuple[int, bool]]) -> None:
    parts = [
        Federated.of("r/c", examples, 1e30 if high else -1e30, float(high))
        for examples, high in ends
    ]
    merged = all_of(parts)
    assert merged.loss is not None
    assert -1e30 <= merged.loss <= 1e30
    assert 0 <= merged.accuracy <= 1
    assert 0 <= merged.mean_accuracy <= 1
    assert 0 <= merged.std_accuracy <= 1


def test_a_loss_that_is_not_finite_is_not_hidden_by_others() -> None:
    merged = all_of([Federated.of("r/a", 9, 0.5, 1.0), Federated.of("r/b", 1, None, 0.0)])
    assert merged.loss is None
    assert merged.accuracy == 0.9


def test_of_nobody_nothing_is_told() -> None:
    assert merge() is None
    assert merge(None, None) is None
    one = Federated.of("r/a", 3, math.pi, 0.5)
    assert merge(None, one, None) == one
