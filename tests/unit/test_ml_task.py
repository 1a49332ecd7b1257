"""The task interface: built-in tasks, a task of one's own, and what a bad TASK says."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedfog.messages.schemas import Hyperparameters
from fedfog.ml.ecg5000 import Ecg5000
from fedfog.ml.evaluation import evaluate_full
from fedfog.ml.reference import fedavg
from fedfog.ml.task import TaskError, load_task
from fedfog.ml.training import load_arrays

DATA = Path(__file__).parents[2] / "data"

OWN_TASK = """
import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedfog.ml.task import Task


class Sign(Task):
    name = "sign"
    class_names = ("negative", "positive")

    def __init__(self, data_dir):
        self.data_dir = data_dir
        draws = np.random.default_rng(5).normal(size=(400, 3)).astype(np.float32)
        self.inputs = torch.from_numpy(draws)
        self.labels = (self.inputs.sum(1) > 0).long()

    def new_model(self):
        return nn.Linear(3, 2)

    def training_labels(self):
        return self.labels[:200].numpy()

    def training_data(self, indices):
        rows = torch.from_numpy(indices)
        return TensorDataset(self.inputs[rows], self.labels[rows])

    def test_data(self):
        return TensorDataset(self.inputs[200:], self.labels[200:])


def described(data_dir):
    task = Sign(data_dir)
    task.description = "is the sum of three numbers positive?"
    return task
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_task.py").write_text(OWN_TASK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_task", raising=False)


@pytest.mark.parametrize("name", ["ecg5000", "ecg5000-5class"])
def test_built_in_task_is_found_by_the_name_it_bears(name: str) -> None:
    assert load_task(name, data_dir=DATA).name == name


@pytest.mark.usefixtures("own_module")
def test_task_of_ones_own_is_trained_and_evaluated_without_any_other_change() -> None:
    task = load_task("own_task:described", data_dir=DATA)
    model, test = task.build_model(0), task.test_data()
    slots = np.array_split(np.arange(200), 2)
    parameters = Hyperparameters(local_epochs=2, batch_size=10, learning_rate=0.05, seed=0)
    models = fedavg(task, [slots], parameters, rounds=10, validation_fraction=0.1)
    first, *_, last = models
    load_arrays(model, first)
    before = evaluate_full(task, model, test)
    load_arrays(model, last)
    after = evaluate_full(task, model, test)
    assert after.loss < before.loss
    assert after.accuracy > 0.95


@pytest.mark.usefixtures("own_module")
def test_factory_is_called_with_the_data_directory(tmp_path: Path) -> None:
    assert load_task("own_task:described", data_dir=tmp_path).data_dir == tmp_path  # type: ignore[attr-defined]


@pytest.mark.usefixtures("own_module")
@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("", "ecg5000-5class"),
        ("ecg500", "ecg5000-5class"),
        ("own_task:", "package.module:attribute"),
        (":Sign", "package.module:attribute"),
        ("no_such_package.tasks:Task", "PYTHONPATH"),
        ("own_task:Sing", "spelling"),
        ("pathlib:Path", "fedfog.ml.task.Task"),
        ("own_task:Sign", "description"),
    ],
)
def test_bad_spec_names_the_setting_and_says_what_to_do(spec: str, hint: str) -> None:
    with pytest.raises(TaskError) as caught:
        load_task(spec, data_dir=DATA)
    assert f"TASK={spec}" in str(caught.value)
    assert hint in str(caught.value)


def test_network_has_the_tensors_of_the_seed_and_68353_parameters() -> None:
    state = Ecg5000(DATA).build_model(0).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "conv1.weight": (16, 1, 5),
        "conv1.bias": (16,),
        "conv2.weight": (32, 16, 5),
        "conv2.bias": (32,),
        "fc1.weight": (64, 1024),
        "fc1.bias": (64,),
        "fc2.weight": (1, 64),
        "fc2.bias": (1,),
    }
    assert sum(tensor.numel() for tensor in state.values()) == 68_353


def test_five_class_network_gives_five_logits() -> None:
    task = load_task("ecg5000-5class", data_dir=DATA)
    assert task.build_model(0)(torch.zeros(7, 1, 140)).shape == (7, 5)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    task = Ecg5000(DATA)
    first = task.build_model(3).state_dict()
    torch.manual_seed(99)
    again, other = task.build_model(3).state_dict(), task.build_model(4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_building_a_model_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    Ecg5000(DATA).build_model(7)
    assert torch.equal(torch.rand(3), expected)


def test_single_logit_means_binary_cross_entropy() -> None:
    outputs = torch.tensor([[-30.0], [-0.5], [0.0], [2.0], [40.0]])
    targets = torch.tensor([1, 0, 1, 0, 1])
    expected = nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], targets.float())
    torch.testing.assert_close(Ecg5000(DATA).loss(outputs, targets), expected)


def test_learning_needs_neither_scikit_learn_nor_pandas() -> None:
    script = f"""
import sys
from pathlib import Path
import numpy as np
from fedfog.messages.schemas import Hyperparameters
from fedfog.ml.evaluation import evaluate, evaluate_full
from fedfog.ml.task import load_task
from fedfog.ml.training import train_local
task = load_task("ecg5000", data_dir=Path({str(DATA)!r}))
data, model = task.training_data(np.arange(40)), task.build_model(0)
train_local(task, model, data, Hyperparameters(local_epochs=1), round=1, seed=0)
evaluate(task, model, data)
evaluate_full(task, model, data)
sys.exit(" ".join({{"sklearn", "scipy", "pandas"}} & set(sys.modules)) or 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
