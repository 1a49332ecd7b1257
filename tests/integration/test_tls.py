"""MQTT over TLS: who is refused is told why, and what passes is whole."""

import queue
import random
import shutil
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from structlog.testing import capture_logs

from conftest import LIMIT, Service
from fedfog.cli.broker import LocalBroker, installed_mosquitto
from fedfog.transport import mqtt
from fedfog.transport.network import Network, SessionFailed, SharedSession
from fedfog.transport.tls import Identity, IdentityError
from fedfog_enrolment import pki
from fedfog_enrolment.ca import CA
from secured import certify

pytestmark = pytest.mark.skipif(installed_mosquitto() is None, reason="Mosquitto is not installed")

CLIENT = "r0/c1"
PATIENCE = 4.0  # of a session that is never let in; each attempt takes a hundredth of it
PIPES = shutil.ignore_patterns("signals")


class Closed:
    """A broker that knows only certificates, and what is needed to get some."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = pki.ensure(folder / "pki", ["r0"])
        self.broker = LocalBroker(folder / "broker", "mosquitto", tls_dir=folder / "pki" / "broker")
        self.broker.start()

    def of(self, reader: str) -> Path:
        return self.folder / "pki" / reader

    def client(self, name: str = CLIENT, seconds: float = 3600, ca: CA | None = None) -> Path:
        """A folder with a certificate of its own."""
        return certify(ca or self.ca, self.folder / f"{random.random()}", name, seconds)


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Closed]:
    made = Closed(tmp_path_factory.mktemp("closed"))
    yield made
    made.broker.stop()


@pytest.fixture
def sessions() -> Iterator[Callable[..., mqtt.Session]]:
    """Starts sessions, and stops them after the test."""
    started: list[mqtt.Session] = []

    def start(
        port: int, identity: Path | None, *filters: str, timeout: float = LIMIT
    ) -> mqtt.Session:
        tls = Identity.of(identity)
        session = mqtt.Session("any", "127.0.0.1", port, filters, timeout=timeout, tls=tls)
        started.append(session)
        session.start()
        return session

    yield start
    for session in started:
        session.stop()


@pytest.fixture
def network() -> Iterator[Network]:
    made = Network()
    made.start()
    yield made
    made.stop()


def wait_for(session: mqtt.Session, kind: type) -> Any:
    deadline = time.monotonic() + LIMIT
    while not isinstance(event := session.next(1.0), kind):
        assert time.monotonic() < deadline, f"no {kind.__name__}"
    return event


def ends_with(session: mqtt.Session) -> str:
    """The error that a session ends with which never gets in."""
    with pytest.raises(mqtt.TransportError) as error:
        wait_for(session, mqtt.Connected)
    return str(error.value)


@pytest.fixture
def other_ca(tmp_path: Path) -> CA:
    (tmp_path / "other").mkdir()
    return CA.create(tmp_path / "other")


# Who is refused, and why


def test_own_certificate_that_the_broker_refuses(
    closed: Closed, other_ca: CA, sessions: Callable[..., mqtt.Session]
) -> None:
    foreign = closed.client(ca=other_ca)
    shutil.copy(closed.of("broker") / "ca.crt", foreign)
    cases = {
        closed.client(seconds=-1): "expired at",
        foreign: "is not of the CA in",
        closed.of("probe-revoked"): "our certificate",
        closed.of("broker"): "our certificate",
    }
    started = {sessions(closed.broker.port, f, timeout=PATIENCE): why for f, why in cases.items()}
    for session, why in started.items():
        assert why in ends_with(session)


def test_own_certificate_that_is_not_valid_yet(closed: Closed, tmp_path: Path) -> None:
    """Of a device whose clock is slow; here the certificate is early instead."""
    folder = early(closed.ca, tmp_path / "early")
    identity = Identity(folder)
    assert "is this clock right?" in identity.fault()
    session = mqtt.Session(
        "any", "127.0.0.1", closed.broker.port, [], timeout=PATIENCE, tls=identity
    )
    session.start()
    assert "is not valid before" in ends_with(session)
    session.stop()


def early(ca: CA, folder: Path) -> Path:
    """A certificate that is valid from tomorrow."""
    certify(ca, folder, CLIENT)
    key = load_pem_private_key((folder / "tls.key").read_bytes(), None)
    valid = x509.load_pem_x509_certificate((folder / "tls.crt").read_bytes())
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    builder = x509.CertificateBuilder(
        valid.issuer,
        valid.subject,
        key.public_key(),  # type: ignore[arg-type]
        valid.serial_number,
        tomorrow,
        tomorrow + timedelta(days=1),
        list(valid.extensions),
    )
    made = builder.sign(ca._key, SHA256())
    (folder / "tls.crt").write_bytes(made.public_bytes(Encoding.PEM))
    return folder


def test_broker_that_is_not_of_our_ca_or_has_another_name(
    closed: Closed, other_ca: CA, tmp_path: Path, sessions: Callable[..., mqtt.Session]
) -> None:
    stranger = sessions(closed.broker.port, closed.client(ca=other_ca), timeout=PATIENCE)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(closed.of("broker"), elsewhere, ignore=PIPES)
    (elsewhere / "tls.crt").unlink()
    certify(closed.ca, tmp_path / "named", "broker", server_names=["broker.example"])
    for name in ("tls.crt", "tls.key"):
        shutil.copy(tmp_path / "named" / name, elsewhere)
    renamed = LocalBroker(tmp_path / "broker", "mosquitto", tls_dir=elsewhere).start()
    named = sessions(renamed.port, closed.client(), timeout=PATIENCE)
    assert "its certificate is refused (self-signed certificate" in ends_with(stranger)
    assert "its certificate is refused (IP address mismatch" in ends_with(named)
    renamed.stop()


def test_client_that_shows_a_brokers_certificate_cannot_be_a_broker(
    closed: Closed, tmp_path: Path, sessions: Callable[..., mqtt.Session]
) -> None:
    """Of a stolen client's key, a fake broker could otherwise be made."""
    fake = tmp_path / "fake"
    shutil.copytree(closed.of("broker"), fake, ignore=PIPES)
    stolen = closed.client()
    for name in ("tls.crt", "tls.key"):
        shutil.copy(stolen / name, fake)
    broker = LocalBroker(tmp_path / "broker", "mosquitto", tls_dir=fake).start()
    said = ends_with(sessions(broker.port, closed.client(), timeout=PATIENCE))
    assert "unsuitable certificate purpose" in said
    broker.stop()


def test_plain_and_tls_that_meet(
    closed: Closed, broker: LocalBroker, sessions: Callable[..., mqtt.Session]
) -> None:
    plain = sessions(closed.broker.port, None, timeout=PATIENCE)
    secured = sessions(broker.port, closed.client(), timeout=PATIENCE)
    assert "does it want TLS (TLS_DIR)?" in ends_with(plain)
    assert "no TLS there" in ends_with(secured)


def test_files_that_cannot_be_used_are_named(closed: Closed) -> None:
    for damage, words in {
        "ca.crt": "no certificate or crl found",
        "tls.crt": "damaged, or locked by a password",
        "tls.key": "damaged, or locked by a password",
    }.items():
        folder = closed.client()
        (folder / damage).write_text("garbage")
        with pytest.raises(IdentityError, match=f"{folder}/.*{words}"):
            Identity(folder)
        (folder / damage).unlink()
        with pytest.raises(IdentityError, match=f"{folder}/{damage}.*No such file.*TLS_DIR"):
            Identity(folder)
    folder, other = closed.client(), closed.client()
    shutil.copy(other / "tls.key", folder)
    with pytest.raises(IdentityError, match="key values mismatch"):
        Identity(folder)


def test_refused_service_tries_again_and_ends_with_the_reason(
    closed: Closed, services: Callable[..., Service]
) -> None:
    expired = closed.client("aggregator.r0", seconds=-1)
    service = services(
        "fedfog_aggregator.main", closed.broker, region="r0", tls_dir=expired, mqtt_timeout=5
    )
    assert service.wait(LIMIT) == 1
    log = service.log.read_text()
    assert log.count("mqtt_refused") > 1
    assert "service_failed" in log.splitlines()[-1]
    assert f"{expired}/tls.crt expired at" in log.splitlines()[-1]


def test_one_of_many_sessions_is_refused_and_the_others_go_on(
    closed: Closed, network: Network
) -> None:
    made = [
        SharedSession(
            network,
            "any",
            "127.0.0.1",
            closed.broker.port,
            [],
            timeout=PATIENCE,
            tls=Identity(folder),
        )
        for folder in (closed.client(seconds=-1), closed.client("r0/c2"), closed.client("r0/c3"))
    ]
    for session in made:
        session.start()
    seen: dict[SharedSession | None, type] = {}
    deadline = time.monotonic() + LIMIT
    while len(seen) < len(made):
        assert time.monotonic() < deadline, seen
        if item := network.next(1.0):
            seen[item[0]] = type(item[1])
    assert [seen[session] for session in made] == [SessionFailed, mqtt.Connected, mqtt.Connected]


# Renewed files


def test_certificate_renewed_on_disk_is_shown_at_the_next_connect(
    closed: Closed, sessions: Callable[..., mqtt.Session]
) -> None:
    folder = closed.client(seconds=-1)
    with capture_logs() as logged:
        session = sessions(closed.broker.port, folder)
        while not logged:
            session.next(0.1)
    assert logged[0]["event"] == "mqtt_refused"
    renewed = closed.client()
    # The key first: until the certificate follows they do not match, which is no reason to end.
    for name in ("tls.key", "tls.crt"):
        (renewed / name).replace(folder / name)
        session.next(0.5)
    assert session.connected or wait_for(session, mqtt.Connected)


# What passes


@pytest.mark.parametrize("size", [20_000_000, 1_000_000, 65_536, 16_384, 1])
def test_messages_of_all_sizes_arrive_whole(
    closed: Closed, network: Network, sessions: Callable[..., mqtt.Session], size: int
) -> None:
    """From and to a session of its own, and one of many."""
    payload = random.Random(size).randbytes(size)
    server = sessions(closed.broker.port, closed.of("central-server"))
    fog = sessions(closed.broker.port, closed.of("aggregator.r0"), f"fl/updates/{CLIENT}")
    client = SharedSession(
        network,
        "any",
        "127.0.0.1",
        closed.broker.port,
        ["fl/global_model"],
        tls=Identity(closed.client()),
    )
    wait_for(server, mqtt.Connected)
    wait_for(fog, mqtt.Connected)
    server.publish("fl/global_model", payload, retain=True)
    assert server.flush(LIMIT)
    client.start()
    received: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    deadline = time.monotonic() + LIMIT
    while received.empty():
        assert time.monotonic() < deadline
        if (item := network.next(1.0)) and isinstance(item[1], mqtt.Received):
            received.put(item[1].payload)
    assert received.get() == payload
    many = 3
    for _ in range(many):
        client.publish(f"fl/updates/{CLIENT}", payload)
    for _ in range(many):
        assert wait_for(fog, mqtt.Received).payload == payload


def test_messages_that_come_in_one_tls_record_are_all_read(
    closed: Closed, network: Network
) -> None:
    """A selector does not show what TLS has already taken from the socket. Mosquitto sends each
    message alone, so the server is played."""
    count = 50
    listener = socket.create_server(("127.0.0.1", 0))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(closed.of("broker") / "tls.crt", closed.of("broker") / "tls.key")
    done = threading.Event()

    def serve() -> None:
        sock, _ = listener.accept()
        with context.wrap_socket(sock, server_side=True) as connection:
            connection.recv(1000)
            connack, publish = b"\x20\x03\0\0\0", b"\x30\x05\0\x01t\0"
            connection.send(connack + b"".join(publish + bytes([i]) for i in range(count)))
            done.wait(LIMIT)

    thread = threading.Thread(target=serve)
    thread.start()
    session = SharedSession(
        network,
        "any",
        "127.0.0.1",
        listener.getsockname()[1],
        [],
        tls=Identity(closed.client()),
    )
    session.start()
    received: list[int] = []
    deadline = time.monotonic() + 5.0  # long before anything else would wake the thread
    while len(received) < count and time.monotonic() < deadline:
        if (item := network.next(0.5)) and isinstance(item[1], mqtt.Received):
            received.append(item[1].payload[0])
    done.set()
    thread.join()
    listener.close()
    assert received == list(range(count))


def test_half_open_connections_are_noticed_and_made_anew(
    tmp_path: Path,
    network: Network,
    sessions: Callable[..., mqtt.Session],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mqtt, "KEEPALIVE_SECONDS", 1)
    closed = Closed(tmp_path)
    alone = sessions(closed.broker.port, closed.of("central-server"))
    shared = SharedSession(
        network, "any", "127.0.0.1", closed.broker.port, [], tls=Identity(closed.client())
    )
    shared.start()
    assert closed.broker.process

    def both(kind: type) -> None:
        wait_for(alone, kind)
        deadline = time.monotonic() + LIMIT
        while not ((item := network.next(1.0)) and isinstance(item[1], kind)):
            assert time.monotonic() < deadline, f"no {kind.__name__}"

    both(mqtt.Connected)
    closed.broker.process.send_signal(signal.SIGSTOP)
    both(mqtt.Disconnected)
    closed.broker.process.send_signal(signal.SIGCONT)
    both(mqtt.Connected)
    closed.broker.stop()
    both(mqtt.Disconnected)
    closed.broker.start()
    both(mqtt.Connected)
    closed.broker.stop()
