"""The central server's one worker: it owns MQTT, the run's folder and the Flower processes.

Flower does the rounds (`server_app.py`), this process does all that must survive them: it
publishes each checkpoint that the ServerApp reports, has it evaluated while the clients train,
writes the results, and brings up again whatever dies. What is published was read from a
checkpoint, so nothing that anybody has seen of a run can be lost.
"""

import time
from collections import deque
from multiprocessing.connection import Connection
from typing import Any

import structlog
from pydantic import BaseModel

from fedfog import service
from fedfog.health import BEAT_SECONDS, Heartbeat
from fedfog.logs import Step
from fedfog.messages.codec import (
    CodecError,
    TensorTable,
    Vector,
    decode,
    decode_json,
    digest_of,
    encode,
)
from fedfog.messages.schemas import (
    Bell,
    Bridge,
    Evaluation,
    ModelMeta,
    RoundRecord,
    RunState,
)
from fedfog.messages.topics import is_name
from fedfog.runs import Status
from fedfog.settings import CentralSettings
from fedfog.transport import mqtt
from fedfog_central_server import link, results
from fedfog_central_server.checkpoints import Checkpoint, CheckpointError
from fedfog_central_server.learning import Evaluated, InitialModel, Learning, LearningFailed
from fedfog_central_server.runs import open_run, shares
from fedfog_central_server.tier import (
    FlowerTier,
    HungUp,
    Said,
    SubmitFailed,
    Submitted,
    SuperLinkExited,
)

log = structlog.get_logger()

# Waits before the Flower side is brought up again, counted since the last completed round.
RESTART_AFTER = (0.0, 1.0, 2.0, 4.0, 8.0)
SERVERAPP_SECONDS = 45.0


class RunFailedError(Exception):
    """The run cannot go on; the text says why and what to do."""


class Supervisor:
    """The central server.

    Raises:
        ServiceError: RUN_ID names a run that cannot be taken up.
        OSError: RUNS_DIR cannot be written.
    """

    def __init__(self, settings: CentralSettings) -> None:
        self._settings = settings
        self._topics = topics = settings.topics
        self._bridge_prefix = topics.bridge("")
        self.session = mqtt.Session(
            "fedfog-central-server",
            settings.mqtt_broker,
            settings.mqtt_port,
            [self._bridge_prefix + "+", topics.bell, topics.global_model],
            timeout=settings.mqtt_timeout,
        )
        put = self.session.events.put
        self._run = open_run(settings)
        self._tier = FlowerTier(settings, self._run.folder, put)
        self._learning = Learning(settings, put)
        self._over: Status | None = None

        self._checkpoint: Checkpoint | None = None
        self._payload = b""
        self._echoes: deque[bytes] = deque()
        self._newest: Evaluation | None = None
        self._best = -1.0

        self._bridges: dict[str, Bridge] = {}
        self._flower_run: int | None = None
        self._server_app: Connection | None = None
        self._hello_by: float | None = None
        self._restart_at: float | None = None
        self._failures = 0

    def run(self) -> int:
        """Do the run, then end (EXIT_WHEN_FINISHED) or stand by until SIGTERM; returns the exit
        code."""
        service.on_stop(self.session.events.put)
        try:
            self._serve()
        except (service.ServiceError, mqtt.TransportError, OSError) as error:
            self._end(Status.FAILED, str(error))
            raise
        finally:
            self._hang_up()
            self._tier.close()
            self.session.stop()
        return service.EXIT_FAILED if self._over is Status.FAILED else service.EXIT_OK

    def _serve(self) -> None:
        heartbeat = Heartbeat()
        self._begin()
        while not (self._over and self._settings.exit_when_finished):
            event = self.session.next(self._wait())
            heartbeat.beat(self._health())
            if isinstance(event, service.StopRequested):
                self._end(Status.STOPPED)
                return
            try:
                self._handle(event)
                self._tick(time.monotonic())
            except RunFailedError as error:
                self._end(Status.FAILED, str(error))

    def _begin(self) -> None:
        checkpoint = self._run.recover()
        complete = checkpoint is not None and checkpoint.round == self._settings.rounds
        if not complete:
            self._tier.start()
        self.session.start()
        if checkpoint is None:
            self._learning.make_initial_model()
        else:
            for evaluation in self._run.history.evaluations:
                self._newest, self._best = evaluation, max(self._best, evaluation.accuracy)
            self._take(checkpoint)
        if not complete:
            self._submit()

    def _wait(self) -> float:
        due = [t for t in (self._restart_at, self._hello_by) if t is not None]
        return min([BEAT_SECONDS, *(t - time.monotonic() for t in due)])

    def _health(self) -> str:
        if not self.session.connected:
            return "no MQTT broker"
        if self._over:
            return "ready"
        if self._checkpoint is None:
            return "making model 0"
        return "ready" if self._server_app else "starting Flower"

    # Events

    def _handle(self, event: Any) -> None:
        match event:
            case mqtt.Connected():
                self._echoes.clear()
                self._publish()
            case mqtt.Disconnected(reason):
                log.warning("mqtt_disconnected", reason=reason)
            case mqtt.Received(topic, payload):
                try:
                    self._message(topic, payload)
                except CodecError as error:
                    log.warning("message_refused", topic=topic, reason=str(error))
            case InitialModel(table, vector):
                self._model_0(table, vector)
            case Evaluated() if not self._over:
                self._evaluated(event)
            case LearningFailed(error) if not self._over:
                raise RunFailedError(f"{type(error).__name__}: {error}") from error
            case Submitted(flower_run):
                self._flower_run = flower_run
                self._hello_by = time.monotonic() + SERVERAPP_SECONDS
            case SubmitFailed(reason):
                self._trouble(f"the run cannot be submitted: {reason}")
            case Said(connection, link.Hello() as hello):
                self._greet(connection, hello)
            case Said(connection, message) if connection is self._server_app:
                self._server_app_said(message)
            case HungUp(connection):
                connection.close()
                if connection is self._server_app:
                    self._server_app = None
                    # With the SuperLink gone, too, its own event is the one that counts.
                    if self._tier.alive and not self._over:
                        self._trouble("the ServerApp has ended")
            case SuperLinkExited(code):
                self._hang_up()
                self._flower_run = None
                self._trouble(f"the SuperLink has ended with code {code}")

    def _message(self, topic: str, payload: bytes) -> None:
        if topic == self._topics.global_model:
            self._guard_model(payload)
        elif topic == self._topics.bell:
            self._tell(link.BellHeard(bell=decode_json(payload, Bell)))
        elif payload and is_name(region := topic.removeprefix(self._bridge_prefix)):
            bridge = decode_json(payload, Bridge)
            known = self._bridges.get(region)
            later = known is None or bridge.boot > known.boot
            # The will of an earlier boot may come after the birth of its successor.
            if (later and bridge.online) or (known and bridge.boot == known.boot):
                self._bridges[region] = bridge
                self._tell(link.BridgeHeard(region=region, bridge=bridge))

    def _guard_model(self, payload: bytes) -> None:
        """Repair the retained model if it is not ours. Own messages come back once each, in order;
        to know them by their bytes costs less than a second connection without them."""
        if payload in self._echoes:
            while self._echoes.popleft() != payload:
                pass
        elif self._checkpoint is not None and not self._is_present_model(payload):
            log.info("retained_model_replaced", topic=self._topics.global_model)
            self._publish()

    def _is_present_model(self, payload: bytes) -> bool:
        """As a former start of the server published it, perhaps with an older evaluation."""
        assert self._checkpoint is not None
        try:
            model, ours = decode(payload, ModelMeta), self._meta(self._checkpoint)
        except CodecError:
            return False
        meta = model.meta.model_copy(update={"evaluation": ours.evaluation})
        return meta == ours and digest_of(model.vector) == ours.digest

    # The Flower side

    def _submit(self) -> None:
        replaced, self._flower_run, self._hello_by = self._flower_run, None, None
        first = self._checkpoint.round + 1 if self._checkpoint else 1
        self._tier.submit(self._run.id, first, self._settings.rounds, replaced)

    def _greet(self, connection: Connection, hello: link.Hello) -> None:
        if self._over or hello.flower_run != self._flower_run:
            self._tier.hang_up(connection)  # of a run that was given up: this ends it
            return
        self._server_app, self._hello_by = connection, None
        log.info("serverapp_ready", pid=hello.pid, flower_run=hello.flower_run)
        for region, bridge in self._bridges.items():
            self._tell(link.BridgeHeard(region=region, bridge=bridge))
        if self._checkpoint is not None:
            self._tell(link.Start())

    def _server_app_said(self, message: link.FromServerApp) -> None:
        match message:
            case link.Checkpointed(round=round_):
                try:
                    checkpoint = self._run.checkpoints.load(round_)
                except CheckpointError as error:
                    raise RunFailedError(f"just written, and damaged: {error}") from error
                self._failures = 0
                self._take(checkpoint)
            case link.CueWanted(cue=cue):
                self.session.publish(self._topics.cue, cue.to_json())
            case link.Logged(level=level, event=event, fields=fields):
                getattr(log, level)(event, **fields)
            case link.Failed(error=error):
                raise RunFailedError(error)

    def _tell(self, message: BaseModel) -> None:
        if self._server_app is None:
            return
        try:
            link.say(self._server_app, message)
        except OSError as error:  # HungUp follows
            log.debug("serverapp_not_told", reason=str(error))

    def _hang_up(self) -> None:
        """End the ServerApp if it still runs."""
        connection, self._server_app, self._hello_by = self._server_app, None, None
        if connection is not None:
            self._tier.hang_up(connection)

    def _trouble(self, what: str) -> None:
        """Bring the Flower side up again, unless it was tried too often since the last round."""
        if self._failures == len(RESTART_AFTER):
            text = f"{what}; gave up after {self._failures} restarts (FLWR_LOG_LEVEL=DEBUG tells "
            text += "what Flower does)"
            raise service.ServiceError(text) if self._over else RunFailedError(text)
        delay = RESTART_AFTER[self._failures]
        self._failures += 1
        self._restart_at = time.monotonic() + delay
        log.warning("flower_restarts", because=what, in_seconds=delay, attempt=self._failures)

    def _tick(self, now: float) -> None:
        if self._hello_by is not None and now >= self._hello_by:
            self._hello_by = None
            log.error("serverapp_missing", seconds=SERVERAPP_SECONDS, flower_run=self._flower_run)
            self._tier.end_superlink()
        if self._restart_at is None or now < self._restart_at:
            return
        self._restart_at = None
        if not self._tier.alive:
            self._tier.start()
        if self._over is None and self._checkpoint is not None:
            self._adopt(self._checkpoint.round)
        if self._over is None:
            self._submit()

    def _adopt(self, known: int) -> None:
        """Take a checkpoint that a ServerApp wrote but died before it could say so."""
        try:
            newest = self._run.checkpoints.newest()
        except CheckpointError as error:
            raise RunFailedError(str(error)) from error
        if newest is not None and newest.round > known:
            self._take(newest)

    # Models

    def _model_0(self, table: TensorTable, vector: Vector) -> None:
        record = RoundRecord(run=self._run.id, round=0, regions={}, num_clients=0, num_examples=0)
        checkpoint = Checkpoint(record, table, vector)
        try:
            self._run.checkpoints.save(checkpoint)
        except OSError as error:
            path = self._run.checkpoints.path(0)
            raise RunFailedError(f"{path} cannot be written: {error.strerror}") from error
        self._take(checkpoint)

    def _take(self, checkpoint: Checkpoint) -> None:
        """Publish a checkpoint's model, then do what may be done while the clients train."""
        began = time.monotonic()
        first, self._checkpoint = self._checkpoint is None, checkpoint
        meta = self._meta(checkpoint)
        self._payload = encode(meta, checkpoint.table, checkpoint.vector)
        sent = self._publish()
        log.info(
            Step.PUBLISH_MODEL,
            run=meta.run,
            round=f"{meta.round}/{meta.rounds}",
            state=meta.state,
            bytes=len(self._payload),
            waits_for_broker=None if sent else True,
            seconds=round(time.monotonic() - began, 4),
        )
        if first:
            self._tell(link.Start())
        history = self._run.history
        history.add(checkpoint.record)
        if history.lacks_evaluation(checkpoint.round):
            self._learning.evaluate(checkpoint)
        elif meta.state is RunState.FINISHED:
            self._end(Status.COMPLETED)

    def _meta(self, checkpoint: Checkpoint) -> ModelMeta:
        last = checkpoint.round == self._settings.rounds
        return ModelMeta(
            run=self._run.id,
            run_started=self._run.info.run_started,
            round=checkpoint.round,
            rounds=self._settings.rounds,
            state=RunState.FINISHED if last else RunState.TRAINING,
            digest=checkpoint.digest,
            hyperparameters=self._settings.hyperparameters,
            regions=shares(checkpoint.record),
            evaluation=self._newest,
        )

    def _publish(self) -> bool:
        """Publish the present model; without a broker, that is done on the next connection."""
        if not self._payload:
            return False
        sent = self.session.publish(self._topics.global_model, self._payload, retain=True)
        if sent:
            self._echoes.append(self._payload)
        return sent

    def _evaluated(self, event: Evaluated) -> None:
        round_, evaluation = event.checkpoint.round, event.evaluation
        record = self._run.history.evaluated(round_, evaluation, event.seconds)
        if record is None:
            return
        try:
            self._run.history.save(self._run.seconds)
        except OSError as error:  # not fatal: what could not be written is kept for the next time
            self._history_not_written(error)
        if round_ > 0:
            self.session.publish(self._topics.history, record.to_json())
        if evaluation is not None:
            self._newest = evaluation
            log.info(
                "model_evaluated",
                run=self._run.id,
                round=f"{round_}/{self._settings.rounds}",
                **_rounded(evaluation),
                seconds=round(event.seconds, 4),
            )
            if evaluation.accuracy > self._best:
                self._best = evaluation.accuracy
                self._save("best.safetensors", event.checkpoint)
        if round_ == self._settings.rounds:
            self._end(Status.COMPLETED)

    # Results

    def _history_not_written(self, error: OSError) -> None:
        path = self._run.folder / "history.json"
        log.error("history_not_written", path=str(path), error=error.strerror)

    def _save(self, name: str, checkpoint: Checkpoint) -> None:
        try:
            results.save_model(self._run.folder / name, self._meta(checkpoint), checkpoint)
        except OSError as error:
            log.error("model_not_written", path=str(self._run.folder / name), error=str(error))

    def _end(self, status: Status, error: str = "") -> None:
        """The run is over for this process: write the results. Later calls do nothing."""
        if self._over:
            return
        self._over, self._restart_at = status, None
        if status is not Status.COMPLETED:  # a ServerApp that has done its rounds ends by itself
            self._hang_up()
        if status is Status.STOPPED or self._settings.exit_when_finished:
            self._tier.terminate()  # it ends while the results are written
        try:
            self._run.history.close(self._run.seconds)
        except OSError as problem:
            self._history_not_written(problem)
        summary = results.summarize(self._run, status, error)
        try:
            if self._checkpoint is not None:
                self._save("model.safetensors", self._checkpoint)
                description = self._learning.description
                results.save_card(self._run, summary, self._checkpoint, description)
                if status is not Status.STOPPED:  # the import alone takes a second
                    results.save_curve(self._run)
            results.save_summary(self._run, summary)  # last: it says that all the rest is there
        except OSError as problem:
            log.error("results_not_written", folder=str(self._run.folder), error=str(problem))
            self._over = Status.FAILED
        (log.error if status is Status.FAILED else log.info)(
            f"run_{status}",
            run=self._run.id,
            error=error or None,
            rounds=f"{summary.rounds}/{self._settings.rounds}",
            accuracy=_change(summary.initial_accuracy, summary.test_accuracy),
            loss=_change(summary.initial_loss, summary.test_loss),
            results=str(self._run.folder),
            seconds=summary.seconds,
        )


def _rounded(evaluation: Evaluation) -> dict[str, float | None]:
    values = {name: getattr(evaluation, name) for name in ("accuracy", "auroc", "macro_f1", "loss")}
    return {name: value and round(value, 4) for name, value in values.items()}


def _change(before: float | None, after: float | None) -> str | None:
    """How a metric went over the rounds, as `0.5838 -> 0.9911 (+0.4073)`."""
    if before is None or after is None:
        return None
    return f"{before:.4f} -> {after:.4f} ({after - before:+.4f})"
