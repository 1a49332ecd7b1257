"""Aggregators above aggregators, over a real broker: the same means and the same promises as with
one tier, whichever of them dies."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import REPOSITORY, Peer, Service
from fedfog.cli.broker import LocalBroker, free_port
from fedfog.messages.codec import TensorMessage, Vector, decode, digest_of, encode
from fedfog.messages.schemas import (
    ClientMetrics,
    ModelMeta,
    PartialMeta,
    Presence,
    RegionReceipt,
    UpdateMeta,
)
from halting import Halt
from wire import SIZE, TABLE, birth, constant, model, update

Services = Callable[..., Service]
AGGREGATOR = "fedfog_aggregator.main"
BASE = constant(0.25)


class Fog(Peer):
    """Aggregators in a tree, and a peer that plays the clients and the central server.

    Args:
        parents: region -> its parent; the one that is no region's child is the top.
    """

    def __init__(self, services: Services, broker: LocalBroker, parents: dict[str, str]) -> None:
        super().__init__(broker.port, "fl/#")
        self.parents, self._services, self._broker = parents, services, broker

    def start(self, region: str, **settings: object) -> Service:
        children = [child for child, parent in self.parents.items() if parent == region]
        defaults: dict[str, object] = {
            "region": region,
            "parent_region": self.parents.get(region, ""),
            "child_regions": ",".join(children),
            "cohort_settle": 0.2,
            "round_deadline": 600 if not children else 1000,
        }
        return self._services(AGGREGATOR, self._broker, region, **defaults | settings)

    def begin(self, base: Vector = BASE, round: int = 1) -> None:
        self.publish("fl/global_model", model(base, round - 1), retain=True)

    def birth(self, region: str, *clients: str) -> None:
        for client in clients:
            self.publish(f"fl/presence/{region}/{client}", birth(), retain=True)

    def send(self, region: str, client: str, vector: Vector, **fields: Any) -> None:
        payload = update(fields.pop("base", BASE), vector, client, region=region, **fields)
        self.publish(f"fl/updates/{region}/{client}", payload)

    def wait_phase(self, region: str, phase: str, round: int = 1, after: int = 0) -> None:
        def seen(topic: str, payload: bytes) -> bool:
            status = json.loads(payload) if topic == f"fl/status/{region}" and payload else {}
            return (status.get("phase"), status.get("round")) == (phase, round)

        self.wait_for(seen, after=after)

    def partial(self, topic: str, round: int = 1, after: int = 0) -> TensorMessage[PartialMeta]:
        def seen(on: str, payload: bytes) -> bool:
            mine = on == f"fl/partial/{topic}" and payload
            return bool(mine) and decode(payload, PartialMeta).meta.round == round

        return decode(self.wait_for(seen, after=after), PartialMeta)

    def accepted(self, region: str, round: int = 1) -> list[list[str]]:
        """Members of each close of a round."""
        said = [RegionReceipt.model_validate_json(p) for t, p in self.on_topic(region)]
        return [receipt.members for receipt in said if receipt.round == round]

    def on_topic(self, region: str) -> list[tuple[str, bytes]]:
        return [(t, p) for t, p in self.received if t == f"fl/receipts/{region}"]


@pytest.fixture
def fog(services: Services, broker: LocalBroker) -> Any:
    made: list[Fog] = []

    def make(**parents: str) -> Fog:
        made.append(Fog(services, broker, parents))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_four_tiers_give_flat_fedavg(fog: Callable[..., Fog]) -> None:
    """Regions, two tiers above them, and the server, whose mean of one partial is that partial."""
    tree = fog(north="left", south="left", west="right", left="top", right="top")
    for region in ("north", "south", "west", "left", "right", "top"):
        tree.start(region, clients_expected={"north": 2, "south": 3, "west": 1}.get(region, 0))
    clients = {"north": "ab", "south": "cde", "west": "f"}
    random = np.random.default_rng(5)
    base = BASE
    for region, names in clients.items():
        tree.birth(region, *names)
    for round in (1, 2, 3):
        tree.begin(base, round)
        products, weights, right = [], [], []
        for region in ("left", "right", "top", *clients):
            tree.wait_phase(region, "open", round)
        for region, names in clients.items():
            for name in names:
                vector = random.normal(size=SIZE).astype(np.float32)
                n = int(random.integers(1, 10_000))
                right.append(int(random.integers(0, 20)))
                told = ClientMetrics(
                    train_loss=0.5,
                    validation_examples=20,
                    validation_loss=1.0,
                    validation_accuracy=right[-1] / 20,
                )
                tree.send(
                    region, name, vector, base=base, round=round, num_examples=n, metrics=told
                )
                products.append(n * vector.astype(np.float64))
                weights.append(n)
        top = tree.partial("top", round)
        flat = np.sum(products, axis=0) / sum(weights)
        # Three tiers round to float32 here, each by half a unit in the last place.
        largest = max(
            np.abs(product / n).max() for product, n in zip(products, weights, strict=True)
        )
        assert np.abs(top.vector - flat).max() <= 3 * np.finfo(np.float32).eps / 2 * largest
        meta = top.meta
        assert (meta.num_clients, meta.num_examples) == (6, sum(weights))
        assert meta.members == {"left": sum(weights[:5]), "right": weights[5]}
        assert meta.left_out == {}
        assert meta.metrics.train_loss == pytest.approx(0.5)
        federated, own = meta.federated, np.array(right) / 20
        assert federated is not None
        assert (federated.num_clients, federated.num_examples) == (6, 120)
        assert federated.accuracy == pytest.approx(own.mean())
        assert federated.std_accuracy == pytest.approx(own.std())
        assert federated.worst_accuracy == own.min()
        everybody = [f"{region}/{name}" for region, names in clients.items() for name in names]
        assert federated.worst_client == min(zip(own, everybody, strict=True))[1]
        base = top.vector
    for region, names in clients.items():
        assert tree.accepted(region, 1) == [list(names)]
    # An aggregator with a parent hands nothing to a bridge, and sends its partial once.
    topics = [t for t, _ in tree.received if t.startswith("fl/partial/")]
    paths = ["left/north", "left/south", "right/west", "top/left", "top/right", "top"]
    assert sorted(topics) == sorted([f"fl/partial/{path}" for path in paths] * 3)


COMMIT = "fedfog_aggregator.store:PartialStore.commit"
PUBLISH = "fedfog.transport.mqtt:Session.publish"


def other_partial(round: int, base: Vector, value: float) -> bytes:
    """Of region `other`, which is played."""
    meta = PartialMeta(
        run="run",
        round=round,
        region="other",
        digest=digest_of(constant(value)),
        num_clients=3,
        num_examples=20,
        members={"x": 20},
        base_digest=digest_of(base),
        metrics=ClientMetrics(train_loss=0.5),
    )
    return encode(meta, TABLE, constant(value))


@pytest.mark.parametrize(
    ("victim", "site", "when", "pattern"),
    [
        pytest.param("region_0", COMMIT, "before", "", id="region before its commit"),
        pytest.param("region_0", PUBLISH, "before", "partial/middle", id="region before it sends"),
        pytest.param("middle", COMMIT, "before", "", id="middle before its commit"),
        pytest.param("middle", COMMIT, "after", "", id="middle after its commit"),
        pytest.param("middle", PUBLISH, "before", "partial/top", id="middle before it sends"),
        pytest.param("middle", PUBLISH, "after", "partial/top", id="middle after it has sent"),
        pytest.param("middle", PUBLISH, "before", "receipts/middle$", id="middle before receipts"),
        pytest.param("top", COMMIT, "before", "", id="top before its commit"),
        pytest.param("top", COMMIT, "after", "", id="top after its commit"),
        pytest.param("top", PUBLISH, "after", "partial/top$", id="top after it has published"),
    ],
)
def test_killed_aggregator_of_any_tier_loses_nothing_and_counts_nothing_twice(
    fog: Callable[..., Fog], tmp_path: Path, victim: str, site: str, when: str, pattern: str
) -> None:
    tree = fog(region_0="middle", middle="top", other="top")
    halt = Halt(tmp_path / "halt", COMMIT, PUBLISH)
    settings = {"region_0": {"clients_expected": 2}}
    running = {
        region: tree.start(
            region, **settings.get(region, {}), **(halt.settings if region == victim else {})
        )
        for region in ("region_0", "middle", "top")
    }
    played = Presence(online=True, boot=1, own_data=True).to_json()
    tree.publish("fl/presence/top/other", played, retain=True)
    tree.birth("region_0", "a", "b")
    tree.begin()
    for region in running:
        tree.wait_phase(region, "open")
    tree.send("region_0", "a", constant(2))
    # The region that is killed is not the last whose partial is waited for.
    other = other_partial(1, BASE, 7)
    tree.publish("fl/partial/top/other", other)
    halt.arm(site, when, pattern)
    tree.send("region_0", "b", constant(4))
    halt.kill_there(running[victim])

    after = len(tree.received)
    tree.start(victim, **settings.get(victim, {}))
    if victim == "region_0":  # its clients send again to the new boot, by the book
        tree.wait_phase(victim, "closed" if site == PUBLISH else "open", after=after)
        tree.send("region_0", "a", constant(2))
        tree.send("region_0", "b", constant(4))
    elif victim == "top":
        tree.wait_phase(victim, "closed" if pattern or when == "after" else "open", after=after)
        tree.publish("fl/partial/top/other", other)
    one = tree.partial("top", 1, after if victim == "top" else 0)
    assert one.meta.members == {"middle": 20, "other": 20}
    assert one.meta.num_clients == 5
    assert one.meta.left_out == {}
    np.testing.assert_array_equal(one.vector, constant(5))  # the mean of 3 and 7
    for topic in ("middle/region_0", "top/middle", "top"):
        versions = {p for t, p in tree.received if t == f"fl/partial/{topic}"}
        assert len(versions) == 1, topic
    assert all(members == ["a", "b"] for members in tree.accepted("region_0"))

    tree.begin(one.vector, 2)
    tree.wait_phase("region_0", "open", 2)
    tree.wait_phase("top", "open", 2)
    for client, value in (("a", 1), ("b", 5)):
        tree.send("region_0", client, constant(value), base=one.vector, round=2)
    tree.publish("fl/partial/top/other", other_partial(2, one.vector, 1))
    two = tree.partial("top", 2)
    np.testing.assert_array_equal(two.vector, constant(2))
    assert two.meta.members == {"middle": 20, "other": 20}


def test_child_that_is_late_or_never_comes_is_named_by_its_parent_and_says_so_itself(
    fog: Callable[..., Fog],
) -> None:
    tree = fog(region_0="top", region_1="top", region_2="top")
    top = tree.start("top", round_deadline=4, cohort_limit=2)
    tree.start("region_0")
    late = tree.start("region_1")
    tree.birth("region_0", "a")
    tree.birth("region_1", "b")
    warning = json.loads(top.wait_for_log("deadline_not_above_that_of_child"))
    assert warning["setting"] == "ROUND_DEADLINE"
    tree.begin()
    tree.wait_phase("region_0", "open")
    tree.wait_phase("region_1", "open")
    tree.wait_phase("top", "open")
    tree.send("region_0", "a", constant(2))
    left_out = tree.partial("top").meta.left_out
    assert left_out == {"region_1": "no update in time", "region_2": "offline"}
    tree.send("region_1", "b", constant(100))
    line = json.loads(late.wait_for_log("partial_late"))
    assert line["accepted_updates_of"] == ["b"]
    assert line["level"] == "error"
    tree.on("fl/receipts/region_1")
    assert tree.accepted("region_1") == [["b"]]


def test_child_that_the_parent_does_not_list_is_refused_and_told_the_setting(
    fog: Callable[..., Fog],
) -> None:
    tree = fog(region_0="top")
    tree.start("top")
    stranger = tree.start("stranger", parent_region="top", clients_expected=1)
    tree.start("region_0")
    for region in ("stranger", "region_0"):
        tree.birth(region, "a")
    tree.begin()
    tree.wait_phase("stranger", "open")
    tree.send("stranger", "a", constant(100))
    assert "CHILD_REGIONS" in stranger.wait_for_log("partial_rejected")
    tree.wait_phase("region_0", "open")
    tree.send("region_0", "a", constant(2))
    assert tree.partial("top").meta.members == {"region_0": 10}


def test_three_tiers_with_a_real_server_and_clients_give_flat_fedavg(
    fog: Callable[..., Fog], services: Services, broker: LocalBroker, tmp_path: Path
) -> None:
    tree = fog(north="top", south="top")
    flower = free_port()
    task: dict[str, object] = {"task": "chaos.task:Tiny", "pythonpath": REPOSITORY / "tests"}
    server = services(
        "fedfog_central_server.main",
        broker,
        "server",
        regions="top",
        rounds=2,
        runs_dir=tmp_path / "runs",
        run_id="deep",
        flower_port=flower,
        exit_when_finished=True,
        **task,
    )
    address = f"127.0.0.1:{flower}"
    services("fedfog_bridge.main", broker, "bridge", region="top", flower_server=address)
    tree.start("top")
    clients = {"north": "ab", "south": "c"}
    for region, names in clients.items():
        tree.start(region, regions="north,south", clients_expected=len(names))
        for name in names:
            own = {"region": region, "client_id": name, **task}
            services("fedfog_client.main", broker, f"{region}-{name}", **own)
    assert server.wait(180) == 0
    updates: dict[int, dict[str, TensorMessage[UpdateMeta]]] = {1: {}, 2: {}}
    models: dict[int, TensorMessage[ModelMeta]] = {}
    for topic, payload in tree.received:
        if topic.startswith("fl/updates/"):
            sent = decode(payload, UpdateMeta)
            updates[sent.meta.round][sent.meta.client] = sent
        elif topic == "fl/global_model":
            published = decode(payload, ModelMeta)
            models[published.meta.round] = published
    history = json.loads((tmp_path / "runs" / "deep" / "history.json").read_text())["rounds"]
    for round, members in updates.items():
        assert members.keys() == {"a", "b", "c"}
        weights = {name: one.meta.num_examples for name, one in members.items()}
        assert abs(sum(weights.values()) - 360) < 3  # of 400, a tenth of each validates
        products = [weights[name] * one.vector.astype(np.float64) for name, one in members.items()]
        flat = np.sum(products, axis=0) / sum(weights.values())
        largest = max(np.abs(one.vector).max() for one in members.values())
        error = np.abs(models[round].vector - flat).max()
        assert error <= 3 * np.finfo(np.float32).eps / 2 * largest
        record = history[round - 1]
        assert record["num_clients"] == 3
        assert record["regions"]["top"]["members"] == {
            "north": weights["a"] + weights["b"],
            "south": weights["c"],
        }
