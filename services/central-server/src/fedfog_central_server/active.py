"""A run at work: its models from the checkpoint to the broker, their evaluation, its results.

What is published was read from a checkpoint, so nothing that anybody has seen of a run can be lost.
"""

import math
import time
from collections.abc import Callable

import structlog

from fedfog.files import write_atomically
from fedfog.logs import Step
from fedfog.messages.codec import encode
from fedfog.messages.schemas import ClientEvaluation, Evaluation, ModelMeta, RoundRecord, RunState
from fedfog.runs import FinalEvaluation, Status
from fedfog.settings import CentralSettings
from fedfog_central_server import link, results
from fedfog_central_server.checkpoints import Checkpoint, CheckpointError
from fedfog_central_server.final import Collection
from fedfog_central_server.learning import Evaluated, InitialModel, Learning, LearningFailed
from fedfog_central_server.retained import RetainedModel
from fedfog_central_server.runs import Run, shares

log = structlog.get_logger()

_LOGGED = ("accuracy", "auroc", "macro_f1", "loss", "ece")


class RunFailedError(Exception):
    """The run cannot go on; the text says why and what to do."""


class ActiveRun:
    """The run that the server works on, or the last one that it worked on.

    Args:
        published: takes each record with its evaluation.

    Raises:
        ServiceError: all its checkpoints are damaged.
        OSError: its folder cannot be read or written.
    """

    def __init__(
        self,
        run: Run,
        learning: Learning,
        retained: RetainedModel,
        published: Callable[[RoundRecord], object],
    ) -> None:
        self.run = run
        self.settings: CentralSettings = run.settings
        self.over: Status | None = None
        self.error = ""
        self.checkpoint: Checkpoint | None = None
        self._learning, self._retained, self._published = learning, retained, published
        self._deferred: Checkpoint | None = None  # until the model before it is evaluated
        self._clients: Collection | None = None  # their word on the last model
        self._clients_due = math.inf
        self._newest: Evaluation | None = None
        self._best = -1.0
        self._unsaved: Checkpoint | None = None  # model 0
        self._save_at, self._save_again = 0.0, iter(run.checkpoints.again_after)
        self._recovered = run.recover()

    @property
    def id(self) -> str:
        """The run's id in messages."""
        return self.run.id

    @property
    def rounds(self) -> int:
        """Completed rounds."""
        return self.checkpoint.round if self.checkpoint else 0

    @property
    def trained(self) -> bool:
        """The last round is done."""
        return self._clients is not None

    @property
    def early(self) -> bool:
        """It was the last one by EARLY_STOP_ROUNDS."""
        return self.trained and self.rounds < self.settings.rounds

    @property
    def complete(self) -> bool:
        """The broker was there to take the last model, and this and the clients have evaluated
        it, or these have had their time."""
        if self._clients is None or not self._retained.sent:
            return False
        heard = self._clients.complete or time.monotonic() >= self._clients_due
        return heard and not self.run.history.lacks_evaluation(self.rounds)

    @property
    def accuracy(self) -> float | None:
        """Of the newest model that is evaluated."""
        return self._newest.accuracy if self._newest else None

    def begin(self) -> None:
        """Publish the model to go on from, or have model 0 made."""
        for evaluation in self.run.history.evaluations:
            self._newest, self._best = evaluation, max(self._best, evaluation.accuracy)
        if self._recovered is None:
            self._learning.make_initial_model(self.id, self.settings.seed)
        else:
            self._take(self._recovered)

    def start_message(self) -> link.Start:
        """What the ServerApp has to know."""
        return link.Start(
            run=self.id,
            folder=str(self.run.folder.resolve()),
            settings=self.settings.model_dump(mode="json"),
        )

    # Events

    def learned(self, event: InitialModel | Evaluated | LearningFailed) -> None:
        """Raises RunFailedError."""
        if self.over or event.run != self.id:
            return
        if isinstance(event, LearningFailed):
            error = event.error
            raise RunFailedError(f"{type(error).__name__}: {error}") from error
        if isinstance(event, Evaluated):
            self._evaluated(event)
            if (checkpoint := self._deferred) is not None:
                self._deferred = None
                self._take(checkpoint)
        elif self.checkpoint is None:
            record = RoundRecord(run=self.id, round=0, regions={}, num_clients=0, num_examples=0)
            self._unsaved = Checkpoint(record, event.table, event.vector)

    def heard(self, region: str, client: str, said: ClientEvaluation) -> None:
        """A client has evaluated a run's last model."""
        if self._clients and not self.over and (said.run, said.round) == (self.id, self.rounds):
            self._clients.hear(region, client, said)

    def tick(self, now: float) -> float | None:
        """Save model 0, and wait for the clients' evaluations of the last one; returns when
        something is due next, if anything is.

        Raises:
            RunFailedError: model 0 cannot be saved.
        """
        if self.over:
            return None
        if self._clients and self._retained.sent:
            self._clients_due = min(self._clients_due, now + self.settings.evaluation_timeout)
            return self._clients_due if now < self._clients_due else None
        return self._save_initial(now)

    def _save_initial(self, now: float) -> float | None:
        if self._unsaved is None:
            return None
        if now < self._save_at:
            return self._save_at
        try:
            self.run.checkpoints.save(self._unsaved)
        except OSError as error:
            path, delay = self.run.checkpoints.path(0), next(self._save_again, None)
            if delay is None:
                raise RunFailedError(
                    f"{path} cannot be written ({error.strerror}): make room or correct RUNS_DIR"
                ) from error
            log.error(
                "checkpoint_not_written",
                path=str(path),
                error=error.strerror,
                again_in_seconds=delay,
            )
            self._save_at = now + delay
            return self._save_at
        checkpoint, self._unsaved = self._unsaved, None
        self._take(checkpoint)
        return None

    def checkpointed(self, round_: int) -> None:
        """The ServerApp has written a checkpoint. Raises RunFailedError."""
        try:
            checkpoint = self.run.checkpoints.load(round_)
        except CheckpointError as error:
            raise RunFailedError(f"just written, and damaged: {error}") from error
        self._take(checkpoint)

    def adopt(self) -> None:
        """Take a checkpoint that a ServerApp wrote but died before it could say so."""
        last = self.run.checkpoints.last_round
        if self.checkpoint is None or last <= self.checkpoint.round:
            return
        try:
            self._take(self.run.checkpoints.load(last))
        except CheckpointError as error:  # nobody has seen its model: the round is done again
            log.error("checkpoint_damaged", error=str(error))

    # Models

    def _take(self, checkpoint: Checkpoint) -> None:
        """Publish a checkpoint's model, then do what may be done while the clients train."""
        began, history = time.monotonic(), self.run.history
        if self.settings.early_stop_rounds and history.lacks_evaluation(checkpoint.round - 1):
            self._deferred = checkpoint  # that evaluation decides if this model is the last
            return
        self.checkpoint = checkpoint
        if self._ends_with(checkpoint.round):
            self._clients = Collection(checkpoint.record)
        meta = self._meta(checkpoint)
        payload = encode(meta, checkpoint.table, checkpoint.vector)
        sent = self._retained.set(meta, payload)
        log.info(
            Step.PUBLISH_MODEL,
            run=meta.run,
            round=f"{meta.round}/{meta.rounds}",
            state=meta.state,
            bytes=len(payload),
            waits_for_broker=None if sent else True,
            seconds=round(time.monotonic() - began, 4),
        )
        history.add(checkpoint.record)
        if history.lacks_evaluation(checkpoint.round):
            self._learning.evaluate(self.id, checkpoint)

    def _ends_with(self, round_: int) -> bool:
        return round_ == self.settings.rounds or bool(self.run.ends_early_with(round_))

    def _meta(self, checkpoint: Checkpoint) -> ModelMeta:
        last = self._ends_with(checkpoint.round)
        return ModelMeta(
            run=self.id,
            run_started=self.run.info.run_started,
            round=checkpoint.round,
            rounds=self.settings.rounds,
            state=RunState.FINISHED if last else RunState.TRAINING,
            digest=checkpoint.digest,
            hyperparameters=self.settings.hyperparameters,
            regions=shares(checkpoint.record),
            evaluation=self._newest,
        )

    def _evaluated(self, event: Evaluated) -> None:
        round_, evaluation = event.checkpoint.round, event.evaluation
        record = self.run.history.evaluated(round_, evaluation, event.seconds)
        if record is None:  # asked for twice, by a stop and a resume
            return
        try:
            self.run.history.save(self.run.seconds)
            self.run.checkpoints.prune(self.run.history.written)
        except OSError as error:  # not fatal: what could not be written is kept for the next time
            self._history_not_written(error)
        if round_ > 0:
            self._published(record)
        if evaluation is None:
            return
        self._newest = evaluation
        log.info(
            "model_evaluated",
            run=self.id,
            round=f"{round_}/{self.settings.rounds}",
            **_rounded(evaluation),
            seconds=round(event.seconds, 4),
        )
        if evaluation.accuracy > self._best:
            self._best = evaluation.accuracy
            self._save("best.safetensors", event.checkpoint)

    # Results

    def end(
        self, status: Status, error: str = "", *, held: bool = False, curve: bool = True
    ) -> None:
        """Write the results: the run is over, perhaps only for now.

        Args:
            held: only `fedfog resume` is to go on with it.
            curve: draw the learning curve; its library alone takes a second to load.
        """
        self.over, self.error = status, error
        folder = self.run.folder
        if status is Status.COMPLETED and self._clients:
            self.run.history.federated = told = self._clients.result()
            if told is not None:
                self._say_federated(told)
        try:
            self.run.history.close(self.run.seconds)
        except OSError as problem:
            self._history_not_written(problem)
        summary = results.summarize(self.run, status, error, held)
        try:
            if self.checkpoint is not None:
                self._save("model.safetensors", self.checkpoint)
                results.save_card(self.run, summary, self.checkpoint, self._learning.card)
                if curve:
                    results.save_curve(self.run)
            results.save_summary(self.run, summary)  # last: it says that all the rest is there
        except OSError as problem:
            path, reason = problem.filename or str(folder), problem.strerror
            log.error("results_not_written", path=path, error=reason)
            self.over, self.error = Status.FAILED, f"{path} cannot be written: {reason}"
        (log.error if self.over is Status.FAILED else log.info)(
            f"run_{self.over}",
            run=self.id,
            error=self.error or None,
            rounds=f"{summary.rounds}/{self.settings.rounds}",
            early_stop=summary.early_stop or None,
            accuracy=_change(summary.initial_accuracy, summary.test_accuracy),
            loss=_change(summary.initial_loss, summary.test_loss),
            results=str(folder),
            seconds=summary.seconds,
        )

    def _say_federated(self, told: FinalEvaluation) -> None:
        overall, missing = told.overall, told.missing or None
        (log.warning if missing else log.info)(
            "model_evaluated_by_clients",
            run=self.id,
            round=self.rounds,
            clients=overall and overall.num_clients,
            accuracy=overall and round(overall.accuracy, 4),
            worst=overall and round(overall.worst_accuracy, 4),
            worst_client=overall and overall.worst_client,
            missing=missing,
            missing_clients=told.missing_clients or None,
            setting="EVALUATION_TIMEOUT" if missing else None,
        )

    def _history_not_written(self, error: OSError) -> None:
        path = self.run.folder / "history.json"
        log.error("history_not_written", path=str(path), error=error.strerror)

    def _save(self, name: str, checkpoint: Checkpoint) -> None:
        path = self.run.folder / name
        model = encode(self._meta(checkpoint), checkpoint.table, checkpoint.vector)
        try:
            write_atomically(path, model)
        except OSError as error:
            log.error("model_not_written", path=str(path), error=error.strerror)


def _rounded(evaluation: Evaluation) -> dict[str, float | None]:
    values = {name: getattr(evaluation, name) for name in _LOGGED}
    return {name: value and round(value, 4) for name, value in values.items()}


def _change(before: float | None, after: float | None) -> str | None:
    """How a metric went over the rounds, as `0.5838 -> 0.9911 (+0.4073)`."""
    if before is None or after is None:
        return None
    return f"{before:.4f} -> {after:.4f} ({after - before:+.4f})"
