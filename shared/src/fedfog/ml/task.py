"""What is learned: the one interface behind which a model and its data set stand.

To federate a model of your own, write a subclass of `Task` and point the setting TASK at a
callable that makes it from the data directory, for example the class itself::

    # my_package/tasks.py                      TASK=my_package.tasks:Wearables
    class Wearables(Task):
        name = "wearables"
        description = "stress or no stress from 60 s of wrist signals"
        class_names = ("calm", "stressed")

        def __init__(self, data_dir: Path) -> None: ...
        def new_model(self) -> nn.Module: ...
        def training_labels(self) -> NDArray[np.int64]: ...
        def training_data(self, indices: NDArray[np.int64]) -> TensorDataset: ...
        def test_data(self) -> TensorDataset: ...

A whole one, in a package of its own, is in docs/bring-your-own.md.
"""

from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path
from urllib.parse import parse_qsl

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own abbreviation)
from torch.utils.data import TensorDataset

BUILT_IN = {
    "ecg5000": "fedfog.ml.ecg5000:Ecg5000",
    "ecg5000-5class": "fedfog.ml.ecg5000:Ecg5000FiveClass",
    "wesad": "fedfog.ml.wesad:Wesad",
    "wesad-unscaled": "fedfog.ml.wesad:WesadUnscaled",
}


class TaskError(Exception):
    """The setting TASK names nothing that can be used; the text says what to do."""


class DataError(Exception):
    """A file of the data set is missing or altered; the text names it and says what to do."""


class Task(ABC):
    """A classification problem: its model, loss and data.

    A data set is a `TensorDataset` of inputs (n, ...) float32 and class labels (n,) int64 from 0.
    Load each split only when it is asked for: clients hold training data, the server test data.

    Attributes:
        name: in one word.
        description: what is told apart by what, for the model's card.
        class_names: class 0 first.
        input_shape: of an example that is read from a row of a table; default: flat, as it is.
        data_statement, limits: whose the data are and what the model is not for, in the card.
    """

    name: str
    description: str
    class_names: tuple[str, ...]
    input_shape: tuple[int, ...] = (-1,)
    data_statement: str = "The task says nothing about its data."
    limits: str = (
        "Nothing is known here about the data: judge the figures with its owner. The model was not "
        "checked for medical or any other safety-critical use."
    )

    @abstractmethod
    def new_model(self) -> nn.Module:
        """The untrained model, its weights drawn from PyTorch's global generator. Every tensor of
        its `state_dict` is float32. One output per class, or a single one for two classes."""

    @abstractmethod
    def training_labels(self) -> NDArray[np.int64]:
        """Labels (n,) of the whole training set, by which it is cut into slots.

        Raises DataError.
        """

    def training_groups(self) -> NDArray[np.int64] | None:
        """What each training example belongs to (n,), its subject or file for example, which the
        partition `group` keeps together; None if there is nothing of that kind.

        Raises DataError.
        """
        return None

    @abstractmethod
    def training_data(self, indices: NDArray[np.int64]) -> TensorDataset:
        """The training examples at `indices`, positions in `training_labels()`.

        Raises DataError.
        """

    @abstractmethod
    def test_data(self) -> TensorDataset:
        """The held-out examples on which the server evaluates each global model.

        Raises DataError.
        """

    def own_data(self, path: Path) -> TensorDataset:
        """The examples of a client with data of its own (CLIENT_DATA): a table whose first column
        is the label, as .csv, .tsv or .parquet, or arrays `x` and `y` in an .npz.

        Raises DataError and OSError.
        """
        from fedfog.ml.own_data import read

        return read(path, self.class_names, self.input_shape)

    def build_model(self, seed: int) -> nn.Module:
        """`new_model` with weights that depend on the seed alone; the global generator is left
        as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.new_model()

    def logits(self, outputs: Tensor) -> Tensor:
        """Scores (n, classes) out of model outputs. A single output z (n, 1) is the log-odds of
        class 1, which is the same as the two scores (0, z)."""
        return F.pad(outputs, (1, 0)) if outputs.shape[1] == 1 else outputs

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats; for a single output, binary cross-entropy with logits."""
        return F.cross_entropy(self.logits(outputs), targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Further metrics of the model's outputs for the server's test data, by name; accuracy,
        AUROC, macro-F1 and the others of `fedfog.ml.evaluation` are there without it."""
        return {}


def load_task(spec: str, *, data_dir: Path) -> Task:
    """Make the task that the setting TASK names.

    `spec` is a key of `BUILT_IN` or `package.module:attribute`, where the attribute is called with
    `data_dir` and returns a `Task`; after a `?` come further arguments of the call, all of them
    texts: `?name=value&other=value`. Raises TaskError.
    """
    name, _, arguments = spec.partition("?")
    module_name, _, attribute = BUILT_IN.get(name, name).partition(":")
    if not module_name or not attribute:
        known = ", ".join(BUILT_IN)
        raise TaskError(f"TASK={spec} is unknown: use {known}, or package.module:attribute")
    try:
        factory = getattr(import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise TaskError(
            f"TASK={spec} cannot be imported ({error}): install the package or put its folder "
            "on PYTHONPATH, and check the spelling of module:attribute"
        ) from error
    try:
        pairs = parse_qsl(arguments, keep_blank_values=True, strict_parsing=bool(arguments))
        task = factory(data_dir, **dict(pairs))
    except (ValueError, TypeError) as error:
        if not arguments:
            raise
        raise TaskError(f"TASK={spec}: the task does not take {arguments} ({error})") from error
    if not isinstance(task, Task):
        raise TaskError(
            f"TASK={spec} made a {type(task).__name__}: it has to return a fedfog.ml.task.Task"
        )
    if missing := [field for field in Task.__annotations__ if not hasattr(task, field)]:
        raise TaskError(
            f"TASK={spec} lacks {', '.join(missing)}: set them on {type(task).__name__}"
        )
    return task
