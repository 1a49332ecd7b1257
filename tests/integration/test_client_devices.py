"""Clients that are not like the others: with data of their own, slow, or away now and then."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conftest import REPOSITORY, Peer, Service
from fedfog.cli.broker import LocalBroker
from fedfog.core.phases import Phase
from fedfog.messages.codec import TensorMessage, TensorTable, decode, decode_meta
from fedfog.messages.schemas import Presence, Slot, Status, UpdateMeta
from fedfog.ml.ecg5000 import Ecg5000
from fedfog.ml.training import state_arrays
from wire import model

TASK = Ecg5000(REPOSITORY / "data")
ARRAYS = state_arrays(TASK.build_model(7))
TABLE = TensorTable.of(ARRAYS)
BASE = TABLE.flatten(ARRAYS)


class Device:
    """A running client of `region_0`; a peer plays the rest of the federation."""

    def __init__(self, service: Service, peer: Peer, name: str) -> None:
        self.service, self._peer, self._name = service, peer, name
        self.birth = Presence.model_validate_json(peer.on(f"fl/presence/region_0/{name}"))

    def model(self, round: int = 0) -> None:
        self._peer.publish("fl/global_model", model(BASE, round, table=TABLE), retain=True)

    def end(self) -> None:
        """Kill it, and have the broker forget the model."""
        self.service.kill()
        self._peer.publish("fl/global_model", b"", retain=True)

    def deal(self) -> None:
        dealt = Slot(run="run", slot=0, slots=3, region_index=0, regions=1)
        self._peer.publish(f"fl/slots/region_0/{self._name}", dealt.to_json())

    def starves(self, round: int) -> None:
        status = Status(online=True, boot=1, run="run", round=round, phase=Phase.STARVING)
        self._peer.publish("fl/status/region_0", status.to_json())

    def update(self, round: int = 1) -> TensorMessage[UpdateMeta]:
        topic = f"fl/updates/region_0/{self._name}"

        def wanted(at: str, payload: bytes) -> bool:
            return at == topic and decode_meta(payload, UpdateMeta).round == round

        return decode(self._peer.wait_for(wanted), UpdateMeta)

    def sits_out(self, round: int) -> bool:
        """Whether it sits this round out; otherwise it trains."""
        line = self.service.wait_for_log(f'"round": {round}, .*"event": "(sits_round_out|epoch)"')
        event: str = json.loads(line)["event"]
        return event == "sits_round_out"


Start = Callable[..., Device]


@pytest.fixture
def start(
    broker: LocalBroker, services: Callable[..., Service], peers: Callable[..., Peer]
) -> Start:
    def begin(name: str = "c1", folder: str = "", **settings: object) -> Device:
        service = services("fedfog_client.main", broker, folder or name, client_id=name, **settings)
        return Device(service, peers(broker.port, "fl/updates/#", "fl/presence/#"), name)

    return begin


def beats(path: Path, rows: slice) -> Path:
    """A file with these training beats of ECG5000."""
    inputs, labels = TASK.training_data(np.arange(500)[rows]).tensors
    np.savez(path, x=inputs.numpy(), y=labels.numpy())
    return path


def test_client_with_data_of_its_own_trains_on_them_and_needs_no_slot(
    start: Start, tmp_path: Path
) -> None:
    path = beats(tmp_path / "own.npz", slice(240, 360))
    device = start(client_data=path, data_dir=tmp_path)  # nothing but its own
    assert device.birth.own_data
    device.model()
    update = device.update()
    assert update.meta.num_examples == 108  # a tenth is held back
    assert update.meta.metrics.validation_accuracy is not None
    assert np.abs(update.vector - BASE).max() > 1e-4


def test_what_such_a_client_draws_follows_from_its_name(start: Start, tmp_path: Path) -> None:
    beats(tmp_path / "own.npz", slice(240, 360))
    vectors = []
    for name, folder in (("c1", "one"), ("c1", "again"), ("c2", "other")):
        device = start(name, folder, client_data=tmp_path / "own.npz")
        device.model()
        vectors.append(device.update().vector)
        device.end()
    assert vectors[0].tobytes() == vectors[1].tobytes()
    assert vectors[0].tobytes() != vectors[2].tobytes()


def test_fault_in_its_file_ends_the_client_and_names_setting_and_line(
    start: Start, tmp_path: Path
) -> None:
    path = tmp_path / "own.csv"
    path.write_text("normal,1,2\nabnormal,1,two\n")
    device = start(client_data=path)
    device.model()
    assert device.service.wait() == 1
    text = device.service.log.read_text()
    assert f"CLIENT_DATA: {path}, line 2" in text
    assert "'two'" in text


def test_fault_in_the_file_of_one_client_of_a_process_ends_it_alone(
    broker: LocalBroker,
    services: Callable[..., Service],
    peers: Callable[..., Peer],
    tmp_path: Path,
) -> None:
    beats(tmp_path / "region_0-sim-0001.npz", slice(240, 300))
    peer = peers(broker.port, "fl/updates/#")
    host = services(
        "fedfog_client.main",
        broker,
        client_id="sim",
        clients_per_process=2,
        client_data=tmp_path / "{region}-{client}.npz",
    )
    peer.publish("fl/global_model", model(BASE, table=TABLE), retain=True)
    assert decode(peer.on("fl/updates/region_0/sim-0001"), UpdateMeta).meta.num_examples == 54
    failed = json.loads(host.wait_for_log("client_failed"))
    assert failed["client"] == "sim-0000"
    assert "region_0-sim-0000.npz cannot be read" in failed["error"]
    assert host.stop() == 1


def test_clients_of_a_process_do_not_share_a_file(
    broker: LocalBroker, services: Callable[..., Service], tmp_path: Path
) -> None:
    path = beats(tmp_path / "own.npz", slice(0, 9))
    host = services("fedfog_client.main", broker, clients_per_process=2, client_data=path)
    assert host.wait() == 2
    assert "{client}" in host.log.read_text()


def test_slow_client_holds_its_update_back_and_says_how_long_it_took(start: Start) -> None:
    device = start(client_slowdown=4)
    device.model()
    device.deal()
    seconds = device.update().meta.train_seconds
    trained = json.loads(device.service.wait_for_log('"event": "epoch"'))["timestamp"]
    told = json.loads(device.service.wait_for_log("step_1_local_training"))["timestamp"]
    waited = np.datetime64(told.rstrip("Z")) - np.datetime64(trained.rstrip("Z"))
    # Three quarters of the time were spent waiting after the training.
    assert waited / np.timedelta64(1, "s") > 0.74 * seconds


def test_newer_model_ends_the_wait_of_a_slow_client(start: Start) -> None:
    device = start(client_slowdown=1000)
    device.model()
    device.deal()
    device.service.wait_for_log('"round": 1, .*"event": "epoch"')
    device.model(round=1)
    device.service.wait_for_log('"round": 2, .*"event": "epoch"')
    assert "step_2_update_published" not in device.service.log.read_text()


def test_who_sits_out_when_follows_from_seed_client_and_round(start: Start, tmp_path: Path) -> None:
    path = beats(tmp_path / "own.npz", slice(240, 260))
    absences: list[list[bool]] = []
    for name, folder in (("c1", "one"), ("c1", "again"), ("c2", "other")):
        device = start(name, folder, client_dropout=0.5, client_data=path)
        absences.append([])
        for round in range(1, 9):
            device.model(round - 1)
            absences[-1].append(device.sits_out(round))
        device.end()
    assert absences[0] == absences[1]
    assert absences[0] != absences[2]
    assert set(absences[0]) == {True, False}


def test_client_that_sits_out_is_back_when_its_region_starves(start: Start) -> None:
    device = start(client_dropout=0.999)
    device.model()
    device.deal()
    assert device.sits_out(1)
    device.starves(round=9)  # of another round
    device.starves(round=1)
    assert device.update().meta.num_examples == 150
    device.model(round=1)
    assert device.sits_out(2)
