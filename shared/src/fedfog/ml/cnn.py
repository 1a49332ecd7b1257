"""The convolutional network for heartbeats of 140 samples."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own abbreviation)


class EcgCnn(nn.Module):
    """Two convolutions and two dense layers: 68,353 parameters with one output, 68,613 with five.

    Neither normalisation nor dropout, so that the whole state is float32 and can be averaged.
    """

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(1, 16, kernel_size=5)
        self.conv2 = nn.Conv1d(16, 32, kernel_size=5)
        self.fc1 = nn.Linear(32 * 32, 64)
        self.fc2 = nn.Linear(64, num_outputs)

    def forward(self, beats: Tensor) -> Tensor:
        """Beats (n, 1, 140) to logits (n, num_outputs)."""
        x = F.max_pool1d(F.relu(self.conv1(beats)), 2)
        x = F.max_pool1d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(torch.flatten(x, start_dim=1)))
        logits: Tensor = self.fc2(x)
        return logits
