"""An enrolled client that floods: what it costs the others, and that it is named."""

import json
import os
import re
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import REPOSITORY, Peer, Service
from fedfog.cli.broker import LocalBroker, installed_mosquitto
from fedfog.messages.codec import TensorMessage, TensorTable, decode
from fedfog.messages.schemas import PartialMeta
from fedfog.ml.task import load_task
from fedfog.ml.training import state_arrays
from fedfog.transport.mqtt import LARGE_BYTES, RECEIVE_MAXIMUM, WAITING_BYTES
from fedfog_enrolment import pki
from fuzz.flooder import NAME
from secured import certify, context, shipped_broker
from wire import model

ROUNDS = 20
ARRAYS = state_arrays(load_task("ecg5000", data_dir=REPOSITORY / "data").build_model(7))
TABLE = TensorTable.of(ARRAYS)
BASE = TABLE.flatten(ARRAYS)
# What the transport lets wait, and a few models: the sum, one in work, one in the store.
MEMORY = WAITING_BYTES + RECEIVE_MAXIMUM * LARGE_BYTES + 8 * BASE.nbytes


class Stage:
    """A broker, and who may come to it; without a PKI anybody may."""

    def __init__(self, folder: Path, secured: bool) -> None:
        self.pki, self._folder = (folder / "pki" if secured else None), folder
        if self.pki:
            self._ca = pki.ensure(self.pki, ["r0"])
            self.broker = shipped_broker(folder / "broker", self.pki / "broker").start()
        else:
            self.broker = LocalBroker(folder / "broker", "mosquitto").start()

    def identity(self, name: str) -> Path | None:
        if self.pki is None:
            return None
        if "/" not in name:
            return self.pki / name
        folder = self._folder / name.replace("/", "-")
        return folder if folder.exists() else certify(self._ca, folder, name)

    def context(self, name: str) -> ssl.SSLContext | None:
        folder = self.identity(name)
        return context(folder) if folder else None

    def settings(self, name: str) -> dict[str, object]:
        folder = self.identity(name)
        return {"tls_dir": folder} if folder else {}


@pytest.fixture(params=["plain", "secured"])
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    if installed_mosquitto() is None:
        pytest.skip("Mosquitto is not installed (apt install mosquitto)")
    made = Stage(tmp_path, request.param == "secured")
    yield made
    made.broker.stop()


@pytest.fixture
def flooder(stage: Stage) -> Iterator["subprocess.Popen[bytes]"]:
    """Begins with the first model."""
    command = [sys.executable, "-m", "fuzz.flooder", str(stage.broker.port), "r0"]
    if folder := stage.identity(f"r0/{NAME}"):
        command.append(str(folder))
    path = os.pathsep.join([str(REPOSITORY / "tests"), *sys.path])
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    )
    yield process
    process.kill()
    process.wait()


def peak(service: Service) -> int:
    """Bytes, the most that the process has had in memory."""
    text = Path(f"/proc/{service.process.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", text)
    assert found
    return 1024 * int(found[1])


def test_an_honest_update_counts_in_each_of_20_rounds_while_an_enrolled_client_floods(
    stage: Stage,
    flooder: "subprocess.Popen[bytes]",
    services: Callable[..., Service],
    peers: Callable[..., Peer],
) -> None:
    port = stage.broker.port
    aggregator = services(
        "fedfog_aggregator.main",
        stage.broker,
        region="r0",
        clients_expected=2,
        round_deadline=15,
        log_level="info",
        **stage.settings("aggregator.r0"),
    )
    services(
        "fedfog_client.main",
        stage.broker,
        region="r0",
        client_id="honest",
        **stage.settings("r0/honest"),
    )
    server = peers(port, tls=stage.context("central-server"))
    watcher = peers(port, "fl/partial/r0", "fl/receipts/r0/honest", tls=stage.context("monitor"))
    before = 0
    for round in range(1, ROUNDS + 1):
        server.publish("fl/global_model", model(BASE, round - 1, rounds=99, table=TABLE), True)
        partial = partial_of(watcher, round)
        assert "honest" in partial.meta.members, (round, partial.meta)
        before = before or peak(aggregator)
    assert flooder.poll() is None
    partials = [decode(p, PartialMeta).meta for t, p in watcher.received if t == "fl/partial/r0"]
    assert [meta.round for meta in partials] == list(range(1, ROUNDS + 1)), "each once"
    told = [json.loads(p)["verdict"] for t, p in watcher.received if t != "fl/partial/r0"]
    assert not {"late", "rejected"} & set(told)
    assert peak(aggregator) <= before + MEMORY
    line = json.loads(aggregator.wait_for_log("messages_over_quota"))
    assert line["of"].keys() == {NAME}
    assert line["setting"] == "CLIENT_QUOTA"


def partial_of(watcher: Peer, round: int) -> TensorMessage[PartialMeta]:
    def seen(topic: str, payload: bytes) -> bool:
        return topic == "fl/partial/r0" and decode(payload, PartialMeta).meta.round == round

    return decode(watcher.wait_for(seen), PartialMeta)
