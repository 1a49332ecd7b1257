"""TENSORBOARD_DIR: what TensorBoard would show is what the history says. Real broker, SuperLink and
bridge; clients and aggregator are played."""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event

from centre import Centre, Region
from conftest import LIMIT, Service
from fedfog.cli.broker import LocalBroker
from fedfog.runs import figures


def events(folder: Path) -> Iterator[Event]:
    """The format is TensorFlow's TFRecord: length and its checksum, content and its checksum."""
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_figures_of_each_round_are_there_for_tensorboard(
    services: Callable[..., Service], broker: LocalBroker, tmp_path: Path
) -> None:
    centre = Centre(
        *(services, broker, tmp_path), rounds=2, run_id="one", tensorboard_dir=tmp_path / "boards"
    )
    region = Region(broker.port)
    centre.bridge()
    assert centre.start().wait(LIMIT) == 0
    region.close()
    shown = {
        (event.step, value.tag): value.simple_value
        for event in events(tmp_path / "boards" / "one")
        for value in event.summary.value
    }
    history = centre.read("history.json")
    for record in history["rounds"]:
        told = figures(record)
        for tag in ("accuracy", "loss", "macro_f1", "train_loss", "num_clients"):
            assert abs(shown[record["round"], tag] - told[tag]) < 1e-6
        assert abs(shown[record["round"], "seconds/aggregate"] - told["seconds_aggregate"]) < 1e-6
    assert {step for step, _ in shown} == {1, 2}


def test_missing_package_ends_the_server_at_its_start_and_names_the_setting(
    services: Callable[..., Service], broker: LocalBroker, tmp_path: Path
) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "tensorboardX.py").write_text("raise ImportError('not installed')\n")
    centre = Centre(
        *(services, broker, tmp_path), tensorboard_dir=tmp_path / "boards", pythonpath=hidden
    )
    server = centre.start()
    assert server.wait(LIMIT) == 1
    assert "TENSORBOARD_DIR needs tensorboardX: pip install" in server.log.read_text()


def test_folder_that_cannot_be_made_ends_the_server_at_its_start(
    services: Callable[..., Service], broker: LocalBroker, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    centre = Centre(*(services, broker, tmp_path), tensorboard_dir=tmp_path / "file" / "boards")
    server = centre.start()
    assert server.wait(LIMIT) == 1
    assert "TENSORBOARD_DIR" in server.log.read_text()
