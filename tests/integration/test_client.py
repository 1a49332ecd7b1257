"""The running client, over a real broker, with the test in the place of server and aggregator."""

import concurrent.futures
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import REPOSITORY, Peer, Service
from fedfog.cli.broker import LocalBroker
from fedfog.core.partition import deal
from fedfog.messages.codec import TensorMessage, TensorTable, decode, decode_json
from fedfog.messages.schemas import (
    ClientEvaluation,
    Receipt,
    RegionReceipt,
    Slot,
    Status,
    UpdateMeta,
    Verdict,
)
from fedfog.ml.task import load_task
from fedfog.ml.training import state_arrays
from wire import model

MODULE = "fedfog_client.main"
ARRAYS = state_arrays(load_task("ecg5000", data_dir=REPOSITORY / "data").build_model(7))
TABLE = TensorTable.of(ARRAYS)
BASE = TABLE.flatten(ARRAYS)


class Edge:
    """A running client `c1` of `region_0`, and a peer that plays the rest of the federation."""

    def __init__(self, service: Service, peer: Peer) -> None:
        self.service, self.peer = service, peer

    def model(self, round: int = 0, run: str = "run", **fields: Any) -> None:
        message = model(BASE, round, run, table=TABLE, **fields)
        self.peer.publish("fl/global_model", message, retain=True)

    def deal(self, run: str = "run", slot: int = 0, slots: int = 3) -> None:
        dealt = Slot(run=run, slot=slot, slots=slots, region_index=0, regions=1)
        self.peer.publish("fl/slots/region_0/c1", dealt.to_json())

    def update(self, round: int = 1, run: str = "run", after: int = 0) -> TensorMessage[UpdateMeta]:
        def seen(topic: str, payload: bytes) -> bool:
            if topic != "fl/updates/region_0/c1":
                return False
            meta = decode(payload, UpdateMeta).meta
            return (meta.run, meta.round) == (run, round)

        return decode(self.peer.wait_for(seen, after=after), UpdateMeta)

    def answer(self, verdict: Verdict, round: int = 1, boot: int = 5, run: str = "run") -> None:
        receipt = Receipt(run=run, round=round, verdict=verdict, boot=boot)
        self.peer.publish("fl/receipts/region_0/c1", receipt.to_json())

    def status(self, boot: int) -> None:
        status = Status(online=True, boot=boot)
        self.peer.publish("fl/status/region_0", status.to_json(), retain=True)


@pytest.fixture
def start(
    broker: LocalBroker, services: Callable[..., Service], peers: Callable[..., Peer]
) -> Iterator[Callable[..., Edge]]:
    def begin(**settings: object) -> Edge:
        peer = peers(broker.port, "fl/updates/#", "fl/presence/#")
        after = len(peer.received)
        edge = Edge(services(MODULE, broker, client_id="c1", **settings), peer)
        # A slot is not retained: a client that is not there yet would miss it.
        peer.wait_for(
            lambda t, p: t == "fl/presence/region_0/c1" and json.loads(p)["online"], after=after
        )
        return edge

    yield begin


def outbox(tmp_path: Path) -> Path:
    return tmp_path / MODULE / "state" / "outbox"


def test_trains_on_its_slot_and_reports_what_it_learned(start: Callable[..., Edge]) -> None:
    edge = start(validation_fraction=0.1)
    edge.model()
    edge.deal(slot=1)
    update = edge.update()
    assert update.meta.num_examples == 150  # 167 examples of slot 1 of 3, a tenth held back
    assert update.meta.metrics.validation_accuracy is not None
    assert update.meta.metrics.validation_examples == 17
    assert np.abs(update.vector - BASE).max() > 1e-4
    edge.service.wait_for_log("step_1_local_training")
    edge.service.wait_for_log('"epoch": "1/1"')


def test_trains_on_what_the_partition_deals_to_its_slot(start: Callable[..., Edge]) -> None:
    edge = start(validation_fraction=0)
    edge.model(partition="dirichlet:0.3")
    edge.deal(slot=1)
    labels = load_task("ecg5000", data_dir=REPOSITORY / "data").training_labels()
    dealt = deal(labels, None, [3], seed=7, partition="dirichlet:0.3")[0][1]
    assert edge.update().meta.num_examples == len(dealt) != 167


def test_partition_that_the_data_do_not_allow_ends_it_and_is_named(
    start: Callable[..., Edge],
) -> None:
    edge = start()
    edge.model(partition="group")
    edge.deal()
    assert edge.service.wait() == 1
    assert "PARTITION=group: the task does not say" in edge.service.log.read_text()


def test_same_seed_and_slot_give_the_same_update(start: Callable[..., Edge]) -> None:
    first = start()
    first.model()
    first.deal()
    before = first.update().vector
    first.service.kill()
    after = len(first.peer.received)
    second = start(state_dir="other")
    second.deal()
    again = first.update(after=after)
    assert again.vector.tobytes() == before.tobytes()


def test_asks_for_a_slot_until_it_has_one(start: Callable[..., Edge]) -> None:
    edge = start()
    edge.model()

    def births() -> int:
        return sum(topic == "fl/presence/region_0/c1" for topic, _ in edge.peer.received)

    edge.peer.wait_for(lambda _topic, _payload: births() >= 3)
    edge.deal()
    edge.update()


def test_update_is_repeated_until_it_is_answered(
    start: Callable[..., Edge], tmp_path: Path
) -> None:
    edge = start()
    edge.status(5)
    edge.model()
    edge.deal()
    edge.update()
    after = len(edge.peer.received)
    edge.update(after=after)  # again, since nobody answered
    assert outbox(tmp_path).exists()
    edge.answer(Verdict.RECEIVED)
    edge.status(6)  # the aggregator that held it is gone
    edge.service.wait_for_log("new boot of the aggregator")
    accepted = RegionReceipt(run="run", round=1, boot=6, members=["c1", "c2"])
    edge.peer.publish("fl/receipts/region_0", accepted.to_json())
    edge.service.wait_for_log("update_accepted")
    assert not outbox(tmp_path).exists()


def test_killed_with_an_unanswered_update_it_sends_the_same_one_again(
    start: Callable[..., Edge],
) -> None:
    edge = start()
    edge.model()
    edge.deal()
    first = edge.update()
    edge.service.kill()
    after = len(edge.peer.received)
    again = start()
    second = edge.update(after=after)
    assert second.vector.tobytes() == first.vector.tobytes()
    again.service.wait_for_log("reconnect")
    assert "step_1_local_training" not in again.service.log.read_text()


def test_damaged_outbox_is_dropped_and_said_so(start: Callable[..., Edge], tmp_path: Path) -> None:
    outbox(tmp_path).parent.mkdir(parents=True)
    outbox(tmp_path).write_bytes(b"half a fi")
    edge = start()
    edge.service.wait_for_log("outbox_damaged")
    edge.model()
    edge.deal()
    edge.update()


def test_newer_model_makes_an_unanswered_update_void(
    start: Callable[..., Edge], tmp_path: Path
) -> None:
    edge = start()
    edge.model()
    edge.deal()
    edge.update()
    edge.model(round=1)
    edge.service.wait_for_log("update_void")
    assert edge.update(round=2).meta.round == 2


def test_model_that_arrives_during_training_stops_it_and_is_trained_instead(
    start: Callable[..., Edge],
) -> None:
    edge = start()
    edge.deal()
    long = model(BASE, 0, table=TABLE, local_epochs=100_000)
    edge.peer.publish("fl/global_model", long, retain=True)
    edge.deal()
    edge.service.wait_for_log('"epoch": "2/100000"')
    edge.model(round=1)
    edge.update(round=2)
    edge.service.wait_for_log("training_cancelled")


def test_late_joiner_starts_from_the_retained_model(start: Callable[..., Edge]) -> None:
    edge = start()
    edge.model(round=4)
    edge.service.kill()
    late = start(state_dir="late")
    late.service.wait_for_log("step_8_global_model_received")
    late.deal()
    assert late.update(round=5).meta.round == 5


def test_finished_model_of_an_old_run_does_not_end_a_new_client(
    start: Callable[..., Edge],
) -> None:
    edge = start(exit_when_finished=True)
    edge.model(round=3, run="old", finished=True)
    edge.service.wait_for_log("run_finished")
    edge.model(run="run", started=2)
    edge.deal()
    edge.update()
    edge.answer(Verdict.ACCEPTED)
    edge.model(round=1, finished=True, started=2)
    assert edge.service.wait() == 0


def test_finished_model_is_evaluated_before_the_client_ends(
    start: Callable[..., Edge], peers: Callable[..., Peer], broker: LocalBroker
) -> None:
    edge = start(exit_when_finished=True, validation_fraction=0.1)
    edge.model()
    edge.deal()
    before = edge.update().meta.metrics
    edge.model(round=1, finished=True)
    assert edge.service.wait() == 0
    # Retained: the server may just be starting again.
    said = decode_json(
        peers(broker.port, "fl/evaluations/#").on("fl/evaluations/region_0/c1"), ClientEvaluation
    )
    assert (said.run, said.round) == ("run", 1)
    # The played model has not changed since it was evaluated for the update.
    found = (said.num_examples, said.loss, said.accuracy)
    told = (before.validation_examples, before.validation_loss, before.validation_accuracy)
    assert found == told


def test_client_without_validation_examples_says_nothing_of_the_finished_model_and_ends(
    start: Callable[..., Edge], peers: Callable[..., Peer], broker: LocalBroker
) -> None:
    said = peers(broker.port, "fl/evaluations/#")
    edge = start(exit_when_finished=True, validation_fraction=0)
    edge.model()
    edge.deal()
    assert edge.update().meta.metrics.validation_examples is None
    edge.model(round=1, finished=True)
    assert edge.service.wait() == 0
    assert not said.received


def test_garbage_on_every_topic_leaves_it_alive(start: Callable[..., Edge]) -> None:
    edge = start()
    edge.service.wait_for_log("mqtt_connected")
    for topic in ("global_model", "slots/region_0/c1", "receipts/region_0", "status/region_0"):
        for payload in (b"\xff\xfe", b"[]", b"{}", b"null"):
            edge.peer.publish(f"fl/{topic}", payload)
    edge.model()
    edge.deal()
    edge.update()


def test_model_of_another_architecture_ends_it_with_a_reason(start: Callable[..., Edge]) -> None:
    edge = start()
    edge.peer.publish("fl/global_model", model(np.zeros(13, np.float32)), retain=True)
    edge.deal()
    assert edge.service.wait() == 1
    assert "training failed" in edge.service.log.read_text()


def test_altered_data_file_ends_it_with_what_to_do(
    start: Callable[..., Edge], tmp_path: Path
) -> None:
    folder = tmp_path / "data" / "ECG5000"
    folder.mkdir(parents=True)
    original = (REPOSITORY / "data/ECG5000/ECG5000_TRAIN.tsv").read_bytes()
    (folder / "ECG5000_TRAIN.tsv").write_bytes(original.replace(b"1", b"2", 1))
    edge = start(data_dir=tmp_path / "data")
    edge.model()
    edge.deal()
    assert edge.service.wait() == 1
    text = edge.service.log.read_text()
    assert "ECG5000_TRAIN.tsv" in text
    assert "git checkout" in text


def test_keeps_the_name_it_gave_itself(
    broker: LocalBroker, services: Callable[..., Service]
) -> None:
    names = []
    for _ in range(2):
        service = services(MODULE, broker)
        names.append(json.loads(service.wait_for_log("client_started"))["client"])
        assert service.stop() == 0
    assert names[0] == names[1]
    other = services(MODULE, broker, name="replica")
    assert json.loads(other.wait_for_log("client_started"))["client"] != names[0]


def test_two_clients_with_one_name_are_told(
    broker: LocalBroker, services: Callable[..., Service]
) -> None:
    first = services(MODULE, broker, client_id="c1", name="one")
    first.wait_for_log("mqtt_connected")
    second = services(MODULE, broker, client_id="c1", name="two")
    # They take the session from each other until one of them gives up.
    both = concurrent.futures.ThreadPoolExecutor(2)
    ends = [both.submit(service.wait, 60) for service in (first, second)]
    done, _ = concurrent.futures.wait(ends, return_when="FIRST_COMPLETED")
    assert done.pop().result() == 1
    assert "CLIENT_ID" in first.log.read_text() + second.log.read_text()
    first.process.kill()
    second.process.kill()
    both.shutdown()
