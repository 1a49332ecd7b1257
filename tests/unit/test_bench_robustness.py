"""The bench of the robust rules: it trains as the product does, and the page has its figures."""

from pathlib import Path

import numpy as np
import pytest
from bench import robustness
from bench.robustness import Federation

from fedfog.messages.schemas import Hyperparameters
from fedfog.ml.ecg5000 import Ecg5000
from fedfog.ml.training import load_arrays, state_arrays, train_local


@pytest.fixture(scope="module")
def federation() -> Federation:
    return Federation(Ecg5000(robustness.ROOT / "data"), "Dirichlet 0.5", 0)


def test_clients_trained_at_once_are_trained_as_by_the_product(federation: Federation) -> None:
    """Those with a single batch, in which the order is without effect."""
    few = [c for c, number in enumerate(federation.examples) if number <= robustness.BATCH]
    assert 1 < len(few) < robustness.CLIENTS
    everybody = list(range(robustness.CLIENTS))
    models = federation.train(federation.start, everybody, set(), 1, "Adam")
    for client in few:
        model = federation.task.build_model(federation.seed)
        data = federation.task.training_data(federation.parts[client])
        parameters = Hyperparameters(local_epochs=1)
        train_local(federation.task, model, data, parameters, round=1, seed=0)
        one = np.concatenate([array.ravel() for array in state_arrays(model).values()])
        moved = np.linalg.norm(one - federation.start)
        assert np.linalg.norm(models[client] - one) < 1e-3 * moved


def test_client_with_flipped_labels_learns_the_opposite(federation: Federation) -> None:
    model = federation.start
    for number in range(1, 13):
        model = federation.train(model, [14], {14}, number, "Adam")[0]
    assert federation.accuracy(model) < 25


def test_accuracy_is_that_of_the_model_given(federation: Federation) -> None:
    model = federation.task.build_model(1)
    load_arrays(model, {k: np.zeros_like(v) for k, v in state_arrays(model).items()})
    zero = np.concatenate([array.ravel() for array in state_arrays(model).values()])
    assert federation.accuracy(zero) == pytest.approx(58.38, abs=0.01)  # all called normal


def test_page_has_the_figures_of_the_results(tmp_path: Path) -> None:
    copy = tmp_path / "page.md"
    copy.write_text(robustness.PAGE.read_text())
    robustness.write_page(robustness.load(), copy)
    assert copy.read_text() == robustness.PAGE.read_text(), "python -m bench.robustness --write"
