"""Local training: what a client's round promises."""

import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from fedfog.messages.schemas import Hyperparameters
from fedfog.ml.ecg5000 import Ecg5000, Ecg5000FiveClass
from fedfog.ml.training import (
    DivergenceError,
    TrainingResult,
    load_arrays,
    round_seed,
    split_validation,
    state_arrays,
    train_local,
)

DATA = Path(__file__).parents[2] / "data"
TASK = Ecg5000(DATA)
BEATS = TASK.training_data(np.arange(100))


class WithDropout(Ecg5000):
    def new_model(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(140, 1))


def train(
    model: nn.Module,
    task: Ecg5000 = TASK,
    data: TensorDataset = BEATS,
    *,
    round: int = 1,
    seed: int = 0,
    on_epoch: Callable[..., object] | None = None,
    should_stop: Callable[[], bool] | None = None,
    **changes: Any,
) -> TrainingResult | None:
    parameters = Hyperparameters(**{"local_epochs": 2} | changes)
    return train_local(
        task,
        model,
        data,
        parameters,
        round=round,
        seed=seed,
        on_epoch=on_epoch,  # type: ignore[arg-type]
        should_stop=should_stop,
    )


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for name, array in state_arrays(one).items():
        np.testing.assert_array_equal(array, state_arrays(other)[name])


def test_state_goes_through_arrays_unchanged() -> None:
    model, other = TASK.build_model(1), TASK.build_model(2)
    load_arrays(other, state_arrays(model))
    assert_same(model, other)


def test_arrays_are_float32_in_order_of_their_names() -> None:
    arrays = state_arrays(TASK.build_model(1))
    assert list(arrays) == sorted(arrays)
    assert all(array.dtype == np.float32 for array in arrays.values())


def test_training_does_not_reach_into_arrays_taken_before() -> None:
    model = TASK.build_model(1)
    arrays = state_arrays(model)
    train(model)
    expected = state_arrays(TASK.build_model(1))
    assert all(np.array_equal(arrays[name], expected[name]) for name in expected)


def test_training_does_not_reach_into_arrays_it_started_from() -> None:
    arrays, model = state_arrays(TASK.build_model(1)), TASK.build_model(2)
    for array in arrays.values():
        array.flags.writeable = False  # as the codec hands them over
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_arrays(model, arrays)
    train(model)
    expected = state_arrays(TASK.build_model(1))
    assert all(np.array_equal(arrays[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["missing", "unknown", "wrong shape"])
def test_arrays_that_do_not_fit_the_model_are_refused_by_name(kind: str) -> None:
    model = TASK.build_model(1)
    arrays = state_arrays(model)
    if kind == "missing":
        del arrays["fc1.bias"]
    elif kind == "unknown":
        arrays["fc1.bias2"] = arrays["fc1.bias"]
    else:
        arrays["fc1.bias"] = arrays["fc1.bias"][:-1]
    with pytest.raises(RuntimeError, match=r"fc1\.bias"):
        load_arrays(model, arrays)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (nn.BatchNorm1d(4), "num_batches_tracked"),
        (nn.Linear(3, 1, dtype=torch.float64), "weight"),
    ],
)
def test_state_that_cannot_be_averaged_is_refused_by_name(model: nn.Module, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        state_arrays(model)


@pytest.mark.parametrize("task", [TASK, WithDropout(Path())], ids=["cnn", "dropout"])
def test_same_seed_trains_the_same_weights(task: Ecg5000) -> None:
    first, second, third = (task.build_model(1) for _ in range(3))
    torch.manual_seed(11)
    train(first, task, seed=5)
    torch.manual_seed(12)
    train(second, task, seed=5)
    train(third, task, seed=6)
    assert_same(first, second)
    with pytest.raises(AssertionError):
        assert_same(first, third)


def test_training_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    train(WithDropout(Path()).build_model(0), WithDropout(Path()))
    assert torch.equal(torch.rand(3), expected)


def test_no_state_of_the_optimizer_outlives_a_round() -> None:
    """Two rounds from the same weights end in the same weights: nothing is carried over."""
    model = TASK.build_model(1)
    start = state_arrays(model)
    train(model)
    first = state_arrays(model)
    load_arrays(model, start)
    train(model)
    second = state_arrays(model)
    assert all(np.array_equal(first[name], second[name]) for name in first)


def in_plain_pytorch(
    model: nn.Module,
    make: Callable[..., torch.optim.Optimizer],
    steps: int = 12,
    loss_of: Callable[..., torch.Tensor] = TASK.loss,
    clip: float | None = None,
) -> None:
    """What `train(seed=5)` is to do, as PyTorch's users write it."""
    optimizer = make(model.parameters())
    shuffling = torch.Generator().manual_seed(5)
    model.train()
    while steps:
        for batch in torch.split(torch.randperm(len(BEATS), generator=shuffling), 32)[:steps]:
            inputs, targets = BEATS[batch]
            optimizer.zero_grad()
            loss_of(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            steps -= 1


def test_adam_is_torchs_bit_for_bit() -> None:
    model, other = TASK.build_model(1), TASK.build_model(1)
    train(model, local_epochs=3, seed=5)
    in_plain_pytorch(other, partial(torch.optim.Adam, lr=1e-3))
    assert_same(model, other)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_torchs_bit_for_bit(momentum: float) -> None:
    model, other = TASK.build_model(1), TASK.build_model(1)
    train(model, local_epochs=3, seed=5, optimizer="sgd", learning_rate=0.1, momentum=momentum)
    in_plain_pytorch(other, partial(torch.optim.SGD, lr=0.1, momentum=momentum))
    assert_same(model, other)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_learning_rate_decays_from_round_to_round(optimizer: str) -> None:
    model, other = TASK.build_model(1), TASK.build_model(1)
    train(model, round=3, optimizer=optimizer, learning_rate=0.08, lr_decay=0.5)
    train(other, round=1, optimizer=optimizer, learning_rate=0.02)
    assert_same(model, other)


def test_proximal_term_is_that_of_fedprox() -> None:
    """As a part of the loss, whose gradient PyTorch takes."""
    model, other = TASK.build_model(1), TASK.build_model(1)
    start = [p.detach().clone() for p in other.parameters()]

    def loss_of(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        pairs = zip(other.parameters(), start, strict=True)
        distance = torch.stack([(p - before).square().sum() for p, before in pairs]).sum()
        return TASK.loss(outputs, targets) + 1.5 / 2 * distance

    changes: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 0.1}
    train(model, local_epochs=3, seed=5, proximal_mu=1.5, **changes)
    in_plain_pytorch(other, partial(torch.optim.SGD, lr=0.1), loss_of=loss_of)
    for name, array in state_arrays(model).items():
        np.testing.assert_allclose(array, state_arrays(other)[name], rtol=1e-5, atol=1e-7)
    free = TASK.build_model(1)
    train(free, local_epochs=3, seed=5, **changes)
    first = torch.cat([p.ravel() for p in start])
    near, far = (torch.cat([p.detach().ravel() for p in m.parameters()]) for m in (model, free))
    assert torch.dist(near, first) < 0.9 * torch.dist(far, first)


def test_gradients_are_clipped_by_their_norm_over_all_tensors() -> None:
    model, other, free = (TASK.build_model(1) for _ in range(3))
    train(model, local_epochs=3, seed=5, optimizer="sgd", learning_rate=0.1, clip_norm=0.05)
    in_plain_pytorch(other, partial(torch.optim.SGD, lr=0.1), clip=0.05)
    assert_same(model, other)
    train(free, local_epochs=3, seed=5, optimizer="sgd", learning_rate=0.1)
    with pytest.raises(AssertionError):
        assert_same(model, free)


@pytest.mark.parametrize("task", [TASK, Ecg5000FiveClass(DATA)], ids=["one output", "five"])
def test_balanced_classes_weigh_as_in_pytorchs_cross_entropy(task: Ecg5000) -> None:
    """By the client's own labels; a class that it lacks has no part in it."""
    data = task.training_data(np.arange(300))
    labels = data.tensors[1]
    counts = torch.bincount(labels, minlength=len(task.class_names)).float()
    weights = torch.where(counts > 0, len(labels) / counts, 0)
    model = task.build_model(1)
    with torch.no_grad():
        scores = task.logits(model(data.tensors[0]))
        expected = nn.functional.cross_entropy(scores, labels, weights).item()
        plain = task.loss(model(data.tensors[0]), labels).item()
    changes: dict[str, Any] = {"learning_rate": 1e-30, "batch_size": 300, "local_epochs": 1}
    balanced = train(model, task, data, class_weights="balanced", **changes)
    assert balanced is not None
    assert balanced.loss == pytest.approx(expected, rel=1e-5)
    assert balanced.loss != pytest.approx(plain, rel=1e-2)


@pytest.mark.parametrize("steps", [1, 3, 4, 7])
def test_steps_count_batches_over_the_ends_of_epochs(steps: int) -> None:
    """Of four batches each, of which the last has 4 beats."""
    model, other = TASK.build_model(1), TASK.build_model(1)
    seen: list[tuple[int, int]] = []
    result = train(model, seed=5, local_steps=steps, on_epoch=lambda *epoch: seen.append(epoch[:2]))
    in_plain_pytorch(other, partial(torch.optim.Adam, lr=1e-3), steps)
    assert_same(model, other)
    epochs = (steps + 3) // 4
    assert seen == [(epoch, epochs) for epoch in range(1, epochs + 1)]
    assert result is not None
    assert result.num_examples == 100  # its weight in the mean


def test_training_does_not_load_the_compiler() -> None:
    """It would cost each client more than PyTorch itself before its first batch."""
    script = """if True:
        import sys
        from test_ml_training import TASK, train
        train(TASK.build_model(1), proximal_mu=0.1, clip_norm=1.0, class_weights="balanced")
        train(TASK.build_model(1), optimizer="sgd")
        sys.exit("torch._dynamo" in sys.modules)
    """
    subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, check=True)


def test_each_epoch_is_reported_and_the_result_is_the_last() -> None:
    seen: list[tuple[int, int, float, float]] = []
    result = train(TASK.build_model(1), local_epochs=4, on_epoch=lambda *epoch: seen.append(epoch))
    assert [(epoch, epochs) for epoch, epochs, _, _ in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert result == TrainingResult(100, *seen[-1][2:])
    assert seen[-1][2] < seen[0][2]


def test_reported_loss_is_the_mean_over_examples_not_over_batches() -> None:
    model = TASK.build_model(1)
    with torch.no_grad():
        expected = TASK.loss(model(BEATS.tensors[0]), BEATS.tensors[1]).item()
    # A step too small to change a weight, and a last batch of 4 that must not weigh as one of 32.
    result = train(model, local_epochs=1, learning_rate=1e-30)
    assert result is not None
    assert result.loss == pytest.approx(expected, rel=1e-5)


def test_stop_is_asked_before_every_batch_and_ends_training_without_a_result() -> None:
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == 6

    seen: list[int] = []
    model = TASK.build_model(1)
    assert (
        train(
            model,
            local_epochs=100,
            should_stop=should_stop,
            on_epoch=lambda epoch, *_: seen.append(epoch),
        )
        is None
    )
    assert asked == 6
    assert seen == [1]  # four batches make an epoch of 100 beats


def test_diverging_training_names_the_learning_rate() -> None:
    with pytest.raises(DivergenceError, match="LEARNING_RATE"):
        train(TASK.build_model(1), learning_rate=1e30)


def test_client_without_examples_is_told_so() -> None:
    with pytest.raises(ValueError, match="no examples"):
        train(TASK.build_model(1), data=TASK.training_data(np.arange(0)))


def test_round_seeds_differ_between_rounds_slots_and_runs() -> None:
    seeds = {round_seed(s, r, c) for s in (0, 1, 2**32 + 1) for r in range(20) for c in range(20)}
    assert len(seeds) == 3 * 20 * 20
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_round_seed_is_the_same_in_another_process() -> None:
    script = "from fedfog.ml.training import round_seed; print(round_seed(7, 3, 2))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert int(done.stdout) == round_seed(7, 3, 2)


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=200),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_validation_split_parts_the_slot_in_proportion_and_leaves_something_to_train_on(
    labels: list[int], fraction: float, seed: int
) -> None:
    # The slot is every second example of a training set twice its size.
    all_labels = np.repeat(np.array(labels), 2)
    slot = np.arange(0, 2 * len(labels), 2)
    training, validation = split_validation(slot, all_labels, fraction, seed)
    assert np.array_equal(np.sort(np.concatenate([training, validation])), slot)
    assert len(training) >= 1
    assert len(validation) == min(round(fraction * len(slot)), len(slot) - 1)
    for label in range(5):
        share = len(validation) * np.mean(all_labels[slot] == label)
        assert abs(np.sum(all_labels[validation] == label) - share) < 1


def test_validation_split_is_drawn_by_its_seed() -> None:
    slot = np.arange(100)
    first, again, other = (split_validation(slot, slot % 2, 0.1, seed)[1] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
