"""Enrolment over HTTPS: who gets a certificate and who does not, also in a crash or an attack."""

import json
import re
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedfog.control import ControlError
from fedfog_enrolment import http, pki
from fedfog_enrolment.ca import CA, EARLY, common_name, key_pem, new_key, pem
from halting import Halt
from office import REGIONS, Office, request_of
from secured import certify, keep

Offices = Callable[..., Office]


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    """One for all tests that leave it as it is, but for tokens and clients of their own."""
    started = Office(tmp_path_factory.mktemp("office"))
    yield started
    started.service.kill()


@pytest.fixture
def offices(tmp_path: Path) -> Iterator[Offices]:
    started: list[Office] = []

    def start(**settings: object) -> Office:
        started.append(Office(tmp_path, **settings))
        return started[-1]

    yield start
    for one in started:
        if one.service.process.poll() is None:
            one.service.kill()


def test_a_request_decides_nothing_but_the_key(office: Office) -> None:
    key = new_key()
    asked = [
        x509.BasicConstraints(ca=True, path_length=None),
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]),
        x509.SubjectAlternativeName([x509.DNSName("mosquitto")]),
    ]
    csr = request_of(key, "central-server", asked)
    status, answer = office.post("/v1/join", {"token": office.token(), "csr": csr})
    assert status == 200
    certificate = x509.load_pem_x509_certificate(answer["certificate"].encode())
    assert re.fullmatch(r"r0/c-[0-9a-f]{12}", answer["name"])
    assert [name.rfc4514_string() for name in certificate.subject] == [f"CN={answer['name']}"]
    assert office.ca.issued(certificate)
    assert certificate.public_key() == key.public_key()
    extensions = certificate.extensions
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usage = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    with pytest.raises(x509.ExtensionNotFound):
        extensions.get_extension_for_class(x509.SubjectAlternativeName)
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    assert end - begin == timedelta(days=1) + EARLY


def test_a_lost_answer_is_asked_for_again_and_nothing_is_counted_twice(office: Office) -> None:
    token, key = office.token(), new_key()
    before = office.unused()
    first = office.join(token, key, "lost")
    assert first[0] == 200
    assert [office.join(token, key, "lost") for _ in range(3)] == [first] * 3
    assert office.unused() == [*before[:-1], "0 of 1"]


def test_one_of_many_gets_the_last_use(office: Office) -> None:
    token = office.token(uses=1)
    with ThreadPoolExecutor(20) as pool:
        statuses = pool.map(lambda key: office.join(token, key)[0], [new_key() for _ in range(20)])
    assert sorted(statuses) == [200] + [403] * 19


def test_tokens_that_are_over_admit_nobody(office: Office) -> None:
    used_up, revoked, expired = office.token(), office.token(), office.token(hours=1e-9)
    assert office.join(used_up, new_key())[0] == 200
    ids = [row[0] for row in office.ask("tokens").rows]
    office.ask("revoke token", ids[-2])
    before = office.unused()
    for token, word in (
        (used_up, "used up"),
        (revoked, "revoked"),
        (expired, "expired"),
        ("unknown", "unknown"),
    ):
        status, answer = office.join(token, new_key())
        assert (status, word in answer["error"]) == (403, True), answer
    assert office.unused() == before
    states = [row[4] for row in office.ask("tokens").rows]
    assert states[-3:] == ["valid", "revoked", "expired"]


def test_a_key_keeps_its_name_and_token(office: Office) -> None:
    device = office.device("keeps")
    before = office.unused()
    for token, name in (
        (office.token("r0"), "keeps"),  # a replayed request does not get in by another token
        (office.token("r1"), ""),
        (device.token, "another"),
    ):
        assert office.join(token, device.key, name)[0] == 403
    assert office.unused() == [*before, "1 of 1", "1 of 1"]


def test_a_name_is_taken_until_it_is_revoked_and_belongs_to_a_region(office: Office) -> None:
    office.device("taken")
    token = office.token(uses=2)
    assert office.join(token, new_key(), "taken")[0] == 409
    assert office.unused()[-1] == "2 of 2"
    assert office.device("taken", office.token("r1")).name == "r1/taken"


def test_a_region_with_regions_below_it_has_no_clients(offices: Offices) -> None:
    office = offices(region_parents="r1=r0")
    with pytest.raises(ControlError, match="has regions below it"):
        office.token("r0")
    first = (office.pki / "join" / "r0.token").read_text()
    before = office.unused()
    status, answer = office.join(first, new_key())
    assert (status, office.unused()) == (403, before)
    assert "has regions below it" in answer["error"]
    assert office.device("", office.token("r1")).name.startswith("r1/")


@pytest.mark.parametrize(
    "name", ["r0/c1", "+", "#", "C1", "c1\n", " ", "-c", "c.1", "c" * 32, "c\0", "ç"]
)
def test_bad_names_are_refused(office: Office, name: str) -> None:
    token = office.token()
    assert office.join(token, new_key(), name)[0] == 400
    assert office.unused()[-1] == "1 of 1"


def with_bad_signature() -> str:
    one, other = new_key(), new_key()
    data = x509.load_pem_x509_csr(request_of(one).encode()).public_bytes(Encoding.DER)
    forged = data.replace(point(one), point(other))
    assert forged != data
    return x509.load_der_x509_csr(forged).public_bytes(Encoding.PEM).decode()


def point(key: ec.EllipticCurvePrivateKey) -> bytes:
    numbers = key.public_key().public_numbers()
    return numbers.x.to_bytes(32) + numbers.y.to_bytes(32)


@pytest.mark.parametrize(
    ("csr", "word"),
    [
        pytest.param(with_bad_signature, "signature", id="signature"),
        pytest.param(lambda: request_of(rsa.generate_private_key(65537, 2048)), "P-256", id="RSA"),
        pytest.param(
            lambda: request_of(ec.generate_private_key(ec.SECP384R1())), "P-256", id="P-384"
        ),
        pytest.param(lambda: "", "not a certificate request", id="empty"),
        pytest.param(lambda: "-----BEGIN CERTIFICATE-----\n", "not a", id="certificate"),
    ],
)
def test_bad_requests_are_refused(office: Office, csr: Callable[[], str], word: str) -> None:
    token = office.token()
    status, answer = office.post("/v1/join", {"token": token, "csr": csr()})
    assert (status, word in answer["error"]) == (400, True), answer
    assert office.unused()[-1] == "1 of 1"


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{", b"\xff", b'{"csr": "x"}', b'{"token": 1, "csr": "x"}', b"[" * 8000],
    ids=repr,
)
def test_bad_json_is_refused(office: Office, body: bytes) -> None:
    assert office.post("/v1/join", body)[0] == 400


def test_a_long_body_is_refused_before_it_is_read(office: Office) -> None:
    assert office.post("/v1/join", b" " * (http.MAX_BODY + 1))[0] == 413
    with secured_socket(office) as connection:
        connection.sendall(b"POST /v1/join HTTP/1.1\r\nContent-Length: 1000000000000\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.0 413 ")
    with secured_socket(office) as connection:
        connection.sendall(b"POST /v1/join HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.0 411 ")


def secured_socket(office: Office, client: ssl.SSLContext | None = None) -> ssl.SSLSocket:
    plain = socket.create_connection(("127.0.0.1", office.port), 30)
    return (client or office.client_context()).wrap_socket(plain, server_hostname="localhost")


def test_health_and_nothing_else(office: Office) -> None:
    for path, status in (("/v1/health", 200), ("/", 404), ("/v1/join", 404), ("/../ca.key", 404)):
        connection = HTTPSConnection("localhost", office.port, context=office.client_context())
        connection.request("GET", path)
        assert connection.getresponse().status == status
        connection.close()
    assert office.post("/v1/other", {})[0] == 404


def test_renewal_gives_a_new_key_the_same_name_once(office: Office) -> None:
    first = office.device("renewing")
    key = new_key()
    answer = first.renew(key)
    assert answer[0] == 200
    assert answer[1]["name"] == first.name
    renewed = x509.load_pem_x509_certificate(answer[1]["certificate"].encode())
    assert (common_name(renewed), renewed.public_key()) == (first.name, key.public_key())
    # Lost answer: asked again with the former certificate.
    assert first.renew(key) == answer
    # Stolen: another key does not get one by the former certificate.
    assert first.renew(new_key())[0] == 403
    # Nor does the former request, sent again, get a certificate for the former key.
    assert office.join(first.token, first.key, "renewing")[0] == 403


def test_a_chain_of_renewals_leaves_one_way(office: Office) -> None:
    first = office.device("chain")
    second = first.renewed()
    third = second.renewed()
    assert first.renew(second.key)[0] == 403
    assert second.renew(third.key) == (200, {"certificate": third.pem, "name": third.name})
    assert third.renew(office.device().key)[0] == 403  # a key of somebody else


def test_renewal_needs_a_certificate_of_a_client_of_ours(office: Office, tmp_path: Path) -> None:
    question = {"csr": request_of(new_key())}
    assert office.post("/v1/renew", question)[0] == 401
    for service in ("aggregator.r0", "probe-revoked"):
        assert office.post("/v1/renew", question, office.pki / service)[0] == 403
    unknown = certify(office.ca, tmp_path / "unknown", "r0/unknown")
    assert office.post("/v1/renew", question, unknown)[0] == 403
    (tmp_path / "elsewhere").mkdir()
    elsewhere = CA.create(tmp_path / "elsewhere")
    for identity in (
        certify(office.ca, tmp_path / "expired", "r0/expired", seconds=-1),
        certify(office.ca, tmp_path / "server", "r0/server", server_names=["localhost"]),
        certify(elsewhere, tmp_path / "foreign", "r0/foreign"),
        office.pki / "broker",
    ):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            office.post("/v1/renew", question, identity)


def test_a_hostile_client_cannot_fill_the_disk_with_renewals(office: Office) -> None:
    device = office.device("hoarder")
    for _ in range(19):
        device = device.renewed()
    assert device.renew(new_key())[0] == 429


def test_an_expired_client_joins_again_under_its_name(offices: Offices) -> None:
    office = offices(cert_seconds=4)
    token, of_another_region = office.token("r0", uses=2), office.token("r1")
    device = office.device("c1", token)
    lost = new_key()
    status, answer = device.renew(lost)
    assert status == 200
    until = x509.load_pem_x509_certificate(answer["certificate"].encode()).not_valid_after_utc
    while datetime.now(UTC) < until + timedelta(seconds=1):
        assert office.join(of_another_region, device.key)[0] == 403
    with pytest.raises((ssl.SSLError, ConnectionError)):
        device.renew(new_key())
    assert office.join(of_another_region, device.key)[0] == 403
    assert office.join(token, new_key(), "c1")[0] == 409
    # The answer to the renewal was lost, so the device knows its former key for sure.
    status, answer = office.join(token, device.key, "c1")
    assert (status, answer["name"]) == (200, "r0/c1")
    assert answer["certificate"] != device.pem
    assert office.unused()[-2:] == ["1 of 2", "1 of 1"]  # it has been counted before


@pytest.mark.parametrize("number", [100, http.MAX_CONNECTIONS + 44])
def test_silent_connections_do_not_block_a_join(office: Office, number: int) -> None:
    silent = [socket.create_connection(("127.0.0.1", office.port)) for _ in range(number)]
    try:
        assert office.join(office.token(), new_key())[0] == 200
        if number < http.MAX_CONNECTIONS:  # it did not wait for one of them to end
            silent[0].setblocking(False)
            with pytest.raises(BlockingIOError):
                silent[0].recv(1)
    finally:
        for one in silent:
            one.close()


def test_a_connection_that_sends_byte_by_byte_is_ended(office: Office) -> None:
    with secured_socket(office) as connection:
        connection.settimeout(0.5)
        with pytest.raises((ConnectionError, ssl.SSLEOFError, EOFError)):
            for _ in range(120):
                connection.sendall(b"x")
                try:
                    if not connection.recv(1):
                        raise EOFError
                except TimeoutError:
                    continue
    assert office.join(office.token(), new_key())[0] == 200


def test_plaintext_and_old_tls_are_refused(office: Office) -> None:
    with socket.create_connection(("127.0.0.1", office.port)) as plain:
        plain.sendall(b"GET /v1/health HTTP/1.1\r\n\r\n")
        with suppress(ConnectionResetError):
            assert b"HTTP" not in plain.recv(100)
    old = office.client_context()
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, ConnectionError)):
        secured_socket(office, old)


JOIN, RENEW, ISSUE = (
    f"fedfog_enrolment.registry:Registry.{name}" for name in ("join", "renew", "_issue")
)


def asked_in_vain(ask: Callable[[], Any]) -> threading.Thread:
    def work() -> None:
        with pytest.raises((OSError, ssl.SSLError)):
            ask()

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_killed_between_commit_and_answer_it_gives_the_same_certificate(
    offices: Offices, tmp_path: Path
) -> None:
    halt = Halt(tmp_path / "halt", JOIN, RENEW)
    office = offices(**halt.settings)
    token, key = office.token(), new_key()
    halt.arm(JOIN, "after")
    asking = asked_in_vain(lambda: office.join(token, key, "c1"))
    halt.kill_there(office.service)
    asking.join()
    office.start().wait_for_log("enrolment_ready")
    [committed] = office.ask("clients").rows
    assert office.unused()[-1] == "0 of 1"
    status, answer = office.join(token, key, "c1")
    assert (status, answer["name"], office.ask("clients").rows) == (200, "r0/c1", [committed])
    assert office.unused()[-1] == "0 of 1"

    folder = keep(
        tmp_path / "c1", key_pem(key), answer["certificate"].encode(), pem(office.ca.certificate)
    )
    next_key = new_key()
    question = {"csr": request_of(next_key)}
    halt.arm(RENEW, "after")
    asking = asked_in_vain(lambda: office.post("/v1/renew", question, folder))
    halt.kill_there(office.service)
    asking.join()
    office.start().wait_for_log("enrolment_ready")
    assert office.post("/v1/renew", {"csr": request_of(new_key())}, folder)[0] == 403
    status, answer = office.post("/v1/renew", question, folder)
    assert (status, answer["name"]) == (200, "r0/c1")


def test_killed_before_the_commit_it_has_counted_nothing(offices: Offices, tmp_path: Path) -> None:
    halt = Halt(tmp_path / "halt", ISSUE)
    office = offices(**halt.settings)
    token = office.token()
    halt.arm(ISSUE, "after")
    asking = asked_in_vain(lambda: office.join(token, new_key(), "c1"))
    halt.kill_there(office.service)
    asking.join()
    office.start().wait_for_log("enrolment_ready")
    assert office.unused()[-1] == "1 of 1"
    assert office.join(token, new_key(), "c1")[0] == 200


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("ca/ca.key", None),
        ("ca/ca.key", b""),
        ("ca/ca.key", key_pem(new_key())),
        ("ca/ca.crt", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
        ("ca/enrolment.db", None),
        ("ca/enrolment.db", b""),
        ("ca/enrolment.db", b"SQLite format 3\0" + b"x" * 8000),
        ("enrolment/tls.crt", None),
        ("enrolment/tls.key", key_pem(new_key())),
        ("join", None),
    ],
)
def test_a_damaged_file_is_named_and_ends_it(
    offices: Offices, name: str, data: bytes | None
) -> None:
    office = offices()
    office.service.stop()
    path = office.pki / name
    if data is not None:
        path.write_bytes(data)
    elif path.is_dir():
        path.rename(path.with_name("away"))
    else:
        path.unlink()
    service = office.start()
    assert service.wait() == 1
    line = json.loads(service.wait_for_log("service_failed"))
    assert str(path.parent if path.parent.name == "enrolment" else path) in line["error"]


def test_a_token_that_the_one_shot_makes_meanwhile_is_known(office: Office) -> None:
    pki.ensure(office.pki, [*REGIONS, "r2"])
    token = (office.pki / "join" / "r2.token").read_text()
    assert office.device("c1", token).name == "r2/c1"


def test_nothing_secret_is_in_the_log(offices: Offices) -> None:
    office = offices()
    device = office.device("c1").renewed()
    first = (office.pki / f"client.{REGIONS[0]}" / "token").read_text()
    wrong = "w" * 43
    csr = request_of(device.key)
    for question in (
        {"token": wrong, "csr": csr},
        {"token": first, "csr": csr, "name": "+"},
        {"token": first, "csr": csr[:-100]},
        {"token": first, "csr": csr, first: "misplaced"},
    ):
        assert office.post("/v1/join", question)[0] >= 400
    assert office.post("/v1/join", first.encode())[0] == 400
    assert office.post(f"/v1/{first}", {})[0] == 404
    office.service.stop()
    log = office.service.log.read_text()
    assert '"status": 403' in log
    secrets = [first, wrong, device.token, key_pem(device.key).decode().splitlines()[1]]
    secrets += (office.pki / "ca" / "ca.key").read_text().splitlines()[1:3]
    secrets += [*csr.splitlines()[1:3], "PRIVATE"]
    assert [secret for secret in secrets if secret in log] == []
    database = (office.pki / "ca" / "enrolment.db").read_bytes()
    assert [secret for secret in secrets if secret.encode() in database] == []


def fedfog(office: Office, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "fedfog.cli.main", *arguments, "--pki-dir", str(office.pki)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


def test_commands_of_the_operator(office: Office) -> None:
    code, token = fedfog(office, "token", "create", "--region", "r1", "--uses", "2")
    assert code == 0
    device = office.device("told", token.strip())
    code, said = fedfog(office, "token", "list")
    assert code == 0
    [line] = [line for line in said.splitlines() if "1 of 2" in line]
    token_id = line.split()[0]
    assert token.strip() not in said
    code, said = fedfog(office, "client", "list")
    assert re.search(rf"{device.name} +{token_id} .* valid", said)
    assert fedfog(office, "token", "revoke", token_id) == (0, f"Token {token_id} revoked.\n")
    assert office.join(token.strip(), new_key())[0] == 403
    for arguments, word in (
        (["token", "create", "--region", "r7"], "r7 is not one of REGIONS"),
        (["token", "revoke", token_id], "no valid token"),
        (["client", "revoke", "r1/nobody"], "no client r1/nobody"),
    ):
        code, said = fedfog(office, *arguments)
        assert (code, word in said) == (1, True), said


def test_commands_need_a_service(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedfog.cli.main", "token", "list"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 1
    assert "No enrolment service answers for PKI_DIR=pki" in done.stderr
