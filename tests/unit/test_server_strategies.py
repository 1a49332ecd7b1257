"""Flower's strategies with our settings do what their papers say."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from structlog.testing import capture_logs

from fedfog.core.aggregation import WeightedSum
from fedfog.flower.strategy import make_strategy
from fedfog.messages.codec import Vector
from flower import round_of

Array = NDArray[np.float64]
SIZE, ROUNDS = 50, 5
EXAMPLES = (30, 500, 7)
OPTIONS = {"server_learning_rate": 0.03, "tau": 0.002, "beta_1": 0.8, "beta_2": 0.95}


def moves(number: int) -> list[Vector]:
    """How far the regions' models of a round are from the global one."""
    generator = np.random.default_rng(number)
    return [generator.normal(0, 0.01, SIZE).astype(np.float32) for _ in EXAMPLES]


def models_of(name: str, **options: float) -> Iterator[Vector]:
    strategy, model = make_strategy(name, len(EXAMPLES), 0.1, **options), np.zeros(SIZE, np.float32)
    for number in range(1, ROUNDS + 1):
        trained = [(model + move, n) for move, n in zip(moves(number), EXAMPLES, strict=True)]
        model = round_of(strategy, number, model, trained)
        yield model


def by_formula(step: Callable[[int, Array], Array]) -> Iterator[Array]:
    """`step(number, delta)`: how far the model goes when the mean over regions goes `delta`."""
    model = np.zeros(SIZE)
    for number in range(1, ROUNDS + 1):
        model = model + step(number, np.average(moves(number), axis=0, weights=EXAMPLES))
        yield model


def assert_close(name: str, step: Callable[[int, Array], Array], **options: float) -> None:
    for found, expected in zip(models_of(name, **options), by_formula(step), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


def test_fedavgm_has_momentum_and_a_learning_rate() -> None:
    """Hsu et al. 2019, arXiv:1909.06335."""
    velocity = np.zeros(SIZE)

    def step(number: int, delta: Array) -> Array:
        nonlocal velocity
        velocity = 0.9 * velocity + delta
        return 0.7 * velocity

    assert_close("FedAvgM", step, server_learning_rate=0.7, server_momentum=0.9)


@pytest.mark.parametrize("name", ["FedAdam", "FedYogi", "FedAdagrad"])
def test_adaptive_strategies_have_their_rate_tau_and_betas(name: str) -> None:
    """Reddi et al. 2021, arXiv:2003.00295, algorithm 2; Flower corrects FedAdam's bias."""
    m, v = np.zeros(SIZE), np.zeros(SIZE)
    beta_1, beta_2 = (0.0, 0.0) if name == "FedAdagrad" else (0.8, 0.95)

    def step(number: int, delta: Array) -> Array:
        nonlocal m, v
        m = beta_1 * m + (1 - beta_1) * delta
        square = delta**2
        v = {
            "FedAdam": beta_2 * v + (1 - beta_2) * square,
            "FedYogi": v - (1 - beta_2) * square * np.sign(v - square),
            "FedAdagrad": v + square,
        }[name]
        rate = 0.03
        if name == "FedAdam":
            rate *= np.sqrt(1 - beta_2 ** (number + 1)) / (1 - beta_1 ** (number + 1))
        return rate * m / (np.sqrt(v) + 0.002)

    assert_close(name, step, **OPTIONS)


@pytest.mark.parametrize("name", ["FedAvg", "FedAvgM", "FedProx"])
def test_what_is_fedavg_at_the_server_is_summed_as_fedavg(name: str) -> None:
    """In float64: Flower's own sum loses what nearly cancels."""
    start = np.zeros(SIZE, np.float32)
    trained = [
        (move + np.float32(s), 1000 + s) for s, move in zip((9, -9, 0), moves(1), strict=True)
    ]
    total = WeightedSum(SIZE)
    for vector, examples in trained:
        total.add(vector, examples)
    found = round_of(make_strategy(name, len(EXAMPLES), 0.1), 1, start, trained)
    assert found.tobytes() == total.mean().tobytes()


def test_option_that_a_strategy_does_not_have_is_named() -> None:
    with capture_logs() as lines:
        make_strategy("FedAvgM", 1, 0.1, server_momentum=0.9, tau=0.5, beta_1=None)
    assert [(line["setting"], line["strategy"]) for line in lines] == [("TAU=0.5", "FedAvgM")]
