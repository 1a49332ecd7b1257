"""Metrics, against values worked out by hand and against their textbook definitions."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, roc_auc_score
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedfog.ml.ecg5000 import Ecg5000, Ecg5000FiveClass
from fedfog.ml.evaluation import evaluate, evaluate_full

BINARY, FIVE = Ecg5000(Path()), Ecg5000FiveClass(Path())


def given_outputs(outputs: list[list[float]], labels: list[int]) -> TensorDataset:
    """A data set on which the identity gives these model outputs."""
    return TensorDataset(torch.tensor(outputs), torch.tensor(labels))


def test_binary_metrics_are_what_one_works_out_by_hand() -> None:
    data = given_outputs([[-2.0], [-1.0], [1.0], [3.0], [-3.0]], [0, 1, 0, 1, 0])
    metrics = evaluate_full(BINARY, nn.Identity(), data)
    assert metrics.num_examples == 5
    assert metrics.accuracy == pytest.approx(3 / 5)
    assert metrics.confusion_matrix == [[2, 1], [1, 1]]
    # Of the six pairs of an abnormal and a normal beat, only (-1, 1) is in the wrong order.
    assert metrics.auroc == pytest.approx(5 / 6)
    assert metrics.macro_f1 == pytest.approx((4 / 6 + 2 / 4) / 2)
    wrong_side = [-2.0, 1.0, 1.0, -3.0, -3.0]
    assert metrics.loss == pytest.approx(sum(math.log1p(math.exp(z)) for z in wrong_side) / 5)


def test_five_class_auroc_is_the_macro_mean_of_one_against_rest() -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(200) % 5
    outputs = generator.normal(size=(200, 5)).astype(np.float32)
    outputs[np.arange(200), labels] += 1
    data = TensorDataset(torch.from_numpy(outputs), torch.from_numpy(labels))
    logits = outputs.astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
    assert evaluate_full(FIVE, nn.Identity(), data).auroc == pytest.approx(expected)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(-3, 3)), min_size=2))
def test_metrics_are_those_of_scikit_learn(examples: list[tuple[int, int, int]]) -> None:
    """Also with ties, and for classes that are rare, missing or predicted only."""
    labels, predicted, odds = map(np.array, zip(*examples, strict=True))
    five = TensorDataset(torch.eye(5)[predicted], torch.from_numpy(labels))
    expected = f1_score(labels, predicted, average="macro", zero_division=0)
    assert evaluate_full(FIVE, nn.Identity(), five).macro_f1 == pytest.approx(expected)
    two = TensorDataset(torch.from_numpy(odds).float()[:, None], torch.from_numpy(labels % 2))
    auroc = evaluate_full(BINARY, nn.Identity(), two).auroc
    if len(set(labels % 2)) == 1:
        assert auroc is None
    else:
        assert auroc == pytest.approx(roc_auc_score(labels % 2, odds))


@given(
    st.lists(st.tuples(st.integers(0, 4), st.lists(st.integers(-40, 40), min_size=5, max_size=5)))
)
def test_calibration_error_is_that_of_its_definition(
    examples: list[tuple[int, list[int]]],
) -> None:
    """Guo et al. 2017, equations 3 to 5, bin by bin."""
    examples.append((0, [9, 0, 0, 0, 0]))
    labels = [label for label, _ in examples]
    logits = np.array([scores for _, scores in examples]) / 4
    logits -= logits.max(1, keepdims=True)  # 1/5, a bin's edge, is exact so
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    expected = 0.0
    for m in range(15):
        inside = (m / 15 < confidence) & (confidence <= (m + 1) / 15)
        if inside.any():
            gap = abs(right[inside].mean() - confidence[inside].mean())
            expected += inside.sum() / len(labels) * gap
    outputs = torch.from_numpy(logits).float()
    data = TensorDataset(outputs, torch.tensor(labels))
    assert evaluate_full(FIVE, nn.Identity(), data).ece == pytest.approx(expected, abs=1e-6)


def test_calibration_error_of_a_model_that_is_sure_and_right_is_0_and_of_a_wrong_one_1() -> None:
    sure = [[90.0], [90.0], [-90.0]]
    assert evaluate_full(BINARY, nn.Identity(), given_outputs(sure, [1, 1, 0])).ece == 0
    assert evaluate_full(BINARY, nn.Identity(), given_outputs(sure, [0, 0, 1])).ece == 1
    # Half sure of what is right every other time.
    even = given_outputs([[0.0], [0.0]], [0, 1])
    assert evaluate_full(BINARY, nn.Identity(), even).ece == 0


def test_confusion_matrix_has_a_row_and_a_column_for_every_class() -> None:
    data = given_outputs([[9.0, 0, 0, 0, 0], [0, 9.0, 0, 0, 0]], [0, 3])
    matrix = np.array(evaluate_full(FIVE, nn.Identity(), data).confusion_matrix)
    assert matrix.shape == (5, 5)
    assert matrix[0, 0] == matrix[3, 1] == 1


def test_metrics_of_the_tasks_own_are_told_beside_the_others() -> None:
    class Counting(Ecg5000):
        def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
            return {"positive": int((outputs > 0).sum()), "normal": int((targets == 0).sum())}

    data = given_outputs([[1.0], [2.0], [-3.0]], [0, 1, 1])
    full = evaluate_full(Counting(Path()), nn.Identity(), data)
    assert full.task == {"positive": 2.0, "normal": 1.0}
    assert evaluate_full(BINARY, nn.Identity(), data).task == {}


@pytest.mark.parametrize("sign", [1, -1])
def test_very_confident_answers_still_rank(sign: int) -> None:
    data = given_outputs([[sign * 90.0], [sign * 90.0 + 10]], [0, 1])
    assert evaluate_full(BINARY, nn.Identity(), data).auroc == 1


def test_auroc_of_classes_that_occur_is_told_when_others_do_not() -> None:
    data = given_outputs([[9.0, 0, 0, 0, 0], [0, 9.0, 0, 0, 0]], [0, 1])
    assert evaluate_full(FIVE, nn.Identity(), data).auroc == 1


def test_auroc_and_calibration_are_none_where_they_are_undefined() -> None:
    one_class = given_outputs([[-1.0], [2.0]], [1, 1])
    assert evaluate_full(BINARY, nn.Identity(), one_class).auroc is None
    assert evaluate_full(BINARY, nn.Identity(), one_class).ece is not None
    broken = given_outputs([[math.nan], [2.0]], [0, 1])
    assert evaluate_full(BINARY, nn.Identity(), broken).auroc is None
    assert evaluate_full(BINARY, nn.Identity(), broken).ece is None


def test_cheap_and_full_evaluation_agree_and_batching_does_not_show() -> None:
    task = Ecg5000(Path(__file__).parents[2] / "data")
    model, data = task.build_model(0), task.test_data()
    cheap, full = evaluate(task, model, data), evaluate_full(task, model, data)
    with torch.no_grad():
        outputs = model(data.tensors[0])
    assert cheap.loss == full.loss == pytest.approx(task.loss(outputs, data.tensors[1]).item())
    assert cheap.accuracy == full.accuracy
    assert np.sum(full.confusion_matrix) == cheap.num_examples == 4500


def test_evaluation_switches_dropout_off() -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.Identity())
    data = given_outputs([[5.0]] * 20, [1] * 20)
    assert evaluate(BINARY, model.train(), data).accuracy == 1


@pytest.mark.parametrize("how", [evaluate, evaluate_full])
def test_nothing_to_evaluate_on_is_said(how) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="no examples"):
        how(BINARY, nn.Identity(), TensorDataset(torch.zeros(0, 1), torch.zeros(0).long()))
