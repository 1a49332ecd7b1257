"""The whole federation, every tier as its own process: who may come late, freeze, die or be
missing, and what the run is then."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import LIMIT, REPOSITORY, Peer, Service
from fedfog.cli.broker import LocalBroker, free_port
from fedfog.core.partition import deal
from fedfog.messages.codec import decode, decode_meta
from fedfog.messages.schemas import Hyperparameters, ModelMeta, PartialMeta, RoundRecord, UpdateMeta
from fedfog.ml.ecg5000 import Ecg5000
from fedfog.ml.reference import fedavg
from halting import Halt

Services = Callable[..., Service]
RUN = "run"


class Stack:
    """Starts the tiers one by one, against one broker."""

    def __init__(self, services: Services, broker: LocalBroker, folder: Path) -> None:
        self._services, self.broker = services, broker
        self.results = folder / "runs" / RUN
        self._flower = free_port()

    def server(self, **settings: object) -> Service:
        defaults: dict[str, object] = {
            "run_id": RUN,
            "runs_dir": self.results.parent,
            "flower_port": self._flower,
            "exit_when_finished": "true",
            "pythonpath": REPOSITORY,
        }
        return self._services("fedfog_central_server.main", self.broker, **(defaults | settings))

    def aggregator(self, region: str = "region_0", **settings: object) -> Service:
        module = "fedfog_aggregator.main"
        return self._services(module, self.broker, f"agg-{region}", region=region, **settings)

    def bridge(self, region: str = "region_0") -> Service:
        address = f"127.0.0.1:{self._flower}"
        module, name = "fedfog_bridge.main", f"bridge-{region}"
        return self._services(module, self.broker, name, region=region, flower_server=address)

    def client(self, name: str, region: str = "region_0", **settings: object) -> Service:
        defaults: dict[str, object] = {"client_id": name, "region": region}
        defaults["pythonpath"] = REPOSITORY
        return self._services(
            "fedfog_client.main", self.broker, f"{region}-{name}", **(defaults | settings)
        )

    def history(self) -> list[dict[str, Any]]:
        return list(json.loads((self.results / "history.json").read_text())["rounds"])

    def summary(self) -> dict[str, Any]:
        return dict(json.loads((self.results / "summary.json").read_text()))


@pytest.fixture
def stack(services: Services, broker: LocalBroker, tmp_path: Path) -> Stack:
    return Stack(services, broker, tmp_path)


@pytest.fixture
def halt(tmp_path: Path) -> Halt:
    """Halts a client that has trained, before its first update is anywhere else."""
    put = "fedfog_client.outbox:Outbox.put"
    return Halt(tmp_path / "halt", put).arm(put, "before")


def of_round(record: bytes, round: int) -> bool:
    return RoundRecord.model_validate_json(record).round >= round


def test_client_that_comes_after_round_1_joins_the_next_round(
    stack: Stack, peers: Callable[..., Peer]
) -> None:
    peer = peers(stack.broker.port, "fl/history")
    server = stack.server(rounds=100_000, local_epochs=20)
    stack.aggregator(clients_expected=2)
    stack.bridge()
    stack.client("a")
    stack.client("b")
    peer.wait_for(lambda _, p: of_round(p, 1))
    stack.client("late")
    peer.wait_for(lambda _, p: b'"late"' in p)
    assert server.stop() == 0
    members = [sorted(r["regions"]["region_0"]["members"]) for r in stack.history()]
    came = members.index(["a", "b", "late"])
    assert came >= 1
    assert members[:came] == [["a", "b"]] * came
    assert members[came:] == [["a", "b", "late"]] * (len(members) - came)


def test_frozen_client_is_left_out_at_the_deadline_by_name(stack: Stack, halt: Halt) -> None:
    server = stack.server(rounds=2)
    stack.aggregator(clients_expected=3, round_deadline=6)
    stack.bridge()
    stack.client("a")
    stack.client("b")
    frozen = stack.client("c", "region_0", **halt.settings)
    halt.wait(frozen)
    os.kill(frozen.process.pid, signal.SIGSTOP)
    assert server.wait(2 * LIMIT) == 0
    rounds = [r["regions"]["region_0"] for r in stack.history()]
    assert [sorted(partial["members"]) for partial in rounds] == [["a", "b"]] * 2
    assert {name for partial in rounds for name in partial["left_out"]} == {"c"}


def test_killed_client_does_not_hold_up_the_round(stack: Stack, halt: Halt) -> None:
    """The will tells it at once: the deadline of ten minutes is not waited for."""
    server = stack.server(rounds=2)
    stack.aggregator(clients_expected=3, round_deadline=600)
    stack.bridge()
    stack.client("a")
    stack.client("b")
    halt.kill_there(stack.client("c", "region_0", **halt.settings))
    assert server.wait(2 * LIMIT) == 0
    first = stack.history()[0]["regions"]["region_0"]
    assert sorted(first["members"]) == ["a", "b"]
    assert first["left_out"] == {"c": "offline"}


def test_without_clients_no_round_is_made_up(stack: Stack, peers: Callable[..., Peer]) -> None:
    """Only model 0 is ever published, and the error names the setting."""
    peer = peers(stack.broker.port, "fl/global_model")
    server = stack.server(rounds=3, round_timeout=3)
    stack.aggregator()
    stack.bridge()
    assert server.wait(2 * LIMIT) == 1
    models = [decode_meta(p, ModelMeta).round for t, p in peer.received if p]
    assert set(models) == {0}
    summary = stack.summary()
    assert summary["status"] == "failed"
    assert "ROUND_TIMEOUT" in summary["error"]


def test_region_without_a_bridge_is_left_out_and_named(stack: Stack) -> None:
    regions = "region_0,region_1"
    # One that waits for the SuperLink is there long before those that never come are given up.
    stack.bridge("region_0").wait_for_log("waiting_for_superlink")
    server = stack.server(rounds=1, regions=regions, regions_timeout=6, local_epochs=1)
    for region in regions.split(","):
        stack.aggregator(region, regions=regions, clients_expected=1)
        stack.client("a", region)
    assert server.wait(2 * LIMIT) == 0
    record = stack.history()[0]
    assert list(record["regions"]) == ["region_0"]
    assert "region_1" in record["left_out"]


def test_two_regions_give_the_mean_over_all_clients_of_both(
    stack: Stack, peers: Callable[..., Peer]
) -> None:
    """Recomputed from the updates as they went over the wire: flat FedAvg in float64."""
    peer = peers(stack.broker.port, "fl/updates/#", "fl/global_model", "fl/partial/#")
    regions = "region_0,region_1"
    server = stack.server(
        rounds=3, regions=regions, min_available_clients=2, min_fit_clients=2, local_epochs=1
    )
    for region, clients in (("region_0", "ab"), ("region_1", "c")):
        stack.aggregator(region, regions=regions, clients_expected=len(clients))
        stack.bridge(region)
        for client in clients:
            stack.client(client, region)
    assert server.wait(2 * LIMIT) == 0
    updates: dict[tuple[int, str, str], Any] = {}
    models: dict[int, Any] = {}
    for topic, payload in peer.received:
        if topic.startswith("fl/updates/"):
            update = decode(payload, UpdateMeta)
            meta = update.meta
            updates[meta.round, meta.region, meta.client] = update
        elif topic == "fl/global_model":
            model = decode(payload, ModelMeta)
            models[model.meta.round] = model.vector
    assert sorted(models) == [0, 1, 2, 3]
    for round in (1, 2, 3):
        members = [u for (r, _, _), u in updates.items() if r == round]
        assert len(members) == 3
        weights = [u.meta.num_examples for u in members]
        # The slots of both regions cover the 500 training beats; a tenth of each validates.
        assert abs(sum(weights) - 450) < len(weights)
        products = [n * u.vector.astype(np.float64) for n, u in zip(weights, members, strict=True)]
        flat = np.sum(products, axis=0) / sum(weights)
        np.testing.assert_allclose(models[round], flat, rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("one_thread")
def test_runs_equal_the_one_process_reference(stack: Stack, peers: Callable[..., Peer]) -> None:
    """Same seeds, slots and order: the model of round 1 to float32 rounding, and that of round 20
    to what is left of it after all the training."""
    runs: dict[str, dict[str, Any]] = {
        "adam": {},
        "sgd": {
            "optimizer": "sgd",
            "learning_rate": 0.1,
            "momentum": 0.5,
            "region_partition": "dirichlet:0.6",
            "partition": "dirichlet:0.3",
        },
        "fedprox": {
            "strategy": "FedProx",
            "proximal_mu": 0.1,
            "lr_decay": 0.95,
            "clip_norm": 1.0,
            "class_weights": "balanced",
            "local_steps": 5,
        },
    }
    regions = ["region_0", "region_1"]
    peer = peers(stack.broker.port, "fl/global_model")
    server = stack.server(
        rounds=20,
        local_epochs=1,
        regions=",".join(regions),
        min_available_clients=2,
        min_fit_clients=2,
        run_id="adam",
        exit_when_finished=False,
    )
    for region in regions:
        stack.aggregator(region, regions=",".join(regions), clients_expected=2)
        stack.bridge(region)
        stack.client("c", region, clients_per_process=2)
    server.wait_for_log("run_completed", 2 * LIMIT)
    for name, settings in runs.items():
        if name != "adam":
            command = [sys.executable, "-m", "fedfog.cli.main", "run", "--name", name, "--follow"]
            command += [f"--set={setting}={value}" for setting, value in settings.items()]
            command += ["--runs-dir", str(stack.results.parent)]
            subprocess.run(command, check=True, timeout=2 * LIMIT)
    found: dict[tuple[str, int], Any] = {}
    for _, payload in peer.received:
        model = decode(payload, ModelMeta)
        found[model.meta.run, model.meta.round] = model.vector
    task = Ecg5000(REPOSITORY / "data")
    for name, settings in runs.items():
        settings.pop("strategy", None)  # FedProx is FedAvg at the server
        parameters = Hyperparameters(local_epochs=1, **settings)
        slots = deal(
            task.training_labels(),
            None,
            [2, 2],
            seed=parameters.seed,
            partition=parameters.partition,
            region_partition=parameters.region_partition,
        )
        models = fedavg(task, slots, parameters, rounds=20, validation_fraction=0.1)
        expected = [np.concatenate([a.ravel() for a in arrays.values()]) for arrays in models]
        assert found[name, 0].tobytes() == expected[0].tobytes()
        np.testing.assert_allclose(found[name, 1], expected[1], rtol=1e-6, atol=1e-9)
        for number in range(2, 21):
            assert np.abs(found[name, number] - expected[number]).max() < 1e-4, (name, number)
        assert np.abs(expected[20] - expected[0]).max() > 0.05


def test_broker_killed_in_mid_run_loses_nothing(stack: Stack, peers: Callable[..., Peer]) -> None:
    peer = peers(stack.broker.port, "fl/history")
    server = stack.server(rounds=8, local_epochs=30)
    stack.aggregator(clients_expected=2, round_deadline=600)
    stack.bridge()
    for name in "ab":
        stack.client(name)
    peer.wait_for(lambda _, p: of_round(p, 2))
    assert stack.broker.process is not None
    stack.broker.process.kill()
    stack.broker.process.wait()
    stack.broker.start()
    assert server.wait(2 * LIMIT) == 0
    rounds = stack.history()
    assert [r["round"] for r in rounds] == list(range(1, 9))
    for record in rounds:
        assert sorted(record["regions"]["region_0"]["members"]) == ["a", "b"]


def test_one_grep_follows_an_update_through_every_tier(stack: Stack) -> None:
    server = stack.server(rounds=1)
    aggregator = stack.aggregator(clients_expected=1)
    bridge = stack.bridge()
    client = stack.client("a")
    assert server.wait(2 * LIMIT) == 0
    for service, steps in (
        (client, ("step_1", "step_2")),
        (aggregator, ("step_3", "step_4")),
        (bridge, ("step_5",)),
        (server, ("step_6",)),
    ):
        lines = [line for line in service.log.read_text().splitlines() if f"{RUN}/1/" in line]
        for step in steps:
            assert any(step in line and '"seconds"' in line for line in lines), (step, lines)
    assert "step_7" in server.log.read_text()
    assert "step_8" in client.log.read_text()
    assert stack.history()[0]["regions"]["region_0"]["members"].keys() == {"a"}
    assert PartialMeta.model_validate(stack.history()[0]["regions"]["region_0"]).num_clients == 1
