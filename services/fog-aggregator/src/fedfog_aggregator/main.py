"""Shell around `fedfog.core.rounds`: MQTT and SQLite on the outside, the rules inside."""

import time
from collections import deque
from typing import Any

import structlog

from fedfog import service
from fedfog.core import participation, rounds
from fedfog.core.metrics import Federated
from fedfog.core.phases import Phase
from fedfog.core.quota import Quota
from fedfog.core.robust import Updates
from fedfog.core.slots import SlotTable
from fedfog.files import next_boot
from fedfog.health import BEAT_SECONDS, Heartbeat
from fedfog.logs import Step
from fedfog.messages.codec import (
    CodecError,
    TensorTable,
    decode,
    decode_json,
    digest_of,
    encode,
    encode_header,
)
from fedfog.messages.schemas import (
    MAX_LOSS,
    ClientMetrics,
    FederatedEvaluation,
    FogRoundRecord,
    ModelMeta,
    PartialMeta,
    Presence,
    Progress,
    Receipt,
    RegionReceipt,
    RegionShare,
    RunState,
    Slot,
    Status,
    UpdateMeta,
    Verdict,
    numbered,
)
from fedfog.messages.topics import is_name
from fedfog.settings import AggregatorSettings, load
from fedfog.transport import mqtt
from fedfog.transport.tls import Identity
from fedfog_aggregator.parent import Parent
from fedfog_aggregator.store import AnotherOwnerError, PartialStore, StoreError

log = structlog.get_logger()

PROGRESS_SECONDS = 0.5
# A round that closes within this time answers `accepted` alone: of 1,000 clients, that is half of
# all messages. Clients repeat after no less than 4 s.
RECEIVED_SECONDS = 2.0
FLOODERS_SAID = 10  # names in a line of the log
TOPIC_SAID = 100  # characters of what a peer calls itself


class Aggregator:
    """The fog aggregator of one region.

    Raises:
        StoreError: STATE_DIR cannot be used.
        ValueError: REGIONS does not contain REGION.
    """

    def __init__(self, settings: AggregatorSettings) -> None:
        self._settings = settings
        self._region = region = settings.region
        self._children = settings.children
        self._share = (0, 1) if self._children else settings.share  # a parent deals no slots
        self._topics = topics = settings.topics
        self._store = PartialStore(settings.state_dir)
        self._boot = next_boot(settings.state_dir)
        self._rounds = rounds.RegionRounds(
            region,
            rounds.Policy(
                quorum=None if settings.k == "all" else settings.k,
                minimum=settings.min_clients,
                deadline=settings.round_deadline,
                expected=settings.clients_expected,
                children=self._children,
                settle=settings.cohort_settle,
                limit=settings.cohort_limit,
                max_examples=settings.max_examples,
                store_limit=settings.store_timeout,
                aggregation=settings.aggregation,
                byzantine=settings.byzantine,
            ),
            self._boot,
            self._store.newest(),
        )
        self._quota, self._lines = Quota(settings.client_quota), Quota(settings.client_quota)
        self._table: TensorTable | None = None
        self._global: ModelMeta | None = None  # that the round began with
        self._last_progress = 0.0
        self._received: dict[str, rounds.Answer] = {}  # `received` that are due, by client
        self._received_due: float | None = None
        self._exit: int | None = None
        self._parent = Parent(settings, self._boot, self._store) if settings.parent_region else None
        self._updates = (topics.partial_to if self._children else topics.update)(region, "")
        self._presences = topics.presence(region, "")
        death = (topics.status(region), Status(online=False, boot=self._boot).to_json())
        self.session = mqtt.Session(
            f"fedfog-aggregator-{region}",
            settings.mqtt_broker,
            settings.mqtt_port,
            [
                topics.global_model,  # first: an update must never overtake its model
                self._presences + "+",
                self._updates + "+",
                topics.status(region),
                *(self._parent.topics if self._parent else []),
            ],
            # A session has one will. Of the two deaths, it is the parent that has to hear.
            will=self._parent.death if self._parent else death,
            timeout=settings.mqtt_timeout,
            tls=Identity.of(settings.tls_dir),
        )

    def run(self) -> int:
        """Serve until SIGTERM or until another aggregator takes over; returns the exit code."""
        log.info("aggregator_started", boot=self._boot, k=self._settings.k)
        heartbeat = Heartbeat()
        service.on_stop(self.session.events.put)
        self.session.start()
        while self._exit is None:
            due = self._wake_at()
            now = time.monotonic()
            wait = BEAT_SECONDS if due is None else min(BEAT_SECONDS, due - now)
            event = self.session.next(wait)
            now = time.monotonic()
            heartbeat.beat("ready" if self.session.connected else "no MQTT broker")
            if isinstance(event, service.StopRequested):
                break
            self._handle(event, now)
            del event  # a large update makes room for the next one
            if due is not None and now >= due and self._exit is None:
                self._apply(rounds.Tick(), now)
                sending = self._parent is not None and self.session.sending(self._parent.partial)
                self._upwards(participation.Tick(sending), now)
            if self._received_due is not None and now >= self._received_due:
                self._answer_received()
            self._publish_progress(now)
            self._name_flooders(now)
        self.session.publish(
            self._topics.status(self._region),
            Status(online=False, boot=self._boot).to_json(),
            retain=True,
        )
        if self._parent and self._exit is None:  # else a successor has announced itself
            self.session.publish(*self._parent.death, retain=True)
        self.session.stop()
        self._store.close()
        log.info("aggregator_stopped", round=self._rounds.round, phase=self._rounds.phase)
        return self._exit or service.EXIT_OK

    def _wake_at(self) -> float | None:
        due = [self._rounds.wake_at(), self._parent.wake_at() if self._parent else None]
        due.append(self._received_due)
        return min((at for at in due if at is not None), default=None)

    def _handle(self, event: Any, now: float) -> None:
        for core_event in self._translate(event):
            self._apply(core_event, now)

    # From messages to events

    def _translate(self, event: Any) -> list[rounds.Event]:
        if isinstance(event, mqtt.Connected):
            self._upwards(participation.Connected())
            return [rounds.Connected()]
        if isinstance(event, mqtt.Disconnected):
            log.warning("mqtt_disconnected", reason=event.reason)
        if not isinstance(event, mqtt.Received) or not event.payload:
            return []
        topic, payload = event.topic, event.payload
        if topic.startswith((self._updates, self._presences)) and not self._may_send(topic):
            return []
        if topic.startswith(self._updates):
            return self._update(topic.removeprefix(self._updates), payload)
        try:
            if topic == self._topics.global_model:
                return self._model(payload)
            if self._parent and topic in self._parent.topics:
                if (news := self._parent.translate(topic, payload)) is not None:
                    self._upwards(news)
                return []
            if topic.startswith(self._presences):
                return self._presence(topic.removeprefix(self._presences), payload)
            status = decode_json(payload, Status)
            return [rounds.OwnStatusSeen(status.boot, status.online)]
        except CodecError as error:
            topic = topic[:TOPIC_SAID]
            self._warn(topic, "message_refused", topic=topic, bytes=len(payload), reason=str(error))
            return []

    def _may_send(self, topic: str) -> bool:
        """Whether this message of a client is to be looked at; all that are not of a name are
        counted together."""
        client, machine = topic.rpartition("/")[2], self._rounds
        if not is_name(client):
            client = ""
        known = client in machine.present or client in machine.cohort
        at = (machine.run, machine.round, machine.fog_round)
        return self._quota.take(client, known, at, time.monotonic())

    def _name_flooders(self, now: float) -> None:
        if refused := self._quota.report(now):
            log.warning(
                "messages_over_quota",
                dropped=refused.total(),
                of=dict(refused.most_common(FLOODERS_SAID)),
                setting="CLIENT_QUOTA",
            )

    def _model(self, payload: bytes) -> list[rounds.Event]:
        model = decode(payload, ModelMeta)
        if digest_of(model.vector) != model.meta.digest:
            raise CodecError("the digest is not that of the tensors")
        meta = model.meta
        round_ = meta.round + 1
        arrived = rounds.ModelArrived(
            run=meta.run,
            run_started=meta.run_started,
            round=round_,
            digest=meta.digest,
            num_parameters=model.table.num_parameters,
            finished=meta.state is RunState.FINISHED,
            stored=self._store.stored(meta.run, round_),
            slots=self._store.slots(meta.run),
            vector=None if self._settings.aggregation == "fedavg" else model.vector,
            fog_rounds=meta.hyperparameters.fog_rounds,
        )
        if self._rounds.is_news(arrived):
            self._global = meta
        self._table = model.table
        self._upwards(
            participation.ModelArrived(
                arrived.run, arrived.run_started, arrived.round, arrived.finished
            )
        )
        return [arrived]

    def _presence(self, client: str, payload: bytes) -> list[rounds.Event]:
        presence = decode_json(payload, Presence)
        self._check_name(client)
        own = self._settings.round_deadline
        if presence.online and presence.deadline is not None and presence.deadline >= own:
            # A child that waits so long for a client comes too late with all its others.
            log.warning(
                "deadline_not_above_that_of_child",
                child=client,
                child_seconds=presence.deadline,
                seconds=own,
                setting="ROUND_DEADLINE",
            )
        return [
            rounds.PresenceSeen(
                client, presence.online, presence.boot, presence.slot, presence.own_data
            )
        ]

    def _check_name(self, client: str) -> None:
        if not is_name(client):
            raise CodecError("the topic does not end in a client's name")
        if self._children and client not in self._children:
            raise CodecError(f"{client} is not one of CHILD_REGIONS {sorted(self._children)}")

    def _update(self, client: str, payload: bytes) -> list[rounds.Event]:
        """Check what can be checked without knowing the round; a refusal is answered at once."""
        if self._table is None:
            return []  # no model seen yet: the owner repeats
        try:
            self._check_name(client)
            if self._children:
                return [self._partial_of_child(client, payload, self._table)]
            update = decode(payload, UpdateMeta, self._table)
            meta = update.meta
            if (meta.region, meta.client) != (self._region, client):
                raise CodecError(f"it says {meta.region}/{meta.client}, its topic does not")
        except CodecError as error:
            name = client[:TOPIC_SAID]
            self._warn(name, "update_rejected", client=name, bytes=len(payload), reason=str(error))
            if is_name(client):
                self._send_receipt(
                    client,
                    Receipt(verdict=Verdict.REJECTED, reason=str(error)[:200], boot=self._boot),
                )
            return []
        told, federated = meta.metrics, None
        if told.validation_examples is not None and told.validation_accuracy is not None:
            federated = Federated.of(
                f"{self._region}/{client}",
                told.validation_examples,
                told.validation_loss,
                told.validation_accuracy,
            )
        return [
            rounds.UpdateArrived(
                meta.run,
                meta.round,
                client,
                meta.base_digest,
                meta.num_examples,
                update.vector,
                {"train_loss": told.train_loss},
                federated=federated,
                fog_round=meta.fog_round,
            )
        ]

    @staticmethod
    def _partial_of_child(child: str, payload: bytes, table: TensorTable) -> rounds.UpdateArrived:
        partial = decode(payload, PartialMeta, table)
        meta = partial.meta
        if meta.region != child:
            raise CodecError(f"it says {meta.region}, its topic does not")
        return rounds.UpdateArrived(
            meta.run,
            meta.round,
            child,
            meta.base_digest or "",
            meta.num_examples,
            partial.vector,
            {"train_loss": meta.metrics.train_loss},
            meta.num_clients,
            FederatedEvaluation.told(meta.federated),
        )

    # From actions to messages

    def _upwards(self, event: participation.Event, now: float | None = None) -> None:
        if self._parent:
            now = time.monotonic() if now is None else now
            self._parent.handle(event, now, self.session.publish)

    def _apply(self, event: rounds.Event, now: float) -> None:
        """Hand an event to the rules and carry out all that follows from it."""
        actions = deque(self._rounds.handle(event, now))
        while actions:
            match actions.popleft():
                case rounds.PublishStatus():
                    self._publish_status()
                case rounds.PublishPartial(run, round_):
                    self._publish_partial(run, round_)
                case rounds.PublishRegional(run, round_, fog_round):
                    self._publish_regional(run, round_, fog_round)
                case rounds.Answer(verdict="received") as answer:
                    self._received[answer.client] = answer
                    self._received_due = self._received_due or now + RECEIVED_SECONDS
                case rounds.Answer() as answer:
                    if answer.verdict != "accepted":
                        self._log_refusal(answer)
                    self._answer(answer)
                case rounds.AnswerMembers(run, round_, members, fog_round):
                    self._received, self._received_due = {}, None
                    told = RegionReceipt(
                        run=run,
                        round=round_,
                        fog_round=fog_round,
                        boot=self._boot,
                        members=list(members),
                    )
                    topic = self._topics.receipts(self._region)
                    self.session.publish(topic, told.to_json())
                case rounds.DealSlot(client, run, slot, slots):
                    index, regions = self._share
                    dealt = Slot(
                        run=run, slot=slot, slots=slots, region_index=index, regions=regions
                    )
                    topic = self._topics.slot(self._region, client)
                    self.session.publish(topic, dealt.to_json())
                case rounds.StoreCohort(newest, cohort, slots_table):
                    self._store_cohort(newest, cohort, slots_table)
                case rounds.StoreSlots(slots_table):
                    self._store_slots(slots_table)
                case rounds.Commit() as commit:
                    committed = self._commit(commit)
                    del commit  # and with it the sum
                    actions.extend(self._rounds.handle(committed, now))
                case rounds.Log(level, name, fields):
                    getattr(log, level)(name, **fields)
                case rounds.Exit(reason, another_owner):
                    log.error("aggregator_gives_up", reason=reason)
                    self._exit = (
                        service.EXIT_SUCCEEDED_BY_ANOTHER if another_owner else service.EXIT_FAILED
                    )

    def _store_cohort(
        self, newest: rounds.Newest, cohort: frozenset[str], slots: SlotTable
    ) -> None:
        try:
            self._store.save_cohort(newest, cohort, slots, self._settings.keep_rounds)
        except StoreError as error:
            # Only a restart in this very round would miss it; the partial is what must not fail.
            log.error("cohort_not_stored", error=str(error))

    def _store_slots(self, slots: SlotTable) -> None:
        try:
            self._store.save_slots(slots)
        except StoreError as error:  # the next cohort is stored with them
            log.error("slots_not_stored", error=str(error))

    def _commit(self, commit: rounds.Commit) -> rounds.Committed | rounds.CommitFailed:
        assert self._table is not None
        began = time.monotonic()
        mean = commit.total.mean()
        members, suspicious, more = dict(commit.members), {}, 0
        if isinstance(commit.total, Updates):
            names, found = list(members), commit.total.aggregate()
            members = dict(zip(names, found.examples, strict=True))
            suspicious = {names[i]: why for i, why in found.suspicious.items()}
            more = found.unnamed
        meta = PartialMeta(
            run=commit.run,
            round=commit.round,
            region=self._region,
            digest=digest_of(mean),
            num_clients=commit.num_clients,
            num_examples=commit.total.weight,
            members=members,
            left_out=dict(commit.left_out),
            # A mean of values at the bound may be beyond it, by rounding.
            metrics=ClientMetrics(
                train_loss=min(max(commit.metrics["train_loss"], -MAX_LOSS), MAX_LOSS)
            ),
            federated=FederatedEvaluation.of(commit.federated),
            base_digest=commit.base_digest,
            aggregation=self._settings.aggregation,
            suspicious=suspicious,
            suspicious_more=more,
            seconds={"collect": round(commit.collect_seconds, 6)},
        )
        try:
            if commit.last:
                meta = self._with_regional(meta)
            payload = (encode_header(meta, self._table), mean.data.cast("B"))
            if commit.last:
                self._store.commit(commit.run, commit.round, payload, members)
            else:
                self._store.commit_regional(commit.fog_round, meta, payload)
        except AnotherOwnerError as error:
            return rounds.CommitFailed(str(error), another_owner=True)
        except StoreError as error:
            return rounds.CommitFailed(str(error))
        number = commit.round if commit.last else numbered(commit.round, commit.fog_round)
        name = f"{commit.run}/{number}/{self._region}"
        for client, why in suspicious.items():
            log.warning("update_suspicious", partial=name, client=client, reason=why)
        log.info(
            Step.AGGREGATE_REGION,
            partial=name,
            clients=meta.num_clients,
            examples=meta.num_examples,
            left_out=meta.left_out,
            train_loss=round(meta.metrics.train_loss, 4),
            collect_seconds=round(commit.collect_seconds, 3),
            seconds=round(time.monotonic() - began, 4),
        )
        if commit.last or self._settings.aggregation == "fedavg":
            return rounds.Committed(meta.digest)
        return rounds.Committed(meta.digest, mean)

    def _with_regional(self, meta: PartialMeta) -> PartialMeta:
        """The partial with what there is to tell of the regional rounds before it."""
        before = self._store.regional(meta.run, meta.round)
        if not before:
            return meta
        told = [
            FogRoundRecord(
                num_clients=one.num_clients,
                num_examples=one.num_examples,
                train_loss=one.metrics.train_loss,
                seconds=one.seconds,
            )
            for one in before
        ]
        # Only the first of them began with the global model.
        return meta.model_copy(update={"regional": told, "federated": before[0].federated})

    def _publish_regional(self, run: str, round_: int, fog_round: int) -> None:
        """Give the region's clients the model that the next regional round begins with."""
        assert self._global is not None
        began = time.monotonic()
        aggregate = self._store.regional_aggregate(run, round_, fog_round)
        meta = aggregate.meta
        share = RegionShare(num_clients=meta.num_clients, num_examples=meta.num_examples)
        model = self._global.model_copy(
            update={
                "fog_round": fog_round,
                "digest": meta.digest,
                "regions": {self._region: share},
            }
        )
        payload = encode(model, aggregate.table, aggregate.vector)
        if self.session.publish(self._topics.regional_model(self._region), payload, retain=True):
            log.info(
                Step.PUBLISH_PARTIAL,
                partial=f"{run}/{numbered(round_, fog_round)}/{self._region}",
                bytes=len(payload),
                seconds=round(time.monotonic() - began, 4),
            )

    def _publish_partial(self, run: str, round_: int) -> None:
        if self._parent:
            self._upwards(participation.Trained(run, round_))
            return
        began = time.monotonic()
        payload = self._store.committed(run, round_)
        topic = self._topics.partial_of(self._region)
        if self.session.publish(topic, payload, retain=True):
            log.info(
                Step.PUBLISH_PARTIAL,
                partial=f"{run}/{round_}/{self._region}",
                bytes=len(payload),
                seconds=round(time.monotonic() - began, 4),
            )

    def _answer(self, answer: rounds.Answer) -> None:
        receipt = Receipt(
            run=answer.run,
            round=answer.round,
            fog_round=answer.fog_round,
            verdict=Verdict(answer.verdict),
            reason=answer.reason,
            boot=self._boot,
        )
        self._send_receipt(answer.client, receipt)

    def _send_receipt(self, client: str, receipt: Receipt) -> None:
        self.session.publish(self._topics.receipts(self._region, client), receipt.to_json())

    def _answer_received(self) -> None:
        for answer in self._received.values():
            self._answer(answer)
        self._received, self._received_due = {}, None

    def _log_refusal(self, answer: rounds.Answer) -> None:
        number = numbered(answer.round, answer.fog_round)
        update = f"{answer.run}/{number}/{self._region}/{answer.client}"
        self._warn(answer.client, f"update_{answer.verdict}", update=update, reason=answer.reason)

    def _warn(self, of: str, event: str, **fields: object) -> None:
        """Log what one sender has done wrong: in a minute, as often as it may send in a round."""
        if self._lines.take(of, False, None, time.monotonic()):
            log.warning(event, **fields)

    def _publish_status(self) -> None:
        machine = self._rounds
        status = Status(
            online=True,
            boot=self._boot,
            run=machine.run,
            round=machine.round if machine.run else None,
            fog_round=machine.fog_round,
            phase=machine.phase,
        )
        self.session.publish(self._topics.status(self._region), status.to_json(), retain=True)

    def _publish_progress(self, now: float) -> None:
        machine = self._rounds
        if machine.run is None or machine.phase not in (Phase.OPEN, Phase.STARVING):
            return
        if now - self._last_progress < PROGRESS_SECONDS:
            return
        self._last_progress = now
        progress = Progress(
            run=machine.run,
            round=machine.round,
            fog_round=machine.fog_round,
            phase=machine.phase,
            received=len(machine.members),
            expected=machine.expected,
            waiting_for=machine.missing[:10],
            seconds_left=round(machine.deadline - now, 1),
        )
        self.session.publish(self._topics.progress(self._region), progress.to_json())


def main() -> None:
    settings = load(AggregatorSettings)
    service.give_memory_back()

    def body() -> int:
        try:
            return Aggregator(settings).run()
        except (StoreError, ValueError) as error:
            raise service.ServiceError(str(error)) from error

    service.run("fog-aggregator", settings, body, region=settings.region)


if __name__ == "__main__":
    main()
