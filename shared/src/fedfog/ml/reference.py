"""FedAvg in one process: what the distributed stack is compared with."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from fedfog.messages.schemas import Hyperparameters
from fedfog.ml import training
from fedfog.ml.task import Task

Sums = dict[str, NDArray[np.float64]]


def fedavg(
    task: Task,
    regions: Sequence[Sequence[NDArray[np.int64]]],
    parameters: Hyperparameters,
    *,
    rounds: int,
    validation_fraction: float,
) -> Iterator[training.Arrays]:
    """Global models 0 to `rounds` of a client for each slot of each region, every client in every
    round (McMahan et al. 2017, arXiv:1602.05629, algorithm 1), and in every one of `fog_rounds`
    regional rounds (HierFAVG: Liu et al. 2020, arXiv:1905.06641, of which this is FedAvg up to
    rounding if there is one). Seeds are what the real client uses, and a region's partial is
    rounded to float32 as it is on the wire: training, above all with Adam, carries a difference in
    the last bit on."""
    seed = parameters.seed
    model, labels = task.build_model(seed), task.training_labels()
    datasets: list[dict[int, TensorDataset]] = []  # of each region, by number of the slot
    for region_index, slots in enumerate(regions):
        datasets.append({})
        for slot, indices in enumerate(slots):
            number = training.global_slot(region_index, slot)
            split_seed = training.round_seed(seed, 0, number)
            kept, _ = training.split_validation(indices, labels, validation_fraction, split_seed)
            datasets[-1][number] = task.training_data(kept)
    state = training.state_arrays(model)
    yield state
    for round in range(1, rounds + 1):
        total = {name: np.zeros(array.shape) for name, array in state.items()}
        for region in datasets:
            regional = state
            for fog_round in range(1, parameters.fog_rounds + 1):
                mean = {name: np.zeros(array.shape) for name, array in state.items()}
                for number, dataset in region.items():
                    training.load_arrays(model, regional)
                    drawn = training.round_seed(seed, round, number, fog_round)
                    training.train_local(task, model, dataset, parameters, round=round, seed=drawn)
                    _add(mean, training.state_arrays(model), len(dataset))
                regional = _mean(mean, _examples(region))
            _add(total, regional, _examples(region))
        state = _mean(total, sum(map(_examples, datasets)))
        yield state


def _examples(region: Mapping[int, TensorDataset]) -> int:
    return sum(map(len, region.values()))


def _add(total: Sums, arrays: training.Arrays, examples: int) -> None:
    for name, array in arrays.items():
        total[name] += np.float64(examples) * array


def _mean(total: Sums, examples: int) -> training.Arrays:
    return {name: (array / examples).astype(np.float32) for name, array in total.items()}
