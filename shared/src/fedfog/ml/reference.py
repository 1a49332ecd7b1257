"""FedAvg in one process: what the distributed stack is compared with."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fedfog.messages.schemas import Hyperparameters
from fedfog.ml import training
from fedfog.ml.task import Task


def fedavg(
    task: Task,
    regions: Sequence[Sequence[NDArray[np.int64]]],
    parameters: Hyperparameters,
    *,
    rounds: int,
    validation_fraction: float,
) -> Iterator[training.Arrays]:
    """Global models 0 to `rounds` of a client for each slot of each region, every client in every
    round (McMahan et al. 2017, arXiv:1602.05629, algorithm 1). Seeds are what the real client uses,
    and sums are flat: regions change nothing but rounding."""
    seed = parameters.seed
    model, labels = task.build_model(seed), task.training_labels()
    datasets = {}
    for region_index, slots in enumerate(regions):
        for slot, indices in enumerate(slots):
            number = training.global_slot(region_index, slot)
            split_seed = training.round_seed(seed, 0, number)
            kept, _ = training.split_validation(indices, labels, validation_fraction, split_seed)
            datasets[number] = task.training_data(kept)
    examples = sum(map(len, datasets.values()))
    state = training.state_arrays(model)
    yield state
    for round in range(1, rounds + 1):
        total = {name: np.zeros(array.shape) for name, array in state.items()}
        for number, dataset in datasets.items():
            training.load_arrays(model, state)
            client_seed = training.round_seed(seed, round, number)
            training.train_local(task, model, dataset, parameters, round=round, seed=client_seed)
            for name, array in training.state_arrays(model).items():
                total[name] += len(dataset) / examples * array
        state = {name: array.astype(np.float32) for name, array in total.items()}
        yield state
