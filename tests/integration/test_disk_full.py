"""Services on a disk that is full, a small tmpfs: nothing is lost, and the run goes on when there
is room again."""

import errno
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from centre import Centre, expected, lines
from centre import Region as PlayedRegion
from conftest import LIMIT, REPOSITORY, Peer, Service
from fedfog.cli.broker import LocalBroker
from fedfog.messages.codec import TensorTable, decode
from fedfog.messages.schemas import Receipt, Slot, UpdateMeta, Verdict
from fedfog.ml.task import load_task
from fedfog.ml.training import state_arrays
from region import Region
from wire import constant, model, update

Services = Callable[..., Service]
Peers = Callable[..., Peer]


class Disk:
    """A file system of a few megabytes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def fill(self) -> None:
        with self._filler.open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError as error:
                assert error.errno == errno.ENOSPC

    def make_room(self) -> None:
        self._filler.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted (that takes root): {done.stderr.strip()}")
    yield Disk(folder)
    # Lazily: the services that have files open in it are killed after this.
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_aggregator_closes_no_round_before_its_partial_is_on_disk(
    disk: Disk, services: Services, broker: LocalBroker, peers: Peers
) -> None:
    """Also the cohort and the slots of a newcomer cannot be stored meanwhile: that ends nothing."""
    peer = peers(broker.port, "fl/receipts/#", "fl/partial/#", "fl/status/#", "fl/slots/#")
    state = disk.folder / "state"
    service = services("fedfog_aggregator.main", broker, clients_expected=2, state_dir=state)
    region = Region(service, peer)
    region.open("a", "b")

    def send(client: str, value: float, base: float, round: int) -> None:
        payload = update(constant(base), constant(value), client, round)
        peer.publish(f"fl/updates/region_0/{client}", payload)

    for round, base, values in ((1, 0.25, (1.0, 3.0)), (2, 2.0, (5.0, 9.0))):
        after = len(peer.received)
        disk.fill()
        if round == 2:
            peer.publish("fl/global_model", model(constant(base), 1), retain=True)
            region.wait_phase("open", 2)
            service.wait_for_log("cohort_not_stored")
            region.present("c")
            peer.on("fl/slots/region_0/c")
            service.wait_for_log("slots_not_stored")
        for client, value in zip("ab", values, strict=True):
            send(client, value, base, round)
        region.wait_phase("degraded", round, after)
        refused = lines(service, "partial_not_stored")[-1]["error"]
        assert str(state / "aggregator.db") in refused
        assert "STATE_DIR" in refused
        told = [t for t, _ in peer.received[after:]]
        assert not {"fl/partial/region_0", "fl/receipts/region_0"} & set(told)
        disk.make_room()
        partial = region.partial(round, after)
        assert partial.meta.members == {"a": 10, "b": 10}
        np.testing.assert_array_equal(partial.vector, constant(sum(values) / 2))
        peer.on("fl/receipts/region_0", after=after)
    service.kill()
    # What was told is on the disk.
    after = len(peer.received)
    again = services("fedfog_aggregator.main", broker, clients_expected=2, state_dir=state)
    again.wait_for_log("step_4_partial_published")
    assert region.partial(2, after).vector.tobytes() == partial.vector.tobytes()


def test_aggregator_gives_up_after_store_timeout_and_names_it(
    disk: Disk, services: Services, broker: LocalBroker, peers: Peers
) -> None:
    """Started again with room, it counts the repeated update."""
    peer = peers(broker.port, "fl/receipts/#", "fl/partial/#", "fl/status/#")
    settings = {"clients_expected": 1, "state_dir": disk.folder / "state"}
    service = services("fedfog_aggregator.main", broker, store_timeout=0.1, **settings)
    region = Region(service, peer)
    region.open("a")
    disk.fill()
    region.send("a", 1.0)
    assert service.wait() == 1
    assert "STORE_TIMEOUT" in service.log.read_text()
    disk.make_room()
    after = len(peer.received)
    services("fedfog_aggregator.main", broker, **settings)
    region.wait_phase("open", 1, after)
    region.send("a", 1.0)
    assert region.partial(after=after).meta.members == {"a": 10}


def test_central_server_publishes_no_model_before_its_checkpoint_is_on_disk(
    disk: Disk, services: Services, broker: LocalBroker, tmp_path: Path
) -> None:
    here = Centre(services, broker, tmp_path, runs_dir=disk.folder / "runs")
    here.runs = disk.folder / "runs"
    region = PlayedRegion(broker.port, allowed=1)
    here.bridge()
    server = here.start()
    region.model(1)
    disk.fill()
    region.allow(3)
    problem = json.loads(server.wait_for_log("checkpoint_not_written", LIMIT))
    assert problem["path"] == str(here.folder / "checkpoints" / "round-000002.safetensors")
    assert problem["error"] == "No space left on device"
    assert 2 not in region.models
    disk.make_room()
    assert server.wait(LIMIT) == 0
    assert region.model(3).vector.tobytes() == expected(region.models[0], 3)
    assert here.read("summary.json")["status"] == "completed"
    region.close()


def test_client_sends_an_update_that_it_cannot_store(
    disk: Disk, services: Services, broker: LocalBroker, peers: Peers
) -> None:
    peer = peers(broker.port, "fl/updates/#", "fl/presence/#")
    arrays = state_arrays(load_task("ecg5000", data_dir=REPOSITORY / "data").build_model(7))
    table = TensorTable.of(arrays)
    state = disk.folder / "state"
    service = services("fedfog_client.main", broker, client_id="c1", state_dir=state)
    peer.on("fl/presence/region_0/c1")
    disk.fill()
    peer.publish("fl/global_model", model(table.flatten(arrays), table=table), retain=True)
    dealt = Slot(run="run", slot=0, slots=3, region_index=0, regions=1)
    peer.publish("fl/slots/region_0/c1", dealt.to_json())
    sent = decode(peer.on("fl/updates/region_0/c1"), UpdateMeta)
    assert sent.meta.round == 1
    problem = json.loads(service.wait_for_log("outbox_not_written"))
    assert str(state / "outbox") in problem["error"]
    assert problem["setting"] == "STATE_DIR"
    accepted = Receipt(run="run", round=1, verdict=Verdict.ACCEPTED, boot=5)
    peer.publish("fl/receipts/region_0/c1", accepted.to_json())
    service.wait_for_log("update_accepted")
    assert service.stop() == 0


@pytest.mark.parametrize(
    ("module", "setting"),
    [
        ("fedfog_aggregator.main", "state_dir"),
        ("fedfog_client.main", "state_dir"),
        ("fedfog_bridge.main", "state_dir"),
        ("fedfog_central_server.main", "runs_dir"),
    ],
)
def test_full_disk_at_start_is_an_error_that_names_path_and_setting(
    disk: Disk, services: Services, broker: LocalBroker, module: str, setting: str
) -> None:
    disk.fill()
    folder = disk.folder / "here"
    service = services(module, broker, **{setting: folder})
    assert service.wait() == 1
    [failed] = lines(service, "service_failed")
    assert str(folder) in failed["error"]
    assert setting.upper() in failed["error"]
    assert "Traceback" not in service.log.read_text()


def test_full_disk_under_the_health_file_ends_no_service(
    disk: Disk, services: Services, broker: LocalBroker, peers: Peers
) -> None:
    peer = peers(broker.port, "fl/receipts/#", "fl/partial/#", "fl/status/#")
    disk.fill()
    health = disk.folder / "health"
    settings: dict[str, Any] = {"clients_expected": 1, "health_file": health}
    region = Region(services("fedfog_aggregator.main", broker, **settings), peer)
    warning = json.loads(region.service.wait_for_log("health_not_written"))
    assert (warning["path"], warning["setting"]) == (str(health), "HEALTH_FILE")
    region.open("a")
    region.send("a", 1.0)
    assert region.partial().meta.members == {"a": 10}
