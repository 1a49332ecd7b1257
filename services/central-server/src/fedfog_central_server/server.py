"""The central server: one process that owns MQTT, the Flower side and the commands, and works on
one run at a time.

Flower does the rounds (`server_app.py`), this process does all that must survive them. Everything
that happens becomes an event in one queue, and one thread handles them.
"""

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import structlog

from fedfog import service
from fedfog.control import Answer, Asked, Control, ResumeCommand, RunCommand, StopCommand
from fedfog.core.quota import Quota
from fedfog.health import BEAT_SECONDS, Heartbeat
from fedfog.messages.codec import CodecError, decode_json
from fedfog.messages.schemas import Bell, Bridge, ClientEvaluation, RoundRecord
from fedfog.messages.topics import is_name
from fedfog.runs import Status
from fedfog.settings import CentralSettings
from fedfog.transport import mqtt
from fedfog.transport.tls import Identity
from fedfog_central_server.active import ActiveRun, RunFailedError
from fedfog_central_server.flower_side import FlowerSide
from fedfog_central_server.learning import Evaluated, InitialModel, Learning, LearningFailed
from fedfog_central_server.retained import RetainedModel
from fedfog_central_server.runs import Run, open_again, open_at_start, open_new
from fedfog_central_server.tracking import Tracking

log = structlog.get_logger()

LINES = 60  # of the log, in a minute, about what is wrong on one topic
TOPIC_SAID = 100  # characters


class CentralServer:
    """The service.

    Raises:
        ServiceError: RUN_ID names a run that cannot be taken up.
        OSError: RUNS_DIR cannot be written.
    """

    def __init__(self, settings: CentralSettings) -> None:
        self._settings = settings
        self._topics = topics = settings.topics
        self._bridge_prefix = topics.bridge("")
        self._evaluations = topics.evaluation("+", "+").removesuffix("+/+")
        self._lines = Quota(LINES)
        self._session = mqtt.Session(
            "fedfog-central-server",
            settings.mqtt_broker,
            settings.mqtt_port,
            [
                self._bridge_prefix + "+",
                self._evaluations + "+/+",
                topics.bell,
                topics.global_model,
            ],
            timeout=settings.mqtt_timeout,
            tls=Identity.of(settings.tls_dir),
        )
        put = self._session.events.put
        self._first = open_at_start(settings)
        self._active: ActiveRun | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="fedfog-"))  # mode 0700
        self._flower = FlowerSide(
            settings,
            self._folder,
            put,
            lambda cue: self._session.publish(topics.cue, cue.to_json()),
        )
        self._control = Control(self._folder, settings.runs_dir, put)
        self._learning = Learning(settings, put)
        self._retained = RetainedModel(self._session, topics.global_model)
        self._tracking = Tracking(settings.tensorboard_dir) if settings.tensorboard_dir else None

    def run(self) -> int:
        """Do the run, then end (EXIT_WHEN_FINISHED) or stand by for commands until SIGTERM;
        returns the exit code."""
        service.on_stop(self._session.events.put)
        try:
            self._serve()
        except (service.ServiceError, mqtt.TransportError, OSError) as error:
            self._end_run(Status.FAILED, str(error), leaving=True)
            raise
        finally:
            self._control.close()
            self._flower.close()
            self._session.stop()
            if self._tracking is not None:
                self._tracking.close()
            shutil.rmtree(self._folder, ignore_errors=True)
        failed = self._active is not None and self._active.over is Status.FAILED
        return service.EXIT_FAILED if failed else service.EXIT_OK

    def _serve(self) -> None:
        heartbeat = Heartbeat()
        self._flower.start()
        self._session.start()
        if self._first is not None:
            self._work_on(self._first)
        due: float | None = None
        while not self._finished:
            wait = BEAT_SECONDS if due is None else min(BEAT_SECONDS, due - time.monotonic())
            event = self._session.next(wait)
            heartbeat.beat(self._health())
            if isinstance(event, service.StopRequested):
                self._end_run(Status.STOPPED, leaving=True)
                return
            try:
                self._handle(event)
                due = self._tick(idle=event is None)
            except RunFailedError as error:
                self._end_run(Status.FAILED, str(error))

    @property
    def _finished(self) -> bool:
        over = self._active is not None and self._active.over is not None
        return over and self._settings.exit_when_finished

    def _health(self) -> str:
        if not self._session.connected:
            return "no MQTT broker"
        if self._active is None or self._active.over:
            return "ready"
        if self._active.checkpoint is None:
            return "making model 0"
        return "ready" if self._flower.ready else "starting Flower"

    def _handle(self, event: Any) -> None:
        match event:
            case None:
                pass
            case mqtt.Connected():
                self._retained.connected()
            case mqtt.Disconnected(reason):
                log.warning("mqtt_disconnected", reason=reason)
            case mqtt.Received(topic, payload):
                try:
                    self._message(topic, payload)
                except CodecError as error:
                    topic = topic[:TOPIC_SAID]
                    if self._lines.take(topic, False, None, time.monotonic()):
                        log.warning("message_refused", topic=topic, reason=str(error))
            case InitialModel() | Evaluated() | LearningFailed():
                if self._active is not None:
                    self._active.learned(event)
            case Asked():
                event.answer(self._answer(event))
            case _:
                self._flower.handle(event)

    def _message(self, topic: str, payload: bytes) -> None:
        if topic == self._topics.global_model:
            self._retained.heard(payload)
        elif topic == self._topics.bell:
            self._flower.hear_bell(decode_json(payload, Bell))
        elif topic.startswith(self._evaluations):
            region, _, client = topic.removeprefix(self._evaluations).partition("/")
            if payload and is_name(region) and is_name(client) and self._active is not None:
                self._active.heard(region, client, decode_json(payload, ClientEvaluation))
        elif payload and is_name(region := topic.removeprefix(self._bridge_prefix)):
            self._flower.hear_bridge(region, decode_json(payload, Bridge))

    def _tick(self, idle: bool) -> float | None:
        """What is due without an event; returns when something is due next."""
        active, now = self._active, time.monotonic()
        due = [self._flower.tick(now, idle)]
        if active is not None and not active.over:
            due.append(active.tick(now))
            if active.complete:
                self._end_run(Status.COMPLETED)
        return min((t for t in due if t is not None), default=None)

    # Runs

    @property
    def _in_progress(self) -> ActiveRun | None:
        return self._active if self._active is not None and not self._active.over else None

    def _work_on(self, run: Run) -> None:
        """Raises ServiceError, OSError: this run cannot be worked on."""
        active = ActiveRun(
            run,
            self._learning,
            self._retained,
            lambda record: self._tell(run.info.run, record),
        )
        self._active = active
        active.begin()
        try:
            self._flower.attach(active)
        except service.ServiceError as error:
            self._end_run(Status.FAILED, str(error))
            raise

    def _tell(self, run: str, record: RoundRecord) -> None:
        self._session.publish(self._topics.history, record.to_json())
        if self._tracking is not None:
            self._tracking.add(run, record)

    def _end_run(
        self, status: Status, error: str = "", *, held: bool = False, leaving: bool = False
    ) -> None:
        """End the run in progress, if there is one, and write its results."""
        leaving = leaving or self._settings.exit_when_finished
        active = self._in_progress
        # Its ServerApp is at the next round of a run that ends early.
        self._flower.detach(done=status is Status.COMPLETED and not (active and active.early))
        if leaving:
            self._flower.terminate()  # it ends while the results are written
        if active is not None:
            active.end(status, error, held=held, curve=status is not Status.STOPPED)

    # Commands

    def _answer(self, asked: Asked) -> Answer:
        command = asked.command
        refused = ""
        try:
            match command:
                case RunCommand(name=name, settings=chosen):
                    self._require_idle()
                    self._work_on(open_new(self._settings, name, chosen))
                case ResumeCommand(name=name):
                    self._require_idle()
                    self._work_on(open_again(self._settings, name))
                case StopCommand(name=name):
                    self._stop(name)
        except (service.ServiceError, OSError) as error:
            refused = str(error)
        active = self._active
        if active is None:
            return Answer(refused=refused)
        return Answer(
            refused=refused,
            name=active.run.info.run,
            status=active.over or "running",
            error=active.error,
            rounds=active.rounds,
            of=active.settings.rounds,
            accuracy=active.accuracy,
        )

    def _require_idle(self) -> None:
        if (active := self._in_progress) is not None:
            raise service.ServiceError(
                f"Run {active.run.info.run} is in progress ({active.rounds} of "
                f"{active.settings.rounds} rounds done): wait for its end (`fedfog runs`), or stop "
                "it with `fedfog stop`"
            )

    def _stop(self, name: str) -> None:
        active = self._in_progress
        if active is None:
            raise service.ServiceError("No run is in progress")
        if name and name != active.run.info.run:
            raise service.ServiceError(f"{name} is not in progress, but {active.run.info.run} is")
        self._end_run(Status.STOPPED, held=True)
