"""The central server with a real broker, a real SuperLink and real fog bridges; the test stands in
for the clients and the aggregator of a region."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paho.mqtt.client as paho
import psutil
import pytest
from safetensors.numpy import load_file

from conftest import Peer, Service
from fedfog.cli.broker import LocalBroker, free_port
from fedfog.messages.codec import TensorMessage, decode, decode_json, digest_of, encode
from fedfog.messages.schemas import ClientMetrics, ModelMeta, PartialMeta, RoundRecord, RunState

MODEL = "fl/global_model"
LIMIT = 90.0  # seconds for what takes about ten on an idle machine


class Region(Peer):
    """Clients and aggregator of a region, played: the partial of round r is model r-1 plus r, and
    is published as soon as round r is `allowed`."""

    def __init__(self, port: int, name: str = "region_0", allowed: int = 10**6) -> None:
        self.name, self.allowed = name, allowed
        self.models: dict[int, TensorMessage[ModelMeta]] = {}
        self._done: set[tuple[str, int]] = set()
        super().__init__(port, MODEL)

    def _on_message(self, client: Any, data: Any, message: paho.MQTTMessage) -> None:
        super()._on_message(client, data, message)
        if not message.payload.startswith(b"garbage"):
            model = decode(bytes(message.payload), ModelMeta)
            self.models[model.meta.round] = model
            self._answer()

    def allow(self, round: int) -> None:
        self.allowed = round
        self._answer()

    def model(self, round: int) -> TensorMessage[ModelMeta]:
        """Wait for model `round`."""
        self.wait_for(lambda _topic, _payload: round in self.models, LIMIT)
        return self.models[round]

    def _answer(self) -> None:
        for base in list(self.models.values()):
            round = base.meta.round + 1
            key = (base.meta.run, round)
            if base.meta.state is RunState.FINISHED or round > self.allowed or key in self._done:
                continue
            self._done.add(key)
            vector = base.vector + np.float32(round)
            meta = PartialMeta(
                run=base.meta.run,
                round=round,
                region=self.name,
                digest=digest_of(vector),
                num_clients=2,
                num_examples=10,
                members={"a": 4, "b": 6},
                metrics=ClientMetrics(train_loss=1.0 / round),
            )
            payload = encode(meta, base.table, vector)
            self._client.publish(f"fl/partial/{self.name}", payload, qos=1, retain=True)


class Centre:
    """Central server and a bridge; the server can be started again."""

    def __init__(
        self, services: Callable[..., Service], broker: LocalBroker, folder: Path, **settings: Any
    ) -> None:
        self.port, self.runs = free_port(), folder / "runs"
        self._services, self._broker = services, broker
        self._settings = {
            "flower_port": self.port,
            "runs_dir": self.runs,
            "rounds": 3,
            "exit_when_finished": True,
            **settings,
        }

    def bridge(self, region: str = "region_0") -> Service:
        return self._services(
            "fedfog_bridge.main",
            self._broker,
            f"bridge-{region}",
            region=region,
            flower_server=f"127.0.0.1:{self.port}",
        )

    def start(self, **settings: Any) -> Service:
        return self._services(
            "fedfog_central_server.main", self._broker, "central", **self._settings | settings
        )

    @property
    def folder(self) -> Path:
        """Of the newest run."""
        return (self.runs / "latest").resolve()

    def read(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())


@pytest.fixture
def centre(
    services: Callable[..., Service], broker: LocalBroker, tmp_path: Path
) -> Callable[..., Centre]:
    return lambda **settings: Centre(services, broker, tmp_path, **settings)


def descendants(service: Service) -> list[psutil.Process]:
    children: list[psutil.Process] = psutil.Process(service.process.pid).children(recursive=True)
    return children


def assert_gone(processes: list[psutil.Process], within: float = 5.0) -> None:
    deadline = time.monotonic() + within
    while alive := [process for process in processes if is_alive(process)]:
        assert time.monotonic() < deadline, f"still running: {alive}"
        time.sleep(0.02)


def is_alive(process: psutil.Process) -> bool:
    """Not ended; a zombie has ended, and only waits for init to take note."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def lines(service: Service, event: str) -> list[dict[str, Any]]:
    text = service.log.read_text(errors="replace").splitlines()
    parsed = [json.loads(line) for line in text if line.startswith("{")]
    return [line for line in parsed if line["event"] == event]


def expected(model_0: TensorMessage[ModelMeta], rounds: int) -> bytes:
    vector = model_0.vector
    for round in range(1, rounds + 1):
        vector = vector + np.float32(round)
    return vector.tobytes()


def test_a_run_publishes_every_model_and_leaves_all_results(
    services: Callable[..., Service], any_broker: LocalBroker, tmp_path: Path
) -> None:
    centre = Centre(services, any_broker, tmp_path)
    region, watcher = Region(any_broker.port), Peer(any_broker.port, "fl/history")
    centre.bridge()
    server = centre.start()
    region.model(1)
    children = descendants(server)
    assert server.wait(LIMIT) == 0
    assert_gone(children, within=0.5)

    final = region.model(3)
    assert final.vector.tobytes() == expected(region.models[0], 3)
    assert [region.models[r].meta.state for r in range(4)] == ["training"] * 3 + ["finished"]
    assert final.meta.regions["region_0"].num_clients == 2
    assert final.meta.evaluation is not None
    assert final.meta.evaluation.round < 3
    # Own messages that come back are not taken for somebody else's.
    assert not lines(server, "retained_model_replaced")

    summary, history = centre.read("summary.json"), centre.read("history.json")
    assert (summary["status"], summary["error"], summary["rounds"]) == ("completed", "", 3)
    assert (summary["clients"], summary["regions"]) == ([2, 2, 2], ["region_0"])
    assert summary["run"] == final.meta.run == history["run"]
    assert [record["round"] for record in history["rounds"]] == [1, 2, 3]
    for record in history["rounds"]:
        assert record["evaluation"]["num_examples"] == 4500
        assert {"push", "reply", "pull", "aggregate", "evaluate"} <= record["seconds"].keys()
    last = history["rounds"][-1]["evaluation"]
    for name in ("accuracy", "auroc", "macro_f1", "loss"):
        assert summary[f"test_{name}"] == last[name]
    published = [decode_json(payload, RoundRecord) for _, payload in watcher.received]
    assert [record.round for record in published] == [1, 2, 3]

    tensors = load_file(centre.folder / "model.safetensors")
    assert final.table.flatten(tensors).tobytes() == final.vector.tobytes()
    saved = decode((centre.folder / "model.safetensors").read_bytes(), ModelMeta)
    assert saved.meta.evaluation is not None
    assert saved.meta.evaluation.round == 3
    card = (centre.folder / "README.md").read_text()
    assert final.meta.digest in card
    assert "not a medical device" in card
    assert (centre.folder / "learning-curve.png").read_bytes().startswith(b"\x89PNG")
    assert centre.read("settings.json")["settings"]["rounds"] == 3
    steps = [line["event"] for line in map(json.loads, _story(server))]
    assert steps == ["step_7_global_model_published"] + 3 * [
        "step_6_global_aggregation",
        "step_7_global_model_published",
    ]
    assert "->" in lines(server, "run_completed")[0]["accuracy"]
    region.close()
    watcher.close()


def _story(server: Service) -> list[str]:
    return [line for line in server.log.read_text().splitlines() if '"step_' in line]


def kill_server_app(server: Service) -> None:
    psutil.Process(lines(server, "serverapp_ready")[-1]["pid"]).kill()


def kill_superlink(server: Service) -> None:
    [superlink] = psutil.Process(server.process.pid).children()
    superlink.kill()


def test_open_rounds_survive_the_death_of_server_app_and_superlink(
    centre: Callable[..., Centre], broker: LocalBroker
) -> None:
    here, region = centre(), Region(broker.port, allowed=1)
    here.bridge()
    server = here.start()
    for round, kill in ((1, kill_server_app), (2, kill_superlink)):
        region.model(round)
        kill(server)
        server.wait_for_log(f'(?s:("serverapp_ready".*){{{round + 1}}})', LIMIT)
        region.allow(round + 1)
    assert server.wait(LIMIT) == 0
    assert region.model(3).vector.tobytes() == expected(region.models[0], 3)
    assert len({model.meta.run for model in region.models.values()}) == 1
    assert here.read("summary.json")["clients"] == [2, 2, 2]
    region.close()


def test_a_killed_server_leaves_no_child_and_goes_on_where_it_was(
    centre: Callable[..., Centre], broker: LocalBroker
) -> None:
    here, region = centre(), Region(broker.port, allowed=1)
    here.bridge()
    server = here.start()
    region.model(1)
    children = descendants(server)
    assert len(children) == 3  # SuperLink, SuperExec, ServerApp
    server.kill()
    assert_gone(children)
    # The region closes its round while nobody is there to hear of it.
    region.allow(2)
    region.allow(3)
    again = here.start()
    assert again.wait(LIMIT) == 0
    assert region.model(3).vector.tobytes() == expected(region.models[0], 3)
    assert len({model.meta.run for model in region.models.values()}) == 1
    assert [record["round"] for record in here.read("history.json")["rounds"]] == [1, 2, 3]
    region.close()


def test_a_stopped_server_says_so_and_goes_on_when_started_again(
    centre: Callable[..., Centre], broker: LocalBroker
) -> None:
    here, region = centre(), Region(broker.port, allowed=2)
    bridge = here.bridge()
    server = here.start()
    region.model(2)
    children = descendants(server)
    began = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - began < 5.0
    assert_gone(children, within=0.5)
    summary = here.read("summary.json")
    assert (summary["status"], summary["rounds"]) == ("stopped", 2)
    region.allow(3)
    again = here.start(exit_when_finished=False)
    again.wait_for_log("run_completed", LIMIT)
    assert region.model(3).vector.tobytes() == expected(region.models[0], 3)
    resumed = here.read("summary.json")
    assert (resumed["status"], resumed["run"]) == ("completed", summary["run"])
    # Now it stands by: bridges stay connected, and only SIGTERM ends it.
    assert [bridge.process.poll(), again.process.poll()] == [None, None]
    children = descendants(again)
    assert again.stop() == 0
    assert_gone(children, within=0.5)
    region.close()


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    centre: Callable[..., Centre], broker: LocalBroker
) -> None:
    """The region has gone on meanwhile, and does the lost round again."""
    here, region = centre(), Region(broker.port, allowed=2)
    here.bridge()
    server = here.start()
    region.model(2)
    server.kill()
    newest = here.folder / "checkpoints" / "round-000002.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    region.allow(3)
    again = here.start()
    assert again.wait(LIMIT) == 0
    [damage], [back] = lines(again, "checkpoint_damaged"), lines(again, "run_goes_back")
    assert "round-000002" in damage["error"]
    assert (back["from_round"], back["to_round"]) == (2, 1)
    assert region.model(3).vector.tobytes() == expected(region.models[0], 3)
    region.close()


def test_without_a_region_the_run_fails_and_says_which_setting(
    centre: Callable[..., Centre],
) -> None:
    here = centre(regions_timeout=6, regions="north,south", min_available_clients=2)
    server = here.start()
    waiting = json.loads(server.wait_for_log("waiting_for_regions", LIMIT))
    assert waiting["missing"] == ["north", "south"]
    assert server.wait(LIMIT) == 1
    summary = here.read("summary.json")
    assert summary["status"] == "failed"
    for word in ("REGIONS_TIMEOUT", "MIN_AVAILABLE_CLIENTS", "north", "south"):
        assert word in summary["error"]


def test_nothing_is_published_that_could_not_be_checkpointed(
    centre: Callable[..., Centre], broker: LocalBroker
) -> None:
    """The folder is made unusable, as by a full disk; the run goes on when it is repaired."""
    here, region = centre(), Region(broker.port, allowed=1)
    here.bridge()
    server = here.start()
    region.model(1)
    checkpoints = here.folder / "checkpoints"
    checkpoints.rename(away := here.folder / "away")
    checkpoints.write_text("not a folder")
    region.allow(3)
    problem = json.loads(server.wait_for_log("checkpoint_not_written", LIMIT))
    assert str(checkpoints / "round-000002.safetensors") in problem["path"]
    assert 2 not in region.models
    checkpoints.unlink()
    away.rename(checkpoints)
    assert server.wait(LIMIT) == 0
    assert region.model(3).vector.tobytes() == expected(region.models[0], 3)
    region.close()


def test_model_0_is_retained_before_flower_is_up_and_repaired(
    centre: Callable[..., Centre], broker: LocalBroker, peers: Callable[..., Peer]
) -> None:
    """After somebody else wrote it, and after the broker came back without it. It is there
    before Flower is, so that clients train while Flower starts."""
    server = centre().start()
    watcher = peers(broker.port, MODEL)
    payload = watcher.on(MODEL, LIMIT)
    assert not lines(server, "serverapp_ready")
    assert decode(payload, ModelMeta).meta.round == 0
    watcher.publish(MODEL, b"garbage", retain=True)
    server.wait_for_log("retained_model_replaced")
    watcher.wait_for(lambda _topic, p: p == payload, after=2)
    assert peers(broker.port, MODEL).on(MODEL) == payload
    broker.stop()
    broker.start()
    assert peers(broker.port, MODEL).on(MODEL) == payload
