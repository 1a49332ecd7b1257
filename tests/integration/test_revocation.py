"""A revoked client is out at once, although it has a live session: enrolment, guard and broker."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import Service
from fedfog.cli.broker import installed_mosquitto
from fedfog.control import ControlError
from fedfog_enrolment import pki
from fedfog_enrolment.ca import load_certificate, new_key
from office import REGIONS, Device, Office
from secured import NOT_AUTHORIZED, Holder, shipped_broker


class Fleet(Office):
    """Enrolment with the broker of the compose stack, and later its guard."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "guard.sock"
        super().__init__(folder, guard_socket=self.socket)
        self.service.stop()
        self.broker = shipped_broker(folder / "broker", self.pki / "broker").start()
        self.guard: Service | None = None
        self.start(mqtt_broker="localhost", mqtt_port=self.broker.port)
        self.service.wait_for_log("enrolment_ready")

    def start_guard(self) -> "Fleet":
        assert self.broker.process is not None
        settings = {
            "PKI_DIR": self.pki,
            "MQTT_BROKER": "localhost",
            "MQTT_PORT": self.broker.port,
            "BROKER_PID": self.broker.process.pid,
            "GUARD_SOCKET": self.socket,
            "HEALTH_FILE": self.folder / "guard-health",
        }
        env = {name: str(value) for name, value in settings.items()}
        self.guard = Service("fedfog_enrolment.guard", self.folder / "guard", env)
        self.guard.wait_for_log("guard_listens")
        return self

    def enter(self, device: Device) -> Holder:
        return Holder(self.broker.port, device.folder)

    def stop(self) -> None:
        for service in (self.guard, self.service):
            if service and service.process.poll() is None:
                service.kill()
        self.broker.stop()


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    if installed_mosquitto() is None:
        pytest.skip("Mosquitto is not installed (apt install mosquitto)")
    started = Fleet(tmp_path)
    yield started
    started.stop()


def sends(holder: Holder, device: Device) -> bool:
    """Its update is taken."""
    topic = f"fl/updates/{device.name}"
    return holder.publish([topic])[topic] < NOT_AUTHORIZED


def test_a_revoked_client_is_cut_off_and_stays_out(fleet: Fleet) -> None:
    fleet.start_guard()
    first = fleet.device("c1")
    thief = first.renewed()
    other = fleet.device("c2")
    stolen, honest = fleet.enter(thief), fleet.enter(other)
    assert sends(stolen, thief)
    assert sends(honest, other)

    command = [sys.executable, "-m", "fedfog.cli.main", "client", "revoke", "r0/c1"]
    command += ["--pki-dir", str(fleet.pki)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert re.search(r"r0/c1 revoked and cut off.*`fedfog token revoke [0-9a-f]{12}`", done.stdout)
    stolen.until(lambda: stolen.disconnected)
    for certificate in (first, thief):
        with pytest.raises(OSError):
            fleet.enter(certificate)
        assert certificate.renew(new_key())[0] == 403
        assert fleet.join(first.token, certificate.key, "c1")[0] == 403
    assert sends(honest, other)

    # Its name is free, for whoever has a token that is still good.
    again = fleet.device("c1")
    assert sends(fleet.enter(again), again)
    with pytest.raises(OSError):
        fleet.enter(thief)


@pytest.mark.parametrize("killed", [False, True])
def test_a_revocation_is_kept_until_there_is_a_guard(fleet: Fleet, killed: bool) -> None:
    device, other = fleet.device("c1"), fleet.device("c2")
    session, honest = fleet.enter(device), fleet.enter(other)
    with pytest.raises(ControlError, match=r"Not done, or not wholly.*no guard answers"):
        fleet.ask("revoke client", "r0/c1")
    assert device.renew(new_key())[0] == 403
    assert sends(session, device)
    if killed:  # neither needs the other to be there before it
        fleet.service.kill()
        fleet.start(mqtt_broker="localhost", mqtt_port=fleet.broker.port)
        fleet.service.wait_for_log("revocations_not_in_force")
    guard = fleet.start_guard().guard
    assert guard is not None
    guard.wait_for_log('"revoked": 2')  # the guard's own probe, and this one
    session.until(lambda: session.disconnected)
    with pytest.raises(OSError):
        fleet.enter(device)
    assert sends(honest, other)


def test_a_stolen_bridge_is_cut_off_and_the_region_gets_a_new_one(
    fleet: Fleet, tmp_path: Path
) -> None:
    fleet.start_guard()
    bridge = fleet.pki / "bridge.r0"
    stolen = shutil.copytree(bridge, tmp_path / "stolen")
    key = (fleet.pki / "superlink" / "bridge.r0.pub").read_bytes()
    session, other = (Holder(fleet.broker.port, one) for one in (stolen, fleet.pki / "bridge.r1"))
    with pytest.raises(ControlError, match="There is no service"):
        fleet.ask("revoke client", "bridge.r9")
    fleet.ask("revoke client", "bridge.r0")
    session.until(lambda: session.disconnected)
    with pytest.raises(OSError):
        Holder(fleet.broker.port, stolen)
    serial = load_certificate(stolen / "tls.crt").serial_number
    assert serial in fleet.ca.revoked(fleet.pki / "crl" / "ca.crl"), "nginx does not know"
    other.catch_up()

    pki.ensure(fleet.pki, REGIONS)
    Holder(fleet.broker.port, bridge).catch_up()
    assert (fleet.pki / "superlink" / "bridge.r0.pub").read_bytes() != key
    with pytest.raises(OSError):
        Holder(fleet.broker.port, stolen)


def test_a_new_region_is_known_to_the_broker_when_enrolment_starts(fleet: Fleet) -> None:
    fleet.start_guard()
    fleet.service.stop()
    fleet.start(mqtt_broker="localhost", mqtt_port=fleet.broker.port, regions="r0,r1,r2")
    fleet.service.wait_for_log("enrolment_ready")
    fleet.device("c1", fleet.token("r2"))  # it answers after the broker has been told
    assert "user aggregator.r2" in (fleet.pki / "broker" / "acl").read_text()
