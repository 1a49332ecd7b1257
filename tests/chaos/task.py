"""What the chaos suite learns: next to nothing, in a time that differs between clients."""

import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedfog.ml.task import Task

EXAMPLES, FEATURES = 400, 4
STEP_SECONDS = 0.04


class _Slow(nn.Module):
    """Two small layers (51 parameters); a training step takes up to `STEP_SECONDS`, depending on
    the examples alone, and is idle, so that many clients fit on few cores."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, 7), nn.Tanh(), nn.Linear(7, 2))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            time.sleep(STEP_SECONDS * (float(inputs.abs().sum()) % 1.0))
        outputs: Tensor = self.layers(inputs)
        return outputs


class Tiny(Task):
    """Two overlapping clouds of points. Set TASK=chaos.task:Tiny and PYTHONPATH=tests."""

    name = "tiny"
    description = "which of two clouds a point is from: for the chaos suite"
    class_names = ("left", "right")

    def __init__(self, _data_dir: Path) -> None:
        draw = torch.Generator().manual_seed(1)
        self._labels = torch.arange(EXAMPLES) % 2
        noise = torch.randn(EXAMPLES, FEATURES, generator=draw)
        self._inputs = noise + self._labels[:, None]

    def new_model(self) -> nn.Module:
        return _Slow()

    def training_labels(self) -> NDArray[np.int64]:
        labels: NDArray[np.int64] = self._labels.numpy()
        return labels

    def training_data(self, indices: NDArray[np.int64]) -> TensorDataset:
        chosen = torch.from_numpy(indices)
        return TensorDataset(self._inputs[chosen], self._labels[chosen])

    def test_data(self) -> TensorDataset:
        return TensorDataset(self._inputs[:40], self._labels[:40])
