"""Training switched off: the tensors of FedFog's CNN, and an update that is model + constant.

Runs in the environments of all rivals, so it imports nothing but NumPy.
"""

import json
import os
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

# `fedfog.ml.cnn.EcgCnn` with one output: 68,353 float32.
SHAPES: dict[str, tuple[int, ...]] = {
    "conv1.weight": (16, 1, 5),
    "conv1.bias": (16,),
    "conv2.weight": (32, 16, 5),
    "conv2.bias": (32,),
    "fc1.weight": (64, 1024),
    "fc1.bias": (64,),
    "fc2.weight": (1, 64),
    "fc2.bias": (1,),
}

# What a rival's processes are told by environment.
MARKS = "RIVAL_MARKS"
ROUNDS = "RIVAL_ROUNDS"
CLIENTS = "RIVAL_CLIENTS"
PORT = "RIVAL_PORT"
FOLDER = "RIVAL_FOLDER"
FRAMEWORK = "RIVAL_FRAMEWORK"


def number(name: str) -> int:
    """ROUNDS, CLIENTS or PORT."""
    return int(os.environ[name])


def zeros() -> dict[str, Array]:
    """Model 0."""
    return {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}


def step(client: int) -> np.float32:
    """What client 1, 2, ... adds to every parameter."""
    return np.float32(client)


def mean_step(clients: int) -> float:
    """What FedAvg adds to every parameter in a round in which all clients count the same."""
    return (clients + 1) / 2


def mark(tensor: object) -> None:
    """Note that a model has come, and its first parameter."""
    line = json.dumps({"at": time.monotonic(), "value": float(np.ravel(np.asarray(tensor))[0])})
    with Path(os.environ[MARKS]).open("a") as file:
        file.write(line + "\n")
