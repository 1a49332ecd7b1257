"""The guard of the broker's lists, beside a real Mosquitto configured as in the compose stack."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from conftest import LIMIT, Service
from fedfog.cli.broker import LocalBroker, installed_mosquitto
from fedfog.messages.topics import Topics
from fedfog.settings import GuardSettings
from fedfog_enrolment import guard, pki
from fedfog_enrolment.acl import acl
from fedfog_enrolment.ca import CA, load_certificate
from secured import NOT_AUTHORIZED, Holder, certify, shipped_broker

REGIONS = ["r0", "r1"]


class Stack:
    """A broker and its guard; the broker sees the lists through links, which a test can change
    behind the guard's back."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pki = folder, folder / "pki"
        self.ca = pki.ensure(self.pki, REGIONS)
        self.seen = folder / "seen"
        self.seen.mkdir()
        for name in ("ca.crt", "tls.crt", "tls.key", "ca.crl", "acl"):
            (self.seen / name).symlink_to(self.pki / "broker" / name)
        self.broker: LocalBroker = shipped_broker(folder / "broker", self.seen).start()
        self.socket = folder / "guard.sock"
        self.guard = self.start_guard()
        self.guard.wait_for_log("guard_listens")
        self._holders: list[Holder] = []

    def start_guard(self) -> Service:
        assert self.broker.process is not None
        settings = {
            "PKI_DIR": self.pki,
            "MQTT_BROKER": "localhost",
            "MQTT_PORT": self.broker.port,
            "BROKER_PID": self.broker.process.pid,
            "GUARD_SOCKET": self.socket,
            "HEALTH_FILE": self.folder / "health",
        }
        env = {name: str(value) for name, value in settings.items()}
        return Service("fedfog_enrolment.guard", self.folder / "guard", env)

    def install(self, crl: bytes | None = None, access: str | None = None) -> None:
        guard.install(self.socket, crl, access)

    def crl(self, *serials: int) -> bytes:
        """A list with these, and what was revoked before."""
        return self.ca.crl(self.ca.revoked(self.pki / "broker" / "ca.crl") | set(serials))

    def files(self) -> list[bytes]:
        return [(self.pki / "broker" / name).read_bytes() for name in ("ca.crl", "acl")]

    def certify(self, name: str, seconds: float = 3600) -> Path:
        number = len(list(self.folder.iterdir()))
        return certify(self.ca, self.folder / f"holder{number}", name, seconds)

    def enter(self, folder: Path) -> Holder:
        self._holders.append(Holder(self.broker.port, folder))
        return self._holders[-1]

    def assert_closed_to_strangers(self) -> None:
        """The broker is up, and follows its lists."""
        client = self.enter(self.certify("r0/c1"))
        assert set(client.publish(["fl/global_model", "fl/cue"]).values()) == {NOT_AUTHORIZED}
        assert max(client.publish(["fl/updates/r0/c1"]).values()) < NOT_AUTHORIZED
        client.close()
        self.assert_refused(self.pki / "probe-revoked")

    def assert_refused(self, folder: Path) -> None:
        with pytest.raises(OSError):  # an alert of TLS, or a connection that ends
            Holder(self.broker.port, folder)

    def stop(self) -> None:
        self.guard.kill()
        self.broker.stop()


@contextmanager
def started(folder: Path) -> Iterator[Stack]:
    if installed_mosquitto() is None:
        pytest.skip("Mosquitto is not installed (apt install mosquitto)")
    stack = Stack(folder)
    try:
        yield stack
    finally:
        stack.stop()


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    with started(tmp_path) as stack:
        yield stack


@pytest.fixture(scope="class")
def lasting_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """For tests that leave it as it was."""
    with started(tmp_path_factory.mktemp("guarded")) as stack:
        yield stack


def outdated(stack: Stack) -> bytes:
    """A list of the right CA whose time is over: with it, nobody could connect."""
    key = load_pem_private_key((stack.pki / "ca" / "ca.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    now = datetime.now(UTC)
    serial = load_certificate(stack.pki / "probe-revoked" / "tls.crt").serial_number
    entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
    return (
        x509.CertificateRevocationListBuilder()
        .issuer_name(stack.ca.certificate.subject)
        .last_update(now - timedelta(days=2))
        .next_update(now - timedelta(days=1))
        .add_revoked_certificate(entry)
        .sign(key, SHA256())
        .public_bytes(Encoding.PEM)
    )


def foreign(stack: Stack) -> bytes:
    folder = stack.folder / "another CA"
    folder.mkdir()
    return CA.create(folder).crl([1])


BAD_CRLS: dict[str, Callable[[Stack], bytes]] = {
    "empty": lambda _: b"",
    "truncated": lambda stack: stack.crl()[:-40],
    "no list": lambda stack: (stack.pki / "broker" / "ca.crt").read_bytes(),
    "of another CA": foreign,
    "out of date": outdated,
    "without those revoked before": lambda stack: stack.ca.crl([]),
}
BAD_ACLS: dict[str, Callable[[str], str]] = {
    "empty": lambda _: "",
    "cut between lines": lambda text: text[: text.index("user monitor")],
    "cut within a line": lambda text: text[:-5],
    "unknown word": lambda text: text.replace("pattern write", "patern write", 1),
    "unknown right": lambda text: text.replace("topic write", "topic wirte", 1),
    "wildcard out of place": lambda text: text.replace("fl/slots/+/+", "fl/slots/+x/+", 1),
    "line without end": lambda text: text.replace("\n\nuser", "\0\n\nuser", 1),
}


class TestDamaged:
    """A list that is damaged is not installed, and the broker goes on with what it had."""

    @pytest.mark.parametrize("damage", BAD_CRLS)
    def test_list_of_revoked_certificates_is_not_installed(
        self, lasting_stack: Stack, damage: str
    ) -> None:
        before = lasting_stack.files()
        with pytest.raises(guard.GuardError, match=r"not installed.*revoked certificates"):
            lasting_stack.install(crl=BAD_CRLS[damage](lasting_stack))
        assert lasting_stack.files() == before
        lasting_stack.assert_closed_to_strangers()

    @pytest.mark.parametrize("damage", BAD_ACLS)
    def test_access_list_is_not_installed(self, lasting_stack: Stack, damage: str) -> None:
        before = lasting_stack.files()
        with pytest.raises(guard.GuardError, match=r"not installed.*access list"):
            lasting_stack.install(access=BAD_ACLS[damage](acl(REGIONS, Topics(), {})))
        assert lasting_stack.files() == before
        lasting_stack.assert_closed_to_strangers()

    @pytest.mark.parametrize("name", ["ca.crl", "acl"])
    @pytest.mark.parametrize("damage", [None, b"", b"junk\n"], ids=["missing", "empty", "junk"])
    def test_file_on_the_disk_is_not_read_by_the_broker(
        self, lasting_stack: Stack, name: str, damage: bytes | None
    ) -> None:
        file = lasting_stack.pki / "broker" / name
        file.unlink()
        if damage is not None:
            file.write_bytes(damage)
        with pytest.raises(guard.GuardError, match="not installed"):
            lasting_stack.install()
        lasting_stack.assert_closed_to_strangers()

        # A good one takes its place.
        crl = lasting_stack.ca.crl(
            [load_certificate(lasting_stack.pki / "probe-revoked/tls.crt").serial_number]
        )
        lasting_stack.install(crl, acl(REGIONS, Topics(), {}))
        lasting_stack.assert_closed_to_strangers()

    def test_at_the_guards_start_it_ends_the_guard_and_not_the_broker(self, stack: Stack) -> None:
        stack.guard.stop()
        (stack.pki / "broker" / "acl").write_text("junk\n")
        second = stack.start_guard()
        second.wait_for_log("the end of the access list is missing")
        assert second.wait() == 1
        stack.assert_closed_to_strangers()


class TestBehindTheGuardsBack:
    """What the broker reads is not what the guard wrote: the listener is closed."""

    @pytest.mark.parametrize(
        ("name", "damage"),
        [("acl", None), ("acl", b"junk\n"), ("ca.crl", None), ("ca.crl", b""), ("ca.crl", b"x\n")],
    )
    def test_the_broker_is_ended_and_the_reason_told(
        self, stack: Stack, name: str, damage: bytes | None
    ) -> None:
        link = stack.seen / name
        link.unlink()
        if damage is not None:
            link.write_bytes(damage)
        reason = {"ca.crl": "it takes revoked certificates", "acl": "anybody may write"}[name]
        with pytest.raises(guard.GuardError, match=f"the broker was ended: .*{reason}"):
            stack.install()
        assert stack.broker.process is not None
        assert stack.broker.process.wait(LIMIT) == 0
        assert stack.guard.wait() == 1
        assert "broker_ended" in stack.guard.log.read_text()
        with pytest.raises(ConnectionRefusedError):
            stack.enter(stack.certify("r0/c1"))

    def test_so_it_is_at_the_guards_start(self, stack: Stack) -> None:
        stack.guard.stop()
        (stack.seen / "acl").unlink()
        second = stack.start_guard()
        second.wait_for_log("anybody may write.*broker_ended")
        assert second.wait() == 1
        assert stack.broker.process is not None
        assert stack.broker.process.wait(LIMIT) == 0


def test_a_broker_that_is_slow_to_refuse_is_asked_again(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands still for longer than one attempt lasts, and is not ended for that."""
    assert stack.broker.process is not None
    broker = psutil.Process(stack.broker.process.pid)
    visit, asked = guard._Broker._visit, []

    def slow(self: Any, name: str, *rest: Any) -> list[int]:
        if name == guard.REVOKED:
            asked.append(name)
            if len(asked) == 1:
                broker.suspend()
        try:
            return visit(self, name, *rest)
        finally:
            broker.resume()

    monkeypatch.setattr(guard._Broker, "_visit", slow)
    settings = GuardSettings(
        pki_dir=stack.pki,
        mqtt_broker="localhost",
        mqtt_port=stack.broker.port,
        broker_pid=broker.pid,
    )
    guard.Guard(settings).install()
    assert len(asked) == 2
    stack.assert_closed_to_strangers()


def test_a_revoked_client_is_cut_off_and_nobody_else(stack: Stack) -> None:
    folder = stack.certify("r0/c1")
    client, other = stack.enter(folder), stack.enter(stack.certify("r0/c2"))
    aggregator = stack.enter(stack.pki / "aggregator.r0")
    aggregator.subscribe("fl/updates/r0/+")

    stack.install(stack.crl(load_certificate(folder / "tls.crt").serial_number))
    stack.assert_refused(folder)
    # It still has its session. A certificate that lives for a moment takes that over.
    client.catch_up()
    stack.enter(stack.certify("r0/c1", seconds=60)).close()
    with pytest.raises(ConnectionError):
        client.publish(["fl/updates/r0/c1"], b"revoked")
        client.catch_up()
    stack.assert_refused(folder)

    other.publish(["fl/updates/r0/c2"], b"honest")
    aggregator.catch_up()
    assert [message.payload for message in aggregator.received] == [b"honest"]
    assert not other.disconnected
    assert not aggregator.disconnected


def test_a_new_region_is_let_in_and_nobody_is_cut(stack: Stack) -> None:
    client, newcomer = stack.enter(stack.certify("r0/c1")), stack.enter(stack.certify("bridge.r2"))
    assert set(newcomer.publish(["fl/bell"]).values()) == {NOT_AUTHORIZED}
    stack.install(access=acl([*REGIONS, "r2"], Topics(), {}))
    assert max(newcomer.publish(["fl/bell"]).values()) < NOT_AUTHORIZED
    client.catch_up()
    assert not client.disconnected


def test_a_restarted_guard_goes_on_with_what_was_revoked(stack: Stack) -> None:
    folder = stack.certify("r0/c1")
    stack.install(stack.crl(load_certificate(folder / "tls.crt").serial_number))
    stack.guard.kill()
    second = stack.start_guard()
    second.wait_for_log("guard_listens")
    stack.assert_refused(folder)
    only_the_probe = [load_certificate(stack.pki / "probe-revoked/tls.crt").serial_number]
    with pytest.raises(guard.GuardError, match="lacks 1"):
        stack.install(stack.ca.crl(only_the_probe))
    stack.guard = second


def test_without_a_guard_the_asker_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(guard.GuardError, match="is fedfog-guard running"):
        guard.install(tmp_path / "guard.sock", b"")


def test_the_health_check_does_not_disturb_the_guard(stack: Stack) -> None:
    """It has the probe's certificate, so that the two take the session from each other."""
    ask = ["mosquitto_sub", "-h", "localhost", "-p", str(stack.broker.port)]
    ask += ["--cafile", str(stack.pki / "probe" / "ca.crt")]
    ask += ["--cert", str(stack.pki / "probe" / "tls.crt")]
    ask += ["--key", str(stack.pki / "probe" / "tls.key")]
    ask += ["-t", "$SYS/broker/version", "-C", "1", "-W", str(int(LIMIT))]
    for _ in range(5):
        check = subprocess.Popen(ask, stdout=subprocess.PIPE)
        stack.install()
        said, _ = check.communicate(timeout=LIMIT)
        assert said.startswith(b"mosquitto version")
        assert check.returncode == 0
