"""Many MQTT sessions of one process, moved by one thread.

Each of a process's virtual clients has a session of its own: its presence, its will and its
receipts are those of a client alone. A thread for each would not do at 1,000, so one thread drives
paho's external event loop (`loop_read`, `loop_write`, `loop_misc`) for all of them. What happens
to any of them comes out of one queue.
"""

import queue
import selectors
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fedfog.transport import mqtt
from fedfog.transport.tls import Identity

CHECK_SECONDS = 1.0
CONNECTS_AT_ONCE = 50
# A payload from this size on is kept once, however many sessions receive it.
SHARED_BYTES = 1024


@dataclass(frozen=True)
class SessionFailed:
    """The session has ended; the others go on."""

    error: mqtt.TransportError


class Network(threading.Thread):
    """The thread, and the queue of all events: pairs of the session and what happened to it."""

    def __init__(self) -> None:
        super().__init__(name="mqtt", daemon=True)
        self._events: queue.SimpleQueue[tuple[SharedSession | None, Any]] = queue.SimpleQueue()
        self._last: SharedSession | None = None
        self._selector = selectors.DefaultSelector()
        self._ears, self._bell = socket.socketpair()
        for end in (self._ears, self._bell):
            end.setblocking(False)
        self._selector.register(self._ears, selectors.EVENT_READ)
        self._joining: deque[SharedSession] = deque()
        self._writing: deque[SharedSession] = deque()
        self._reading: set[SharedSession] = set()  # TLS has more, which no selector sees
        self._sessions: list[SharedSession] = []
        self._offline: dict[SharedSession, float] = {}  # and when to try again
        self._payloads: dict[str, bytes] = {}
        self._told = 0.0
        self._ending = False

    @property
    def connected(self) -> bool:
        """At least one session is."""
        return any(session.connected for session in self._sessions)

    def put(self, event: Any, session: "SharedSession | None" = None) -> None:
        """Add an event of another source; `session` is the one that it concerns."""
        self._events.put((session, event))

    def next(self, timeout: float) -> "tuple[SharedSession | None, Any] | None":
        """The next event and its session, or None after `timeout` seconds. Events are those of
        `mqtt.Session.next`, `SessionFailed`, and what was `put`. The message before is
        acknowledged.

        Raises:
            Exception: the thread has ended with it.
        """
        if self._last is not None:
            self._last.acknowledge()
            self._last = None
        try:
            session, event = self._events.get(timeout=max(timeout, 0.0))
        except queue.Empty:
            return None
        if session is None:
            if isinstance(event, _ThreadFailed):
                raise event.error
            return None, event
        self._last = session
        return session, session.take(event)

    def stop(self, timeout: float = 2.0) -> None:
        """Flush and disconnect all sessions (no will is published) and end the thread."""
        deadline = time.monotonic() + timeout
        for session in list(self._sessions):
            if session.connected and not session.flush(max(0.0, deadline - time.monotonic())):
                mqtt.log.warning("mqtt_not_flushed", session=session.id)
            session.stop()
        self._ending = True
        self._ring()
        self.join(max(0.5, deadline - time.monotonic()))

    # Called by sessions, from any thread

    def add(self, session: "SharedSession") -> None:
        self._joining.append(session)
        self._ring()

    def wants_to_write(self, session: "SharedSession") -> None:
        self._writing.append(session)
        self._ring()

    def shared(self, topic: str, payload: bytes) -> bytes:
        """The object that other sessions were given for an equal payload, if there is one."""
        if len(payload) < SHARED_BYTES:
            return payload
        known = self._payloads.get(topic)
        if known != payload:
            self._payloads[topic] = known = payload
        return known

    def may_tell(self) -> bool:
        """Whether a session may log that it does not get through; not all say the same."""
        now = time.monotonic()
        if now - self._told < CHECK_SECONDS:
            return False
        self._told = now
        return True

    def _ring(self) -> None:
        with suppress(BlockingIOError):  # the thread has not heard earlier rings yet
            self._bell.send(b"\0")

    # The thread

    def run(self) -> None:
        try:
            self._serve()
        except Exception as error:  # noqa: BLE001 (raised again in `next`)
            self.put(_ThreadFailed(error))

    def _serve(self) -> None:
        checked = 0.0
        while True:
            while self._joining:
                session = self._joining.popleft()
                self._sessions.append(session)
                self._offline[session] = 0.0
            now = time.monotonic()
            if now - checked >= CHECK_SECONDS:
                checked = now
                self._check()
            self._connect(now)
            # Another thread may have added to them while the last ones were being written.
            busy = self._writing or self._reading
            for key, ready in self._selector.select(0 if busy else self._wait(now)):
                if key.data is None:
                    with suppress(BlockingIOError):
                        while self._ears.recv(4096):
                            pass
                    continue
                session = key.data
                if ready & selectors.EVENT_READ:
                    self._reading.add(session)
                if ready & selectors.EVENT_WRITE:
                    self._write(session)
            for session in list(self._reading):
                self._read(session)
            for _ in range(len(self._writing)):
                self._write(self._writing.popleft())
            if self._ending and not any(session.paho.socket() for session in self._sessions):
                return

    def _wait(self, now: float) -> float:
        first = min(self._offline.values(), default=now + CHECK_SECONDS)
        return min(max(0.0, first - now), CHECK_SECONDS)

    def _connect(self, now: float) -> None:
        """Try those whose turn it is. They have the same broker: if one does not get through, the
        others wait until the open connections were served."""
        due = [session for session, at in self._offline.items() if at <= now]
        for session in due[:CONNECTS_AT_ONCE]:
            del self._offline[session]
            if not session.connect():
                self._offline[session] = now + session.next_delay()
                return

    def _read(self, session: "SharedSession") -> None:
        session.paho.loop_read()
        sock = session.paho.socket()
        if not (isinstance(sock, ssl.SSLSocket) and sock.pending()):
            self._reading.discard(session)

    def _write(self, session: "SharedSession") -> None:
        paho = session.paho
        paho.loop_write()
        sock = paho.socket()
        if sock is not None:
            # Asked once more: what was queued at the very end of `loop_write` rang no bell.
            more = selectors.EVENT_WRITE if paho.want_write() else 0
            self._selector.modify(sock, selectors.EVENT_READ | more, session)

    def _check(self) -> None:
        """Keep-alives, and sessions that cannot go on."""
        for session in list(self._sessions):
            session.paho.loop_misc()
            if session.closing and session.paho.socket() is None:
                self._sessions.remove(session)
                self._offline.pop(session, None)
                continue
            try:
                session.check()
            except mqtt.TransportError as error:
                session.stop()
                self.put(SessionFailed(error), session)

    def socket_opened(self, session: "SharedSession", sock: Any) -> None:
        self._selector.register(sock, selectors.EVENT_READ, session)

    def socket_closes(self, session: "SharedSession", sock: Any) -> None:
        self._selector.unregister(sock)
        if not session.closing:
            self._offline[session] = time.monotonic() + session.next_delay()


@dataclass(frozen=True)
class _ThreadFailed:
    error: Exception


class SharedSession(mqtt.Session):
    """A session whose events come out of `network.next`, and which its thread serves.

    The arguments after `network` are those of `mqtt.Session`.
    """

    def __init__(
        self,
        network: Network,
        client_id: str,
        host: str,
        port: int,
        subscriptions: Sequence[str],
        will: tuple[str, bytes] | None = None,
        timeout: float = 300.0,
        tls: Identity | None = None,
    ) -> None:
        super().__init__(client_id, host, port, subscriptions, will, timeout, tls)
        self._network = network
        self.id = client_id
        self.closing = False
        self._first_delay, self._longest_delay = mqtt.reconnect_delays()
        self._delay = self._first_delay
        self.paho = self._client
        self.paho.on_socket_close = self._on_socket_close
        self.paho.on_socket_register_write = self._on_wants_write

    def start(self) -> None:
        self._connect_later()
        self._network.add(self)

    def stop(self, timeout: float = 0.0) -> None:
        """Disconnect (the will is not published) after what is already on its way."""
        self.closing = self._stopping = True
        self.acknowledge()
        self.paho.disconnect()

    # Called by the network's thread

    def connect(self) -> bool:
        """Try to connect; False if there is no broker."""
        try:
            self.paho.reconnect()
        except OSError:
            self._on_connect_fail(None, None)
            return False
        return True

    def _may_tell(self) -> bool:
        return self._network.may_tell()

    def next_delay(self) -> float:
        """Seconds to the next attempt."""
        delay, self._delay = self._delay, min(2 * self._delay, self._longest_delay)
        return delay

    def _emit(self, event: Any) -> None:
        if isinstance(event, mqtt.Connected):
            self._delay = self._first_delay
        self._network.put(event, self)

    def _payload(self, topic: str, payload: bytes) -> bytes:
        return self._network.shared(topic, payload)

    def _on_socket_open(self, client: Any, data: Any, sock: Any) -> None:
        super()._on_socket_open(client, data, sock)
        self._network.socket_opened(self, sock)

    def _on_socket_close(self, _c: Any, _u: Any, sock: Any) -> None:
        self._network.socket_closes(self, sock)

    def _on_wants_write(self, _c: Any, _u: Any, _sock: Any) -> None:
        self._network.wants_to_write(self)
