"""All clients of a region in one process without PyTorch: what a round costs beside the training.

Each has an MQTT session of its own and follows `fedfog.core.participation`, as `fedfog_client`
does: presence with a will, slot, update, receipts, repeats. What it would have trained is the
global model plus a constant. Run by `bench.width` in place of the clients of a federation.
"""

import itertools
import json
import random
import selectors
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numpy as np

from fedfog import service
from fedfog.core import participation as core
from fedfog.messages.codec import decode, decode_json, digest_of, encode_header
from fedfog.messages.schemas import (
    ClientMetrics,
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

CONSTANT = np.float32(1e-3)
METRICS = ClientMetrics(train_loss=0.0)
TICK_SECONDS = 0.5

# MQTT 5 (https://docs.oasis-open.org/mqtt/mqtt/v5.0/mqtt-v5.0.html), as little as is needed.
_CONNACK, _PUBLISH, _PUBACK, _SUBACK = 2, 3, 4, 9
_RECEIVE_MAXIMUM = b"\x03\x21\x00\x64"  # properties of CONNECT: 100
_FAILURE = 0x80
# A large message that starts like the last one of its topic is taken for that one.
_START = 4096

T = TypeVar("T")
OnMessage = Callable[[str, bytes], None]


class Peers:
    """Sessions of many clients with one broker, in one thread."""

    def __init__(self, host: str, port: int) -> None:
        self.address = host, port
        self.selector = selectors.DefaultSelector()
        self.scratch = memoryview(bytearray(1 << 20))
        self._last: dict[str, bytes] = {}

    def step(self, timeout: float) -> None:
        """Serve every session that is ready, after at most `timeout` seconds."""
        for key, ready in self.selector.select(timeout):
            if ready & selectors.EVENT_READ:
                key.data.read()
            if ready & selectors.EVENT_WRITE:
                key.data.flush()

    def shared(self, topic: str, start: memoryview, size: int) -> bytes | None:
        """The last payload of a topic, if it has this size and starts like this."""
        last = self._last.get(topic)
        if last is None or len(last) != size or last[:_START] != bytes(start[:_START]):
            return None
        return last

    def keep(self, topic: str, payload: memoryview) -> bytes:
        """A payload as an object that all who are sent the same have in common."""
        new = bytes(payload)  # a memoryview would be compared element by element
        if self._last.get(topic) != new:
            self._last[topic] = new
        return self._last[topic]


class Peer:
    """One MQTT session: QoS 1 both ways, and what is received is acknowledged at once."""

    def __init__(
        self,
        peers: Peers,
        client_id: str,
        filters: Sequence[str],
        on_message: OnMessage,
        on_connected: Callable[[], None] = lambda: None,
        will: tuple[str, bytes] | None = None,
    ) -> None:
        self._peers, self._filters = peers, filters
        self._on_message, self._on_connected = on_message, on_connected
        self._in, self._skip = b"", 0
        self._skipped = ("", b"", b"")
        self._out: deque[memoryview] = deque()
        self._ids = itertools.cycle(range(1, 1 << 16))
        self._socket = socket.create_connection(peers.address)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peers.selector.register(self._socket, selectors.EVENT_READ, self)
        clean_start, will_flags = 2, 0x2C if will else 0  # will: QoS 1, retained
        # Without keep-alive: nobody here is ever frozen.
        body = _text("MQTT") + bytes((5, clean_start | will_flags, 0, 0)) + _RECEIVE_MAXIMUM
        body += _text(client_id)
        if will:
            body += b"\0" + _text(will[0]) + len(will[1]).to_bytes(2) + will[1]
        self._write(b"\x10" + _integer(len(body)), body)

    def publish(self, topic: str, *payload: bytes | memoryview, retain: bool = False) -> None:
        """Send with QoS 1. The parts must not change until they have gone."""
        head = _text(topic) + next(self._ids).to_bytes(2) + b"\0"
        size = len(head) + sum(len(part) for part in payload)
        self._write(bytes([0x32 | retain]) + _integer(size) + head, *payload)

    def close(self) -> None:
        """Disconnect; the will is not published."""
        self._socket.setblocking(True)
        for part in self._out:
            self._socket.sendall(part)
        self._socket.sendall(b"\xe0\0")
        self._peers.selector.unregister(self._socket)
        self._socket.close()

    def _write(self, *parts: bytes | memoryview) -> None:
        idle = not self._out
        self._out.extend(memoryview(part) for part in parts)
        if idle:
            self.flush()

    def flush(self) -> None:
        try:
            while self._out:
                sent = self._socket.sendmsg(self._out)
                while self._out and sent >= len(self._out[0]):
                    sent -= len(self._out.popleft())
                if sent:
                    self._out[0] = self._out[0][sent:]
        except BlockingIOError:
            pass
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._out else 0)
        if self._peers.selector.get_key(self._socket).events != wanted:
            self._peers.selector.modify(self._socket, wanted, self)

    def read(self) -> None:
        """Raises ConnectionError: the broker has closed the session."""
        size = self._socket.recv_into(self._peers.scratch)
        if size == 0:
            raise ConnectionError("the broker has closed a session")
        data = self._peers.scratch[:size]
        if self._skip:
            skipped = min(self._skip, size)
            self._skip -= skipped
            data = data[skipped:]
            if not self._skip:
                self._take(*self._skipped)
        if self._in:
            data = memoryview(self._in + data)
        while data:
            body = _body(data)
            if body is None:
                break
            start, end = body
            if data[0] >> 4 == _PUBLISH and len(data) - start >= 2 * _START:
                topic, id_, payload = _publish(data[start:end], data[0])
                size = end - start - (len(data[start:end]) - len(payload))
                known = self._peers.shared(topic, payload, size)
                if known is not None and end > len(data):
                    self._skip, self._skipped = end - len(data), (topic, id_, known)
                    data = data[:0]
                    break
            if end > len(data):
                break
            self._packet(data[0], data[start:end])
            data = data[end:]
        self._in = bytes(data)

    def _packet(self, first: int, body: memoryview) -> None:
        match first >> 4:
            case 3:
                topic, id_, payload = _publish(body, first)
                self._take(topic, id_, self._peers.keep(topic, payload))
            case 2:
                if body[1] >= _FAILURE:
                    raise ConnectionError(f"the broker refuses a session: {body[1]:#x}")
                filters = b"".join(_text(f) + b"\1" for f in self._filters)
                self._write(b"\x82" + _integer(3 + len(filters)), b"\0\1\0", filters)
            case 9:
                self._on_connected()
            case 4:
                if len(body) > 2 and body[2] >= _FAILURE:
                    raise ConnectionError(f"the broker refuses a message: {body[2]:#x}")
            case kind:
                raise ConnectionError(f"the broker has sent a packet of kind {kind}")

    def _take(self, topic: str, id_: bytes, payload: bytes) -> None:
        self._write(b"\x40\2" + id_)
        self._on_message(topic, payload)


def _text(text: str) -> bytes:
    return len(text).to_bytes(2) + text.encode()


def _integer(value: int) -> bytes:
    """A variable byte integer [1.5.5]."""
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _body(data: memoryview) -> tuple[int, int] | None:
    """Where the packet that `data` begins with has its body; None if that is not known yet."""
    length = 0
    for at, byte in enumerate(data[1:5]):
        length |= (byte & 127) << 7 * at
        if byte < 128:
            return at + 2, at + 2 + length
    return None


def _publish(body: memoryview, first: int) -> tuple[str, bytes, memoryview]:
    """Topic, packet id and payload of a PUBLISH."""
    at = 2 + int.from_bytes(body[:2])
    topic, id_ = str(body[2:at], "utf-8"), bytes(body[at : at + 2])
    if first & 6:
        at += 2
    return topic, id_, body[at + 1 + body[at] :]


class Model:
    """A global model, and the update that everybody makes of it."""

    def __init__(self, payload: bytes) -> None:
        model = decode(payload, ModelMeta)
        if digest_of(model.vector) != model.meta.digest:
            raise ValueError("the digest is not that of the tensors")
        self.meta, self.table = model.meta, model.table
        self.update = memoryview((model.vector + CONSTANT).tobytes())


class Client:
    """One client of a region."""

    def __init__(self, swarm: "Swarm", name: str) -> None:
        self._swarm, self._name, self._region = swarm, name, swarm.region
        self._boot = int(time.time())
        self._core = core.Participation(random.Random(name))
        self._model: Model | None = None
        topics = swarm.topics
        self._presence = topics.presence(self._region, name)
        self._update = topics.update(self._region, name)
        self._receipts = topics.receipts(self._region, name)
        self._slot = topics.slot(self._region, name)
        self.peer = Peer(
            swarm.peers,
            f"fedfog-client-{self._region}-{name}",
            [
                topics.status(self._region),
                self._slot,
                self._receipts,
                topics.receipts(self._region),
                topics.global_model,
            ],
            self._received,
            lambda: self._apply(core.Connected()),
            (self._presence, self._announcement(online=False)),
        )

    def tick(self, now: float) -> None:
        due = self._core.wake_at()
        if due is not None and due <= now:
            self._apply(core.Tick())

    def _received(self, topic: str, payload: bytes) -> None:
        swarm, name = self._swarm, self._name
        topics = swarm.topics
        if topic == topics.global_model:
            if not payload:
                return
            self._model = model = swarm.read(topic, payload, Model)
            finished = model.meta.state is RunState.FINISHED
            meta = model.meta
            self._apply(core.ModelArrived(meta.run, meta.run_started, meta.round + 1, finished))
        elif topic == self._receipts:
            receipt = decode_json(payload, Receipt)
            swarm.count[receipt.verdict] += 1
            self._apply(
                core.VerdictArrived(
                    receipt.run or "", receipt.round or 0, receipt.verdict, receipt.boot
                )
            )
        elif topic == self._slot:
            slot = decode_json(payload, Slot)
            self._apply(core.SlotDealt(slot.run, slot.slot))
        elif topic == topics.status(self._region):
            status = swarm.read(topic, payload, lambda p: decode_json(p, Status))
            if status.online:
                self._apply(core.AggregatorSeen(status.boot))
        else:
            closed = swarm.read(topic, payload, Closed)
            if name in closed.members:
                swarm.count[Verdict.ACCEPTED] += 1
                self._apply(closed.verdict)

    def _apply(self, event: core.Event) -> None:
        for action in self._core.handle(event, time.monotonic()):
            match action:
                case core.Announce():
                    self.peer.publish(self._presence, self._announcement(online=True), retain=True)
                case core.Train(run, round_):
                    self._apply(core.Trained(run, round_))
                case core.Send(run, round_, attempt):
                    self._send(run, round_, attempt)
                case core.EmptyOutbox(verdict="void"):
                    self._swarm.count["void"] += 1
                case core.RunFinished():
                    self._swarm.finished += 1

    def _send(self, run: str, round_: int, attempt: int) -> None:
        model = self._model
        assert model is not None
        meta = UpdateMeta(
            run=run,
            round=round_,
            region=self._region,
            client=self._name,
            base_digest=model.meta.digest,
            num_examples=1,
            metrics=METRICS,
        )
        self._swarm.count["sent" if attempt == 1 else "sent again"] += 1
        self.peer.publish(self._update, encode_header(meta, model.table), model.update)

    def _announcement(self, online: bool) -> bytes:
        slot = self._core.current_slot
        return Presence(online=online, boot=self._boot, slot=slot).to_json()


class Closed:
    """Receipt for all members of a closed round."""

    def __init__(self, payload: bytes) -> None:
        receipt = decode_json(payload, RegionReceipt)
        self.members = frozenset(receipt.members)
        self.verdict = core.VerdictArrived(
            receipt.run, receipt.round, Verdict.ACCEPTED, receipt.boot
        )


class Swarm:
    """Clients `client-1` to `client-<CLIENTS_PER_PROCESS>` of REGION."""

    def __init__(self, settings: ClientSettings) -> None:
        self.region, self.topics = settings.region, settings.topics
        self.peers = Peers(settings.mqtt_broker, settings.mqtt_port)
        self.count: Counter[str] = Counter()
        self.finished = 0
        self._read: dict[str, tuple[bytes, Any]] = {}
        names = [f"client-{i}" for i in range(1, settings.clients_per_process + 1)]
        self._clients = [Client(self, name) for name in names]

    def read(self, topic: str, payload: bytes, decoder: Callable[[bytes], T]) -> T:
        """What `decoder` makes of a payload; once for all clients that are handed it."""
        known, decoded = self._read.get(topic, (None, None))
        if known is not payload:
            decoded = decoder(payload)
            self._read[topic] = payload, decoded
        return cast(T, decoded)

    def run(self) -> None:
        """Take part until all clients have seen the end of a run, then say on stdout, as JSON,
        what was counted."""
        ticked = time.monotonic()
        while self.finished < len(self._clients):
            self.peers.step(TICK_SECONDS)
            now = time.monotonic()
            if now - ticked >= TICK_SECONDS:
                ticked = now
                for client in self._clients:
                    client.tick(now)
        for client in self._clients:
            client.peer.close()
        print(json.dumps(self.count))


def main() -> None:
    settings = load(ClientSettings)
    service.allow_open_files(settings.clients_per_process, "CLIENTS_PER_PROCESS")
    Swarm(settings).run()


if __name__ == "__main__":
    main()
