"""How a bridge shows itself on its own topic, and notices who else does."""

from typing import Any

import structlog

from fedfog.files import next_boot
from fedfog.messages.codec import CodecError, decode_json
from fedfog.messages.schemas import Bridge
from fedfog.settings import BridgeSettings
from fedfog.transport import mqtt
from fedfog.transport.tls import Identity

log = structlog.get_logger()


class Presence:
    """The MQTT session of a bridge, with its retained birth and its will.

    Args:
        subscriptions: topics besides the bridge's own.
    """

    def __init__(self, settings: BridgeSettings, subscriptions: list[str]) -> None:
        self.boot = next_boot(settings.state_dir)
        self.superseded = False
        self._up = False
        self._sessions = 0
        self._topic = settings.topics.bridge(settings.region)
        self._offline = Bridge(online=False, boot=self.boot)
        self._state: Bridge | None = None  # nothing to tell yet
        self.session = mqtt.Session(
            f"fedfog-bridge-{settings.region}",
            settings.mqtt_broker,
            settings.mqtt_port,
            [*subscriptions, self._topic],
            will=(self._topic, self._offline.to_json()),
            timeout=settings.mqtt_timeout,
            tls=Identity.of(settings.tls_dir),
        )

    def online(self, node_id: int | None) -> None:
        """Announce a new session, in which this node answers for the region; None: some node of
        a SuperNode does."""
        self._sessions += 1
        self._state = Bridge(online=True, boot=self.boot, node_id=node_id, session=self._sessions)
        self._publish()

    def offline(self) -> None:
        self._state = self._offline
        self._publish()

    def observe(self, event: Any) -> None:
        """Keep the retained birth true; sets `superseded` when a later boot has shown itself."""
        if isinstance(event, mqtt.Disconnected):
            self._up = False
        if isinstance(event, mqtt.Connected):
            self._up = True
            self._publish()
        if not isinstance(event, mqtt.Received) or event.topic != self._topic:
            return
        try:
            seen = decode_json(event.payload, Bridge) if event.payload else None
        except CodecError as error:
            log.warning("bridge_topic_garbage", reason=str(error))
            seen = None
        if seen is not None and seen.boot > self.boot:
            log.error("bridge_superseded", boot=self.boot, by=seen.boot)
            self.superseded = True
        elif self._state is not None and seen != self._state:
            # A will of an earlier boot, or of this one after a takeover of the connection.
            self._publish()

    def _publish(self) -> None:
        if self._up and self._state is not None:  # else `Connected` will have it published
            self.session.publish(self._topic, self._state.to_json(), retain=True)
