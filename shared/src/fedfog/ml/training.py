"""Training on one client, and how a model's state becomes arrays and back."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.utils.data import TensorDataset

from fedfog.messages.schemas import Hyperparameters
from fedfog.ml.task import Task

Arrays = dict[str, NDArray[np.float32]]

# More than a region will ever have: makes the numbers of all slots of all regions differ.
SLOTS_PER_REGION = 1 << 20


class DivergenceError(ArithmeticError):
    """The training loss is no longer finite."""


@dataclass(frozen=True)
class TrainingResult:
    """What one client's training gave: means over the last epoch, taken while it ran."""

    num_examples: int
    loss: float
    accuracy: float


def state_arrays(model: nn.Module) -> Arrays:
    """Copy of the model's state as float32 arrays, in order of their names.

    Raises ValueError for a state tensor of another dtype: it could not be averaged.
    """
    state = model.state_dict()
    for name, tensor in state.items():
        if tensor.dtype != torch.float32:
            raise ValueError(
                f"state tensor {name} is {tensor.dtype}, but only float32 can be federated: build "
                "the model in float32 and without counters (GroupNorm instead of BatchNorm)"
            )
    return {name: state[name].detach().cpu().numpy().copy() for name in sorted(state)}


def load_arrays(model: nn.Module, arrays: Mapping[str, NDArray[np.float32]]) -> None:
    """Copy arrays (by name) into the model's state.

    Raises RuntimeError, which lists them, for missing, unknown or wrongly shaped tensors.
    """
    model.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})


def round_seed(seed: int, round: int, slot: int, fog_round: int = 1) -> int:
    """Seed below 2**63 for what a client draws in one round; the same on every machine.

    `seed` is the run's, `slot` the client's; round 0 stands for what is drawn once, the split.
    """
    key = (round, slot) if fog_round == 1 else (round, slot, fog_round)
    sequence = np.random.SeedSequence(seed, spawn_key=key)
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def global_slot(region_index: int, slot: int) -> int:
    """A number that no other slot of any region has: the `slot` of `round_seed`."""
    return region_index * SLOTS_PER_REGION + slot


def split_validation(
    indices: NDArray[np.int64], labels: NDArray[np.int64], fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut a client's examples into (training, validation), each sorted.

    `indices` point into `labels`, the labels of the whole training set. Validation gets the
    nearest whole number to `fraction` of the examples, spread over the classes in proportion as
    far as that goes, but never all of them; of a few examples it may get none.
    """
    shuffled = np.random.default_rng(seed).permutation(indices)
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    count = min(round(fraction * len(indices)), len(indices) - 1)
    if count <= 0:
        return np.sort(indices), indices[:0]
    # Equal steps through the examples in order of class: systematic sampling.
    picked = ((np.arange(count) + 0.5) * len(indices) / count).astype(np.int64)
    return np.sort(np.delete(by_class, picked)), np.sort(by_class[picked])


class _Adam:
    """`torch.optim.Adam` with its defaults, bit for bit, by PyTorch's own functional Adam.

    The first use of any `torch.optim.Optimizer` imports PyTorch's compiler: 1.5 s of a core in
    every client, as much as PyTorch itself, before the first batch.
    """

    def __init__(self, parameters: Sequence[Tensor], learning_rate: float) -> None:
        self._learning_rate = learning_rate
        self._parameters = parameters
        self._means = [torch.zeros_like(p) for p in self._parameters]
        self._squares = [torch.zeros_like(p) for p in self._parameters]
        self._steps = [torch.tensor(0.0) for _ in self._parameters]

    @torch.no_grad()
    def step(self) -> None:
        """Move the parameters that have a gradient."""
        moved = [i for i, p in enumerate(self._parameters) if p.grad is not None]
        adam(
            [self._parameters[i] for i in moved],
            [cast(Tensor, self._parameters[i].grad) for i in moved],
            [self._means[i] for i in moved],
            [self._squares[i] for i in moved],
            [],
            [self._steps[i] for i in moved],
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self._learning_rate,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )


class _Sgd:
    """`torch.optim.SGD` with momentum, bit for bit, without the import of `_Adam`'s kind."""

    def __init__(self, parameters: Sequence[Tensor], learning_rate: float, momentum: float) -> None:
        self._learning_rate, self._momentum = learning_rate, momentum
        self._parameters = parameters
        self._velocities = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self) -> None:
        """Move the parameters that have a gradient."""
        for parameter, velocity in zip(self._parameters, self._velocities, strict=True):
            if parameter.grad is not None:
                velocity.mul_(self._momentum).add_(parameter.grad)
                parameter.add_(velocity, alpha=-self._learning_rate)


def train_local(
    task: Task,
    model: nn.Module,
    dataset: TensorDataset,
    parameters: Hyperparameters,
    *,
    round: int,
    seed: int,
    on_epoch: Callable[[int, int, float, float], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> TrainingResult | None:
    """Train the model in place on shuffled batches, with a fresh Adam (Kingma, Ba 2015,
    arXiv:1412.6980) or SGD; with `proximal_mu` as in FedProx (Li et al. 2020, arXiv:1812.06127).

    `seed` alone decides the shuffling and what the model draws, dropout for example. `round` is the
    global one, from 1. After each epoch `on_epoch(epoch, epochs, loss, accuracy)` is called, also
    after one that `local_steps` cuts short; the loss is the task's, with class weights and without
    the proximal term. `should_stop()` is asked before each batch; if it says yes, the result is
    None and the model is left as it is by then.

    Raises ValueError for an empty data set and DivergenceError.
    """
    if len(dataset) == 0:
        raise ValueError("no examples to train on: start fewer clients or give them more data")
    loss_of: Callable[[Tensor, Tensor], Tensor] = task.loss
    if parameters.class_weights == "balanced":
        loss_of = _balanced(task, dataset.tensors[1])
    trained = [p for p in model.parameters() if p.requires_grad]
    received = [p.detach().clone() for p in trained] if parameters.proximal_mu else []
    learning_rate = parameters.learning_rate * parameters.lr_decay ** (round - 1)
    optimizer: _Adam | _Sgd = (
        _Adam(trained, learning_rate)
        if parameters.optimizer == "adam"
        else _Sgd(trained, learning_rate, parameters.momentum)
    )
    batches = math.ceil(len(dataset) / parameters.batch_size)
    steps = parameters.local_steps or parameters.local_epochs * batches
    epochs = math.ceil(steps / batches)
    shuffling = torch.Generator().manual_seed(seed)
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for epoch in range(1, epochs + 1):
            loss_sum, correct, seen = 0.0, 0, 0
            order = torch.randperm(len(dataset), generator=shuffling)
            left = steps - (epoch - 1) * batches
            for batch in torch.split(order, parameters.batch_size)[:left]:
                if should_stop is not None and should_stop():
                    return None
                inputs, targets = dataset[batch]
                outputs = model(inputs)
                loss = loss_of(outputs, targets)
                model.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                if parameters.proximal_mu:
                    _pull(trained, received, parameters.proximal_mu)
                if parameters.clip_norm:
                    nn.utils.clip_grad_norm_(trained, parameters.clip_norm)
                optimizer.step()
                seen += len(batch)
                loss_sum += loss.item() * len(batch)
                correct += int((task.logits(outputs).argmax(1) == targets).sum())
            result = TrainingResult(len(dataset), loss_sum / seen, correct / seen)
            if not math.isfinite(result.loss):
                raise DivergenceError(
                    f"the training loss is {result.loss} after epoch {epoch}: lower LEARNING_RATE"
                )
            if on_epoch is not None:
                on_epoch(epoch, epochs, result.loss, result.accuracy)
    return result


@torch.no_grad()
def _pull(parameters: Sequence[Tensor], received: Sequence[Tensor], mu: float) -> None:
    """Add the gradient of FedProx's proximal term, mu / 2 times the squared distance."""
    for parameter, before in zip(parameters, received, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(parameter - before, alpha=mu)


def _balanced(task: Task, labels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The task's loss with weights that make all classes in `labels` count the same: the weighted
    mean of PyTorch's losses, for every loss that is a mean over examples."""
    weights = 1 / torch.bincount(labels)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        shares = weights[targets] / weights[targets].sum()
        members = [targets == label for label in torch.unique(targets)]
        losses = [shares[m].sum() * task.loss(outputs[m], targets[m]) for m in members]
        return torch.stack(losses).sum()

    return loss
