"""One MQTT 5 session: everything that happens to it becomes an event in one queue.

The network thread only enqueues, so that no work of ours delays a keep-alive. A message is
acknowledged when the worker asks for the next event, so that at most `RECEIVE_MAXIMUM` payloads
wait in memory and the broker keeps the rest. A PUBACK is never taken for an answer of the peer.

Nothing is queued while there is no connection: the owner of a message publishes it again when it
sees `Connected`. So a broker that comes back empty, or with old retained messages, is repaired.
"""

import queue
import random
import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import paho.mqtt.client as mqtt
import structlog
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

log = structlog.get_logger()

KEEPALIVE_SECONDS = 15
RECEIVE_MAXIMUM = 100
RECONNECT_SECONDS = (0.1, 0.3), (2.0, 3.0)
CONTESTED_DROPS, CONTESTED_SECONDS = 10, 10.0


class TransportError(Exception):
    """The session cannot go on; the text names the setting or the peer."""


@dataclass(frozen=True)
class Connected:
    """The session is up and subscribed: publish again what is yours."""


@dataclass(frozen=True)
class Disconnected:
    reason: str


@dataclass(frozen=True)
class Received:
    topic: str
    payload: bytes


@dataclass(frozen=True)
class _Delivery:
    """A message together with what its acknowledgement needs."""

    message: Received
    mid: int
    generation: int


def reconnect_delays() -> tuple[float, float]:
    """The first and the longest wait before a further attempt, in seconds; they double in between.
    Random ends keep a fleet from coming back at once."""
    first, longest = (random.uniform(*seconds) for seconds in RECONNECT_SECONDS)
    return first, longest


class Session:
    """A session of one service with the broker.

    Args:
        client_id: unique among all services; contains role, region and client.
        host, port: of the broker (settings MQTT_BROKER and MQTT_PORT).
        subscriptions: topic filters, in order; renewed at every connect.
        will: topic and payload that the broker publishes, retained, if this session dies.
        timeout: seconds without a connection after which `next` raises (setting MQTT_TIMEOUT).
    """

    def __init__(
        self,
        client_id: str,
        host: str,
        port: int,
        subscriptions: Sequence[str],
        will: tuple[str, bytes] | None = None,
        timeout: float = 300.0,
    ) -> None:
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._id, self._host, self._port = client_id, host, port
        self._subscriptions = subscriptions
        self._timeout = timeout
        self._offline_since: float | None = time.monotonic()
        self._generation = 0
        self._unacknowledged: _Delivery | None = None
        self._packet_limit: int | None = None
        self._drops: deque[float] = deque(maxlen=CONTESTED_DROPS)
        self._sent: deque[mqtt.MQTTMessageInfo] = deque()
        self._topics: dict[int, str] = {}
        self._client = client = mqtt.Client(
            CallbackAPIVersion.VERSION2, client_id, protocol=mqtt.MQTTv5, manual_ack=True
        )
        client.max_inflight_messages_set(RECEIVE_MAXIMUM)
        client.reconnect_delay_set(*reconnect_delays())  # type: ignore[arg-type]
        if will:
            client.will_set(*will, qos=1, retain=True)
        client.on_connect = self._on_connect
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_socket_open = self._on_socket_open

    def start(self) -> None:
        """Begin to connect, and go on trying; `next` tells what comes of it."""
        self._connect_later()
        self._client.loop_start()

    def _connect_later(self) -> None:
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.ReceiveMaximum = RECEIVE_MAXIMUM
        self._client.connect_async(
            self._host, self._port, KEEPALIVE_SECONDS, clean_start=True, properties=properties
        )

    @property
    def connected(self) -> bool:
        return self._offline_since is None

    def next(self, timeout: float | None = None) -> Any | None:
        """The next event, or None after `timeout` seconds: `Connected`, `Disconnected`,
        `Received`, or whatever else was put into `events`. The message before is acknowledged.

        Raises:
            TransportError: no connection for MQTT_TIMEOUT seconds, or another process keeps
                taking this session over.
        """
        self.acknowledge()
        self.check()
        if not self.connected:  # so that the limit of the wait is noticed in time
            timeout = 1.0 if timeout is None else min(timeout, 1.0)
        try:
            event = self.events.get(timeout=None if timeout is None else max(timeout, 0.0))
        except queue.Empty:
            return None
        return self.take(event)

    def take(self, event: Any) -> Any:
        """What the owner sees of an event out of `events`; `acknowledge` is due after it."""
        if isinstance(event, _Delivery):
            self._unacknowledged = event
            return event.message
        return event

    def publish(self, topic: str, payload: bytes, retain: bool = False) -> bool:
        """Send with QoS 1. False if there is no connection: the owner publishes again then.

        Raises:
            TransportError: the payload is larger than the broker takes.
        """
        limit = self._packet_limit
        if limit is not None and len(payload) + len(topic) + 32 > limit:
            raise TransportError(
                f"a message of {len(payload)} bytes for {topic} is more than the broker at "
                f"{self._host}:{self._port} takes ({limit}): raise its max_packet_size"
            )
        if not self.connected:
            return False
        # No lock of ours is held here: paho calls back while it holds its own.
        info = self._client.publish(topic, payload, qos=1, retain=retain)
        if info.rc != mqtt.MQTT_ERR_SUCCESS:  # the connection broke just now
            return False
        self._topics[info.mid] = topic
        self._sent.append(info)
        while self._sent and self._sent[0].is_published():
            self._sent.popleft()
        return True

    def flush(self, timeout: float) -> bool:
        """Wait until the broker has all that was published; False after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self._sent:
            self._sent[0].wait_for_publish(max(0.0, deadline - time.monotonic()))
            if not self._sent[0].is_published():
                return False
            self._sent.popleft()
        return True

    def stop(self, timeout: float = 2.0) -> None:
        """Flush, disconnect (the will is not published) and end the network thread."""
        self.acknowledge()
        if self.connected and not self.flush(timeout):
            log.warning("mqtt_not_flushed", messages=len(self._sent))
        self._client.disconnect()
        self._client.loop_stop()

    def acknowledge(self) -> None:
        """Acknowledge the message that was taken last."""
        delivery, self._unacknowledged = self._unacknowledged, None
        # A mid of an earlier connection would acknowledge another message of the present one.
        if delivery and delivery.mid and delivery.generation == self._generation:
            self._client.ack(delivery.mid, 1)

    def check(self) -> None:
        """Raises TransportError as `next` does."""
        since = self._offline_since
        if since is not None and time.monotonic() - since > self._timeout:
            raise TransportError(
                f"no connection to the MQTT broker at {self._host}:{self._port} for "
                f"{self._timeout:.0f} s (MQTT_TIMEOUT): is it running, and are MQTT_BROKER and "
                "MQTT_PORT right?"
            )
        drops = self._drops
        if len(drops) == CONTESTED_DROPS and drops[-1] - drops[0] < CONTESTED_SECONDS:
            raise TransportError(
                f"the MQTT session {self._id} was cut {len(drops)} times in "
                f"{CONTESTED_SECONDS:.0f} s: another process uses the same REGION or CLIENT_ID"
            )

    # Callbacks: paho's network thread. They must not raise, block or compute.

    def _on_socket_open(self, _c: Any, _u: Any, sock: Any) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _on_connect(self, _c: Any, _u: Any, _f: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            log.warning("mqtt_refused", broker=f"{self._host}:{self._port}", reason=str(reason))
            return
        self._packet_limit = getattr(properties, "MaximumPacketSize", None)
        self._generation += 1
        if self._subscriptions:
            self._client.subscribe([(t, SubscribeOptions(qos=1)) for t in self._subscriptions])
        self._offline_since = None
        log.debug("mqtt_connected", broker=f"{self._host}:{self._port}", id=self._id)
        self._emit(Connected())

    def _on_connect_fail(self, _c: Any, _u: Any) -> None:
        since = self._offline_since or time.monotonic()
        log.info(
            "mqtt_waiting_for_broker",
            broker=f"{self._host}:{self._port}",
            seconds=round(time.monotonic() - since, 1),
            limit=self._timeout,
        )

    def _on_disconnect(self, _c: Any, _u: Any, _f: Any, reason: Any, _p: Any) -> None:
        if self._offline_since is not None:
            return
        self._offline_since = now = time.monotonic()
        self._drops.append(now)
        self._emit(Disconnected(str(reason)))

    def _on_message(self, _c: Any, _u: Any, message: mqtt.MQTTMessage) -> None:
        received = Received(message.topic, self._payload(message))
        self._emit(_Delivery(received, message.mid, self._generation))

    def _payload(self, message: mqtt.MQTTMessage) -> bytes:
        return bytes(message.payload)

    def _emit(self, event: Any) -> None:
        self.events.put(event)

    def _on_publish(self, _c: Any, _u: Any, mid: int, reason: Any, _p: Any) -> None:
        topic = self._topics.pop(mid, "")
        if reason.is_failure:
            log.error("mqtt_publish_refused", topic=topic, reason=str(reason))
