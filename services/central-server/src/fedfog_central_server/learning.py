"""The one thread that uses PyTorch: it makes model 0 and evaluates every model.

Nothing waits for the import of PyTorch but these two, and a round never waits for an evaluation.
"""

import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import structlog

from fedfog.messages.codec import TensorTable, Vector
from fedfog.messages.schemas import Evaluation
from fedfog.ml.runtime import load_torch
from fedfog.settings import CentralSettings
from fedfog_central_server.checkpoints import Checkpoint

if TYPE_CHECKING:
    from torch.nn import Module

    from fedfog.ml.task import Task

log = structlog.get_logger()

# Rounds that are much faster than an evaluation would pile up models: the oldest go without.
MAX_WAITING = 8
OF_CARD = ("description", "data_statement", "limits")


@dataclass(frozen=True)
class InitialModel:
    run: str
    table: TensorTable
    vector: Vector


@dataclass(frozen=True)
class Evaluated:
    """`evaluation` is None if the model was passed over because newer ones were waiting."""

    run: str
    checkpoint: Checkpoint
    evaluation: Evaluation | None
    seconds: float = 0.0


@dataclass(frozen=True)
class LearningFailed:
    run: str
    error: Exception


@dataclass(frozen=True)
class _Job:
    """Evaluate a checkpoint or, without one, make model 0 from the seed."""

    run: str
    checkpoint: Checkpoint | None = None
    seed: int = 0


class Learning:
    """Its results are put into the service's queue as the events above; `run` is the run's id."""

    def __init__(self, settings: CentralSettings, put: Callable[[Any], None]) -> None:
        self._settings, self._put = settings, put
        self.card = dict.fromkeys(OF_CARD, "")  # what the task says for it, once it is loaded
        self._jobs: queue.Queue[_Job] = queue.Queue()
        # A daemon: an import or an evaluation must not hold up the end of the service.
        threading.Thread(target=self._work, name="learning", daemon=True).start()

    def make_initial_model(self, run: str, seed: int) -> None:
        self._jobs.put(_Job(run, seed=seed))

    def evaluate(self, run: str, checkpoint: Checkpoint) -> None:
        self._jobs.put(_Job(run, checkpoint))

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                self._put(self._do(job))
            except Exception as error:  # noqa: BLE001  told to the main thread, which ends the run
                self._put(LearningFailed(job.run, error))

    def _do(self, job: _Job) -> InitialModel | Evaluated:
        checkpoint = job.checkpoint
        if checkpoint is not None and self._jobs.qsize() >= MAX_WAITING:
            log.warning("evaluation_passed_over", round=checkpoint.round)
            return Evaluated(job.run, checkpoint, None)
        task = self._task
        from fedfog.ml.evaluation import evaluate_full
        from fedfog.ml.training import load_arrays, state_arrays

        if checkpoint is None:
            arrays = state_arrays(task.build_model(job.seed))
            table = TensorTable.of(arrays)
            return InitialModel(job.run, table, table.flatten(arrays))
        began = time.monotonic()
        load_arrays(self._model, checkpoint.table.unflatten(checkpoint.vector))
        metrics = evaluate_full(task, self._model, task.test_data())
        fields = {name: _finite(value) for name, value in asdict(metrics).items()}
        evaluation = Evaluation(round=checkpoint.round, **fields)
        return Evaluated(job.run, checkpoint, evaluation, time.monotonic() - began)

    @cached_property
    def _task(self) -> "Task":
        load_torch(threads=1)  # more would only take the cores from who trains
        from fedfog.ml.task import load_task

        task = load_task(self._settings.task, data_dir=self._settings.data_dir)
        self.card = {name: getattr(task, name) for name in OF_CARD}
        return task

    @cached_property
    def _model(self) -> "Module":
        """Whose weights are set for each evaluation."""
        return self._task.build_model(0)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
