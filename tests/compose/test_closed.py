"""What the compose stack shows to those who are not part of it, and to parts that were taken over;
and that its certificates are renewed while it trains."""

import json
import re
import socket
import ssl
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterable, Iterator, Set
from datetime import UTC, datetime
from http.client import HTTPSConnection
from typing import Any

import psutil
import pytest

from conftest import Peer
from fedfog.cli.broker import free_port
from fedfog.messages.codec import decode_json
from fedfog.messages.schemas import RegionReceipt
from fedfog_enrolment.ca import new_key
from office import request_of
from stacks import SECONDS, Project, Stack, projects

pytestmark = pytest.mark.compose

# Every port that a service of the stack listens on, beside Docker's resolver on loopback.
LISTENS = {"mosquitto": 8883, "enrolment": 8443, "central-server": 8080, "nginx": 8443}
PUBLISHED = {"mosquitto", "enrolment", "nginx"}
# What else the images name, and Flower and its relatives have for a default.
TRIED = {*LISTENS.values(), 80, 443, 1883, 9001, 9090, 9091, 9092, 9093, 9094, 9095}
FLEET = "/v1/fleet/pull-messages"
RECEIPTS = "fl/receipts/region_0"
CERT_SECONDS = 300
CLIENTS = 3

# Prints which of the addresses [[host, port], ...] takes a connection.
SCAN = """
import concurrent.futures, json, socket, sys

def opens(address):
    try:
        socket.create_connection(address, 3).close()
    except OSError:
        return False
    return True

addresses = [tuple(address) for address in json.loads(sys.argv[1])]
with concurrent.futures.ThreadPoolExecutor(128) as pool:
    print(json.dumps([a for a, open in zip(addresses, pool.map(opens, addresses)) if open]))
"""

Address = tuple[str, int]


def docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"docker {' '.join(arguments[:4])}: {done.stderr}"
    return done.stdout.strip()


def reached(addresses: Iterable[Address], *python: str) -> set[Address]:
    """Those of the addresses that take a connection from where the command PYTHON... runs."""
    command = [*python, "-c", SCAN, json.dumps(sorted(addresses))]
    found = json.loads(subprocess.check_output(command, timeout=SECONDS))
    return {(host, port) for host, port in found}


class Closed:
    """The stack as it comes, with nginx and certificates of five minutes, in a long run."""

    def __init__(self, project: Project) -> None:
        self.project = project
        up = ("up", "--detach", "--wait", "--wait-timeout", "240", "--scale", f"client={CLIENTS}")
        project.ok("--profile", "remote", *up)
        self.containers = {
            name: container
            for name, container in project.containers().items()
            if container["State"]["Running"]
        }

    def name(self, service: str) -> str:
        return f"{self.project.name}-{service}-1"

    def address(self, service: str, network: str) -> Address:
        """Where a service listens in one of its networks."""
        networks = self.containers[f"{service}-1"]["NetworkSettings"]["Networks"]
        return networks[f"{self.project.name}_{network}"]["IPAddress"], LISTENS[service]

    def everywhere(self) -> set[Address]:
        """Each port that might be one, of every container on each of its networks."""
        return {
            (network["IPAddress"], port)
            for container in self.containers.values()
            for network in container["NetworkSettings"]["Networks"].values()
            for port in TRIED
        }

    def published(self) -> dict[Address, str]:
        """Where Docker publishes ports on the host, and of which service."""
        return {
            (one["HostIp"], int(one["HostPort"])): name[:-2]
            for name, container in self.containers.items()
            for bound in container["NetworkSettings"]["Ports"].values()
            for one in bound or []
        }

    def door(self, service: str) -> Address:
        [address] = [a for a, name in self.published().items() if name == service]
        return address


@pytest.fixture(scope="class")
def closed(images: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Closed]:
    with projects(tmp_path_factory.mktemp("closed")) as make:
        yield Closed(
            make(
                ROUNDS="100000",
                LOCAL_EPOCHS="1",
                CLIENTS_EXPECTED=str(CLIENTS),
                CERT_SECONDS=str(CERT_SECONDS),
                MQTT_HOST_PORT=str(free_port()),  # Docker would take another one after a restart
            )
        )


@pytest.fixture
def elsewhere(closed: Closed) -> Iterator[tuple[str, ...]]:
    """Python in a container of another network than the stack's."""
    network = f"{closed.project.name}-elsewhere"
    docker("network", "create", network)
    run = ("docker", "run", "--rm", "--network", network, "--entrypoint", "python")
    yield (*run, "fedfog-enrolment:0.1.0")
    docker("network", "rm", network)


def own_addresses() -> set[str]:
    """Of this host, on all of its interfaces, Docker's gateways included; not loopback."""
    found = {
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6)
    }
    return {a for a in found if not a.startswith(("127.", "::1", "fe80:"))}


def anonymous(address: Address, path: str, body: str = "") -> int:
    """Status of the answer to a request over TLS without a certificate."""
    connection = HTTPSConnection(*address, timeout=30, context=anybody())
    kind = {"content-type": "application/protobuf", "accept": "application/protobuf"}
    try:
        connection.request("POST", path, body, headers=kind)
        return connection.getresponse().status
    finally:
        connection.close()


def anybody() -> ssl.SSLContext:
    """Who has no certificate, and takes any."""
    tls = ssl.create_default_context()
    tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    return tls


def admitted(address: Address, tls: ssl.SSLContext | None) -> bool:
    """Whether the broker answers a CONNECT."""
    try:
        with socket.create_connection(address, 30) as plain:
            spoken = tls.wrap_socket(plain, server_hostname=address[0]) if tls else plain
            spoken.sendall(b"\x10\x12\x00\x04MQTT\x05\x02\x00\x3c\x00\x00\x05guest")
            return bool(spoken.recv(1))
    except (ssl.SSLError, ConnectionError):
        return False


class TestFreshStack:
    """In the order in which they stand: the last one is over when the run has been going on for
    more than CERT_SECONDS."""

    def test_there_is_no_listener_but_the_known_ones(self, closed: Closed) -> None:
        found: dict[str, set[tuple[str, int]]] = {}
        for name in closed.containers:
            service = name.rpartition("-")[0]
            listening = found.setdefault(service, set())
            for protocol, state in (("tcp", "0A"), ("udp", "07")):
                files = (f"/proc/net/{protocol}", f"/proc/net/{protocol}6")
                table = docker("exec", f"{closed.project.name}-{name}", "cat", *files)
                for line in table.splitlines():
                    _, local, _, its_state, *_ = line.split()
                    if its_state == state and not local.startswith("0B00007F:"):  # 127.0.0.11
                        listening.add((protocol, int(local.rpartition(":")[2], 16)))
        assert len(found) == 8
        ports = {name: {("tcp", port)} for name, port in LISTENS.items()}
        assert found == {name: ports.get(name, set()) for name in found}

    def test_another_network_and_the_hosts_other_addresses_reach_nothing(
        self, closed: Closed, elsewhere: tuple[str, ...]
    ) -> None:
        published = closed.published()
        assert set(published.values()) == PUBLISHED
        assert {host for host, _ in published} == {"127.0.0.1"}
        hosts = own_addresses()
        for container in closed.containers.values():
            for network in container["NetworkSettings"]["Networks"].values():
                assert network["Gateway"] in hosts, "an address of this host is not tried"
        of_host = {(host, port) for host in hosts for _, port in published}
        assert reached(of_host | closed.everywhere(), *elsewhere) == set()
        assert reached(of_host, sys.executable) == set()
        assert reached(published, sys.executable) == set(published)

    def test_clients_and_bridges_reach_what_they_need(self, closed: Closed) -> None:
        networks = {
            "client": ("front", ["mosquitto", "enrolment"]),
            "fog-bridge": ("back", ["mosquitto", "central-server", "nginx"]),
        }
        for service, (network, servers) in networks.items():
            python = ("docker", "exec", closed.name(service), "python")
            allowed = {closed.address(server, network) for server in servers}
            assert reached(closed.everywhere(), *python) == allowed, service

    def test_without_a_certificate_nobody_is_answered(self, closed: Closed) -> None:
        broker, enrolment = closed.door("mosquitto"), closed.door("enrolment")
        assert admitted(broker, closed.project.observer()), "the question is wrong"
        assert not admitted(broker, None)
        assert not admitted(broker, anybody())
        join = json.dumps({"token": "made up", "csr": request_of(new_key()), "name": ""})
        assert anonymous(enrolment, "/v1/join", join) == 403
        assert anonymous(enrolment, "/v1/renew", json.dumps({"csr": request_of(new_key())})) == 401
        assert anonymous(closed.door("nginx"), FLEET) == 400
        superlink = closed.address("central-server", "back")
        assert anonymous(superlink, FLEET) == 401
        for call in ("control/start-run", "control/list-runs", "runtime/acquire-task"):
            assert anonymous(superlink, f"/v1/{call}") == 403

    def test_a_bridges_host_submits_no_run_and_takes_no_task(self, closed: Closed) -> None:
        """With all that it has: its certificate, its key at the SuperLink, and Flower itself."""
        said = json.loads(docker("exec", closed.name("fog-bridge"), "python", "-c", TAKEOVER))
        assert said == {
            "central-server:8080": {
                "flwr run": "403", "control/start-run": 403, "control/stop-run": 403,
                "runtime/acquire-task": 403, "fleet/pull-messages": 401,
            },
            "nginx:8443": {
                "flwr run": "400", "control/start-run": 403, "control/stop-run": 403,
                "runtime/acquire-task": 403, "fleet/pull-messages": 401,
            },
        }  # fmt: skip
        # The same command is taken where it may be given.
        flwr = "HOME=/tmp FLWR_HOME=/tmp/flwr flwr"
        config = '[superlink.here]\naddress = "localhost:8080"\n'
        config += 'root-certificates = "/superlink/ca.crt"\n'
        write = f"mkdir -p /tmp/flwr && printf '{config}' > /tmp/flwr/config.toml"
        docker("exec", closed.name("central-server"), "sh", "-c", f"{write} && {flwr} ls here")

    def test_certificates_are_renewed_and_no_round_is_lost(self, closed: Closed) -> None:
        project = closed.project
        obtained = logged(project, "certificate_obtained")
        names = set(obtained)
        assert len(names) == CLIENTS
        peer = Peer(closed.door("mosquitto")[1], RECEIPTS, tls=project.observer())
        assert set(logged(project, "certificate_renewed")) == names
        ends = max(datetime.fromisoformat(line["until"]) for line in obtained.values())
        expired = closes(peer)
        while datetime.now(UTC) < ends:
            expired = closes(peer)
        said = project.ok("logs", "--no-log-prefix", "client").decode()
        assert not re.search('"event": "(update_rejected|update_late)"', said)
        # From now on, nobody gets in with the certificate that he began with. (A broker that stops
        # in order publishes all wills: the round at hand closes without those, who are late then.)
        project.ok("restart", "mosquitto")
        last = closes(peer, after=closes(peer) + 1, of=names)
        closes(peer, after=last)  # so model `last` is made
        peer.close()
        project.ok("exec", "--no-TTY", "central-server", "fedfog", "stop")
        history = project.result("history.json")["rounds"]
        assert len(history) >= last
        members = [set(record["regions"]["region_0"]["members"]) for record in history]
        assert members[:expired] == [names] * expired

    def test_a_revoked_bridge_is_out_at_nginx_too(self, closed: Closed) -> None:
        revoke = ("fedfog", "client", "revoke", "bridge.region_0")
        closed.project.ok("exec", "--no-TTY", "enrolment", *revoke)
        assert docker("exec", closed.name("fog-bridge"), "python", "-c", UNTIL_REFUSED) == "400"
        assert "group is not mosquitto" not in docker("logs", closed.name("mosquitto"))


def logged(project: Project, event: str) -> dict[str, Any]:
    """By client, the line that says so; waits until each has said it."""
    found: dict[str, Any] = {}
    with project.popen("logs", "--follow", "--no-log-prefix", "client") as logs:
        assert logs.stdout is not None
        limit = threading.Timer(CERT_SECONDS, logs.kill)
        limit.start()
        for line in logs.stdout:
            if f'"event": "{event}"' in line:
                said = json.loads(line[line.index("{") :])  # after codes for a terminal
                found[said["client"]] = said
            if len(found) == CLIENTS:
                break
        limit.cancel()
        logs.kill()
    return found


def closes(peer: Peer, after: int = 0, of: Set[str] = frozenset()) -> int:
    """Wait until the region closes, from now on, a round later than this one, with all these
    clients; which."""

    def wanted(_topic: str, payload: bytes) -> bool:
        receipt = decode_json(payload, RegionReceipt)
        return receipt.round > after and of <= set(receipt.members)

    seen = peer.wait_for(wanted, timeout=SECONDS, after=len(peer.received))
    return decode_json(seen, RegionReceipt).round


# Of a bridge's container: the answers to what it is not to do, by server.
TAKEOVER = """
import json, os, pathlib, re, ssl, subprocess
import httpx

app, home = pathlib.Path("/tmp/app"), pathlib.Path("/tmp/flwr")
app.mkdir(), home.mkdir()
(app / "attack.py").write_text("from flwr.serverapp import ServerApp\\napp = ServerApp()\\n")
(app / "pyproject.toml").write_text('''
[project]
name = "attack"
version = "1.0.0"
description = "code for the server"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "attack"
[tool.flwr.app.components]
serverapp = "attack:app"
clientapp = "attack:app"
''')
tls = ssl.create_default_context(cafile="/pki/ca.crt")
tls.load_cert_chain("/pki/tls.crt", "/pki/tls.key")
kind = {"content-type": "application/protobuf", "accept": "application/protobuf"}
calls = "control/start-run", "control/stop-run", "runtime/acquire-task", "fleet/pull-messages"
answers = {}
for server in "central-server:8080", "nginx:8443":
    (home / "config.toml").write_text(
        f'[superlink.it]\\naddress = "{server}"\\nroot-certificates = "/pki/ca.crt"\\n')
    run = subprocess.run(["flwr", "run", str(app), "it"], capture_output=True, text=True,
                         env={**os.environ, "FLWR_HOME": str(home)})
    found = re.search(r"error '(\\d+) ", run.stdout + run.stderr)
    answers[server] = {"flwr run": found[1] if run.returncode and found else run.stdout}
    for call in calls:
        url = f"https://{server}/v1/{call}"
        answers[server][call] = httpx.post(url, headers=kind, verify=tls).status_code
print(json.dumps(answers))
"""

# Of a bridge's container: calls the Fleet API through nginx until that takes the certificate for
# revoked; prints the status.
UNTIL_REFUSED = """
import ssl, time
import httpx

tls = ssl.create_default_context(cafile="/pki/ca.crt")
tls.load_cert_chain("/pki/tls.crt", "/pki/tls.key")
deadline, status = time.monotonic() + 60, 401
while status == 401 and time.monotonic() < deadline:
    status = httpx.post("https://nginx:8443/v1/fleet/pull-messages", verify=tls, headers={
        "content-type": "application/protobuf", "accept": "application/protobuf"}).status_code
    time.sleep(0.5)
print(status)
"""


def test_a_region_on_another_host_trains_through_nginx(stack: Stack) -> None:
    """The other host is played by networks and a volume that are not those of the first project:
    it reaches the first one's published ports, and nothing else."""
    far = f"fedfog-test-{uuid.uuid4().hex[:8]}"
    for network in ("front", "back"):
        docker("network", "create", f"{far}_{network}")
    try:
        form = "{{(index .IPAM.Config 0).Gateway}}"
        host = docker("network", "inspect", "-f", form, f"{far}_front")
        mqtt, enrolment, flower = (str(free_port()) for _ in range(3))
        both = {"REGIONS": "region_0,region_1", "CLIENTS_EXPECTED": "1"}
        first = stack(
            **both,
            PUBLISH_ADDRESS=host,
            SERVER_NAMES=host,
            MQTT_HOST_PORT=mqtt,
            ENROLMENT_HOST_PORT=enrolment,
            FLOWER_HOST_PORT=flower,
            MIN_AVAILABLE_CLIENTS="2",
            MIN_FIT_CLIENTS="2",
            EXIT_WHEN_FINISHED="true",
        )
        second = stack(
            "compose.region.yaml",
            "-1",
            **both,
            REGION="region_1",
            FEDFOG_PROJECT=far,
            MQTT_BROKER=host,
            MQTT_PORT=mqtt,
            ENROLMENT_URL=f"https://{host}:{enrolment}",
            FLOWER_SERVER=f"{host}:{flower}",
        )
        first.ok("--profile", "remote", "up", "--detach")
        docker("volume", "create", f"{far}_pki")
        take = ["docker", "run", "--rm", "-i", "-v", f"{far}_pki:/pki", "eclipse-mosquitto:2.0"]
        for service in ("aggregator", "bridge", "client"):
            identity = first.ok("cp", f"pki:/pki/{service}.region_1", "-")
            subprocess.run([*take, "tar", "-x", "-C", "/pki"], input=identity, check=True)
        second.ok("up", "--detach")
        assert docker("wait", f"{first.name}-central-server-1") == "0"
        summary = first.result("summary.json")
        assert summary["regions"] == ["region_0", "region_1"]
        assert summary["clients"] == [2, 2, 2]
        second.ok("down", "--volumes")
    finally:
        docker("network", "rm", f"{far}_front", f"{far}_back")
        docker("volume", "rm", "--force", f"{far}_pki")


def test_aggregators_above_regions_are_compose_projects(stack: Stack) -> None:
    known = {"ALL_REGIONS": "top,north,south", "REGION_PARENTS": "north=top,south=top"}
    first = stack(**known, REGIONS="top", EXIT_WHEN_FINISHED="true")
    child = {"REGIONS": "north,south", "PARENT_REGION": "top", "CLIENTS_EXPECTED": "1"}
    tiers = {
        "top": {"CHILD_REGIONS": "north,south", "ROUND_DEADLINE": str(SECONDS)},
        "north": child,
        "south": child,
    }
    first.ok("up", "--detach", "mosquitto", "guard", "enrolment", "central-server")
    for region, settings in tiers.items():
        project = stack(
            "compose.region.yaml",
            f"-{region}",
            **known,
            **settings,
            REGION=region,
            FEDFOG_PROJECT=first.name,
        )
        project.ok(
            "up", "--detach", "fog-aggregator", "client" if settings is child else "fog-bridge"
        )
    assert docker("wait", f"{first.name}-central-server-1") == "0"
    summary = first.result("summary.json")
    assert summary["regions"] == ["top"]
    assert summary["clients"] == [2, 2, 2]
