"""Many logical clients in one process: each is to the federation what a process of its own is."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from safetensors.numpy import load_file

from conftest import LIMIT, REPOSITORY, Peer, Service
from fedfog.cli.broker import LocalBroker, installed_mosquitto
from fedfog.messages.codec import TensorMessage, TensorTable, decode
from fedfog.messages.schemas import Receipt, RegionReceipt, Slot, UpdateMeta, Verdict
from fedfog.ml.task import load_task
from fedfog.ml.training import state_arrays
from wire import model

MODULE = "fedfog_client.main"
ARRAYS = state_arrays(load_task("ecg5000", data_dir=REPOSITORY / "data").build_model(7))
TABLE = TensorTable.of(ARRAYS)
BASE = TABLE.flatten(ARRAYS)
NAMES = ["sim-0000", "sim-0001", "sim-0002"]


class Host:
    """A process with the clients `NAMES` of `region_0`; a peer plays the rest of the federation."""

    def __init__(self, services: Callable[..., Service], broker: LocalBroker, peer: Peer) -> None:
        self.peer, self.broker = peer, broker
        self._services = services
        self.service = self.start()

    def start(self) -> Service:
        after = len(self.peer.received)
        many = {"client_id": "sim", "clients_per_process": len(NAMES)}
        self.service = self._services(MODULE, self.broker, **many)
        for name in NAMES:
            self.presence(name, True, after)
        return self.service

    def is_back(self, name: str, after: int) -> bool:
        """Whether a client whose session was cut comes online again, or fails."""
        deadline = time.monotonic() + LIMIT
        while "client_failed" not in self.service.log.read_text():
            births = (p for t, p in self.peer.received[after:] if t.endswith(f"/{name}"))
            if any(json.loads(birth)["online"] for birth in births):
                return True
            assert time.monotonic() < deadline, f"{name} neither comes back nor fails"
            time.sleep(0.02)
        return False

    def presence(self, name: str, online: bool, after: int = 0, slot: int | None = None) -> None:
        def seen(topic: str, payload: bytes) -> bool:
            if topic != f"fl/presence/region_0/{name}":
                return False
            fields = json.loads(payload)
            return fields["online"] is online and slot in (None, fields["slot"])

        self.peer.wait_for(seen, LIMIT, after)

    def model(self, **fields: Any) -> None:
        self.peer.publish("fl/global_model", model(BASE, table=TABLE, **fields), retain=True)

    def deal(self, name: str, slot: int, region: int = 0, regions: int = 1) -> None:
        dealt = Slot(run="run", slot=slot, slots=len(NAMES), region_index=region, regions=regions)
        self.peer.publish(f"fl/slots/region_0/{name}", dealt.to_json())

    def deal_to_all(self) -> None:
        for slot, name in enumerate(NAMES):
            self.deal(name, slot)

    def update(self, name: str, after: int = 0) -> TensorMessage[UpdateMeta]:
        topic = f"fl/updates/region_0/{name}"
        return decode(self.peer.wait_for(lambda t, _: t == topic, LIMIT, after), UpdateMeta)

    def updates(self, after: int = 0) -> dict[str, bytes]:
        return {name: self.update(name, after).vector.tobytes() for name in NAMES}


@pytest.fixture
def host(services: Callable[..., Service], broker: LocalBroker, peers: Callable[..., Peer]) -> Host:
    return Host(services, broker, peers(broker.port, "fl/updates/#", "fl/presence/#"))


@pytest.mark.skipif(installed_mosquitto() is None, reason="Mosquitto is not installed")
def test_simulated_run_gives_bit_for_bit_the_model_of_separate_processes(tmp_path: Path) -> None:
    models, members = [], []
    for arguments in (
        "demo --clients 3 --regions 2",
        "simulate --clients 6 --regions 2 --processes 2",
    ):
        folder = tmp_path / arguments[:4]
        command = [sys.executable, "-m", "fedfog.cli.main", *arguments.split()]
        done = subprocess.run(
            [*command, "--rounds", "2", "--local-epochs", "2"],
            env={**os.environ, "RUNS_DIR": str(folder), "DATA_DIR": str(REPOSITORY / "data")},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        models.append(load_file(folder / "latest" / "model.safetensors"))
        history = json.loads((folder / "latest" / "history.json").read_text())
        members.append(
            [
                sorted(record["regions"][region]["members"])
                for record in history["rounds"]
                for region in ("region_0", "region_1")
            ]
        )
    separate, simulated = models
    assert members[0] == [["client-1", "client-2", "client-3"]] * 4
    assert members[1] == [[f"client-1-000{i}" for i in range(3)]] * 4
    assert separate.keys() == simulated.keys()
    for name, tensor in separate.items():
        assert tensor.tobytes() == simulated[name].tobytes(), name


def test_killed_process_comes_back_with_every_clients_update(host: Host, tmp_path: Path) -> None:
    host.model()
    host.deal_to_all()
    first = host.updates()
    assert len(set(first.values())) == len(NAMES)
    after = len(host.peer.received)
    host.service.kill()
    for name in NAMES:  # each has a will of its own
        host.presence(name, False, after)
    after = len(host.peer.received)
    again = host.start()
    assert host.updates(after) == first
    accepted = RegionReceipt(run="run", round=1, boot=5, members=NAMES)
    host.peer.publish("fl/receipts/region_0", accepted.to_json())
    for name in NAMES:
        again.wait_for_log(f'"update": "run/1/region_0/{name}".*update_accepted')
        assert not (tmp_path / MODULE / "state" / name / "outbox").exists()
    assert "step_1_local_training" not in again.log.read_text()


def test_receipt_is_for_one_client_alone(host: Host, tmp_path: Path) -> None:
    host.model()
    host.deal_to_all()
    host.updates()
    after = len(host.peer.received)
    receipt = Receipt(run="run", round=1, verdict=Verdict.ACCEPTED, boot=5)
    host.peer.publish("fl/receipts/region_0/sim-0001", receipt.to_json())
    host.service.wait_for_log('"update": "run/1/region_0/sim-0001".*update_accepted')
    for name in ("sim-0000", "sim-0002"):
        host.update(name, after)  # again, since nobody answered
        assert (tmp_path / MODULE / "state" / name / "outbox").exists()


def test_clients_train_in_the_order_in_which_they_came(host: Host) -> None:
    host.model(local_epochs=20)
    for slot, name in ((0, "sim-0002"), (1, "sim-0000"), (2, "sim-0001")):
        host.deal(name, slot)
        host.presence(name, True, slot=slot)  # it has it, and is waiting for its turn
    host.updates()
    trained = re.findall(
        r'"update": "run/1/region_0/(sim-\d+)".*step_1_local_training', host.service.log.read_text()
    )
    assert trained == ["sim-0002", "sim-0000", "sim-0001"]


def test_client_that_cannot_train_ends_alone(host: Host) -> None:
    host.model()
    after = len(host.peer.received)
    host.deal("sim-0001", 1, region=900, regions=1000)
    failed = json.loads(host.service.wait_for_log("client_failed"))
    assert (failed["client"], failed["others"]) == ("sim-0001", 2)
    assert "500 examples are too few for 1000 regions" in failed["error"]
    host.presence("sim-0001", False, after)
    for slot, name in ((0, "sim-0000"), (1, "sim-0002")):
        host.deal(name, slot)
        host.update(name)
    assert host.service.stop() == 1


def test_client_whose_name_is_used_twice_ends_alone(host: Host) -> None:
    name = "sim-0001"
    for _ in range(40):  # as a second process with this name would
        after = len(host.peer.received)
        rival = paho.Client(
            CallbackAPIVersion.VERSION2,
            f"fedfog-client-region_0-{name}",
            protocol=paho.MQTTv5,
        )
        rival.connect("127.0.0.1", host.broker.port)
        host.presence(name, False, after)
        if not host.is_back(name, after):
            break
    failed = json.loads(host.service.wait_for_log("client_failed"))
    assert failed["client"] == name
    assert "CLIENT_ID" in failed["error"]
    host.model()
    host.deal("sim-0000", 0)
    host.update("sim-0000")


def test_broker_that_comes_back_has_all_clients_again(host: Host) -> None:
    host.model()
    host.deal_to_all()
    first = host.updates()
    assert host.broker.process is not None
    host.broker.process.kill()
    host.broker.process.wait()
    after = len(host.peer.received)
    host.broker.start()
    assert host.updates(after) == first
    for name in NAMES:
        host.presence(name, True, after)
    assert host.service.stop() == 0
    for name in NAMES:
        host.presence(name, False, after)


def test_process_ends_when_all_its_clients_have_seen_the_end_of_their_run(
    services: Callable[..., Service], broker: LocalBroker, peers: Callable[..., Peer]
) -> None:
    host = Host(
        lambda *args, **kwargs: services(*args, **kwargs, exit_when_finished=True),
        broker,
        peers(broker.port, "fl/updates/#", "fl/presence/#"),
    )
    host.model()
    host.deal("sim-0000", 0)
    host.update("sim-0000")
    host.model(round=1, finished=True)
    assert host.service.wait() == 0
    assert host.service.log.read_text().count("run_finished") == len(NAMES)


def test_too_low_limit_of_open_files_is_named() -> None:
    code = (
        "import resource; from fedfog.service import allow_open_files\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 512))\n"
        "allow_open_files(300, 'CLIENTS_PER_PROCESS')\n"
        "assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 300\n"
        "allow_open_files(1000, 'CLIENTS_PER_PROCESS')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "CLIENTS_PER_PROCESS=1000 needs" in done.stderr
    assert "512" in done.stderr


def test_name_that_leaves_no_room_for_a_number_is_refused(
    services: Callable[..., Service], broker: LocalBroker
) -> None:
    service = services(MODULE, broker, client_id="c" * 30, clients_per_process=2)
    assert service.wait() == 1
    assert "CLIENT_ID" in service.log.read_text()
