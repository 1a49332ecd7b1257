"""One MQTT 5 session: everything that happens to it becomes an event in one queue.

The network thread only enqueues, so that no work of ours delays a keep-alive. A message is
acknowledged when the worker asks for the next event, some together while more are there, so that at
most `RECEIVE_MAXIMUM` payloads wait in memory and the broker keeps the rest. A PUBACK is never
taken for an answer of the peer.

Nothing is queued while there is no connection: the owner of a message publishes it again when it
sees `Connected`. So a broker that comes back empty, or with old retained messages, is repaired.

A large message is in memory once when it is received, and once beside its owner's copy when it is
sent (`_Client`). While the worker is busy with large ones, no more is read from the socket.
"""

import queue
import random
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import paho.mqtt.client as mqtt
import structlog
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.exception import MalformedPacket
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from fedfog.transport.tls import Identity

log = structlog.get_logger()

KEEPALIVE_SECONDS = 15
RECEIVE_MAXIMUM = 100
ACKNOWLEDGED_AT_ONCE = RECEIVE_MAXIMUM // 4
RECONNECT_SECONDS = (0.1, 0.3), (2.0, 3.0)
CONTESTED_DROPS, CONTESTED_SECONDS = 10, 10.0

# A message from this size on is treated with care for memory, and for the time to copy it.
LARGE_BYTES = 1 << 16
# Large messages that may wait for the worker; a single one may be larger.
WAITING_BYTES = 32 << 20
ROOM_SECONDS = 0.05
READ_BYTES = 1 << 12  # at once of small packets
# Largest packet that MQTT has a length for.
MQTT_LIMIT = 268_435_455
SAY_EVERY = 5.0


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
    """A message; the payload of a large one is a bytearray, which nobody may change."""

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


def explain(error: OSError | None, reached: bool, identity: Identity | None) -> str:
    """Why a broker did not take us in, and what to look at.

    Args:
        error: that the attempt ended with; none: there was no answer.
        reached: the connection was there, with TLS if there is an identity.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"its certificate is refused ({error.verify_message}): it has to be of the CA in "
            "TLS_DIR, and for the name in MQTT_BROKER"
        )
    said = str(error or "no answer")
    reason = (error.reason or "") if isinstance(error, ssl.SSLError) else ""
    if identity and "ALERT" in reason:
        said = reason.rpartition("ALERT_")[2].replace("_", " ").lower()
        return f"our certificate is refused ({said}): {identity.fault() or 'ask who issued it'}"
    if identity and reached:
        if fault := identity.fault():
            return f"our certificate is refused ({said}): {fault}"
        return (
            f"{said} after the handshake: is our certificate revoked, or of a CA that the broker "
            "does not know? Or is the broker overloaded?"
        )
    if reached:
        return f"{said}: does it want TLS (TLS_DIR)?"
    if isinstance(error, ssl.SSLError | ConnectionResetError):
        return f"no TLS there ({said}): is MQTT_PORT right?"
    return f"{said}: is it running, and are MQTT_BROKER and MQTT_PORT right?"


class _Client(mqtt.Client):
    """paho's client, which reads the head of a packet byte by byte, copies a message three times
    when it receives it and once more with every call of `send`; which takes an upload that lasts
    longer than two keep-alives for a dead connection; and which, after a reconnect, sends a message
    that its owner sends again, too.

    Args:
        has_room: asked, and may wait for a moment, before so many bytes more are read.
        deliver: is given topic, payload, packet id and QoS of every message.

    Attributes:
        trouble: how the present or last connection has failed; empty: it has not, or was closed.
    """

    def __init__(
        self,
        client_id: str,
        identity: Identity | None,
        has_room: Callable[[int], bool],
        deliver: Callable[[str, bytes, int, int], None],
    ) -> None:
        super().__init__(
            CallbackAPIVersion.VERSION2, client_id, protocol=mqtt.MQTTv5, manual_ack=True
        )
        self._identity = identity
        if identity:
            self.tls_set_context(identity.context)
        self.trouble = ""
        self._has_room, self._deliver = has_room, deliver
        self._read, self._end = bytearray(READ_BYTES), 0  # begins with a packet
        self._receiving, self._sending = _Transfer("receiving"), _Transfer("sending")

    def _create_socket(self) -> Any:
        self.trouble = ""
        self._read, self._end = bytearray(READ_BYTES), 0
        try:
            if self._identity:
                self._identity.refresh()
            return super()._create_socket()
        except OSError as error:
            self._note(error, reached=False)
            raise

    def _note(self, error: OSError, reached: bool = True) -> None:
        # As text, because an error keeps the socket of its frames.
        if not isinstance(error, BlockingIOError):
            self.trouble = explain(error, reached, self._identity)

    def _packet_read(self) -> MQTTErrorCode:
        """Read once, a packet that needs more room into its place, and handle those that are
        whole."""
        wanted = _body_of(self._read, 0, self._end)[1]
        if wanted > len(self._read):
            if wanted >= LARGE_BYTES and not self._has_room(wanted):
                return MQTTErrorCode.MQTT_ERR_AGAIN  # keep-alives go on meanwhile
            # A bytearray that grows would be moved by the allocator, and be there twice.
            begun, self._read = self._read, bytearray(wanted)
            self._read[: self._end] = begun[: self._end]
        try:
            with memoryview(self._read) as whole, whole[self._end :] as rest:
                size = cast(Any, self._sock).recv_into(rest)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return MQTTErrorCode.MQTT_ERR_AGAIN
        except OSError as error:
            self._note(error)
            return MQTTErrorCode.MQTT_ERR_CONN_LOST
        if not size:
            return MQTTErrorCode.MQTT_ERR_CONN_LOST
        self._end += size
        with self._msgtime_mutex:
            self._last_bytes_received = time.monotonic()
        if wanted >= LARGE_BYTES:
            self._receiving.tell(wanted - self._end)
        return self._handle_whole()

    def _handle_whole(self) -> MQTTErrorCode:
        at, done = 0, MQTTErrorCode.MQTT_ERR_SUCCESS
        while done == MQTTErrorCode.MQTT_ERR_SUCCESS:
            start, end = _body_of(self._read, at, self._end)
            if not start or end > self._end or self._sock is None:
                break
            command = self._read[at]
            if len(self._read) > READ_BYTES:  # it is alone there
                packet, self._read = self._read, bytearray(READ_BYTES)
                self._end = 0
            else:
                packet, at, start = self._read[start:end], end, 0
            if command >> 4 == PacketTypes.PUBLISH:
                done = self._publish(command, packet, start)
                continue
            body = packet[start:]
            self._in_packet |= {"command": command, "packet": body, "remaining_length": len(body)}
            try:
                done = self._packet_handle()
            except MalformedPacket:
                done = MQTTErrorCode.MQTT_ERR_PROTOCOL
        if at:  # else a large packet would be copied with each of its parts
            self._end -= at
            self._read[: self._end] = self._read[at : at + self._end]
        return done

    def _publish(self, command: int, packet: bytearray, at: int) -> MQTTErrorCode:
        """Hand on a message, of whose packet the body begins `at`. No properties are read: FedFog
        sends none, a broker passes on those of anybody, and paho needs a time that grows with the
        square of their number (2 s for 60 kB)."""
        qos = command >> 1 & 3
        start, end = _properties_of(packet, at, has_id=qos > 0)
        if end > len(packet):
            return MQTTErrorCode.MQTT_ERR_PROTOCOL
        id_at = start - 2 * (qos > 0)
        topic = packet[at + 2 : id_at].decode(errors="replace")
        mid = int.from_bytes(packet[id_at:start])
        size = len(packet) - end
        with memoryview(packet) as view:  # to the start, where the tensors are aligned
            view[:size] = view[end:]
        del packet[size:]
        payload = cast(bytes, packet) if size >= LARGE_BYTES else bytes(packet)
        self._deliver(topic, payload, mid, qos)
        return MQTTErrorCode.MQTT_ERR_SUCCESS

    def acknowledge(self, mids: Sequence[int]) -> None:
        """Acknowledge messages, in one write."""
        pubacks = b"".join(b"\x40\2" + mid.to_bytes(2) for mid in mids)
        self._packet_queue(mqtt.PUBACK, pubacks, mids[-1], 1)

    def _packet_queue(self, command: int, packet: Any, *rest: Any) -> MQTTErrorCode:
        # Of a memoryview, the part that is left to send is no copy.
        return super()._packet_queue(command, cast(bytes, memoryview(packet)), *rest)

    def _sock_send(self, buf: Any) -> int:
        try:
            sent = super()._sock_send(buf)
        except OSError as error:
            self._note(error)
            raise
        # The system's buffer is full, so the peer has taken what was before. TLS takes one record
        # at a time: what it has taken is at most that buffer ahead of the peer.
        if sent < len(buf):
            with self._msgtime_mutex:
                self._last_msg_out = self._last_bytes_received = time.monotonic()
            if len(buf) >= LARGE_BYTES:
                self._sending.tell(len(buf))
        return sent

    def _messages_reconnect_reset_out(self) -> None:
        with self._out_message_mutex:
            for mid, message in list(self._out_messages.items()):
                if len(message.payload) >= LARGE_BYTES:
                    del self._out_messages[mid]
                    message.info._set_as_published()
        super()._messages_reconnect_reset_out()


def _body_of(data: bytearray, at: int, end: int) -> tuple[int, int]:
    """Where the packet that begins `at` has its body, of which the bytes before `end` are there;
    zeros if that is not known yet (MQTT 5, section 2.1)."""
    size = shift = 0
    for i in range(at + 1, min(at + 5, end)):
        size |= (data[i] & 0x7F) << shift
        shift += 7
        if data[i] < 0x80:
            return i + 1, i + 1 + size
    return 0, 0


def _properties_of(packet: bytearray, at: int, has_id: bool) -> tuple[int, int]:
    """Where the properties of a PUBLISH begin, with their length, and where they end and the
    payload begins, if the body begins `at` (MQTT 5, section 3.3)."""
    start = at = at + 2 + int.from_bytes(packet[at : at + 2]) + 2 * has_id
    size = shift = 0
    more = True
    while more and at < len(packet):
        size |= (packet[at] & 0x7F) << shift
        more, at, shift = packet[at] > 0x7F, at + 1, shift + 7
    return start, at + size


class _Transfer:
    """Says how far a message is that takes seconds."""

    def __init__(self, direction: str) -> None:
        self._direction, self._left, self._say_at = direction, 0, 0.0

    def tell(self, left: int) -> None:
        now = time.monotonic()
        if left > self._left:  # another message
            self._say_at = now + SAY_EVERY
        elif now >= self._say_at:
            log.info(f"mqtt_{self._direction}", megabytes_left=round(left / 1e6, 1))
            self._say_at = now + SAY_EVERY
        self._left = left


class Session:
    """A session of one service with the broker.

    Args:
        client_id: unique among all services; contains role, region and client.
        host, port: of the broker (settings MQTT_BROKER and MQTT_PORT).
        subscriptions: topic filters, in order; renewed at every connect.
        will: topic and payload that the broker publishes, retained, if this session dies.
        timeout: seconds without a connection after which `next` raises (setting MQTT_TIMEOUT).
        tls: the identity towards the broker; default: plain MQTT. The broker takes the name in its
            certificate for the client id.
    """

    def __init__(
        self,
        client_id: str,
        host: str,
        port: int,
        subscriptions: Sequence[str],
        will: tuple[str, bytes] | None = None,
        timeout: float = 300.0,
        tls: Identity | None = None,
    ) -> None:
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._id, self._host, self._port = client_id, host, port
        self._subscriptions = subscriptions
        self._timeout = timeout
        self._tls = tls
        self._trouble = "no answer"
        self._offline_since: float | None = time.monotonic()
        self._generation = 0
        self._unacknowledged: tuple[int, int, int] | None = None
        self._done: list[tuple[int, int]] = []  # mid and generation of what is to acknowledge
        self._packet_limit = MQTT_LIMIT
        self._drops: deque[float] = deque(maxlen=CONTESTED_DROPS)
        self._sent: deque[tuple[str, mqtt.MQTTMessageInfo]] = deque()
        self._topics: dict[int, str] = {}
        self._room = threading.Condition()
        self._waiting = 0  # bytes of large messages that are not acknowledged
        self._arrived = self._taken = 0  # messages; each is counted by one thread only
        self._stopping = False
        self._client = client = _Client(client_id, tls, self._has_room, self._on_message)
        client.max_inflight_messages_set(RECEIVE_MAXIMUM)
        client.reconnect_delay_set(*reconnect_delays())  # type: ignore[arg-type]
        if will:
            client.will_set(*will, qos=1, retain=True)
        client.on_connect = self._on_connect
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
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
            self._taken += 1
            self._unacknowledged = event.mid, event.generation, len(event.message.payload)
            return event.message
        return event

    def publish(self, topic: str, payload: bytes, retain: bool = False) -> bool:
        """Send with QoS 1. False if there is no connection: the owner publishes again then.

        Raises:
            TransportError: the payload is larger than the broker takes.
        """
        limit = self._packet_limit
        if len(payload) + len(topic) + 32 > limit:
            remedy = "raise max_packet_size in its mosquitto.conf"
            if limit == MQTT_LIMIT:
                remedy = "that is as much as MQTT can, so the model has to be smaller"
            raise TransportError(
                f"a message of {len(payload)} bytes for {topic} is more than the broker at "
                f"{self._host}:{self._port} takes ({limit}): {remedy}"
            )
        if not self.connected:
            return False
        # No lock of ours is held here: paho calls back while it holds its own.
        info = self._client.publish(topic, payload, qos=1, retain=retain)
        if info.rc != mqtt.MQTT_ERR_SUCCESS:  # the connection broke just now
            return False
        self._topics[info.mid] = topic
        self._sent.append((topic, info))
        while self._sent and self._sent[0][1].is_published():
            self._sent.popleft()
        return True

    def sending(self, topic: str) -> bool:
        """The broker does not have all yet of what was published there."""
        return any(name == topic and not info.is_published() for name, info in self._sent)

    def flush(self, timeout: float) -> bool:
        """Wait until the broker has all that was published; False after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self._sent:
            info = self._sent[0][1]
            info.wait_for_publish(max(0.0, deadline - time.monotonic()))
            if not info.is_published():
                return False
            self._sent.popleft()
        return True

    def stop(self, timeout: float = 2.0) -> None:
        """Flush, disconnect (the will is not published) and end the network thread."""
        self._stopping = True
        self.acknowledge()
        if self.connected and not self.flush(timeout):
            log.warning("mqtt_not_flushed", messages=len(self._sent))
        self._client.disconnect()
        self._client.loop_stop()

    def acknowledge(self) -> None:
        """Acknowledge the message that was taken last; maybe later, while more are there."""
        taken, self._unacknowledged = self._unacknowledged, None
        if taken is not None:
            mid, generation, size = taken
            if mid:
                self._done.append((mid, generation))
            self._count(-size)
        if self._stopping or self.events.empty() or len(self._done) >= ACKNOWLEDGED_AT_ONCE:
            done, self._done = self._done, []
            # A mid of an earlier connection would acknowledge another message of the present one.
            if mids := [mid for mid, generation in done if generation == self._generation]:
                self._client.acknowledge(mids)

    def check(self) -> None:
        """Raises TransportError as `next` does."""
        since = self._offline_since
        if since is not None and time.monotonic() - since > self._timeout:
            raise TransportError(
                f"no connection to the MQTT broker at {self._host}:{self._port} for "
                f"{self._timeout:.0f} s (MQTT_TIMEOUT): {self._trouble}"
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
            self._client.trouble = f"refused: {reason}"
            return
        self._packet_limit = getattr(properties, "MaximumPacketSize", MQTT_LIMIT)
        self._generation += 1
        if self._subscriptions:
            self._client.subscribe([(t, SubscribeOptions(qos=1)) for t in self._subscriptions])
        self._offline_since = None
        log.debug("mqtt_connected", broker=f"{self._host}:{self._port}", id=self._id)
        self._emit(Connected())

    def _on_connect_fail(self, _c: Any, _u: Any) -> None:
        self._failed("mqtt_waiting_for_broker", self._client.trouble)

    def _failed(self, event: str, trouble: str) -> None:
        """An attempt to connect has."""
        self._trouble = trouble
        if self._may_tell():
            since = self._offline_since or time.monotonic()
            log.info(
                event,
                broker=f"{self._host}:{self._port}",
                reason=trouble,
                seconds=round(time.monotonic() - since, 1),
                limit=self._timeout,
            )

    def _may_tell(self) -> bool:
        return True

    def _on_disconnect(self, _c: Any, _u: Any, _f: Any, reason: Any, _p: Any) -> None:
        if self._offline_since is not None:
            if not self._stopping:
                trouble = self._client.trouble or explain(None, True, self._tls)
                self._failed("mqtt_refused", trouble)
            return
        self._offline_since = now = time.monotonic()
        self._drops.append(now)
        self._emit(Disconnected(str(reason)))

    def _on_message(self, topic: str, payload: bytes, mid: int, qos: int) -> None:
        if self._stopping:
            return
        if qos == 0 and self._arrived - self._taken >= RECEIVE_MAXIMUM:
            return  # of QoS 0 the broker holds nothing back, and whoever sends it may lose it
        self._arrived += 1
        received = Received(topic, self._payload(topic, payload))
        self._count(len(received.payload))
        self._emit(_Delivery(received, mid, self._generation))

    def _payload(self, _topic: str, payload: bytes) -> bytes:
        return payload

    def _has_room(self, size: int) -> bool:
        """Whether so many bytes may be read; waits a little for it."""

        def fits() -> bool:
            waiting = self._waiting
            return self._stopping or not waiting or waiting + size <= WAITING_BYTES

        with self._room:
            return self._room.wait_for(fits, ROOM_SECONDS)

    def _count(self, size: int) -> None:
        """Note that a message of `size` bytes waits for the worker; negative: no more."""
        if abs(size) >= LARGE_BYTES:
            with self._room:
                self._waiting += size
                self._room.notify()

    def _emit(self, event: Any) -> None:
        self.events.put(event)

    def _on_publish(self, _c: Any, _u: Any, mid: int, reason: Any, _p: Any) -> None:
        topic = self._topics.pop(mid, "")
        if reason.is_failure:
            log.error("mqtt_publish_refused", topic=topic, reason=str(reason))
