"""Training in a thread of its own, so that messages are answered while a model is trained.

A process trains one model at a time: PyTorch has one generator of random numbers for the process,
and what a client draws must not depend on who trains beside it. It is the processes that use the
cores.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import structlog

from fedfog.core.partition import slot_indices
from fedfog.messages.codec import TensorMessage, TensorTable, Vector
from fedfog.messages.schemas import (
    MAX_LOSS,
    ClientEvaluation,
    ClientMetrics,
    ModelMeta,
    RunState,
    Slot,
)
from fedfog.ml.runtime import load_torch
from fedfog.service import ServiceError
from fedfog.settings import ClientSettings

log = structlog.get_logger()


@dataclass(frozen=True)
class Job:
    """Train from this model for `fog_round` of `round`: on this slot or, without one, on the
    client's own data. A finished model is evaluated only."""

    client: str
    run: str
    round: int
    model: TensorMessage[ModelMeta]
    slot: Slot | None

    @property
    def finished(self) -> bool:
        return self.model.meta.state is RunState.FINISHED

    @property
    def fog_round(self) -> int:
        return self.model.meta.fog_round + 1


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
class Evaluated:
    """How a run's finished model does on the client's validation examples; None: it has none."""

    job: Job
    evaluation: ClientEvaluation | None


@dataclass(frozen=True)
class TrainingFailed:
    """The client's training failed; if no client is named, none can train."""

    error: Exception
    client: str | None = None


class Trainer(threading.Thread):
    """Works on the newest job of each client, in the order in which they came; PyTorch is imported
    here, after the connection is under way."""

    def __init__(
        self,
        settings: ClientSettings,
        report: Callable[[Trained | Evaluated | TrainingFailed], None],
    ) -> None:
        super().__init__(name="trainer", daemon=True)
        self._settings = settings
        self._report = report
        self._jobs: SimpleQueue[Job] = SimpleQueue()
        self._wanted: dict[str, Job] = {}
        self._absent: dict[str, Job] = {}
        self._data: dict[str, tuple[tuple[Slot | str, int, str, str], tuple[Any, Any]]] = {}

    def submit(self, job: Job) -> None:
        """Train, unless the client sits this round out."""
        self._wanted[job.client] = job
        if self._settings.client_dropout and not job.finished and self._sits_out(job):
            self._absent[job.client] = job
            log.info("sits_round_out", client=job.client, round=job.round)
        else:
            self._jobs.put(job)

    def _sits_out(self, job: Job) -> bool:
        key = (job.round, self._number(job.client), 1)  # not the key of what training draws
        draws = np.random.SeedSequence(job.model.meta.hyperparameters.seed, spawn_key=key)
        return np.random.default_rng(draws).random() < self._settings.client_dropout

    def recall(self, client: str) -> None:
        """The region starves: have the client train if it sits this round out."""
        job = self._absent.pop(client, None)
        if job is not None and self._is_wanted(job):
            log.info("recalled_to_the_round", client=client, round=job.round)
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
        # What clients say of a global model is summed up; of a region's model nobody asks.
        asked = len(validation) and job.fog_round == 1
        received = evaluate(task, model, validation) if asked else None
        if job.finished:
            self._report(Evaluated(job, _evaluation(job, received)))
            return
        result = training.train_local(
            task,
            model,
            examples,
            parameters,
            round=job.round,
            seed=training.round_seed(parameters.seed, job.round, self._stream(job), job.fog_round),
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
        seconds = time.monotonic() - began
        trained = Trained(
            job,
            table,
            table.flatten(arrays),
            result.num_examples,
            ClientMetrics(
                train_loss=result.loss,
                validation_loss=_told(received.loss) if received else None,
                validation_accuracy=received.accuracy if received else None,
                validation_examples=received.num_examples if received else None,
            ),
            seconds * self._settings.client_slowdown,
        )
        if trained.seconds > seconds:  # the clients of a process wait side by side
            wait = threading.Timer(trained.seconds - seconds, self._hand_over, [trained])
            wait.daemon = True
            wait.start()
        else:
            self._report(trained)

    def _hand_over(self, trained: Trained) -> None:
        if self._is_wanted(trained.job):
            self._report(trained)

    def _number(self, client: str) -> int:
        """A number of this client alone, above those of all slots."""
        name = f"{self._settings.region}/{client}"
        return int.from_bytes(sha256(name.encode()).digest()[:8]) | 1 << 63

    def _stream(self, job: Job) -> int:
        """Whose random numbers the client draws: its slot's, or its own."""
        from fedfog.ml.training import global_slot

        slot = job.slot
        return global_slot(slot.region_index, slot.slot) if slot else self._number(job.client)

    def _examples(self, task: Any, job: Job) -> tuple[Any, Any]:
        """Training and validation examples: of the client's slot, kept until that changes, or its
        own, kept for the run."""
        parameters = job.model.meta.hyperparameters
        held = (
            job.slot or job.run,
            parameters.seed,
            parameters.partition,
            parameters.region_partition,
        )
        key, data = self._data.get(job.client, (None, None))
        if data is None or key != held:
            data = self._dealt(task, job, job.slot) if job.slot else self._own(task, job)
            self._data[job.client] = (held, data)
        return data

    def _dealt(self, task: Any, job: Job, slot: Slot) -> tuple[Any, Any]:
        from fedfog.ml.training import round_seed, split_validation

        parameters = job.model.meta.hyperparameters
        labels = task.training_labels()
        mine = slot_indices(
            labels,
            task.training_groups(),
            slot=slot.slot,
            slots=slot.slots,
            region_index=slot.region_index,
            regions=slot.regions,
            seed=parameters.seed,
            partition=parameters.partition,
            region_partition=parameters.region_partition,
        )
        kept, validation = split_validation(
            mine,
            labels,
            self._settings.validation_fraction,
            round_seed(parameters.seed, 0, self._stream(job)),
        )
        log.info(
            "data_slot",
            client=job.client,
            slot=f"{slot.slot} of {slot.slots}",
            region=f"{slot.region_index} of {slot.regions}",
            training=len(kept),
            validation=len(validation),
        )
        return task.training_data(kept), task.training_data(validation)

    def _own(self, task: Any, job: Job) -> tuple[Any, Any]:
        from torch.utils.data import TensorDataset

        from fedfog.ml.own_data import load
        from fedfog.ml.task import DataError
        from fedfog.ml.training import round_seed, split_validation

        path = str(self._settings.client_data).replace("{client}", job.client)
        path = path.replace("{region}", self._settings.region)
        try:
            tensors = load(task, Path(path)).tensors
        except DataError as error:  # of this client alone
            raise ServiceError(f"CLIENT_DATA: {error}") from error
        labels = tensors[1].numpy()
        kept, validation = split_validation(
            np.arange(len(labels)),
            labels,
            self._settings.validation_fraction,
            round_seed(job.model.meta.hyperparameters.seed, 0, self._stream(job)),
        )
        log.info(
            "own_data",
            client=job.client,
            path=path,
            training=len(kept),
            validation=len(validation),
        )
        train, validate = (TensorDataset(*(t[r] for t in tensors)) for r in (kept, validation))
        return train, validate


def _evaluation(job: Job, metrics: Any) -> ClientEvaluation | None:
    return metrics and ClientEvaluation(
        run=job.run,
        round=job.model.meta.round,
        num_examples=metrics.num_examples,
        loss=_told(metrics.loss),
        accuracy=metrics.accuracy,
    )


def _told(loss: float) -> float | None:
    """A loss as messages have it."""
    return loss if abs(loss) <= MAX_LOSS else None
