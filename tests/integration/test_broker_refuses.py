"""Who does not get in, or gets nothing by it: the compose stack's configuration in a real
Mosquitto."""

import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import NameOID

from fedfog.cli.broker import LocalBroker, installed_mosquitto
from fedfog.service import ServiceError
from fedfog_enrolment import pki
from fedfog_enrolment.ca import CA, key_pem, new_key, pem
from secured import NOT_AUTHORIZED, Holder, certify, context, keep, shipped_broker

CONNECT = b"\x10\x0e\0\4MQTT\5\2\0\x3c\0\0\1x"  # MQTT 5, keepalive 60 s, client id x
CONNACK = 0x20
BAD_USERNAME = 0x86
TLS_1_2, TLS_1_3 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3


@dataclass(frozen=True)
class Gate:
    broker: LocalBroker
    folder: Path
    ca: CA

    @property
    def pki(self) -> Path:
        return self.folder / "pki"

    def certify(self, name: str, **more: object) -> Path:
        return certify(self.ca, self.folder / f"{len(list(self.folder.iterdir()))}", name, **more)  # type: ignore[arg-type]

    def enter(self, name: str, **more: object) -> Holder:
        return Holder(self.broker.port, self.certify(name), **more)  # type: ignore[arg-type]

    def knock(self, made: ssl.SSLContext) -> tuple[str, bytes]:
        """Connect over TLS: the alert, as far as there is one, and the answer to a CONNECT."""
        try:
            with (
                socket.create_connection(("localhost", self.broker.port), 10) as raw,
                made.wrap_socket(raw, server_hostname="localhost") as tls,
            ):
                tls.sendall(CONNECT)
                return "", tls.recv(100)
        except ssl.SSLError as error:
            return error.reason or "", b""
        except ConnectionError:
            return "", b""


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    if installed_mosquitto() is None:
        pytest.skip("Mosquitto is not installed (apt install mosquitto)")
    folder = tmp_path_factory.mktemp("gate")
    ca = pki.ensure(folder / "pki", ["r0", "r1"])
    broker = shipped_broker(folder / "broker", folder / "pki" / "broker").start()
    yield Gate(broker, folder, ca)
    broker.stop()


def signed(
    folder: Path,
    name: str | None,
    issuer: str,
    issuer_key: ec.EllipticCurvePrivateKey,
    days: tuple[int, int] = (-1, 1),
) -> Path:
    """A client's certificate that the CA would not make; `days` from now that it is valid."""

    def named(text: str | None) -> x509.Name:
        kind = NameOID.COMMON_NAME if text else NameOID.ORGANIZATION_NAME
        return x509.Name([x509.NameAttribute(kind, text or "nobody")])

    key, now = new_key(), datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=days[0]))
        .not_valid_after(now + timedelta(days=days[1]))
        .sign(issuer_key, SHA256())
    )
    return keep(folder, key_pem(key), pem(made), b"")


def ca_key(gate: Gate) -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key((gate.pki / "ca" / "ca.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


NAME = "FedFog CA"
# What is presented, and the alert that answers it.
REFUSED: dict[str, tuple[Callable[[Gate, Path], Path], str]] = {
    "of another CA": (
        lambda _, folder: signed(folder, "r0/c1", "Another CA", new_key()),
        "UNKNOWN_CA",
    ),
    "of another CA with the same name": (
        lambda _, folder: signed(folder, "r0/c1", NAME, new_key()),
        "DECRYPT_ERROR",
    ),
    "expired": (
        lambda gate, folder: signed(folder, "r0/c1", NAME, ca_key(gate), (-2, -1)),
        "CERTIFICATE_EXPIRED",
    ),
    "not yet valid": (
        lambda gate, folder: signed(folder, "r0/c1", NAME, ca_key(gate), (1, 2)),
        "BAD_CERTIFICATE",
    ),
    "revoked": (lambda gate, _: gate.pki / "probe-revoked", "CERTIFICATE_REVOKED"),
    "a server's": (lambda gate, _: gate.pki / "broker", "UNSUPPORTED_CERTIFICATE"),
}


@pytest.mark.parametrize("version", [TLS_1_2, TLS_1_3], ids=["TLS 1.2", "TLS 1.3"])
class TestHandshake:
    def test_a_valid_certificate_gets_in(self, gate: Gate, version: ssl.TLSVersion) -> None:
        made = context(gate.certify("r0/c1"))
        made.minimum_version = made.maximum_version = version
        _, answer = gate.knock(made)
        assert (answer[0], answer[3]) == (CONNACK, 0)

    @pytest.mark.parametrize("what", REFUSED)
    def test_a_certificate_that_is_not_valid_is_refused(
        self, gate: Gate, tmp_path: Path, version: ssl.TLSVersion, what: str
    ) -> None:
        make, alert = REFUSED[what]
        made = context(make(gate, tmp_path / "presented"), gate.pki / "client.r0" / "ca.crt")
        made.minimum_version = made.maximum_version = version
        said, answer = gate.knock(made)
        assert answer == b""
        if version == TLS_1_2:  # in TLS 1.3 it comes after the handshake, and may be lost
            assert said.endswith(alert)

    def test_no_certificate_is_refused(self, gate: Gate, version: ssl.TLSVersion) -> None:
        made = ssl.create_default_context(cafile=gate.pki / "client.r0" / "ca.crt")
        made.minimum_version = made.maximum_version = version
        said, answer = gate.knock(made)
        assert answer == b""
        assert said.endswith("HANDSHAKE_FAILURE") or version == TLS_1_3


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
def test_tls_1_1_is_refused(gate: Gate) -> None:
    made = context(gate.certify("r0/c1"))
    made.set_ciphers("ALL:@SECLEVEL=0")  # else this side would refuse it
    made.minimum_version = made.maximum_version = ssl.TLSVersion.TLSv1_1
    assert gate.knock(made) == ("TLSV1_ALERT_PROTOCOL_VERSION", b"")


def test_plain_mqtt_is_refused(gate: Gate) -> None:
    with socket.create_connection(("localhost", gate.broker.port), 10) as plain:
        plain.sendall(CONNECT)
        try:
            answer = plain.recv(100)
        except ConnectionResetError:
            answer = b""
    assert answer[:1] in (b"", b"\x15")  # closed, perhaps after an alert of TLS


def test_a_certificate_without_a_name_is_refused(gate: Gate, tmp_path: Path) -> None:
    folder = signed(tmp_path / "nameless", None, NAME, ca_key(gate))
    _, answer = gate.knock(context(folder, gate.pki / "client.r0" / "ca.crt"))
    assert (answer[0], answer[3]) == (CONNACK, BAD_USERNAME)


@pytest.mark.parametrize("name", ["r0", "c1", "r0/c1/x", "aggregator", "region/c1", "+/c1", "#"])
def test_a_name_that_is_not_of_a_client_of_the_region_writes_and_reads_nothing_there(
    gate: Gate, name: str
) -> None:
    owner, stranger = gate.enter("r0/c1"), gate.enter(name)
    aggregator = Holder(gate.broker.port, gate.pki / "aggregator.r0")
    aggregator.subscribe("#")
    stranger.subscribe("#")
    topics = ["fl/updates/r0/c1", "fl/presence/r0/c1"]
    assert set(stranger.publish(topics, name.encode()).values()) == {NOT_AUTHORIZED}
    assert max(owner.publish(topics, b"owner's").values()) < 0x80
    aggregator.publish(["fl/receipts/r0/c1", "fl/slots/r0/c1"])

    stranger.catch_up()
    aggregator.catch_up()
    assert {message.topic for message in stranger.received} == set()
    assert {message.payload for message in aggregator.received} == {b"owner's"}
    for holder in (owner, stranger, aggregator):
        holder.close()


def test_a_client_of_another_region_is_refused(gate: Gate) -> None:
    stranger = gate.enter("r1/c1")
    topics = ["fl/updates/r0/c1", "fl/presence/r0/c1", "fl/receipts/r0/c1", "fl/partial/r0"]
    assert set(stranger.publish(topics).values()) == {NOT_AUTHORIZED}
    stranger.close()


def test_a_client_reads_no_update_receipt_presence_or_slot_of_another(gate: Gate) -> None:
    reader, other = gate.enter("r0/c1"), gate.enter("r0/c2")
    aggregator = Holder(gate.broker.port, gate.pki / "aggregator.r0")
    for topic in ("#", "fl/updates/r0/c2", "fl/+/+/c2", "$share/aggregators/fl/updates/r0/+"):
        reader.subscribe(topic)
    sent = other.publish(["fl/updates/r0/c2", "fl/presence/r0/c2"])
    sent |= aggregator.publish(["fl/receipts/r0/c2", "fl/slots/r0/c2", "fl/receipts/r0/c1"])
    assert max(sent.values()) < 0x80
    reader.catch_up()
    assert {message.topic for message in reader.received} == {"fl/receipts/r0/c1"}
    for holder in (reader, other, aggregator):
        holder.close()


class TestTakeover:
    def test_a_foreign_client_id_does_not_cut_its_owner_off(self, gate: Gate) -> None:
        owner = Holder(gate.broker.port, gate.pki / "aggregator.r0")
        owner.subscribe("fl/updates/r0/+")
        client = gate.enter("r0/c1")
        intruder = gate.enter("r1/c1", client_id="aggregator.r0", username="aggregator.r0")
        client.publish(["fl/updates/r0/c1"], b"update")
        owner.catch_up()
        assert [message.payload for message in owner.received] == [b"update"]
        assert not owner.disconnected
        assert set(intruder.publish(["fl/receipts/r0"]).values()) == {NOT_AUTHORIZED}
        for holder in (owner, client, intruder):
            holder.close()

    def test_a_foreign_client_id_does_not_empty_its_owners_queue(self, gate: Gate) -> None:
        aggregator = gate.pki / "aggregator.r0"
        owner = Holder(gate.broker.port, aggregator, expiry=300)
        owner.subscribe("fl/updates/r0/+")
        owner.cut()
        client = gate.enter("r0/c1")
        for number in range(5):
            client.publish(["fl/updates/r0/c1"], b"%d" % number)
        gate.enter("r1/c1", client_id="aggregator.r0").close()  # with a clean start
        gate.enter("r1/c1", client_id="aggregator.r0", clean=False).close()

        back = Holder(gate.broker.port, aggregator, clean=False)
        assert back.session_present
        back.catch_up()
        assert [message.payload for message in back.received] == [b"0", b"1", b"2", b"3", b"4"]
        back.close()
        client.close()


@pytest.mark.parametrize("topic", ["fl/global_model", "fl/status/r0", "fl/presence/r0/c2"])
def test_a_forged_will_is_not_published(gate: Gate, topic: str) -> None:
    observer = Holder(gate.broker.port, gate.pki / "monitor")
    observer.subscribe("fl/#")
    gate.enter("r0/c1", will=(topic, b"forged", True)).cut()
    gate.enter("r0/c1", will=("fl/presence/r0/c1", b"honest", True)).cut()
    gate.enter("r0/c1").close()  # takes the session over: its will is out
    observer.catch_up()
    arrived = {(message.topic, message.payload) for message in observer.received}
    assert (topic, b"forged") not in arrived
    assert ("fl/presence/r0/c1", b"honest") in arrived
    observer.close()


def test_what_is_larger_than_allowed_is_cut_off_when_it_is_announced(gate: Gate) -> None:
    """The broker keeps no room for it: nothing of the payload was sent."""
    with (
        socket.create_connection(("localhost", gate.broker.port), 10) as raw,
        context(gate.certify("r0/c1")).wrap_socket(raw, server_hostname="localhost") as tls,
    ):
        tls.sendall(CONNECT)
        assert tls.recv(100)[0] == CONNACK
        tls.sendall(b"\x32\xff\xff\xff\x7f")  # PUBLISH of 268,435,455 bytes
        assert tls.recv(100) == b"\xe0\x01\x95"  # DISCONNECT: packet too large


def test_the_largest_model_that_is_allowed_goes_through(gate: Gate) -> None:
    client, aggregator = gate.enter("r0/c1"), Holder(gate.broker.port, gate.pki / "aggregator.r0")
    aggregator.subscribe("fl/updates/r0/+")
    update = bytes(67_108_864 - 100)
    for payload in b"small", update:
        assert max(client.publish(["fl/updates/r0/c1"], payload).values()) < NOT_AUTHORIZED
    aggregator.until(lambda: len(aggregator.received) == 2)
    assert aggregator.received[1].payload == update
    client.close()
    aggregator.close()


def test_the_demos_broker_is_as_closed_as_the_stacks(gate: Gate, tmp_path: Path) -> None:
    """The options of the local broker are those of mosquitto.conf, but for places and sizes."""
    local = tmp_path / "local" / "broker.conf"
    LocalBroker(tmp_path / "local", "mosquitto", tls_dir=gate.pki / "broker")
    shipped = gate.folder / "broker" / "broker.conf"
    options = [
        {line for line in file.read_text().splitlines() if line and line[0] != "#"}
        for file in (local, shipped)
    ]
    different = {line.split()[0] for line in options[0] - options[1]}
    assert different == {
        "listener",
        "max_packet_size",
        "max_queued_bytes",
        "persistence",
        "persistence_location",
    }
    access = {line for line in options[1] if str(gate.pki) in line or "certificate" in line}
    assert len(access) == 6
    assert access <= options[0]


def test_the_embedded_broker_cannot_be_closed(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="install Mosquitto"):
        LocalBroker(tmp_path, "embedded", tls_dir=tmp_path)
