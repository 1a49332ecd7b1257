"""Shell around `fedfog.core.participation`: MQTT, the outbox and the trainer on the outside."""

import random
import re
import time
import uuid
from typing import Any

import structlog

import fedfog
from fedfog import logs, service
from fedfog.core import participation as core
from fedfog.files import next_boot, write_atomically
from fedfog.health import BEAT_SECONDS, Heartbeat
from fedfog.logs import Step
from fedfog.messages.codec import (
    CodecError,
    TensorMessage,
    decode,
    decode_json,
    digest_of,
    encode,
)
from fedfog.messages.schemas import (
    ModelMeta,
    Presence,
    Receipt,
    RegionReceipt,
    RunState,
    Slot,
    Status,
    UpdateMeta,
    Verdict,
)
from fedfog.settings import ClientSettings, load
from fedfog.transport import mqtt
from fedfog_client.outbox import Outbox
from fedfog_client.trainer import Job, Trained, Trainer, TrainingFailed

log = structlog.get_logger()


class Client:
    """One edge client of a region."""

    def __init__(self, settings: ClientSettings, client_id: str) -> None:
        self._settings = settings
        self._id, self._region = client_id, settings.region
        self._topics = topics = settings.topics
        self._boot = next_boot(settings.state_dir)
        self._outbox = Outbox(settings.state_dir)
        left = self._outbox.load()
        if left and (left.region, left.client) != (self._region, self._id):
            log.warning("outbox_of_another_client", update=left.id)  # REGION or CLIENT_ID changed
            self._outbox.clear()
            left = None
        self._core = core.Participation(
            random.Random(), outbox=(left.run, left.round) if left else None
        )
        self._model: TensorMessage[ModelMeta] | None = None
        self._slot: Slot | None = None
        self._exit: int | None = None
        region, client = self._region, self._id
        self.session = mqtt.Session(
            f"fedfog-client-{region}-{client}",
            settings.mqtt_broker,
            settings.mqtt_port,
            [
                topics.status(region),
                topics.slot(region, client),
                topics.receipts(region, client),
                topics.receipts(region),
                topics.global_model,
            ],
            will=(topics.presence(region, client), self._presence(online=False)),
            timeout=settings.mqtt_timeout,
        )
        self._trainer = Trainer(settings, self.session.events.put)

    def run(self) -> int:
        """Take part until SIGTERM or, with EXIT_WHEN_FINISHED, the end of a run; returns the exit
        code."""
        log.info("client_started", boot=self._boot)
        heartbeat = Heartbeat()
        service.on_stop(self.session.events.put)
        self.session.start()
        self._trainer.start()
        while self._exit is None:
            due = self._core.wake_at()
            now = time.monotonic()
            wait = BEAT_SECONDS if due is None else min(BEAT_SECONDS, due - now)
            event = self.session.next(wait)
            now = time.monotonic()
            heartbeat.beat("ready" if self.session.connected else "no MQTT broker")
            if isinstance(event, service.StopRequested):
                break
            if (core_event := self._translate(event)) is not None:
                self._apply(core_event, now)
            if due is not None and now >= due:
                self._apply(core.Tick(), now)
        topic = self._topics.presence(self._region, self._id)
        self.session.publish(topic, self._presence(online=False), retain=True)
        self.session.stop()
        log.info("client_stopped", round=self._core.round, duty=self._core.duty)
        return self._exit or service.EXIT_OK

    # From messages to events

    def _translate(self, event: Any) -> core.Event | None:
        match event:
            case mqtt.Connected():
                return core.Connected()
            case mqtt.Disconnected(reason):
                log.warning("mqtt_disconnected", reason=reason)
            case Trained():
                return self._trained(event)
            case TrainingFailed(error):
                raise service.ServiceError(f"training failed: {error}") from error
            case mqtt.Received(topic, payload) if payload:
                try:
                    return self._message(topic, payload)
                except CodecError as error:
                    log.warning(
                        "message_refused", topic=topic, bytes=len(payload), reason=str(error)
                    )
        return None

    def _message(self, topic: str, payload: bytes) -> core.Event | None:
        topics, region = self._topics, self._region
        if topic == topics.global_model:
            return self._model_arrived(payload)
        if topic == topics.slot(region, self._id):
            self._slot = slot = decode_json(payload, Slot)
            return core.SlotDealt(slot.run, slot.slot)
        if topic == topics.status(region):
            status = decode_json(payload, Status)
            return core.AggregatorSeen(status.boot) if status.online else None
        if topic == topics.receipts(region):
            closed = decode_json(payload, RegionReceipt)
            if self._id not in closed.members:
                return None
            return core.VerdictArrived(closed.run, closed.round, Verdict.ACCEPTED, closed.boot)
        receipt = decode_json(payload, Receipt)
        # An update that could not even be read there is the one that was sent last.
        run = receipt.run or self._core.run or ""
        round_ = self._core.round if receipt.round is None else receipt.round
        return core.VerdictArrived(run, round_, receipt.verdict, receipt.boot, receipt.reason)

    def _model_arrived(self, payload: bytes) -> core.Event:
        began = time.monotonic()
        model = decode(payload, ModelMeta)
        if digest_of(model.vector) != model.meta.digest:
            raise CodecError("the digest is not that of the tensors")
        meta = model.meta
        event = core.ModelArrived(
            meta.run, meta.run_started, meta.round + 1, meta.state is RunState.FINISHED
        )
        if self._core.is_news(event):
            self._model = model
            known = meta.evaluation
            log.info(
                Step.APPLY_MODEL,
                run=meta.run,
                round=f"{meta.round}/{meta.rounds}",
                state=meta.state,
                test_accuracy=known.accuracy if known else None,
                of_round=known.round if known else None,
                seconds=round(time.monotonic() - began, 4),
            )
        return event

    def _trained(self, trained: Trained) -> core.Event:
        """Put the update into the outbox: from here on it survives a crash."""
        job = trained.job
        meta = UpdateMeta(
            run=job.run,
            round=job.round,
            region=self._region,
            client=self._id,
            base_digest=job.model.meta.digest,
            num_examples=trained.num_examples,
            metrics=trained.metrics,
            train_seconds=round(trained.seconds, 4),
        )
        log.info(
            Step.TRAIN,
            update=meta.id,
            examples=meta.num_examples,
            seconds=meta.train_seconds,
            **{k: round(v, 4) for k, v in meta.metrics.model_dump(exclude_none=True).items()},
        )
        self._outbox.put(encode(meta, trained.table, trained.vector))
        return core.Trained(job.run, job.round)

    # From actions to messages

    def _apply(self, event: core.Event, now: float) -> None:
        for action in self._core.handle(event, now):
            match action:
                case core.Announce():
                    topic = self._topics.presence(self._region, self._id)
                    self.session.publish(topic, self._presence(online=True), retain=True)
                case core.Train(run, round_):
                    assert self._model is not None and self._slot is not None
                    self._trainer.submit(Job(run, round_, self._model, self._slot))
                case core.CancelTraining():
                    self._trainer.cancel()
                case core.Send(run, round_, attempt, why):
                    self._send(run, round_, attempt, why)
                case core.EmptyOutbox(run, round_, verdict, reason):
                    self._outbox.clear()
                    level = log.error if verdict == Verdict.REJECTED else log.info
                    level(f"update_{verdict}", update=self._update_id(run, round_), reason=reason)
                case core.RunFinished(run, took_part):
                    log.info("run_finished", run=run, took_part=took_part)
                    if took_part and self._settings.exit_when_finished:
                        self._exit = service.EXIT_OK

    def _send(self, run: str, round_: int, attempt: int, why: str) -> None:
        payload = self._outbox.payload
        assert payload is not None
        began = time.monotonic()
        if self.session.publish(self._topics.update(self._region, self._id), payload):
            log.info(
                Step.PUBLISH_UPDATE,
                update=self._update_id(run, round_),
                attempt=attempt,
                why=why,
                bytes=len(payload),
                seconds=round(time.monotonic() - began, 4),
            )

    def _update_id(self, run: str, round_: int) -> str:
        return f"{run}/{round_}/{self._region}/{self._id}"

    def _presence(self, online: bool) -> bytes:
        return Presence(
            online=online,
            boot=self._boot,
            slot=self._core.current_slot,
            version=fedfog.__version__,
        ).to_json()


def client_id_of(settings: ClientSettings) -> str:
    """CLIENT_ID or, without it, the name that this client's state folder was given at first.

    If that is lost or damaged, the name is the one on the update in the outbox; without an update
    nobody waits for the old name, and the client takes a new one.

    Raises:
        OSError: STATE_DIR is full, or cannot be read or written.
    """
    if settings.client_id:
        return settings.client_id
    path = settings.state_dir / "client_id"
    name = path.read_text(errors="replace") if path.exists() else ""
    if not re.fullmatch("c-[0-9a-f]{12}", name):
        left = Outbox(settings.state_dir).load()
        name = left.client if left else f"c-{uuid.uuid4().hex[:12]}"
        if path.exists():
            log.warning("client_id_damaged", path=str(path), new_name=name)
        write_atomically(path, name.encode())
    return name


def main() -> None:
    settings = load(ClientSettings)

    def body() -> int:
        try:
            client_id = client_id_of(settings)
        except OSError as error:
            raise service.ServiceError(f"{error} (STATE_DIR)") from error
        context = {"region": settings.region, "client": client_id}
        logs.configure("client", settings.log_level, settings.log_format, **context)
        return Client(settings, client_id).run()

    service.run("client", settings, body, region=settings.region)


if __name__ == "__main__":
    main()
