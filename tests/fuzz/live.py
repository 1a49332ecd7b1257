"""Mutants through a real broker at running services, which have to live, to go on with their rounds
and to need no more memory at the end than at the beginning."""

import os
import random
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from conftest import REPOSITORY, Peer, Service
from fedfog.cli.broker import LocalBroker, free_port
from fedfog.messages.catalog import read
from fedfog.messages.codec import CodecError, decode_meta
from fedfog.messages.schemas import PartialMeta
from fedfog.messages.topics import Topics
from fuzz.mutator import mutants
from fuzz.valid import REGION, messages

# Between the first and the last tenth, of any process.
GROWTH = 32 << 20
BATCH = 800
HONEST = "c1"
OF_THE_HOSTILE = ("fl/updates/", "fl/presence/")
# A model that is none has the server publish the true one again: few are enough.
RARE = {"fl/global_model": 0.01}
Told = Callable[[int], None]


class LiveError(AssertionError):
    """A service died, grew, or lost an honest update."""


@dataclass(frozen=True)
class Memory:
    process: str
    first: int  # bytes, the most in the first tenth
    last: int


class Fog:
    """Every kind of service in a run without end, an honest client `c1`, and the hostile peer,
    which publishes as client `m` and, if nobody keeps it from that, as all others."""

    def __init__(self, folder: Path) -> None:
        self.broker = LocalBroker(folder / "broker", "mosquitto").start()
        self.port = self.broker.port
        self._folder, self._flower = folder, free_port()
        self.services = {
            "central-server": self._start(
                "fedfog_central_server.main",
                rounds=10**6,
                run_id="fuzz",
                runs_dir=folder / "runs",
                flower_port=self._flower,
            ),
            "fog-bridge": self._start(
                "fedfog_bridge.main", flower_server=f"127.0.0.1:{self._flower}"
            ),
            "fog-aggregator": self._start(
                "fedfog_aggregator.main",
                clients_expected=1,
                round_deadline=1,  # `m` may be present and send nothing that counts
                client_quota=10**9,  # all mutants are to be read
            ),
            "client": self._start("fedfog_client.main", client_id=HONEST),
            "monitor": self._start("fedfog_monitor.main"),
        }
        self.hostile = Peer(self.port, f"fl/partial/{REGION}")

    def _start(self, module: str, **settings: object) -> Service:
        folder = self._folder / module
        env = {
            "MQTT_BROKER": self.broker.host,
            "MQTT_PORT": str(self.port),
            "STATE_DIR": str(folder / "state"),
            "HEALTH_FILE": str(folder / "health"),
            "LOG_LEVEL": "info",
            "TASK": "chaos.task:Tiny",
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "tests"), *sys.path]),
            **{name.upper(): str(value) for name, value in settings.items()},
        }
        return Service(module, folder, env)

    def honest_update_counted(self) -> None:
        """Wait for a partial with the honest client, of a round that closes from now on."""
        after = len(self.hostile.received)

        def counted(_topic: str, payload: bytes) -> bool:
            try:
                meta = decode_meta(payload, PartialMeta)
            except CodecError:
                return False
            return meta.run == "fuzz" and HONEST in meta.members

        self.hostile.wait_for(counted, after=after)
        del self.hostile.received[:-1]

    def check_alive(self) -> None:
        assert self.broker.process is not None
        for name, process in self._processes().items():
            if process.poll() is not None:
                raise LiveError(f"{name} has ended with code {process.returncode}")

    def memory(self) -> dict[str, int]:
        """Bytes of each service with its children, by name."""
        sizes = {}
        for name, process in self._processes().items():
            parent = psutil.Process(process.pid)
            family = [parent, *parent.children(recursive=True)]
            sizes[name] = sum(member.memory_info().rss for member in family if _lives(member))
        return sizes

    def stop(self) -> None:
        """Raises LiveError: a service does not end as it should."""
        self.hostile.close()
        codes = {name: service.stop() for name, service in self.services.items()}
        self.broker.stop()
        if any(codes.values()):
            raise LiveError(f"exit codes {codes}")

    def kill(self) -> None:
        for service in self.services.values():
            if service.process.poll() is None:
                service.kill()
        self.broker.stop()

    def _processes(self) -> dict[str, subprocess.Popen[bytes]]:
        assert self.broker.process is not None
        services = {name: service.process for name, service in self.services.items()}
        return {**services, "broker": self.broker.process}


def _lives(process: psutil.Process) -> bool:
    return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)


@contextmanager
def fog(folder: Path) -> Iterator[Fog]:
    """A federation whose first round is done.

    Raises:
        LiveError: a service did not end as it should.
    """
    running = Fog(folder)
    try:
        running.honest_update_counted()
        yield running
        running.check_alive()
        running.stop()
    finally:
        running.kill()


def publish(
    running: Fog, count: int, seed: int = 1, told: Told = lambda _done: None
) -> list[Memory]:
    """`count` mutants on all topics, and after each batch of them an honest update that counts.

    On topics that belong to a trusted peer, only what is no message: a valid one is that peer's
    word. On the hostile client's own topics, everything.

    Raises:
        LiveError: a service died or grew.
        AssertionError: the honest client's update is not counted any more.
    """
    chance, batch = random.Random(seed), max(1, min(BATCH, count // 10))
    sources = {
        topic: mutants(payloads, seed + index)
        for index, (topic, payloads) in enumerate(_all_messages().items())
    }
    topics = list(sources)
    weights = [RARE.get(t, 4.0 if t.startswith(OF_THE_HOSTILE) else 1.0) for t in topics]
    seen: list[dict[str, int]] = []
    for begin in range(0, count, batch):
        for topic in chance.choices(topics, weights, k=min(batch, count - begin) - 1):
            payload = next(sources[topic])
            while not _may_be_sent(topic, payload):
                payload = next(sources[topic])
            running.hostile.publish_unconfirmed(topic, payload)
        running.hostile.publish("fl/updates/region_0/m", b"the broker has all that was before")
        running.honest_update_counted()
        running.check_alive()
        seen.append(running.memory())
        told(begin + batch)
    tenth = max(1, len(seen) // 10)
    grown = []
    for name in seen[0]:
        first = max(sizes[name] for sizes in seen[:tenth])
        grown.append(Memory(name, first, max(sizes[name] for sizes in seen[-tenth:])))
    if bad := [memory for memory in grown if memory.last > memory.first + GROWTH]:
        raise LiveError(f"memory grows: {bad}")
    return grown


def _all_messages() -> dict[str, list[bytes]]:
    """Of the hostile client, and of those that the honest one hears."""
    honest = {
        topic: payloads
        for topic, payloads in messages(HONEST).items()
        if not topic.startswith(OF_THE_HOSTILE)
    }
    return messages("m") | honest


def _may_be_sent(topic: str, payload: bytes) -> bool:
    if topic.startswith(OF_THE_HOSTILE):
        return True
    for look in (
        lambda: read(Topics(), topic, payload),
        lambda: decode_meta(payload, PartialMeta),  # the bridge does not look at the tensors
    ):
        try:
            look()
        except CodecError:
            continue
        return False
    return True


# Raw packets (MQTT 5, chapter 3)


def _packet(first: int, *parts: bytes) -> bytes:
    body, length = b"".join(parts), bytearray()
    size = len(body)
    while True:
        size, low = divmod(size, 128)
        length.append(low | 128 * (size > 0))
        if not size:
            return bytes([first]) + bytes(length) + body


def _text(text: str) -> bytes:
    data = text.encode()
    return len(data).to_bytes(2, "big") + data


def _connect(client_id: str, version: int = 5, will: bool = False) -> bytes:
    properties = b"\x05\x11\x00\x00\x00\x0a" if version == 5 else b""
    flags = 0x2E if will else 0x02
    parts = [_text("MQTT"), bytes([version, flags, 0, 60]), properties, _text(client_id)]
    if will:
        parts += [b"\x00" * (version == 5), _text(f"fl/presence/{REGION}/m"), _text("will")]
    return _packet(0x10, *parts)


def raw_packets() -> list[bytes]:
    update = _text(f"fl/updates/{REGION}/m")
    payload = messages("m")[f"fl/updates/{REGION}/m"][0]
    user = b"\x26" + _text("key") + _text("value")
    return [
        _connect("raw"),
        _connect("raw", version=4),
        _connect("raw", will=True),
        _packet(0x82, b"\x00\x01\x00", _text(f"fl/receipts/{REGION}/m"), b"\x01"),
        _packet(0x82, b"\x00\x02\x02\x0b\x07", _text("fl/#"), b"\x2d"),
        _packet(0xA2, b"\x00\x03\x00", _text(f"fl/receipts/{REGION}/m")),
        _packet(0x30, update, b"\x00", payload),
        _packet(0x32, update, b"\x00\x04\x00", payload),
        _packet(0x35, update, b"\x00\x05", bytes([2 * len(user)]), user, user, payload),
        _packet(0x40, b"\x00\x06\x00\x00"),
        _packet(0x62, b"\x00\x05"),
        _packet(0xC0),
        _packet(0xE0, b"\x00\x00"),
        _packet(0xF0, b"\x18\x00"),
    ]


def knock(port: int, count: int, seed: int = 1, told: Told = lambda _done: None) -> None:
    """`count` mutated packets at a broker, of which half come after a good CONNECT.

    Raises:
        OSError: nobody listens any more.
    """
    chance, sources = random.Random(seed), mutants(raw_packets(), seed)
    done = 0
    while done < count:
        number = min(chance.choice((1, 1, 2, 4)), count - done)
        greeting = _connect(f"raw-{chance.randrange(1000)}") if chance.random() < 0.7 else b""
        converse(port, greeting + b"".join(next(sources) for _ in range(number)))
        done += number
        told(done)


def converse(port: int, data: bytes) -> None:
    """Send and hear the peer out, who may well cut the line. Raises OSError: nobody listens, or
    nothing comes for ten seconds."""
    with socket.create_connection(("127.0.0.1", port), 10.0) as sock:
        # Thousands of connections would stay in TIME_WAIT.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65536):
                pass
        except TimeoutError:
            raise
        except OSError:  # cut, in one of several ways
            return
