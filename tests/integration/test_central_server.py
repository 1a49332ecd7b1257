"""The central server with a real broker, a real SuperLink and real fog bridges; the test stands in
for the clients and the aggregator of a region."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from centre import MODEL, Centre, Region, assert_gone, descendants, expected, lines
from conftest import LIMIT, Peer, Service
from fedfog.cli.broker import LocalBroker
from fedfog.flower.strategy import make_strategy
from fedfog.messages.codec import decode, decode_json
from fedfog.messages.schemas import ModelMeta, RoundRecord
from flower import round_of


@pytest.fixture
def centre(
    services: Callable[..., Service], broker: LocalBroker, tmp_path: Path
) -> Callable[..., Centre]:
    return lambda **settings: Centre(services, broker, tmp_path, **settings)


def test_a_run_publishes_every_model_and_leaves_all_results(
    services: Callable[..., Service], any_broker: LocalBroker, tmp_path: Path
) -> None:
    centre = Centre(services, any_broker, tmp_path)
    region, watcher = Region(any_broker.port, allowed=2), Peer(any_broker.port, "fl/history")
    centre.bridge()
    server = centre.start()
    watcher.on("fl/history", LIMIT)
    children = descendants(server)
    region.allow(3)
    assert server.wait(LIMIT) == 0
    assert_gone(children, within=3.0)

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
    watcher.wait_for(lambda _topic, _payload: len(watcher.received) >= 3)
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


def test_moments_of_the_strategy_survive_the_kill_of_the_server_to_the_last_bit(
    centre: Callable[..., Centre], broker: LocalBroker
) -> None:
    options = {"server_learning_rate": 0.5, "beta_1": 0.8, "tau": 0.1}
    here, region = centre(strategy="FedAdam", rounds=4, **options), Region(broker.port, allowed=2)
    here.bridge()
    server = here.start()
    region.model(2)
    server.kill()
    again = here.start()
    region.allow(4)
    assert again.wait(LIMIT) == 0
    assert here.read("summary.json")["rewinds"] == []
    undisturbed, model = make_strategy("FedAdam", 1, 1e-3, **options), region.models[0].vector
    for number in range(1, 5):
        model = round_of(undisturbed, number, model, [(model + np.float32(number), 10)])
        assert region.model(number).vector.tobytes() == model.tobytes()
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
    assert time.monotonic() - began < 10.0  # when Docker would kill it
    assert_gone(children, within=3.0)
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
    assert_gone(children, within=3.0)
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
    server.wait_for_log("serverapp_ready")
    story = server.log.read_text()
    assert story.index("step_7_global_model_published") < story.index("serverapp_ready")
    assert decode(payload, ModelMeta).meta.round == 0
    watcher.publish(MODEL, b"garbage", retain=True)
    server.wait_for_log("retained_model_replaced")
    watcher.wait_for(lambda _topic, p: p == payload, after=2)
    assert peers(broker.port, MODEL).on(MODEL) == payload
    broker.stop()
    broker.start()
    assert peers(broker.port, MODEL).on(MODEL) == payload
