"""The one thread that uses PyTorch: it makes model 0 and evaluates every model.

Nothing waits for the import of PyTorch but these two, and a round never waits for an evaluation.
"""

import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import structlog

from fedfog.messages.codec import TensorTable, Vector
from fedfog.messages.schemas import Evaluation
from fedfog.settings import CentralSettings
from fedfog_central_server.checkpoints import Checkpoint

log = structlog.get_logger()

# Rounds that are much faster than an evaluation would pile up models: the oldest go without.
MAX_WAITING = 8


@dataclass(frozen=True)
class InitialModel:
    table: TensorTable
    vector: Vector


@dataclass(frozen=True)
class Evaluated:
    """`evaluation` is None if the model was passed over because newer ones were waiting."""

    checkpoint: Checkpoint
    evaluation: Evaluation | None
    seconds: float = 0.0


@dataclass(frozen=True)
class LearningFailed:
    error: Exception


class Learning:
    """Its results are put into the service's queue as the events above."""

    def __init__(self, settings: CentralSettings, put: Callable[[Any], None]) -> None:
        self._settings, self._put = settings, put
        self.description = ""
        self._jobs: queue.Queue[Checkpoint | None] = queue.Queue()
        # A daemon: an import or an evaluation must not hold up the end of the service.
        threading.Thread(target=self._work, name="learning", daemon=True).start()

    def make_initial_model(self) -> None:
        self._jobs.put(None)

    def evaluate(self, checkpoint: Checkpoint) -> None:
        self._jobs.put(checkpoint)

    def _work(self) -> None:
        try:
            self._serve()
        except Exception as error:  # noqa: BLE001  told to the main thread, which ends the run
            self._put(LearningFailed(error))

    def _serve(self) -> None:
        import torch

        from fedfog.ml.evaluation import evaluate_full
        from fedfog.ml.task import load_task
        from fedfog.ml.training import load_arrays, state_arrays

        torch.set_num_threads(1)  # more would only take the cores from who trains
        task = load_task(self._settings.task, data_dir=self._settings.data_dir)
        self.description = task.description
        model = task.build_model(self._settings.seed)
        while True:
            checkpoint = self._jobs.get()
            if checkpoint is None:
                arrays = state_arrays(model)
                table = TensorTable.of(arrays)
                self._put(InitialModel(table, table.flatten(arrays)))
                continue
            if self._jobs.qsize() >= MAX_WAITING:
                log.warning("evaluation_passed_over", round=checkpoint.round)
                self._put(Evaluated(checkpoint, None))
                continue
            began = time.monotonic()
            load_arrays(model, checkpoint.table.unflatten(checkpoint.vector))
            metrics = evaluate_full(task, model, task.test_data())
            fields = {name: _finite(value) for name, value in asdict(metrics).items()}
            evaluation = Evaluation(round=checkpoint.round, **fields)
            self._put(Evaluated(checkpoint, evaluation, time.monotonic() - began))


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
