"""Training in a thread of its own, so that messages are answered while a model is trained.

A process trains one model at a time: PyTorch has one generator of random numbers for the process,
and what a client draws must not depend on who trains beside it. It is the processes that use the
cores.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import structlog

from fedfog.core.partition import slot_indices
from fedfog.messages.codec import TensorMessage, TensorTable, Vector
from fedfog.messages.schemas import ClientMetrics, ModelMeta, Slot
from fedfog.ml.runtime import load_torch
from fedfog.settings import ClientSettings

log = structlog.get_logger()


@dataclass(frozen=True)
class Job:
    """Train from this global model on this slot for `round`."""

    client: str
    run: str
    round: int
    model: TensorMessage[ModelMeta]
    slot: Slot


@dataclass(frozen=True)
class Trained:
    """What a job gave: the new weights, float32 of shape (num_parameters,)."""

    job: Job
    table: TensorTable
    vector: Vector
    num_examples: int
    metrics: ClientMetrics
    seconds: float


@dataclass(frozen=True)
class TrainingFailed:
    """The client's training failed; if no client is named, none can train."""

    error: Exception
    client: str | None = None


class Trainer(threading.Thread):
    """Works on the newest job of each client, in the order in which they came; PyTorch is imported
    here, after the connection is under way."""

    def __init__(
        self, settings: ClientSettings, report: Callable[[Trained | TrainingFailed], None]
    ) -> None:
        super().__init__(name="trainer", daemon=True)
        self._settings = settings
        self._report = report
        self._jobs: SimpleQueue[Job] = SimpleQueue()
        self._wanted: dict[str, Job] = {}
        self._data: dict[str, tuple[tuple[Slot, int, str, str], tuple[Any, Any]]] = {}

    def submit(self, job: Job) -> None:
        self._wanted[job.client] = job
        self._jobs.put(job)

    def cancel(self, client: str) -> None:
        """Drop the client's job, or stop it at its next batch; it reports nothing."""
        self._wanted.pop(client, None)

    def run(self) -> None:
        try:
            load_torch(self._settings.training_threads)
            from fedfog.ml.task import DataError, load_task

            task = load_task(self._settings.task, data_dir=self._settings.data_dir)
            while True:
                job = self._jobs.get()
                if not self._is_wanted(job):
                    continue
                try:
                    self._train(task, job)
                except DataError:
                    raise  # it is the same for all clients
                except Exception as error:  # noqa: BLE001 (it ends the client, in the main thread)
                    self._report(TrainingFailed(error, job.client))
                del job  # and with it the model that was trained from
        except Exception as error:  # noqa: BLE001 (it ends the service, in the main thread)
            self._report(TrainingFailed(error))

    def _is_wanted(self, job: Job) -> bool:
        return self._wanted.get(job.client) is job

    def _train(self, task: Any, job: Job) -> None:
        from fedfog.ml import training
        from fedfog.ml.evaluation import evaluate

        began = time.monotonic()
        said = log.bind(client=job.client)
        parameters = job.model.meta.hyperparameters
        examples, validation = self._examples(task, job)
        model = task.build_model(parameters.seed)
        training.load_arrays(model, job.model.table.unflatten(job.model.vector))
        received = evaluate(task, model, validation) if len(validation) else None
        slot = training.global_slot(job.slot.region_index, job.slot.slot)
        result = training.train_local(
            task,
            model,
            examples,
            parameters,
            round=job.round,
            seed=training.round_seed(parameters.seed, job.round, slot),
            on_epoch=lambda epoch, epochs, loss, accuracy: said.info(
                "epoch",
                round=job.round,
                epoch=f"{epoch}/{epochs}",
                loss=round(loss, 4),
                accuracy=round(accuracy, 4),
            ),
            should_stop=lambda: not self._is_wanted(job),
        )
        if result is None:
            said.info("training_cancelled", round=job.round)
            return
        arrays = training.state_arrays(model)
        del model  # of a large one, no more copies than needed
        table = TensorTable.of(arrays)
        self._report(
            Trained(
                job,
                table,
                table.flatten(arrays),
                result.num_examples,
                ClientMetrics(
                    train_loss=result.loss,
                    validation_loss=received.loss if received else None,
                    validation_accuracy=received.accuracy if received else None,
                ),
                time.monotonic() - began,
            )
        )

    def _examples(self, task: Any, job: Job) -> tuple[Any, Any]:
        """Training and validation examples of the client's slot; kept until that changes."""
        from fedfog.ml.training import global_slot, round_seed, split_validation

        slot, parameters = job.slot, job.model.meta.hyperparameters
        seed = parameters.seed
        held = (slot, seed, parameters.partition, parameters.region_partition)
        key, data = self._data.get(job.client, (None, None))
        if data is None or key != held:
            labels = task.training_labels()
            mine = slot_indices(
                labels,
                task.training_groups(),
                slot=slot.slot,
                slots=slot.slots,
                region_index=slot.region_index,
                regions=slot.regions,
                seed=seed,
                partition=parameters.partition,
                region_partition=parameters.region_partition,
            )
            kept, validation = split_validation(
                mine,
                labels,
                self._settings.validation_fraction,
                round_seed(seed, 0, global_slot(slot.region_index, slot.slot)),
            )
            data = (task.training_data(kept), task.training_data(validation))
            self._data[job.client] = (held, data)
            log.info(
                "data_slot",
                client=job.client,
                slot=f"{slot.slot} of {slot.slots}",
                region=f"{slot.region_index} of {slot.regions}",
                training=len(kept),
                validation=len(validation),
            )
        return data
