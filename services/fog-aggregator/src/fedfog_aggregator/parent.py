"""The way up to an aggregator above this one. Towards it a region is a client: its partial is its
update, and the store of partials is its outbox, which survives a crash."""

import random
import time
from collections.abc import Callable

import structlog

import fedfog
from fedfog.core import participation as core
from fedfog.logs import Step
from fedfog.messages.codec import decode_json
from fedfog.messages.schemas import Presence, Receipt, RegionReceipt, Status, Verdict
from fedfog.settings import AggregatorSettings
from fedfog_aggregator.store import PartialStore

log = structlog.get_logger()


class Parent:
    """What this region owes to PARENT_REGION.

    `topics` are those that it is to hear of, `death` is topic and payload of its end.
    """

    def __init__(self, settings: AggregatorSettings, boot: int, store: PartialStore) -> None:
        self._region, self._parent = region, parent = settings.region, settings.parent_region
        self._boot, self._store, self._deadline = boot, store, settings.round_deadline
        self._core = core.Participation(random.Random(), own_data=True)
        topics = settings.topics
        self._status = topics.status(parent)
        self._all_receipts = topics.receipts(parent)
        self.topics = (self._status, self._all_receipts, topics.receipts(parent, region))
        self._presence = topics.presence(parent, region)
        self.partial = topics.partial_to(parent, region)
        self.death = (self._presence, self._announcement(online=False))

    def wake_at(self) -> float | None:
        """When `Tick` is due next."""
        return self._core.wake_at()

    def translate(self, topic: str, payload: bytes) -> core.Event | None:
        """What a message on one of `topics` says.

        Raises:
            CodecError: it is malformed.
        """
        if topic == self._status:
            status = decode_json(payload, Status)
            return core.AggregatorSeen(status.boot) if status.online else None
        if topic == self._all_receipts:
            closed = decode_json(payload, RegionReceipt)
            if self._region not in closed.members:
                return None
            return core.VerdictArrived(closed.run, closed.round, Verdict.ACCEPTED, closed.boot)
        receipt = decode_json(payload, Receipt)
        # A partial that could not even be read there is the one that was sent last.
        run = receipt.run or self._core.run or ""
        round_ = self._core.round if receipt.round is None else receipt.round
        return core.VerdictArrived(run, round_, receipt.verdict, receipt.boot, receipt.reason)

    def handle(
        self, event: core.Event, now: float, publish: Callable[[str, bytes, bool], bool]
    ) -> None:
        """Apply one event and carry out what follows from it. The region's round is its training,
        and the commit of its partial the end of it.

        Raises:
            StoreError: the partial cannot be read.
        """
        for action in self._core.handle(event, now):
            match action:
                case core.Announce():
                    publish(self._presence, self._announcement(online=True), True)
                case core.Send(run, round_, attempt, why):
                    self._send(run, round_, attempt, why, publish)
                case core.EmptyOutbox(run, round_, verdict, reason):
                    self._log_end(run, round_, verdict, reason)

    def _send(
        self,
        run: str,
        round_: int,
        attempt: int,
        why: str,
        publish: Callable[[str, bytes, bool], bool],
    ) -> None:
        began = time.monotonic()
        payload = self._store.committed(run, round_)
        if publish(self.partial, payload, False):
            log.info(
                Step.PUBLISH_PARTIAL,
                partial=f"{run}/{round_}/{self._region}",
                parent=self._parent,
                attempt=attempt,
                why=why,
                bytes=len(payload),
                seconds=round(time.monotonic() - began, 4),
            )

    def _log_end(self, run: str, round_: int, verdict: str, reason: str) -> None:
        fields: dict[str, object] = {"partial": f"{run}/{round_}/{self._region}"}
        if verdict == Verdict.ACCEPTED:
            log.info("partial_accepted", **fields, parent=self._parent)
            return
        # `void`: the answer was lost, or there is none; the parent's partial says which.
        stored = self._store.stored(run, round_)
        fields["accepted_updates_of"] = sorted(stored.members or {}) if stored else []
        if verdict != "void":
            fields["lost"] = "they are in no global model; left_out at the parent names this region"
        level = log.warning if verdict == "void" else log.error
        level(f"partial_{verdict}", **fields, parent=self._parent, reason=reason)

    def _announcement(self, online: bool) -> bytes:
        return Presence(
            online=online,
            boot=self._boot,
            own_data=True,
            deadline=self._deadline,
            version=fedfog.__version__,
        ).to_json()
