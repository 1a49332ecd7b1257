"""kill -9 at exact instants: the service, started again, goes on to exactly the right model."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from centre import Centre, expected
from centre import Region as PlayedRegion
from conftest import LIMIT, REPOSITORY, Peer, Service
from fedfog.cli.broker import LocalBroker
from fedfog.messages.codec import TensorMessage, TensorTable, Vector, decode
from fedfog.messages.schemas import Receipt, RegionReceipt, Slot, Status, UpdateMeta, Verdict
from fedfog.ml.task import load_task
from fedfog.ml.training import state_arrays
from flower import SuperLink, partial, publish_partial
from halting import Halt, kill_all
from region import Region
from wire import birth, constant, model, update

Services = Callable[..., Service]
Peers = Callable[..., Peer]

# Aggregator

COMMIT = "fedfog_aggregator.store:PartialStore.commit"
READ = "fedfog_aggregator.store:PartialStore.partial"
PUBLISH = "fedfog.transport.mqtt:Session.publish"


class Clients:
    """Clients of `region_0`, played by the book: each keeps its update until its verdict comes,
    and sends it to every new boot of the aggregator."""

    def __init__(self, peer: Peer, values: dict[str, float]) -> None:
        self.peer, self.values = peer, values
        for name in values:
            peer.publish(f"fl/presence/region_0/{name}", birth(), retain=True)

    def send(self, base: float, round: int, *clients: str) -> None:
        for client in clients:
            vector = constant(self.values[client] + round)
            payload = update(constant(base), vector, client, round)
            self.peer.publish(f"fl/updates/region_0/{client}", payload)

    def accepted(self, round: int) -> list[list[str]]:
        """Members of each close of a round."""
        said = [json.loads(p) for t, p in self.peer.received if t == "fl/receipts/region_0"]
        return [receipt["members"] for receipt in said if receipt["round"] == round]


@pytest.mark.parametrize(
    ("site", "when", "pattern", "committed"),
    [
        pytest.param(COMMIT, "before", "", False, id="before its commit"),
        pytest.param(COMMIT, "after", "", True, id="after its commit, before it takes note of it"),
        pytest.param(READ, "before", "", True, id="between commit and publish"),
        pytest.param(PUBLISH, "before", "fl/partial", True, id="when it is about to publish"),
        pytest.param(PUBLISH, "before", "receipts/region_0$", True, id="before the receipts"),
        pytest.param(PUBLISH, "after", "receipts/region_0$", True, id="after the receipts"),
    ],
)
def test_aggregator_killed(
    services: Services,
    broker: LocalBroker,
    peers: Peers,
    tmp_path: Path,
    site: str,
    when: str,
    pattern: str,
    committed: bool,
) -> None:
    peer = peers(broker.port, "fl/receipts/#", "fl/partial/#", "fl/status/#")
    halt = Halt(tmp_path / "halt", site)
    settings: dict[str, object] = {"clients_expected": 2, "round_deadline": 600}
    first = services("fedfog_aggregator.main", broker, **settings, **halt.settings)
    region = Region(first, peer)
    clients = Clients(peer, {"a": 1.0, "b": 3.0})
    peer.publish("fl/global_model", model(constant(0.25)), retain=True)
    region.wait_phase("open", 1)
    clients.send(0.25, 1, "a")
    region.receipt("a", "received")
    # The last update closes the round; its own receipt `received` must not be taken for `accepted`.
    halt.arm(site, when, pattern)
    clients.send(0.25, 1, "b")
    halt.kill_there(first)

    after = len(peer.received)
    region.service = services("fedfog_aggregator.main", broker, **settings)
    region.wait_phase("closed" if committed else "open", 1, after)
    clients.send(0.25, 1, "a", "b")
    for client in "ab" if committed else "":  # else `accepted` says it all, to the region
        region.receipt(client, "accepted", after)
    one = region.partial(1, after)
    assert one.meta.members == {"a": 10, "b": 10}
    np.testing.assert_array_equal(one.vector, constant(3.0))  # the mean of 2 and 4
    versions = {p for t, p in peer.received if t == "fl/partial/region_0"}
    assert len(versions) == 1  # all that was ever published of this round is the same
    if not committed:
        peer.on("fl/receipts/region_0", after=after)
    assert all(members == ["a", "b"] for members in clients.accepted(1))

    peer.publish("fl/global_model", model(one.vector, 1), retain=True)
    region.wait_phase("open", 2)
    clients.send(3.0, 2, "a", "b")
    two = region.partial(2)
    np.testing.assert_array_equal(two.vector, constant(4.0))
    assert two.meta.members == {"a": 10, "b": 10}


# Client

PUT = "fedfog_client.outbox:Outbox.put"
HANDLE = "fedfog.core.participation:Participation.handle"
ARRAYS = state_arrays(load_task("ecg5000", data_dir=REPOSITORY / "data").build_model(7))
TABLE = TensorTable.of(ARRAYS)
GLOBAL = TABLE.flatten(ARRAYS)
UPDATES = "fl/updates/region_0/c1"


class Fog:
    """The rest of the federation of client `c1`, played by `peer`."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        peer.publish("fl/status/region_0", Status(online=True, boot=5).to_json(), retain=True)
        peer.publish("fl/global_model", model(GLOBAL, table=TABLE), retain=True)

    def deal(self, after: int) -> None:
        """The client's slot, when it has announced itself."""

        def born(topic: str, payload: bytes) -> bool:
            return topic == "fl/presence/region_0/c1" and json.loads(payload)["online"] is True

        self.peer.wait_for(born, after=after)
        dealt = Slot(run="run", slot=0, slots=3, region_index=0, regions=1)
        self.peer.publish("fl/slots/region_0/c1", dealt.to_json())

    def update(self, after: int = 0) -> TensorMessage[UpdateMeta]:
        return decode(self.peer.on(UPDATES, after=after), UpdateMeta)

    def receive(self) -> None:
        receipt = Receipt(run="run", round=1, verdict=Verdict.RECEIVED, boot=5)
        self.peer.publish("fl/receipts/region_0/c1", receipt.to_json())

    def accept(self) -> None:
        accepted = RegionReceipt(run="run", round=1, boot=5, members=["c1"])
        self.peer.publish("fl/receipts/region_0", accepted.to_json())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vector]:
    """The update of the same client when nothing happens to it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    broker = LocalBroker(folder / "broker", "mosquitto").start()
    peer = Peer(broker.port, "fl/updates/#", "fl/presence/#")
    fog = Fog(peer)
    settings = {"MQTT_PORT": str(broker.port), "CLIENT_ID": "c1"}
    settings["DATA_DIR"] = str(REPOSITORY / "data")
    service = Service("fedfog_client.main", folder, settings)
    fog.deal(after=0)
    yield fog.update().vector
    service.kill()
    peer.close()
    broker.stop()


@pytest.mark.parametrize(
    ("site", "when", "pattern", "trained_again"),
    [
        pytest.param(PUT, "before", "", True, id="after training, before the outbox"),
        pytest.param(PUT, "after", "", False, id="after the outbox, before the publish"),
        pytest.param(PUBLISH, "after", "fl/updates", False, id="after the publish"),
        pytest.param(HANDLE, "after", "RECEIVED", False, id="after `received`"),
    ],
)
def test_client_killed(
    services: Services,
    broker: LocalBroker,
    peers: Peers,
    tmp_path: Path,
    undisturbed: Vector,
    site: str,
    when: str,
    pattern: str,
    trained_again: bool,
) -> None:
    """What it sends at last is what an undisturbed client with its slot sends."""
    peer = peers(broker.port, "fl/updates/#", "fl/presence/#")
    fog = Fog(peer)
    halt = Halt(tmp_path / "halt", site).arm(site, when, pattern)
    first = services("fedfog_client.main", broker, client_id="c1", **halt.settings)
    fog.deal(after=0)
    if pattern == "RECEIVED":
        fog.update()
        fog.receive()
    halt.kill_there(first)

    after = len(peer.received)
    again = services("fedfog_client.main", broker, client_id="c1")
    fog.deal(after)
    sent = fog.update(after)
    fog.accept()
    again.wait_for_log("update_accepted")
    assert ("step_1_local_training" in again.log.read_text()) is trained_again
    assert not (tmp_path / "fedfog_client.main" / "state" / "outbox").exists()
    assert sent.vector.tobytes() == undisturbed.tobytes()


# Bridge

REPLY = "fedfog.flower.fleet:FleetSession.reply"
UPLOAD = "flwr.supernode.fleet_http_client:FleetHttpClient.PushObject"
CONFIRM = "fedfog.flower.fleet:FleetSession.confirm"


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    running = SuperLink(tmp_path_factory.mktemp("flower")).start()
    yield running
    running.stop()


@pytest.mark.parametrize(
    ("site", "when", "pattern"),
    [
        pytest.param(REPLY, "before", "", id="before replying"),
        pytest.param(UPLOAD, "after", "", id="while replying, a part uploaded"),
        pytest.param(REPLY, "after", "", id="after replying, before the bell"),
        pytest.param(PUBLISH, "after", "fl/bell", id="after the bell"),
        pytest.param(CONFIRM, "before", "", id="before it confirms"),
    ],
)
def test_bridge_killed(
    superlink: SuperLink,
    services: Services,
    broker: LocalBroker,
    peers: Peers,
    tmp_path: Path,
    site: str,
    when: str,
    pattern: str,
) -> None:
    """Each partial is in its model, once."""
    peer = peers(broker.port, "fl/bell", "fl/global_model")
    halt = Halt(tmp_path / "halt", site).arm(site, when, pattern)
    start = {"flower_server": superlink.address}
    first = services("fedfog_bridge.main", broker, **start, **halt.settings)
    run = superlink.submit(mqtt_port=broker.port, num_server_rounds=2)
    publish_partial(peer, partial(1.5, 1))
    if site == CONFIRM:  # of message 1, when message 2 is in hand
        run.wait_rounds(1)
        publish_partial(peer, partial(3.5, 2))
    halt.kill_there(first)

    services("fedfog_bridge.main", broker, **start)
    for round, value in ((1, 1.5), (2, 3.5)):
        if len(run.rounds) < round:
            publish_partial(peer, partial(value, round))
        run.wait_rounds(round)
    rounds = run.rounds
    assert [r["model"][0] for r in rounds] == [1.5, 3.5]
    assert [r["record"]["left_out"] for r in rounds] == [{}, {}]
    run.wait_state("finished:completed")


# Central server

SAVE = "fedfog_central_server.checkpoints:Checkpoints.save"
RENAME = "pathlib:Path.replace"
# Where, and what there is of the round then: a checkpoint, a published model.
INSTANTS = [
    pytest.param("", "", "", False, False, id="while it waits for partials"),
    pytest.param(SAVE, "before", "", False, False, id="after aggregation, before the checkpoint"),
    pytest.param(RENAME, "before", r"round-\d+", False, False, id="while it writes the checkpoint"),
    pytest.param(SAVE, "after", "", True, False, id="after the checkpoint, before it is told"),
    pytest.param(PUBLISH, "before", "global_model$", True, False, id="before it publishes"),
    pytest.param(PUBLISH, "after", "global_model$", True, True, id="after it published"),
]


class LongRun:
    """One run of a central server that is killed in each of its rounds but the last."""

    def __init__(self, folder: Path, broker: LocalBroker) -> None:
        self.broker, self.halt = broker, Halt(folder / "halt", SAVE, RENAME, PUBLISH)
        self._folder, self._started = folder, list[Service]()
        self.centre = Centre(
            self._service, broker, folder, rounds=len(INSTANTS) + 1, task="chaos.task:Tiny"
        )
        self.region = PlayedRegion(broker.port, allowed=0)
        self.round = 1
        self.bridge = self.centre.bridge()
        self.start()

    def _service(self, module: str, broker: LocalBroker, name: str, **settings: object) -> Service:
        folder = self._folder / name
        env = {key.upper(): str(value) for key, value in settings.items()}
        env |= {"MQTT_PORT": str(broker.port), "STATE_DIR": str(folder / "state")}
        env["HEALTH_FILE"] = str(folder / "health")
        self._started.append(Service(module, folder, env))
        return self._started[-1]

    def start(self) -> None:
        self.server = self.centre.start(**self.halt.settings)

    def published(self, round: int) -> None:
        """Wait until this start of the server has published model `round`."""
        self.server.wait_for_log(rf'step_7.*"round": "{round}/|"round": "{round}/.*step_7', LIMIT)

    def close(self) -> None:
        for service in self._started:
            if service.process.poll() is None:
                kill_all(service)
        self.region.close()


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LongRun]:
    folder = tmp_path_factory.mktemp("centre")
    broker = LocalBroker(folder / "broker", "mosquitto").start()
    run = LongRun(folder, broker)
    yield run
    run.close()
    broker.stop()


@pytest.mark.parametrize(("site", "when", "pattern", "saved", "seen"), INSTANTS)
def test_central_server_killed(
    long_run: LongRun, site: str, when: str, pattern: str, saved: bool, seen: bool
) -> None:
    """The round in which it is killed gives the right model when it is started again; the last
    test is that the run ends right after all these kills."""
    run, round = long_run, long_run.round
    run.published(round - 1)
    asked = rf'train_message.*"round": {round}\b|"round": {round}\b.*train_message'
    run.bridge.wait_for_log(asked, LIMIT)
    if site:
        run.halt.arm(site, when, pattern)
        run.region.allow(round)
        run.halt.wait(run.server)
        if seen:  # what was handed to the network thread is on the wire
            run.region.model(round)
    checkpoint = run.centre.folder / "checkpoints" / f"round-{round:06}.safetensors"
    assert (checkpoint.exists(), round in run.region.models) == (saved, seen)
    kill_all(run.server)
    run.region.allow(round)

    run.start()
    run.published(round)
    assert run.region.model(round).vector.tobytes() == expected(run.region.models[0], round)
    assert len({model.meta.run for model in run.region.models.values()}) == 1
    run.round += 1


def test_run_of_a_central_server_that_was_killed_at_each_instant_ends_right(
    long_run: LongRun,
) -> None:
    run, last = long_run, len(INSTANTS) + 1
    run.region.allow(last)
    assert run.server.wait(LIMIT) == 0
    assert run.region.model(last).vector.tobytes() == expected(run.region.models[0], last)
    rounds = run.centre.read("history.json")["rounds"]
    assert [record["round"] for record in rounds] == list(range(1, last + 1))
    assert [record["regions"].keys() for record in rounds] == [{"region_0"}] * last
    summary = run.centre.read("summary.json")
    assert (summary["status"], summary["rounds"]) == ("completed", last)
