"""Training switched off: the demo's model over as good as no data.

Set TASK=bench.idle:Idle. A round then takes what the protocol takes.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import TensorDataset

from fedfog.ml.cnn import EcgCnn
from fedfog.ml.task import Task

SLOTS = 5000  # one example for each client of each region


class Idle(Task):
    """One example a client, so that a local epoch is a single step."""

    name = "idle"
    description = "nothing: measures the protocol"
    class_names = ("normal", "abnormal")

    def __init__(self, _data_dir: Path) -> None:
        self._examples = torch.zeros(SLOTS, 1, 140), torch.arange(SLOTS) % 2

    def new_model(self) -> nn.Module:
        return EcgCnn(num_outputs=1)

    def training_labels(self) -> NDArray[np.int64]:
        labels: NDArray[np.int64] = self._examples[1].numpy()
        return labels

    def training_data(self, indices: NDArray[np.int64]) -> TensorDataset:
        few = torch.from_numpy(indices[:1])
        return TensorDataset(self._examples[0][few], self._examples[1][few])

    def test_data(self) -> TensorDataset:
        return TensorDataset(self._examples[0][:2], self._examples[1][:2])
