"""How good a model is on a data set."""

from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedfog.ml.task import Task

_BATCH = 512  # bounds the memory of the activations, not the result


@dataclass(frozen=True)
class Metrics:
    """Mean loss in nats and share of right answers."""

    num_examples: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class FullMetrics(Metrics):
    """Metrics that also do justice to rare classes.

    `auroc` is one-vs-rest, averaged over the classes that occur; None if only one does or if the
    scores are not finite. Rows of `confusion_matrix` are true classes, columns predicted ones.
    """

    auroc: float | None
    macro_f1: float
    confusion_matrix: list[list[int]]


def evaluate(task: Task, model: nn.Module, dataset: TensorDataset) -> Metrics:
    """Loss and accuracy, as a client needs them. Raises ValueError for an empty data set."""
    return _metrics(task, *_predict(model, dataset))


def evaluate_full(task: Task, model: nn.Module, dataset: TensorDataset) -> FullMetrics:
    """All metrics; needs scikit-learn. Raises ValueError for an empty data set."""
    from sklearn.metrics import confusion_matrix, f1_score, roc_auc_score

    outputs, targets = _predict(model, dataset)
    logits = task.logits(outputs)
    # Log-odds against the rest rank as probabilities do, but do not saturate into ties.
    own = torch.eye(logits.shape[1], dtype=torch.bool)
    rest = logits.double().unsqueeze(1).masked_fill(own, -torch.inf).logsumexp(2)
    scores = (logits - rest).numpy()
    predicted, true = logits.argmax(1).numpy(), targets.numpy()
    classes = np.arange(len(task.class_names))
    occurs = np.isin(classes, true)
    auroc = None
    if occurs.sum() > 1 and np.isfinite(scores).all():
        one_vs_rest = true[:, np.newaxis] == classes[occurs]
        auroc = float(roc_auc_score(one_vs_rest, scores[:, occurs], average="macro"))
    return FullMetrics(
        **asdict(_metrics(task, outputs, targets)),
        auroc=auroc,
        macro_f1=float(f1_score(true, predicted, average="macro", zero_division=0)),
        confusion_matrix=confusion_matrix(true, predicted, labels=classes).tolist(),
    )


@torch.inference_mode()
def _predict(model: nn.Module, dataset: TensorDataset) -> tuple[Tensor, Tensor]:
    if len(dataset) == 0:
        raise ValueError("no examples to evaluate on")
    inputs, targets = dataset.tensors
    model.eval()
    return torch.cat([model(batch) for batch in torch.split(inputs, _BATCH)]), targets


def _metrics(task: Task, outputs: Tensor, targets: Tensor) -> Metrics:
    correct = task.logits(outputs).argmax(1) == targets
    return Metrics(len(targets), task.loss(outputs, targets).item(), correct.float().mean().item())
