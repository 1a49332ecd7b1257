"""Plain FedAvg in one process: what the distributed stack is compared with."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedfog.ml import training
from fedfog.ml.task import Task


def fedavg(
    task: Task,
    slots: Sequence[NDArray[np.int64]],
    *,
    rounds: int,
    seed: int,
    validation_fraction: float,
    **hyperparameters: Any,
) -> Iterator[training.Arrays]:
    """Global models 0 to `rounds` of a client per slot, every client in every round (McMahan et
    al. 2017, algorithm 1). Seeds are what the real client uses, `hyperparameters` those of
    `train_local`."""
    model, labels = task.build_model(seed), task.training_labels()
    datasets = []
    for slot, indices in enumerate(slots):
        split_seed = training.round_seed(seed, 0, slot)
        kept, _ = training.split_validation(indices, labels, validation_fraction, split_seed)
        datasets.append(task.training_data(kept))
    weights = np.array([len(dataset) for dataset in datasets]) / sum(map(len, datasets))
    state = training.state_arrays(model)
    yield state
    for round in range(1, rounds + 1):
        total = {name: np.zeros(array.shape) for name, array in state.items()}
        for slot, dataset in enumerate(datasets):
            training.load_arrays(model, state)
            client_seed = training.round_seed(seed, round, slot)
            training.train_local(task, model, dataset, seed=client_seed, **hyperparameters)
            for name, array in training.state_arrays(model).items():
                total[name] += weights[slot] * array
        state = {name: array.astype(np.float32) for name, array in total.items()}
        yield state
