"""One logical client: `fedfog.core.participation` with its MQTT session and its outbox."""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

import fedfog
from fedfog.core import participation as core
from fedfog.core.phases import Phase
from fedfog.files import next_boot
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
    numbered,
)
from fedfog.settings import ClientSettings
from fedfog.transport import mqtt
from fedfog.transport.network import Network, SharedSession
from fedfog.transport.tls import Identity
from fedfog_client.outbox import Outbox
from fedfog_client.trainer import Evaluated, Job, Trained, Trainer


class ModelReader:
    """Decodes a global model once for all clients of a process, who are handed the same bytes."""

    def __init__(self) -> None:
        self._payload: bytes | None = None
        self._model: TensorMessage[ModelMeta] | None = None

    def read(self, payload: bytes) -> TensorMessage[ModelMeta]:
        """Raises CodecError."""
        if self._model is None or payload is not self._payload:
            model = decode(payload, ModelMeta)
            if digest_of(model.vector) != model.meta.digest:
                raise CodecError("the digest is not that of the tensors")
            self._payload, self._model = payload, model
        return self._model


class Client:
    """One edge client of a region.

    Args:
        state_dir: its own; no other client may use it.
        run_finished: told of the end of a run, and whether this client took part in it.
        identity: towards the broker; its certificate has the client's name.
    """

    def __init__(
        self,
        settings: ClientSettings,
        client_id: str,
        state_dir: Path,
        network: Network,
        reader: ModelReader,
        trainer: Trainer,
        run_finished: Callable[["Client", bool], None],
        identity: Identity | None,
    ) -> None:
        self.id, self._region = client_id, settings.region
        self.log = structlog.get_logger().bind(client=client_id)
        self._topics = topics = settings.topics
        self._reader, self._trainer, self._run_finished = reader, trainer, run_finished
        self._boot = next_boot(state_dir)
        self._outbox = Outbox(state_dir)
        left = self._outbox.load()
        if left and (left.region, left.client) != (self._region, self.id):
            # REGION or CLIENT_ID changed
            self.log.warning("outbox_of_another_client", update=left.id)
            self._outbox.clear()
            left = None
        self._core = core.Participation(
            random.Random(),
            settings.client_data is not None,
            outbox=(left.run, left.round, left.fog_round) if left else None,
        )
        self._model: TensorMessage[ModelMeta] | None = None
        self._slot: Slot | None = None
        self._evaluation: bytes | None = None  # of the last model of the run that has finished
        region, client = self._region, self.id
        self.session = SharedSession(
            network,
            f"fedfog-client-{region}-{client}",
            settings.mqtt_broker,
            settings.mqtt_port,
            [
                topics.status(region),
                topics.slot(region, client),
                topics.receipts(region, client),
                topics.receipts(region),
                topics.global_model,
                topics.regional_model(region),
            ],
            will=(topics.presence(region, client), self._presence(online=False)),
            timeout=settings.mqtt_timeout,
            tls=identity,
        )

    def start(self) -> None:
        self.log.info("client_started", boot=self._boot)
        self.session.start()

    def stop(self) -> None:
        """Publish the death, if that is possible; it does not end the session."""
        topic = self._topics.presence(self._region, self.id)
        self.session.publish(topic, self._presence(online=False), retain=True)
        self.log.info("client_stopped", round=self._core.round, duty=self._core.duty)

    def wake_at(self) -> float | None:
        """When `tick` is due next."""
        return self._core.wake_at()

    def tick(self, now: float) -> None:
        topic = self._topics.update(self._region, self.id)
        self._apply(core.Tick(self.session.sending(topic)), now)

    def handle(self, event: Any, now: float) -> None:
        """Act on an event of the session or of the trainer at time `now` (seconds, monotonic).

        Raises:
            TransportError: an update is larger than the broker takes.
        """
        if (core_event := self._translate(event)) is not None:
            self._apply(core_event, now)

    # From messages to events

    def _translate(self, event: Any) -> core.Event | None:
        match event:
            case mqtt.Connected():
                self._publish_evaluation()
                return core.Connected()
            case mqtt.Disconnected(reason):
                self.log.warning("mqtt_disconnected", reason=reason)
            case Trained():
                return self._trained(event)
            case Evaluated():
                self._evaluated(event)
            case mqtt.Received(topic, payload) if payload:
                try:
                    return self._message(topic, payload)
                except CodecError as error:
                    self.log.warning(
                        "message_refused", topic=topic, bytes=len(payload), reason=str(error)
                    )
        return None

    def _message(self, topic: str, payload: bytes) -> core.Event | None:
        topics, region = self._topics, self._region
        if topic in (topics.global_model, topics.regional_model(region)):
            return self._model_arrived(payload)
        if topic == topics.slot(region, self.id):
            self._slot = slot = decode_json(payload, Slot)
            return core.SlotDealt(slot.run, slot.slot)
        if topic == topics.status(region):
            status = decode_json(payload, Status)
            if status.phase is Phase.STARVING and status.round == self._core.round:
                self._trainer.recall(self.id)
            return core.AggregatorSeen(status.boot) if status.online else None
        if topic == topics.receipts(region):
            closed = decode_json(payload, RegionReceipt)
            if self.id not in closed.members:
                return None
            return core.VerdictArrived(
                closed.run, closed.round, Verdict.ACCEPTED, closed.boot, fog_round=closed.fog_round
            )
        receipt = decode_json(payload, Receipt)
        # An update that could not even be read there is the one that was sent last.
        run = receipt.run or self._core.run or ""
        round_, fog_round = receipt.round, receipt.fog_round
        if round_ is None:
            round_, fog_round = self._core.round, self._core.fog_round
        return core.VerdictArrived(
            run, round_, receipt.verdict, receipt.boot, receipt.reason, fog_round
        )

    def _model_arrived(self, payload: bytes) -> core.Event:
        began = time.monotonic()
        model = self._reader.read(payload)
        meta = model.meta
        event = core.ModelArrived(
            meta.run,
            meta.run_started,
            meta.round + 1,
            meta.state is RunState.FINISHED,
            meta.fog_round + 1,
        )
        if self._core.is_news(event):
            self._model = model
            known = meta.evaluation
            self.log.info(
                Step.APPLY_MODEL,
                run=meta.run,
                round=f"{meta.round}/{meta.rounds}",
                fog_round=meta.fog_round or None,
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
            fog_round=job.fog_round,
            region=self._region,
            client=self.id,
            base_digest=job.model.meta.digest,
            num_examples=trained.num_examples,
            metrics=trained.metrics,
            train_seconds=round(trained.seconds, 4),
        )
        self.log.info(
            Step.TRAIN,
            update=meta.id,
            examples=meta.num_examples,
            seconds=meta.train_seconds,
            **{k: round(v, 4) for k, v in meta.metrics.model_dump(exclude_none=True).items()},
        )
        self._outbox.put(encode(meta, trained.table, trained.vector))
        return core.Trained(job.run, job.round, job.fog_round)

    def _evaluated(self, evaluated: Evaluated) -> None:
        """The end of a run: say how its last model does."""
        found = evaluated.evaluation
        if found is None:
            self._run_finished(self, True)
            return
        self.log.info(
            "finished_model_evaluated",
            run=found.run,
            round=found.round,
            examples=found.num_examples,
            accuracy=round(found.accuracy, 4),
        )
        self._evaluation = found.to_json()
        self._publish_evaluation()

    def _publish_evaluation(self) -> None:
        """Retained, for a server that is just starting again."""
        topic = self._topics.evaluation(self._region, self.id)
        if self._evaluation and self.session.publish(topic, self._evaluation, retain=True):
            self._run_finished(self, True)

    # From actions to messages

    def _apply(self, event: core.Event, now: float) -> None:
        for action in self._core.handle(event, now):
            match action:
                case core.Announce():
                    topic = self._topics.presence(self._region, self.id)
                    self.session.publish(topic, self._presence(online=True), retain=True)
                case core.Train(run, round_):
                    self._evaluation = None
                    self._submit(run, round_)
                case core.CancelTraining():
                    self._trainer.cancel(self.id)
                case core.Send() as send:
                    self._send(send)
                case core.EmptyOutbox(verdict=verdict) as end:
                    self._outbox.clear()
                    level = self.log.error if verdict == Verdict.REJECTED else self.log.info
                    level(f"update_{verdict}", update=self._update_id(end), reason=end.reason)
                case core.RunFinished(run, took_part):
                    self.log.info("run_finished", run=run, took_part=took_part)
                    if took_part and (self._core.own_data or self._slot):
                        self._submit(run, self._core.round)
                    else:
                        self._run_finished(self, took_part)

    def _submit(self, run: str, round_: int) -> None:
        assert self._model is not None and (self._core.own_data or self._slot)
        slot = None if self._core.own_data else self._slot
        self._trainer.submit(Job(self.id, run, round_, self._model, slot))

    def _send(self, send: core.Send) -> None:
        payload = self._outbox.payload
        if payload is None:
            self.log.error("update_gone", update=self._update_id(send), setting="STATE_DIR")
            return
        began = time.monotonic()
        if self.session.publish(self._topics.update(self._region, self.id), payload):
            self.log.info(
                Step.PUBLISH_UPDATE,
                update=self._update_id(send),
                attempt=send.attempt,
                why=send.why,
                bytes=len(payload),
                seconds=round(time.monotonic() - began, 4),
            )
        self._outbox.release()

    def _update_id(self, action: core.Send | core.EmptyOutbox) -> str:
        number = numbered(action.round, action.fog_round)
        return f"{action.run}/{number}/{self._region}/{self.id}"

    def _presence(self, online: bool) -> bytes:
        return Presence(
            online=online,
            boot=self._boot,
            slot=self._core.current_slot,
            own_data=self._core.own_data,
            version=fedfog.__version__,
        ).to_json()
