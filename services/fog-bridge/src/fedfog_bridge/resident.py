"""The resident bridge: shell around `fedfog.core.bridge` that answers in milliseconds.

One loop and one thread for both sides. It looks for a train message when the server's cue comes,
and every `POLL_SECONDS` in case a cue was lost. A SuperLink that is absent, gone or restarted is
waited for; each new session is announced, so that the server pushes again what the old one held.
"""

import random
import time

import structlog
from flwr.app import Message

from fedfog import service
from fedfog.core.bridge import Decision, Matcher
from fedfog.flower.fleet import FleetSession, MessageLostError, SuperLinkLostError
from fedfog.flower.reply import ReplyError, pack, run_and_round
from fedfog.health import Heartbeat
from fedfog.logs import Step
from fedfog.messages.codec import CodecError, decode_meta
from fedfog.messages.schemas import Bell, PartialMeta
from fedfog.settings import BridgeSettings
from fedfog.transport import mqtt
from fedfog_bridge.node import open_session
from fedfog_bridge.presence import Presence

log = structlog.get_logger()

POLL_SECONDS = 1.5
BACKOFF_SECONDS = (0.1, 2.0)


class ResidentBridge:
    """The fog bridge of one region, as a node of the SuperLink."""

    def __init__(self, settings: BridgeSettings) -> None:
        self._settings = settings
        self._region, self._topics = settings.region, settings.topics
        self._partials = self._topics.partial_of(self._region)
        self._presence = Presence(settings, [self._partials, self._topics.cue])
        self._session = self._presence.session
        self._matcher: Matcher[Message] = Matcher()
        self._fleet: FleetSession | None = None
        self._lost_since = self._retry_at = time.monotonic()
        self._attempts = 0
        self._health = Heartbeat()

    def run(self) -> int:
        """Serve until SIGTERM or until another bridge takes over; returns the exit code.

        Raises:
            ServiceError: no SuperLink for FLOWER_TIMEOUT seconds.
        """
        log.info("bridge_started", boot=self._presence.boot, server=self._settings.flower_server)
        service.on_stop(self._session.events.put)
        self._session.start()
        poll_at = 0.0
        try:
            while not self._presence.superseded:
                event = self._session.next(self._patience(poll_at))
                if isinstance(event, service.StopRequested):
                    return service.EXIT_OK
                self._presence.observe(event)
                decision = self._on_partial(event)
                cued = isinstance(event, mqtt.Received) and event.topic == self._topics.cue
                try:
                    if self._fleet is None:
                        self._connect()
                    if self._fleet is not None:
                        self._carry_out(self._fleet, decision)
                        if cued or time.monotonic() >= poll_at:
                            self._look(self._fleet)
                            poll_at = time.monotonic() + POLL_SECONDS
                except SuperLinkLostError as error:
                    self._lost(error)
                self._beat()
            return service.EXIT_SUCCEEDED_BY_ANOTHER
        finally:
            self._stop()

    def _patience(self, poll_at: float) -> float:
        due = self._retry_at if self._fleet is None else poll_at
        return max(due - time.monotonic(), 0.0)

    def _on_partial(self, event: object) -> Decision[Message]:
        if not isinstance(event, mqtt.Received) or event.topic != self._partials:
            return Decision()
        try:
            meta = decode_meta(event.payload, PartialMeta)
        except CodecError as error:
            if event.payload:  # an empty one only clears the retained message
                log.warning("partial_ignored", reason=str(error))
            return Decision()
        if meta.region != self._region:
            log.warning("partial_ignored", reason=f"it is of region {meta.region}")
            return Decision()
        return self._matcher.on_partial((meta.run, meta.round), event.payload)

    def _look(self, fleet: FleetSession) -> None:
        """Take the next train message; a message that turns out to be lost, of a run that was
        stopped, must not keep the one behind it waiting until the next look."""
        lost = True
        while lost and (message := fleet.next_message()) is not None:
            try:
                key = run_and_round(message)
            except ReplyError as error:
                log.warning("message_ignored", reason=str(error))
                continue
            log.debug("train_message", run=key[0], round=key[1])
            lost = not self._carry_out(fleet, self._matcher.on_message(key, message))

    def _carry_out(self, fleet: FleetSession, decision: Decision[Message]) -> bool:
        """False if the reply was lost."""
        answered = True
        if decision.reply is not None:
            try:
                self._reply(fleet, *decision.reply)
            except MessageLostError as error:
                log.warning("reply_lost", reason=str(error))
                answered = False
        if decision.confirm is not None:
            try:
                fleet.confirm(decision.confirm)
            except MessageLostError as error:
                log.debug("confirm_lost", reason=str(error))  # its run is over: nothing to delete
        return answered

    def _reply(self, fleet: FleetSession, message: Message, partial: bytes) -> None:
        start = time.monotonic()
        fleet.reply(message, pack(self._region, partial))
        bell = Bell(region=self._region, message_id=message.metadata.message_id)
        self._session.publish(self._topics.bell, bell.to_json())
        meta = decode_meta(partial, PartialMeta)
        log.info(
            Step.BRIDGE,
            partial=meta.id,
            clients=meta.num_clients,
            examples=meta.num_examples,
            bytes=len(partial),
            seconds=round(time.monotonic() - start, 3),
        )

    def _connect(self) -> None:
        if time.monotonic() < self._retry_at:
            return
        self._fleet = open_session(self._settings)
        log.info("bridge_online", node_id=self._fleet.node_id, attempts=self._attempts + 1)
        self._attempts = 0
        self._presence.online(self._fleet.node_id)

    def _lost(self, error: SuperLinkLostError) -> None:
        """Note that there is no SuperLink, and when to try again."""
        now = time.monotonic()
        if self._fleet is not None:
            self._fleet.close(sign_off=False)
            self._fleet, self._lost_since = None, now
            self._matcher.forget_messages()
            self._presence.offline()
        limit, waited = self._settings.flower_timeout, now - self._lost_since
        if waited > limit:
            raise service.ServiceError(
                f"no SuperLink at {self._settings.flower_server} (FLOWER_SERVER) for "
                f"{limit:.0f} s (FLOWER_TIMEOUT): {error}"
            )
        first, longest = BACKOFF_SECONDS
        delay = min(first * 2**self._attempts, longest) * random.uniform(0.5, 1.0)
        self._attempts += 1
        self._retry_at = now + delay
        log.info(
            "waiting_for_superlink",
            reason=str(error),
            seconds=round(waited, 1),
            limit=limit,
            retry_in=round(delay, 2),
        )

    def _beat(self) -> None:
        if self._fleet is None:
            self._health.beat(f"waiting for the SuperLink at {self._settings.flower_server}")
        else:
            self._health.beat("ready" if self._session.connected else "no MQTT broker")

    def _stop(self) -> None:
        if not self._presence.superseded:
            self._presence.offline()
        if self._fleet is not None:
            self._fleet.close()
        self._session.stop()
        log.info("bridge_stopped", boot=self._presence.boot)
