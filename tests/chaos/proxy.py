"""A TCP proxy between the services and their servers: it does what networks do, and it keeps the
log that the ledger is made from.

Each service has a port of its own, so a fault meets one service. The MQTT that passes is parsed:
every PUBLISH that a service sends or is sent is noted, whatever becomes of service and broker.
"""

import asyncio
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from chaos import mqtt5
from fedfog.cli.broker import free_port

HOLD_SECONDS = 0.5
_CHUNK = 1 << 16
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: close() sends RST


@dataclass(frozen=True)
class Sighting:
    """A PUBLISH on the wire. `up`: from the service to the broker. `passed`: it was not on a
    half-open connection; whether it arrived is not known."""

    at: float  # monotonic seconds
    service: str
    up: bool
    topic: str
    payload: bytes
    passed: bool = True


@dataclass(eq=False)
class _Connection:
    service: asyncio.StreamWriter
    server: asyncio.StreamWriter
    half_open: bool = False

    def reset(self) -> None:
        for writer in (self.service, self.server):
            with suppress(OSError):
                sock = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()

    def close(self) -> None:
        self.service.close()
        self.server.close()


class Link:
    """The way of one service to one server, and its present faults. Made by `Proxy.link`."""

    def __init__(self, proxy: "Proxy", name: str, upstream: tuple[str, int], mqtt: bool) -> None:
        self.port = free_port()
        self._proxy, self._name, self._upstream, self._mqtt = proxy, name, upstream, mqtt
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._frozen_until = self._refused_until = 0.0
        self._delay = self._delayed_until = 0.0
        self._rate = self._throttled_until = 0.0
        self._duplicate = self._reorder = 0
        self._server: asyncio.Server | None = None

    def fault(self, kind: str, seconds: float = 0.0, amount: float = 0.0) -> None:
        """Begin a fault; from any thread.

        `kind`: cut (RST), close (FIN), refuse (cut, and no new connection for `seconds`), freeze
        (nothing passes for `seconds`, then all of it), half-open (the present connections never
        pass a byte again), delay (by `amount` seconds, for `seconds`), throttle (to `amount` bytes
        a second, for `seconds`), duplicate (the next `amount` PUBLISHes of each direction come
        twice), reorder (each of the next `amount` PUBLISHes to the broker comes after a later one).
        """
        self._proxy.call(lambda: self._begin(kind, seconds, amount))

    def heal(self) -> None:
        """End all faults that would still last; from any thread."""
        self._proxy.call(self._heal)

    def _begin(self, kind: str, seconds: float, amount: float) -> None:
        until = time.monotonic() + seconds
        match kind:
            case "cut":
                for connection in self._connections:
                    connection.reset()
            case "close":
                for connection in self._connections:
                    connection.close()
            case "half-open":
                for connection in self._connections:
                    connection.half_open = True
            case "freeze":
                self._frozen_until = max(until, self._frozen_until)
            case "delay":
                self._delay, self._delayed_until = amount, until
            case "throttle":
                self._rate, self._throttled_until = amount, until
            case "duplicate":
                self._duplicate += int(amount)
            case "reorder":
                self._reorder += int(amount)
            case "refuse":
                self._begin("cut", 0.0, 0.0)
                refused, self._refused_until = self._refused_until, max(until, self._refused_until)
                if not refused:
                    self._spawn(self._refuse())
            case _:
                raise ValueError(f"no such fault: {kind}")

    def _heal(self) -> None:
        self._frozen_until = self._delayed_until = self._throttled_until = 0.0
        self._duplicate = self._reorder = 0
        self._refused_until = min(self._refused_until, time.monotonic())

    def _spawn(self, work: "asyncio._CoroutineLike[None]") -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    async def _refuse(self) -> None:
        assert self._server is not None
        self._server.close()
        while (left := self._refused_until - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 0.1))
        self._refused_until = 0.0
        await self.listen()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            from_server, to_server = await asyncio.open_connection(*self._upstream)
        except OSError:
            writer.transport.abort()
            return
        for stream in (writer, to_server):
            stream.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = _Connection(writer, to_server)
        self._connections.add(connection)
        try:
            await asyncio.gather(
                self._pump(connection, reader, to_server, up=True),
                self._pump(connection, from_server, writer, up=False),
            )
        except asyncio.CancelledError:  # the proxy is closed
            connection.reset()
        finally:
            self._connections.discard(connection)

    async def _pump(
        self,
        connection: _Connection,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        up: bool,
    ) -> None:
        packets = _Packets(self, connection, sink, up) if self._mqtt else None
        try:
            while data := await source.read(_CHUNK):
                if packets is not None:
                    data = packets.pass_on(data)
                while (left := self._frozen_until - time.monotonic()) > 0:
                    await asyncio.sleep(min(left, 0.05))
                if time.monotonic() < self._delayed_until:
                    await asyncio.sleep(self._delay)
                if connection.half_open:
                    continue
                sink.write(data)
                await sink.drain()
                if (left := self._throttled_until - time.monotonic()) > 0:
                    await asyncio.sleep(min(left, len(data) / self._rate))
        except (OSError, mqtt5.MqttError):
            if not connection.half_open:
                connection.reset()
        if connection.half_open:  # the far side is not told
            (connection.service if up else connection.server).close()
        else:
            connection.close()

    # For _Packets

    def note(self, up: bool, publish: mqtt5.Publish, passed: bool) -> None:
        self._proxy.note(self._name, up, publish, passed)

    def duplicates_next(self) -> bool:
        self._duplicate -= (wanted := self._duplicate > 0)
        return wanted

    def holds_back_next(self) -> bool:
        self._reorder -= (wanted := self._reorder > 0)
        return wanted


class _Packets:
    """One direction of one MQTT connection, packet by packet."""

    def __init__(
        self, link: Link, connection: _Connection, sink: asyncio.StreamWriter, up: bool
    ) -> None:
        self._link, self._connection, self._sink, self._up = link, connection, sink, up
        self._buffer = bytearray()
        self._held = b""

    def pass_on(self, data: bytes) -> bytes:
        """What is to be sent on, of whole packets, now that `data` has come."""
        self._buffer += data
        out: list[bytes] = []
        while (packet := mqtt5.take_packet(self._buffer)) is not None:
            publish = mqtt5.parse_publish(packet)
            if publish is None:
                out.append(packet)
                continue
            self._link.note(self._up, publish, not self._connection.half_open)
            if self._up and not self._held and self._link.holds_back_next():
                self._held = packet
                asyncio.get_running_loop().call_later(HOLD_SECONDS, self._release)
                continue
            out += [packet, self._held]
            self._held = b""
            if publish.qos and self._link.duplicates_next():
                out.append(mqtt5.as_duplicate(packet))
        return b"".join(out)

    def _release(self) -> None:
        held, self._held = self._held, b""
        if held and not self._connection.half_open and not self._sink.is_closing():
            self._sink.write(held)


class Proxy:
    """All links, served by one thread.

    `log` holds all sightings. `on_publish` is called with each, in the proxy's thread, before the
    message goes on.
    """

    def __init__(self) -> None:
        self.log: list[Sighting] = []
        self.on_publish: Callable[[Sighting], None] | None = None
        self._payloads: dict[bytes, bytes] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()

    def link(self, name: str, upstream: tuple[str, int], mqtt: bool = True) -> Link:
        """A new link of service `name`; it listens when this returns."""
        link = Link(self, name, upstream, mqtt)
        asyncio.run_coroutine_threadsafe(link.listen(), self._loop).result(10)
        return link

    def call(self, function: Callable[[], None]) -> None:
        """Have it called in the proxy's thread; from there, at once."""
        if threading.current_thread() is self._thread:
            function()
        else:
            self._loop.call_soon_threadsafe(function)

    def note(self, service: str, up: bool, publish: mqtt5.Publish, passed: bool) -> None:
        payload = self._payloads.setdefault(publish.payload, publish.payload)
        sighting = Sighting(time.monotonic(), service, up, publish.topic, payload, passed)
        self.log.append(sighting)
        if self.on_publish is not None:
            self.on_publish(sighting)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end_all(), self._loop).result(10)
        self.call(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    async def _end_all(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
