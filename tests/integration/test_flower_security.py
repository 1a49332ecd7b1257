"""SuperLink with TLS, which admits the bridges whose key the central server has registered."""

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from centre import Centre, Region, expected, lines
from conftest import LIMIT, Service
from fedfog.cli.broker import installed_mosquitto
from fedfog.flower.fleet import FleetSession, NodeIdentity, SuperLinkLostError
from fedfog.transport import tls
from fedfog_enrolment.pki import ensure
from flower import SuperLink, TwoDoors, refuses_old_tls

REGIONS = ("region_0", "region_1")
# What the log of a bridge says when it has the train message of round 2.
IN_HAND = {"resident": '"round": 2.*"train_message"', "supernode": r"ROUND .*/2\]"}


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pki")
    ensure(folder, REGIONS)
    return folder


@pytest.fixture
def doors(tmp_path: Path, pki: Path) -> Iterator[TwoDoors]:
    if installed_mosquitto() is None:
        pytest.skip("Mosquitto is not installed (apt install mosquitto)")
    broker = TwoDoors(tmp_path / "broker", pki)
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory, pki: Path) -> Iterator[SuperLink]:
    running = SuperLink(tmp_path_factory.mktemp("flower"), pki).start()
    yield running
    running.stop()


@pytest.fixture
def bridge(services: Callable[..., Service], doors: TwoDoors, pki: Path) -> Callable[..., Service]:
    """Starts the bridge of a region with its identity."""

    def start(server: str, region: str = "region_0", **settings: object) -> Service:
        common = {"mqtt_port": doors.tls_port, "tls_dir": pki / f"bridge.{region}"}
        return services(
            "fedfog_bridge.main",
            doors,
            f"bridge-{region}",
            **{**common, "region": region, "flower_server": server, **settings},
        )

    return start


@pytest.fixture
def centre(
    services: Callable[..., Service], doors: TwoDoors, pki: Path, tmp_path: Path
) -> Callable[..., Centre]:
    secured = {"mqtt_port": doors.tls_port, "tls_dir": pki / "central-server"}
    return lambda **settings: Centre(services, doors, tmp_path, **secured, **settings)


def identity(pki: Path, name: str, node_file: Path) -> NodeIdentity:
    folder = pki / name
    context = tls.context(folder, folder / "tls.crt", folder / "tls.key")
    return NodeIdentity.read(context, folder / "supernode.key", node_file)


def test_plain_http_is_refused(superlink: SuperLink) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://{superlink.address}/health")
    with pytest.raises(SuperLinkLostError, match=superlink.address):
        FleetSession(superlink.address)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
def test_tls_1_1_is_refused(superlink: SuperLink, pki: Path) -> None:
    assert refuses_old_tls(superlink.port, pki / "superlink" / "ca.crt")


def test_superlink_of_another_ca_is_not_told_anything(
    superlink: SuperLink, pki: Path, tmp_path: Path
) -> None:
    ensure(tmp_path / "pki", ["region_0"])
    foreign = identity(tmp_path / "pki", "bridge.region_0", tmp_path / "node")
    before = superlink.log.read_text()
    with pytest.raises(SuperLinkLostError, match="CERTIFICATE_VERIFY_FAILED"):
        FleetSession(superlink.address, foreign)
    assert "/v1/fleet" not in superlink.log.read_text().removeprefix(before)


def test_one_key_is_one_node_which_a_new_session_takes_over(
    superlink: SuperLink, pki: Path, tmp_path: Path
) -> None:
    first = FleetSession(superlink.address, identity(pki, "bridge.region_0", tmp_path / "node"))
    with pytest.raises(SuperLinkLostError, match="another bridge with this key is online"):
        FleetSession(superlink.address, identity(pki, "bridge.region_0", tmp_path / "other"))
    first.close(sign_off=False)  # as if it had been killed
    again = FleetSession(superlink.address, identity(pki, "bridge.region_0", tmp_path / "node"))
    assert again.node_id == first.node_id
    again.close()
    # Who has signed off leaves no trace that would hold up the next one.
    FleetSession(superlink.address, identity(pki, "bridge.region_0", tmp_path / "third")).close()


@pytest.mark.parametrize("runner", ["resident", "supernode"])
def test_bridge_with_an_unregistered_key_is_refused_and_says_so(
    superlink: SuperLink,
    bridge: Callable[..., Service],
    tmp_path: Path,
    pki: Path,
    runner: str,
) -> None:
    """Its certificate is right, and the SuperLink has another key for this bridge."""
    ensure(tmp_path / "pki", ["region_0"])
    folder = tmp_path / "identity"
    folder.mkdir()
    for name in ("ca.crt", "tls.crt", "tls.key"):
        (folder / name).write_bytes((pki / "bridge.region_0" / name).read_bytes())
    stranger = (tmp_path / "pki" / "bridge.region_0" / "supernode.key").read_bytes()
    (folder / "supernode.key").write_bytes(stranger)
    before = len(superlink.log.read_text())
    service = bridge(superlink.address, tls_dir=folder, bridge_runner=runner, flower_timeout=0.5)
    line = service.wait_for_log("service_failed")
    assert "has not registered this bridge's key" in line
    assert "FLOWER_TIMEOUT" in line
    assert service.wait() == 1
    assert "Activated node_id" not in superlink.log.read_text()[before:]


@pytest.mark.parametrize("content", [None, b"nonsense"], ids=["missing", "damaged"])
def test_bridge_without_its_key_names_the_file(
    bridge: Callable[..., Service], tmp_path: Path, pki: Path, content: bytes | None
) -> None:
    folder = tmp_path / "identity"
    folder.mkdir()
    for name in ("ca.crt", "tls.crt", "tls.key"):
        (folder / name).write_bytes((pki / "bridge.region_0" / name).read_bytes())
    if content:
        (folder / "supernode.key").write_bytes(content)
    service = bridge("127.0.0.1:1", tls_dir=folder)
    assert str(folder / "supernode.key") in service.wait_for_log("service_failed")
    assert service.wait() == 1


@pytest.mark.parametrize("runner", ["resident", "supernode"])
def test_rounds_with_tls_and_registered_keys(
    centre: Callable[..., Centre],
    bridge: Callable[..., Service],
    doors: TwoDoors,
    runner: str,
) -> None:
    """A bridge that is killed with a train message in hand comes back within its round."""
    here, region = centre(rounds=2), Region(doors.port, allowed=1)
    address = f"127.0.0.1:{here.port}"
    server = here.start()
    first = bridge(address, bridge_runner=runner)
    region.model(1)
    first.wait_for_log(IN_HAND[runner])
    first.kill()
    second = bridge(address, bridge_runner=runner)
    second.wait_for_log("bridge_online" if runner == "resident" else "supernode_starting")
    # At once, and not when the SuperLink had missed the heartbeats of the first.
    assert not lines(second, "waiting_for_superlink")
    region.allow(2)
    assert server.wait(LIMIT) == 0
    assert region.model(2).vector.tobytes() == expected(region.models[0], 2)
    assert [record["left_out"] for record in here.read("history.json")["rounds"]] == [{}, {}]
    region.close()


def test_superlink_that_was_killed_gets_the_keys_again(
    centre: Callable[..., Centre], bridge: Callable[..., Service], doors: TwoDoors
) -> None:
    here = centre(rounds=2, regions=",".join(REGIONS), min_fit_clients=2)
    regions = [Region(doors.port, name, allowed=1) for name in REGIONS]
    server = here.start()
    bridges = [bridge(f"127.0.0.1:{here.port}", name) for name in REGIONS]
    regions[0].model(1)
    [superlink] = psutil.Process(server.process.pid).children()
    superlink.kill()
    for one in bridges:
        one.wait_for_log('(?s:("bridge_online".*){2})', LIMIT)
    for region in regions:
        region.allow(2)
    assert server.wait(LIMIT) == 0
    registered = sorted(line["bridge"] for line in lines(server, "bridge_registered"))
    assert registered == [f"bridge.{name}" for name in REGIONS for _ in range(2)]
    history = here.read("history.json")["rounds"]
    assert [sorted(record["regions"]) for record in history] == [list(REGIONS)] * 2
    for region in regions:
        region.close()


def test_a_region_that_is_added_later_needs_no_new_start(
    centre: Callable[..., Centre],
    bridge: Callable[..., Service],
    doors: TwoDoors,
    tmp_path: Path,
    pki: Path,
) -> None:
    superlink = tmp_path / "superlink"
    superlink.mkdir()
    for file in (pki / "superlink").iterdir():
        if file.name != "bridge.region_1.pub":
            (superlink / file.name).write_bytes(file.read_bytes())
    here = centre(superlink_tls_dir=superlink)
    server = here.start()
    server.wait_for_log("bridge.region_0", LIMIT)
    late = bridge(f"127.0.0.1:{here.port}", "region_1")
    late.wait_for_log("has not registered this bridge's key")
    key = "bridge.region_1.pub"
    (superlink / key).write_bytes((pki / "superlink" / key).read_bytes())
    late.wait_for_log("bridge_online")


@pytest.mark.parametrize(
    "call", ["control/start-run", "control/stop-run", "control/list-runs", "runtime/acquire-task"]
)
def test_commands_are_taken_from_the_superlinks_own_host_only(
    superlink: SuperLink, call: str
) -> None:
    """The other host is played by another address of this one."""
    here, other = (
        httpx.Client(
            transport=httpx.HTTPTransport(verify=superlink.tls or True, local_address=address),
            headers={"content-type": "application/protobuf", "accept": "application/protobuf"},
        )
        for address in ("127.0.0.1", "127.0.0.2")
    )
    with here, other:
        url = f"https://{superlink.address}/v1/{call}"
        assert here.post(url).status_code != 403
        assert other.post(url).status_code == 403
        forged = {"x-forwarded-for": "127.0.0.1", "forwarded": "for=127.0.0.1"}
        assert other.post(url, headers=forged).status_code == 403
        for path in ("/docs", "/openapi.json", "/", f"/v1/fleet/../{call}"):
            assert other.get(f"https://{superlink.address}{path}").status_code in (403, 404), path
        assert other.get(f"https://{superlink.address}/health").status_code == 200
        fleet = other.post(f"https://{superlink.address}/v1/fleet/pull-messages")
        assert fleet.status_code == 401  # it came through, and has no signature
