"""A model of any size over as good as no data: measures what its bytes cost.

Set TASK=bench.wide_model:Wide and WIDE_PARAMETERS. A training step adds a constant to all of the
model instead of learning it, so an update differs in every value and costs no time.
"""

import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedfog.ml.task import Task

EXAMPLES, FEATURES = 64, 4


class _Body(nn.Module):
    """A linear head that is trained, and `num_parameters` less its own that are only shifted."""

    def __init__(self, num_parameters: int) -> None:
        super().__init__()
        self.head = nn.Linear(FEATURES, 1)
        rest = num_parameters - FEATURES - 1
        self.rest = nn.Parameter(torch.zeros(rest), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.rest.add_(float(inputs[0, 0]))
        outputs: Tensor = self.head(inputs)
        return outputs


class Wide(Task):
    """One example a client, so that a local epoch is a single step."""

    name = "wide"
    description = "nothing: measures what a model's bytes cost"
    class_names = ("low", "high")

    def __init__(self, _data_dir: Path) -> None:
        labels = torch.arange(EXAMPLES) % 2
        inputs = torch.linspace(0.01, 1.0, EXAMPLES)[:, None].repeat(1, FEATURES)
        self._data = TensorDataset(inputs, labels)

    def new_model(self) -> nn.Module:
        return _Body(int(os.environ["WIDE_PARAMETERS"]))

    def training_labels(self) -> NDArray[np.int64]:
        labels: NDArray[np.int64] = self._data.tensors[1].numpy()
        return labels

    def training_data(self, indices: NDArray[np.int64]) -> TensorDataset:
        return TensorDataset(*self._data[torch.from_numpy(indices[:1])])

    def test_data(self) -> TensorDataset:
        return TensorDataset(*self._data[:2])
