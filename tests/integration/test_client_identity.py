"""The client's identity: got once, kept, renewed in a running client, and never shown to others."""

import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from conftest import LIMIT, REPOSITORY, Service
from fedfog.cli.broker import LocalBroker, free_port, installed_mosquitto
from fedfog.messages.codec import TensorTable, decode_json, decode_meta
from fedfog.messages.schemas import PartialMeta, RegionReceipt
from fedfog.ml.task import load_task
from fedfog.ml.training import state_arrays
from fedfog.settings import ClientSettings, EnrolmentSettings
from fedfog.transport import mqtt
from fedfog.transport.tls import Identity
from fedfog_client.events import Failed, Ready
from fedfog_client.identity import Identities
from fedfog_enrolment import pki
from fedfog_enrolment.ca import CA, common_name, pem
from fedfog_enrolment.http import Enrolment, Server
from fedfog_enrolment.registry import Issued, Registry
from secured import certify
from wire import model

pytestmark = pytest.mark.skipif(installed_mosquitto() is None, reason="Mosquitto is not installed")

REGION = "region_0"
ARRAYS = state_arrays(load_task("ecg5000", data_dir=REPOSITORY / "data").build_model(7))
TABLE = TensorTable.of(ARRAYS)
BASE = TABLE.flatten(ARRAYS)


class Forgetful(Enrolment):
    """Enrolment whose answers may get lost after their commit, if `from_renewal` from the first
    renewal on; then certificates last."""

    lose = False
    from_renewal = False
    lost = 0

    def join(self, body: bytes) -> Issued:
        return self._maybe(super().join(body))

    def renew(self, body: bytes, certificate: bytes | None) -> Issued:
        if self.from_renewal:
            self.lose = True
            self._settings = self._settings.model_copy(update={"cert_seconds": 3600.0})
        return self._maybe(super().renew(body, certificate))

    def _maybe(self, issued: Issued) -> Issued:
        if self.lose:
            self.lost += 1
            raise ConnectionResetError("the answer is lost")
        return issued


class Office:
    """A PKI, and the enrolment service in front of it."""

    def __init__(self, folder: Path, seconds: float = 3600) -> None:
        self.folder = folder
        self.ca = pki.ensure(folder, [REGION])
        self.token_file = folder / "join" / f"{REGION}.token"
        self.tls = folder / "clients"
        self.tls.mkdir()
        (self.tls / "ca.crt").write_bytes(pem(self.ca.certificate))
        self.registry = Registry(folder / "ca" / "enrolment.db")
        self._server = Server(
            ("127.0.0.1", 0), folder / "enrolment", folder / "ca" / "ca.crt", self._new(seconds)
        )
        self.url = f"https://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def _new(self, seconds: float) -> Forgetful:
        settings = EnrolmentSettings(pki_dir=self.folder, regions=REGION, cert_seconds=seconds)
        self.enrolment = Forgetful(self.ca, self.registry, settings)
        return self.enrolment

    def certify_for(self, seconds: float) -> None:
        self._server.enrolment = self._new(seconds)

    @property
    def settings(self) -> dict[str, object]:
        """What a client is started with."""
        return {
            "region": REGION,
            "tls_dir": self.tls,
            "enrolment_url": self.url,
            "join_token_file": self.token_file,
            "mqtt_timeout": 5,
        }

    def token(self, uses: int = 1, region: str = REGION) -> Path:
        path = self.folder / f"token-{time.monotonic_ns()}"
        path.write_text(self.registry.create_token(region, uses, time.time() + 3600) + "\n")
        return path

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def offices(tmp_path: Path) -> Iterator[Callable[..., Office]]:
    made: list[Office] = []

    def make(**options: Any) -> Office:
        made.append(Office(tmp_path / f"pki{len(made)}", **options))
        return made[-1]

    yield make
    for office in made:
        office.close()


class Applicant:
    """The identities of a process, without the rest of it."""

    def __init__(self, office: Office, folder: Path, *names: str, **settings: object) -> None:
        self.folder = folder
        self._events: list[Ready | Failed] = []
        self._count = len(names)
        self._changed = threading.Condition()
        self.settings = ClientSettings.model_validate(office.settings | settings)
        Identities(self.settings, {name: folder / name for name in names}, self._put).start()

    def _put(self, event: Ready | Failed) -> None:
        with self._changed:
            self._events.append(event)
            self._changed.notify()

    def wait(self, kind: type, count: int = 1) -> list[Any]:
        def found() -> list[Any]:
            return [event for event in self._events if isinstance(event, kind)]

        def enough() -> bool:
            return len(found()) >= count or len(self._events) == self._count

        with self._changed:
            assert self._changed.wait_for(enough, LIMIT), self._events
            assert len(found()) >= count, self._events
        return found()

    def own(self, name: str) -> tuple[bytes, bytes]:
        """Key and certificate, as they are on disk."""
        folder = self.folder / name / "identity"
        return (folder / "tls.key").read_bytes(), (folder / "tls.crt").read_bytes()


def refusal(applicant: Applicant) -> str:
    return str(applicant.wait(Failed)[0].error)


# Joining


def test_makes_its_key_itself_and_keeps_it_and_its_certificate_over_a_restart(
    offices: Callable[..., Office], tmp_path: Path
) -> None:
    office = offices()
    token = office.token(uses=1)
    first = Applicant(office, tmp_path / "state", "c1", join_token_file=token)
    assert isinstance(first.wait(Ready)[0].identity, Identity)
    key, certificate = first.own("c1")
    loaded = x509.load_pem_x509_certificate(certificate)
    assert common_name(loaded) == f"{REGION}/c1"
    folder = tmp_path / "state" / "c1" / "identity"
    assert sorted(path.name for path in folder.iterdir()) == ["tls.crt", "tls.key"]
    assert (folder / "tls.key").stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    token.unlink()  # the secret may be taken away
    office.close()
    again = Applicant(office, tmp_path / "state", "c1", join_token_file=token)
    again.wait(Ready)
    assert again.own("c1") == (key, certificate)


def test_answer_that_was_lost_is_asked_for_again(
    offices: Callable[..., Office], services: Callable[..., Service]
) -> None:
    """A token for one device is enough, and at a renewal nobody is locked out."""
    office = offices(seconds=4)
    client = Process(services, office, client_id="c1", join_token_file=office.token(uses=1))
    for event in ("certificate_obtained", "certificate_renewed"):
        client.lose_answers()
        client.until_said(event)


def test_each_of_many_clients_has_an_identity_of_its_own(
    offices: Callable[..., Office], tmp_path: Path
) -> None:
    office = offices()
    names = [f"sim-{number:04d}" for number in range(50)]
    applicant = Applicant(office, tmp_path / "state", *names)
    applicant.wait(Ready, len(names))
    assert len({applicant.own(name)[0] for name in names}) == len(names)
    certificates = [x509.load_pem_x509_certificate(applicant.own(name)[1]) for name in names]
    assert [common_name(c) for c in certificates] == [f"{REGION}/{name}" for name in names]


def test_refusals_say_what_to_do(offices: Callable[..., Office], tmp_path: Path) -> None:
    office = offices()
    garbage, missing = tmp_path / "garbage", tmp_path / "missing"
    garbage.write_text("no token")
    Applicant(office, tmp_path / "other", "c1").wait(Ready)
    for token, name, words in (
        (garbage, "c2", "token is unknown or revoked.*JOIN_TOKEN_FILE"),
        (office.token(uses=0), "c2", "token is used up.*JOIN_TOKEN_FILE"),
        (office.token(region="elsewhere"), "c2", "region elsewhere, but REGION is region_0"),
        (office.token(), "c1", "c1 is taken by another device.*CLIENT_ID"),
        (missing, "c2", "missing: No such file or directory .JOIN_TOKEN_FILE"),
    ):
        applicant = Applicant(office, tmp_path / "state", name, join_token_file=token)
        assert re.search(words, refusal(applicant))
    (tmp_path / "full").write_text("")
    assert "Not a directory" in (said := refusal(Applicant(office, tmp_path / "full", "c3")))
    assert "STATE_DIR" in said


def test_refused_client_of_many_does_not_stop_the_others(
    offices: Callable[..., Office], tmp_path: Path
) -> None:
    office = offices()
    Applicant(office, tmp_path / "other", "c2").wait(Ready)
    applicant = Applicant(office, tmp_path / "state", "c1", "c2", "c3")
    assert "c2 is taken" in refusal(applicant)
    assert {ready.client for ready in applicant.wait(Ready, 2)} == {"c1", "c3"}


def test_enrolment_that_comes_late_is_waited_for(
    offices: Callable[..., Office], services: Callable[..., Service], tmp_path: Path
) -> None:
    """And one that never comes ends the client, with the setting."""
    office = offices()
    office.close()
    settings = office.settings | {"mqtt_timeout": 1}
    nowhere = LocalBroker(tmp_path / "broker", "mosquitto")
    client = services("fedfog_client.main", nowhere, **settings)
    assert client.wait(LIMIT) == 1
    log = client.log.read_text()
    assert log.count("enrolment_unavailable") > 1
    assert "(ENROLMENT_URL) for 1 s (MQTT_TIMEOUT): [Errno 111]" in log.splitlines()[-1]


def test_client_that_waits_for_enrolment_ends_at_sigterm(
    offices: Callable[..., Office], services: Callable[..., Service], tmp_path: Path
) -> None:
    office = offices()
    office.close()
    nowhere = LocalBroker(tmp_path / "broker", "mosquitto")
    client = services("fedfog_client.main", nowhere, **office.settings | {"mqtt_timeout": 300})
    client.wait_for_log("enrolment_unavailable")
    assert client.stop() == 0


def test_fake_enrolment_does_not_get_the_token(
    offices: Callable[..., Office], services: Callable[..., Service], tmp_path: Path
) -> None:
    """Whatever it shows: nothing, another CA's certificate, or that of a client."""
    office = offices()
    (tmp_path / "ca").mkdir()
    foreign = CA.create(tmp_path / "ca")
    names = ["127.0.0.1"]
    shown = [
        certify(foreign, tmp_path / "foreign", "enrolment", server_names=names),
        certify(office.ca, tmp_path / "client", f"{REGION}/thief"),
        certify(office.ca, tmp_path / "named", "enrolment", server_names=["other.example"]),
    ]
    token = office.token_file.read_text().strip().encode()
    nowhere = LocalBroker(tmp_path / "broker", "mosquitto")
    for folder in [None, *shown]:
        with Fake(folder) as fake:
            settings = office.settings | {"enrolment_url": fake.url, "mqtt_timeout": 1}
            client = services("fedfog_client.main", nowhere, **settings)
            assert client.wait(LIMIT) == 1
        assert fake.visits > 1
        assert token not in fake.heard
        log = client.log.read_text()
        assert token.decode() not in log
        if folder:
            assert "its certificate is refused" in log.splitlines()[-1]


class Fake:
    """A server that notes all that it is told."""

    def __init__(self, shown: Path | None) -> None:
        self.heard, self.visits = b"", 0
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if shown else None
        if self._context and shown:
            self._context.load_cert_chain(shown / "tls.crt", shown / "tls.key")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:  # closed
                return
            self.visits += 1
            with sock, suppress(OSError):
                sock.settimeout(1.0)
                if self._context:
                    sock = self._context.wrap_socket(sock, server_side=True)
                while data := sock.recv(65536):
                    self.heard += data
                    if not self._context:
                        sock.sendall(b"HTTP/1.0 200 OK\r\n\r\n{}")

    def __enter__(self) -> "Fake":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()


# Later


def test_expired_at_start_it_joins_again_under_its_name(
    offices: Callable[..., Office], services: Callable[..., Service]
) -> None:
    office = offices(seconds=1)
    client = Process(services, office, client_id="c1", join_token_file=office.token(uses=1))
    client.until_expired()
    office.certify_for(3600)
    key = client.file("tls.key").read_bytes()
    client.start()
    client.until_said("certificate_obtained")
    assert "identity_unusable" in client.log
    assert "tls.crt expired at" in client.log
    assert client.name() == f"{REGION}/c1"
    assert client.file("tls.key").read_bytes() == key


def test_expired_while_a_renewal_was_lost_it_joins_with_the_key_that_is_known(
    offices: Callable[..., Office], services: Callable[..., Service]
) -> None:
    office = offices(seconds=2)
    office.enrolment.from_renewal = True
    client = Process(services, office, client_id="c1", join_token_file=office.token(uses=1))
    client.until_lost()
    client.until_expired()
    office.enrolment.lose = office.enrolment.from_renewal = False
    next_key = client.file("next.key").read_bytes()
    client.start()
    client.until_said("certificate_obtained")
    assert client.file("tls.key").read_bytes() == next_key
    assert not client.file("next.key").exists()
    assert client.name() == f"{REGION}/c1"


def test_killed_between_the_two_files_it_has_the_new_key(
    offices: Callable[..., Office], tmp_path: Path
) -> None:
    office = offices()
    Applicant(office, tmp_path / "state", "c1").wait(Ready)
    folder = tmp_path / "state" / "c1" / "identity"
    key = (folder / "tls.key").read_bytes()
    (folder / "tls.key").rename(folder / "next.key")
    certify(office.ca, tmp_path / "older", f"{REGION}/c1")
    (tmp_path / "older" / "tls.key").rename(folder / "tls.key")
    office.close()
    again = Applicant(office, tmp_path / "state", "c1")
    assert again.wait(Ready)[0].identity.fault() == ""
    assert (folder / "tls.key").read_bytes() == key


def test_revoked_client_ends_when_it_wants_to_renew(
    offices: Callable[..., Office], services: Callable[..., Service]
) -> None:
    office = offices(seconds=3)
    client = Process(services, office, client_id="c1")
    client.until_said("certificate_obtained")
    office.registry.revoke_client(f"{REGION}/c1")
    assert client.service.wait(LIMIT) == 1
    assert "certificate is revoked" in client.log.splitlines()[-1]


class Process:
    """A client's process, with an office and no broker."""

    def __init__(
        self, services: Callable[..., Service], office: Office, **settings: object
    ) -> None:
        self._office, self._services = office, services
        self._settings = office.settings | {"mqtt_timeout": 300} | settings
        self._nowhere = LocalBroker(office.folder.parent / "broker", "mosquitto")
        self.start()

    def start(self) -> None:
        self.service = self._services("fedfog_client.main", self._nowhere, **self._settings)

    @property
    def log(self) -> str:
        return self.service.log.read_text()

    def until_said(self, event: str) -> None:
        self.service.wait_for_log(event, LIMIT)

    def lose_answers(self) -> None:
        """Until one was lost."""
        enrolment = self._office.enrolment
        enrolment.lose = True
        self.until_lost(enrolment.lost)
        enrolment.lose = False

    def until_lost(self, before: int = 0) -> None:
        """An answer more than these was lost."""
        deadline = time.monotonic() + LIMIT
        while self._office.enrolment.lost == before:
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)

    def until_expired(self) -> None:
        """Killed before, so that it cannot renew."""
        self.until_said("certificate_obtained")
        self.service.kill()
        identity = Identity(self._office.tls, self.file("tls.crt").parent)
        deadline = time.monotonic() + LIMIT
        while "expired" not in identity.fault():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def file(self, name: str) -> Path:
        return self.service.log.parent / "state" / "identity" / name

    def name(self) -> str:
        return common_name(x509.load_pem_x509_certificate(self.file("tls.crt").read_bytes()))


def test_renewal_in_a_running_federation_loses_no_round_and_no_receipt(
    offices: Callable[..., Office], services: Callable[..., Service], tmp_path: Path
) -> None:
    """Three clients of a process and one alone, whose certificates last for seconds; the server is
    played."""
    office = offices(seconds=8)
    broker = LocalBroker(tmp_path / "broker", "mosquitto", tls_dir=office.folder / "broker").start()
    aggregator = services(
        "fedfog_aggregator.main",
        broker,
        region=REGION,
        tls_dir=office.folder / f"aggregator.{REGION}",
        clients_expected=4,
        round_deadline=20,
    )
    hosts = [
        services("fedfog_client.main", broker, name, **office.settings, client_id=name, **settings)
        for name, settings in {"sim": {"clients_per_process": 3}, "alone": {}}.items()
    ]
    names = {"alone", *(f"sim-{number:04d}" for number in range(3))}
    server = mqtt.Session(
        "any", broker.host, broker.port, [], tls=Identity(office.folder / "central-server")
    )
    monitor = mqtt.Session(
        "any",
        broker.host,
        broker.port,
        [f"fl/partial/{REGION}", f"fl/receipts/{REGION}"],
        tls=Identity(office.folder / "monitor"),
    )
    for session in (server, monitor):
        session.start()
        while not session.connected:
            session.next(0.1)

    def renewals() -> int:
        return min(host.log.read_text().count('"certificate_renewed"') for host in hosts)

    round = 0
    deadline = time.monotonic() + 2 * LIMIT
    while renewals() < 3:
        assert time.monotonic() < deadline
        round += 1
        server.publish(
            "fl/global_model", model(BASE, round - 1, table=TABLE, rounds=10_000), retain=True
        )
        assert members_of(monitor, round) == names, f"round {round}"
    # The first certificates have expired meanwhile.
    connected = [host.log.read_text().count('"mqtt_connected"') for host in hosts]
    assert connected == [3, 1]
    broker.stop()
    broker.start()
    for host, before in zip(hosts, connected, strict=True):
        while host.log.read_text().count('"mqtt_connected"') < 2 * before:
            assert time.monotonic() < deadline, host.log.read_text()
            time.sleep(0.05)
    for session in (server, monitor):
        session.stop()
    logs = "".join(host.log.read_text() for host in hosts)
    answered = {
        (line["update"], line["event"])
        for line in map(json.loads, logs.splitlines())
        if line["event"].startswith("update_")
    }
    assert "mqtt_refused" not in logs
    assert {update for update, _ in answered} >= {
        f"run/{r}/{REGION}/{name}" for r in range(1, round) for name in names
    }
    assert {event for _, event in answered} == {"update_accepted"}
    assert aggregator.stop() == 0
    broker.stop()


def members_of(monitor: mqtt.Session, round: int) -> set[str]:
    """Of its partial, when the receipts are out, too."""
    members: set[str] = set()
    told = False
    deadline = time.monotonic() + LIMIT
    while not (members and told):
        assert time.monotonic() < deadline, f"no partial or no receipt of round {round}"
        match monitor.next(1.0):
            case mqtt.Received(topic, payload) if payload and "partial" in topic:
                meta = decode_meta(payload, PartialMeta)
                if meta.round == round:
                    members = set(meta.members)
            case mqtt.Received(_, payload) if payload:
                told |= decode_json(payload, RegionReceipt).round == round
    return members


def test_all_tiers_train_over_tls(
    offices: Callable[..., Office], services: Callable[..., Service], tmp_path: Path
) -> None:
    """The broker has no plain listener, and SuperLink and enrolment have none."""
    office = offices()
    broker = LocalBroker(tmp_path / "broker", "mosquitto", tls_dir=office.folder / "broker").start()
    port = free_port()
    server = services(
        "fedfog_central_server.main",
        broker,
        tls_dir=office.folder / "central-server",
        superlink_tls_dir=office.folder / "superlink",
        flower_port=port,
        rounds=2,
        runs_dir=tmp_path / "runs",
        run_id="run",
        exit_when_finished=True,
    )
    fog = {"region": REGION, "clients_expected": 3}
    services(
        "fedfog_aggregator.main",
        broker,
        tls_dir=office.folder / f"aggregator.{REGION}",
        **fog,
    )
    services(
        "fedfog_bridge.main",
        broker,
        tls_dir=office.folder / f"bridge.{REGION}",
        region=REGION,
        flower_server=f"127.0.0.1:{port}",
    )
    many = {"client_id": "sim", "clients_per_process": 2}
    services("fedfog_client.main", broker, "sim", **office.settings, **many)
    named = services("fedfog_client.main", broker, "named", **office.settings)
    assert server.wait(2 * LIMIT) == 0
    history = json.loads((tmp_path / "runs" / "run" / "history.json").read_text())
    assert [record["num_clients"] for record in history["rounds"][-2:]] == [3, 3]
    # The name that it made itself is the one in its certificate.
    certificate = named.log.parent / "state" / "identity" / "tls.crt"
    name = common_name(x509.load_pem_x509_certificate(certificate.read_bytes()))
    assert f'"update": "run/2/{name}"' in named.log.read_text()
    broker.stop()
