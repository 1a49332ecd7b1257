"""nginx in front of the SuperLink, with the configuration that is shipped: bridges call the Fleet
API through it, and nobody does anything else."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from flwr.proto.message_pb2 import PushObjectRequest

from centre import Centre, Region, expected, lines
from conftest import LIMIT, REPOSITORY, Service
from fedfog.cli.broker import free_port, installed_mosquitto
from fedfog.flower.fleet import ControlError, stop_run, submit_run
from fedfog_enrolment.ca import CA, load_certificate
from fedfog_enrolment.pki import ensure
from flower import APP, SuperLink, TwoDoors, refuses_old_tls, run_status
from secured import certify, context

FLEET = "/v1/fleet/pull-messages"
# What the SuperLink says to a Fleet call without a node's signature, and nginx never does.
REACHED = 401

NGINX = shutil.which("nginx", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"]))
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed (apt install nginx)")


class Gate:
    """nginx on a port of its own, before the SuperLink at `upstream`."""

    def __init__(self, folder: Path, pki: Path, upstream: str) -> None:
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        text = (REPOSITORY / "nginx" / "superlink.conf").read_text()
        for one, other in (
            ("listen 8443 ssl", f"listen {self.address} ssl"),
            ("server central-server:8080;", f"server {upstream};"),
            (" /pki/", f" {pki}/nginx/"),
            (" /crl/", f" {pki}/crl/"),
        ):
            assert one in text
            text = text.replace(one, other)
        self.config, self._folder = folder / "nginx.conf", folder
        folder.mkdir(parents=True)
        self.config.write_text(
            f"{'user root;' if os.getuid() == 0 else ''} pid {folder}/pid; daemon off;\n"
            f"error_log {folder}/error.log info; worker_processes 1;\n"
            f"events {{ }}\nhttp {{ access_log off;\n"
            + "".join(
                f"{kind}_temp_path {folder}/{kind};\n"
                for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
            )
            + text
            + "}\n"
        )
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Gate":
        self.process = subprocess.Popen(self._command())
        deadline = time.monotonic() + LIMIT
        while socket.socket().connect_ex(("127.0.0.1", self.port)) != 0:
            assert self.process.poll() is None and time.monotonic() < deadline, self.errors()
            time.sleep(0.02)
        return self

    def _command(self, *more: str) -> list[str]:
        assert NGINX
        return [NGINX, "-p", str(self._folder), "-c", str(self.config), *more]

    def errors(self) -> str:
        return (self._folder / "error.log").read_text()

    def check(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self._command("-t"), capture_output=True, text=True, check=False)

    def reload(self) -> None:
        """Returns when those that had the old configuration are gone."""
        assert self.process
        workers = psutil.Process(self.process.pid).children()
        self.process.send_signal(signal.SIGHUP)
        gone, alive = psutil.wait_procs(workers, timeout=LIMIT)
        assert gone and not alive, self.errors()

    def stop(self) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait(LIMIT)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The federation's folders, and some more holders of certificates."""
    folder = tmp_path_factory.mktemp("pki")
    ca = ensure(folder, ["region_0"])
    for name in ("region_0/c1", "region_0/bridge.region_0", "bridge.", "xbridge.region_0"):
        certify(ca, folder / "more" / name.replace("/", "+"), name)
    certify(ca, folder / "more" / "expired", "bridge.region_0", seconds=-1)
    certify(ca, folder / "more" / "server", "bridge.region_0", server_names=["localhost"])
    revoked = certify(ca, folder / "more" / "revoked", "bridge.region_0")
    (folder / "crl" / "ca.crl").write_bytes(ca.crl([serial(revoked)]))
    (folder / "foreign" / "ca").mkdir(parents=True)
    certify(CA.create(folder / "foreign" / "ca"), folder / "more" / "foreign", "bridge.region_0")
    return folder


def serial(folder: Path) -> int:
    return load_certificate(folder / "tls.crt").serial_number


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory, pki: Path) -> Iterator[SuperLink]:
    running = SuperLink(tmp_path_factory.mktemp("flower"), pki).start()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def gate(
    tmp_path_factory: pytest.TempPathFactory, pki: Path, superlink: SuperLink
) -> Iterator[Gate]:
    running = Gate(tmp_path_factory.mktemp("gate") / "nginx", pki, superlink.address).start()
    yield running
    running.stop()


def post(gate: Gate, pki: Path, holder: Path | None, content: bytes = b"") -> int:
    """Status of a Fleet call that has no node's signature."""
    verify = context(holder, pki / "nginx" / "ca.crt") if holder else None
    if verify is None:
        verify = httpx.create_ssl_context(verify=str(pki / "nginx" / "ca.crt"))
    headers = {"content-type": "application/protobuf", "accept": "application/protobuf"}
    with httpx.Client(verify=verify, headers=headers) as client:
        return client.post(f"https://{gate.address}{FLEET}", content=content).status_code


@pytest.mark.parametrize(
    ("holder", "status"),
    [
        ("bridge.region_0", REACHED),
        ("more/region_0+c1", 403),
        ("more/region_0+bridge.region_0", 403),
        ("more/bridge.", 403),
        ("more/xbridge.region_0", 403),
        ("aggregator.region_0", 403),
        ("central-server", 403),
        ("monitor", 403),
        ("", 400),
        ("more/foreign", 400),
        ("more/revoked", 400),
        ("more/expired", 400),
        ("more/server", 400),
    ],
)
def test_only_a_bridges_certificate_opens_the_fleet_api(
    gate: Gate, pki: Path, holder: str, status: int
) -> None:
    assert post(gate, pki, pki / holder if holder else None) == status


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
def test_tls_1_1_is_refused(gate: Gate, pki: Path) -> None:
    assert refuses_old_tls(gate.port, pki / "nginx" / "ca.crt")


COMMANDS: dict[str, Callable[[str, Path], object]] = {
    "StartRun": lambda address, holder: submit_run(address, APP, {}, context(holder)),
    "StopRun": lambda address, holder: stop_run(address, 1, context(holder)),
    "ListRuns": lambda address, holder: run_status(address, 1, context(holder)),
}


@pytest.mark.parametrize("holder", ["bridge.region_0", "more/region_0+c1"])
@pytest.mark.parametrize("command", COMMANDS)
def test_neither_a_bridge_nor_a_client_can_submit_stop_or_see_a_run(
    gate: Gate, superlink: SuperLink, pki: Path, command: str, holder: str
) -> None:
    before = len(superlink.log.read_text())
    with pytest.raises(ControlError, match="403"):
        COMMANDS[command](gate.address, pki / holder)
    assert "/v1/control/" not in superlink.log.read_text()[before:]


TRICKS = [
    "/v1/control/start-run",
    "/v1/runtime/acquire-task",
    "/docs",
    "/openapi.json",
    "/health",
    "/",
    "/v1/fleet/",
    "/v1/fleet",
    "/V1/FLEET/pull-messages",
    "/v1/fleet/../control/start-run",
    "/v1/fleet/./../control/start-run",
    "/v1/fleet/%2e%2e/control/start-run",
    "/v1/fleet/..%2fcontrol/start-run",
    "/v1/fleet%2f..%2fcontrol%2fstart-run",
    "/v1/fleet/..;/control/start-run",
    "/v1/fleet/..\\control\\start-run",
    "/v1/fleet//../control/start-run",
    "//v1/control/start-run",
    "/v1//fleet/pull-messages",
    "/v1/fleet/pull-messages/../../control/start-run",
    "/v1/fleet/pull-messages?/../../control/start-run",
    "/v1/fleet/pull-messages#/../../control/start-run",
    "/v1/control/start-run#/v1/fleet/pull-messages",
    "/v1/control/start-run?/v1/fleet/pull-messages",
    "/v1/control/start-run%00/v1/fleet/pull-messages",
    "https://127.0.0.1/v1/control/start-run",
    "http://127.0.0.1/v1/fleet/../control/start-run",
]


@pytest.mark.parametrize("target", TRICKS)
def test_a_bridge_reaches_no_other_path(
    gate: Gate, superlink: SuperLink, pki: Path, target: str
) -> None:
    before = len(superlink.log.read_text())
    for method in ("POST", "GET"):
        assert statuses(gate, pki, f"{method} {target} HTTP/1.1\r\n{END}") in ([403], [400])
    requests = re.findall(r'"[A-Z]+ (\S+) HTTP', superlink.log.read_text()[before:])
    assert set(requests) <= {"/v1/runtime/acquire-task"}  # of its own SuperExec


NODE = "Host: superlink\r\nContent-Type: application/protobuf\r\nAccept: application/protobuf\r\n"
END = f"{NODE}Content-Length: 0\r\nConnection: close\r\n\r\n"
HIDDEN = "POST /v1/control/start-run HTTP/1.1\r\nHost: superlink\r\n\r\n"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        pytest.param(f"GET {FLEET} HTTP/1.1\r\n{END}", 405, id="method"),
        pytest.param(f"CONNECT 127.0.0.1:1 HTTP/1.1\r\n{END}", 400, id="connect"),
        pytest.param(
            f"POST {FLEET} HTTP/1.1\r\n{NODE}Content-Length: 4\r\n"
            f"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n{HIDDEN}",
            400,
            id="two lengths",
        ),
        pytest.param(
            f"POST {FLEET} HTTP/1.1\r\n{NODE}Transfer-Encoding: x, chunked\r\n\r\n"
            f"0\r\n\r\n{HIDDEN}",
            501,
            id="unknown coding",
        ),
        pytest.param(
            f"POST {FLEET} HTTP/1.1\r\n{NODE}Content-Length: 0\r\n\r\n"
            f"POST /v1/control/start-run HTTP/1.1\r\n{END}",
            REACHED,
            id="one after the other",
        ),
    ],
)
def test_no_request_is_hidden_in_another(
    gate: Gate, superlink: SuperLink, pki: Path, request_: str, status: int
) -> None:
    before = len(superlink.log.read_text())
    first, *more = statuses(gate, pki, request_)
    assert first == status
    assert set(more) <= {403}  # nginx answers it, or drops it
    assert "/v1/control/" not in superlink.log.read_text()[before:]


def statuses(gate: Gate, pki: Path, request: str) -> list[int]:
    """Status of each answer to what is sent, to the letter, under a bridge's certificate."""
    with (
        socket.create_connection(("127.0.0.1", gate.port), 10) as plain,
        context(pki / "bridge.region_0").wrap_socket(plain, server_hostname="localhost") as tls,
    ):
        tls.sendall(request.encode())
        answer = b""
        while part := tls.recv(65536):
            answer += part
    return [int(line.split()[1]) for line in answer.decode().split("\n") if line[:5] == "HTTP/"]


def test_an_object_may_be_large(gate: Gate, pki: Path) -> None:
    content = PushObjectRequest(object_content=bytes(3 << 20)).SerializeToString()
    assert post(gate, pki, pki / "bridge.region_0", content) == REACHED


def test_a_bridge_that_is_revoked_is_refused_after_a_reload(
    pki: Path, superlink: SuperLink, tmp_path: Path
) -> None:
    shutil.copytree(pki / "nginx", tmp_path / "nginx")
    crl = shutil.copytree(pki / "crl", tmp_path / "crl") / "ca.crl"
    bridge = pki / "bridge.region_0"
    gate = Gate(tmp_path / "gate", tmp_path, superlink.address).start()
    try:
        assert post(gate, pki, bridge) == REACHED
        crl.write_bytes(CA.load(pki / "ca").crl([serial(bridge)]))
        gate.reload()
        assert post(gate, pki, bridge) == 400
    finally:
        gate.stop()


@pytest.mark.parametrize("damage", [None, b"", b"nonsense"], ids=["missing", "empty", "damaged"])
def test_without_a_list_of_the_revoked_nginx_does_not_start(
    pki: Path, tmp_path: Path, damage: bytes | None
) -> None:
    """And at a reload it stays with the list that it has (nginx(8): the configuration is checked
    before it is taken over)."""
    shutil.copytree(pki / "nginx", tmp_path / "nginx")
    folder = shutil.copytree(pki / "crl", tmp_path / "crl")
    gate = Gate(tmp_path / "gate", tmp_path, "127.0.0.1:1")
    assert gate.check().returncode == 0, gate.check().stderr
    (folder / "ca.crl").unlink()
    if damage is not None:
        (folder / "ca.crl").write_bytes(damage)
    refused = gate.check()
    assert refused.returncode != 0
    assert "ca.crl" in refused.stderr


def test_a_federation_trains_through_it(
    services: Callable[..., Service], pki: Path, tmp_path: Path
) -> None:
    """Also when nginx is started again: the bridge's node is the same after that, but has lost
    what it had fetched."""
    if installed_mosquitto() is None:
        pytest.skip("Mosquitto is not installed (apt install mosquitto)")
    doors = TwoDoors(tmp_path / "broker", pki)
    doors.start()
    secured = {"mqtt_port": doors.tls_port, "tls_dir": pki / "central-server"}
    centre = Centre(services, doors, tmp_path, **secured, rounds=2)
    gate = Gate(tmp_path / "gate", pki, f"127.0.0.1:{centre.port}").start()
    try:
        region, server = Region(doors.port, allowed=1), centre.start()
        bridge = services(
            "fedfog_bridge.main",
            doors,
            region="region_0",
            flower_server=gate.address,
            mqtt_port=doors.tls_port,
            tls_dir=pki / "bridge.region_0",
        )
        region.model(1)
        in_hand = '"round": 2.*"train_message"'
        bridge.wait_for_log(in_hand)
        gate.stop()
        bridge.wait_for_log(f"(?s:{in_hand}.*waiting_for_superlink)")
        gate.start()
        bridge.wait_for_log('(?s:("bridge_online".*){2})')
        region.allow(2)
        assert server.wait(LIMIT) == 0
        nodes = {line["node_id"] for line in lines(bridge, "bridge_online")}
        assert len(nodes) == 1
        assert region.model(2).vector.tobytes() == expected(region.models[0], 2)
        assert bridge.stop() == 0
        region.close()
    finally:
        gate.stop()
        doors.stop()
