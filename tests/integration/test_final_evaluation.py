"""The end of a run: what the clients say of its last model, and a run that ends before ROUNDS."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from centre import Centre, Region, lines
from conftest import LIMIT, Peer, Service
from fedfog.cli.broker import LocalBroker
from fedfog.core.metrics import Federated
from fedfog.messages.codec import decode
from fedfog.messages.schemas import ClientEvaluation, FederatedEvaluation, ModelMeta, RunState

# Of a and b, in each round.
BEFORE = FederatedEvaluation.of(
    Federated(2, 30, 1.0, 0.5, 0.5, 0.1, 0.4, "region_0/b", 0.6),
)


@pytest.fixture
def centre(
    services: Callable[..., Service], broker: LocalBroker, tmp_path: Path
) -> Callable[..., Centre]:
    return lambda **settings: Centre(services, broker, tmp_path, **settings)


def say(
    peer: Peer, model: ModelMeta, client: str, right: int, of: int, region: str = "region_0"
) -> None:
    said = ClientEvaluation(
        run=model.run, round=model.round, num_examples=of, loss=0.5, accuracy=right / of
    )
    peer.publish(f"fl/evaluations/{region}/{client}", said.to_json(), retain=True)


def evaluated_all(server: Service, round: int) -> None:
    """Wait until the server's own evaluation of the last model, too, is done."""
    server.wait_for_log(f'"round": "{round}/{round}".*"model_evaluated"', LIMIT)


def test_finished_model_is_evaluated_by_each_client_of_the_last_round_once(
    centre: Callable[..., Centre], broker: LocalBroker
) -> None:
    here, region = centre(rounds=1, evaluation_timeout=LIMIT), Region(broker.port, federated=BEFORE)
    here.bridge()
    server = here.start()
    model = region.model(1).meta
    assert model.state is RunState.FINISHED
    say(region, model.model_copy(update={"round": 0}), "b", 1, 1)
    say(region, model.model_copy(update={"run": "another"}), "b", 1, 1)
    region.publish("fl/evaluations/region_0/b", b"garbage")
    say(region, model, "b", 1000, 1000)  # more than all clients had in the round before
    say(region, model, "c", 1, 1)  # was not in the last round
    say(region, model, "a", 1, 1, region="another")
    say(region, model, "a", 9, 10)
    say(region, model, "a", 0, 10)
    evaluated_all(server, 1)
    # What was said so far has been handled: messages of one sender keep their order.
    region.publish("fl/evaluations/region_0/b", b"end of that")
    server.wait_for_log("(?s:(message_refused.*){2})", LIMIT)
    assert not lines(server, "run_completed")
    say(region, model, "b", 3, 5)
    assert server.wait(LIMIT) == 0
    summary, history = here.read("summary.json"), here.read("history.json")
    told = summary["federated"]
    assert told == history["federated"]
    overall = told["overall"]
    assert told["regions"] == {"region_0": overall}
    assert (overall["num_clients"], overall["num_examples"]) == (2, 15)
    assert overall["accuracy"] == pytest.approx(12 / 15)
    assert overall["mean_accuracy"] == pytest.approx(0.75)
    assert (overall["worst_client"], overall["worst_accuracy"]) == ("region_0/b", 0.6)
    assert (told["missing"], told["missing_clients"]) == (0, [])
    assert history["rounds"][0]["federated"] == BEFORE.model_dump()  # type: ignore[union-attr]
    card = (here.folder / "README.md").read_text()
    assert "| region_0 | 2 | 15 | 0.8000 | 0.7500 ± 0.1500 | 0.6000 (region_0/b) |" in card
    region.close()


def test_clients_that_say_nothing_of_the_finished_model_are_named(
    centre: Callable[..., Centre], broker: LocalBroker
) -> None:
    here, region = centre(rounds=1, evaluation_timeout=1), Region(broker.port, federated=BEFORE)
    here.bridge()
    server = here.start()
    say(region, region.model(1).meta, "a", 9, 10)
    assert server.wait(LIMIT) == 0
    summary = here.read("summary.json")
    assert summary["status"] == "completed"
    told = summary["federated"]
    assert (told["missing"], told["missing_clients"]) == (1, ["region_0/b"])
    [line] = lines(server, "model_evaluated_by_clients")
    assert (line["level"], line["setting"]) == ("warning", "EVALUATION_TIMEOUT")
    assert (
        "The word of 1 more did not come in time: region_0/b."
        in (here.folder / "README.md").read_text()
    )
    region.close()


def test_clients_in_regions_below_others_are_counted_by_their_own_regions(
    centre: Callable[..., Centre], broker: LocalBroker
) -> None:
    """Here a and b are regions, with a client each, for all that the server knows."""
    here, region = centre(rounds=1, evaluation_timeout=LIMIT), Region(broker.port, federated=BEFORE)
    here.bridge()
    server = here.start()
    model = region.model(1).meta
    say(region, model, "c1", 9, 10, region="a")
    say(region, model, "c1", 1, 5, region="b")
    assert server.wait(LIMIT) == 0
    told = here.read("summary.json")["federated"]
    assert told["overall"]["num_clients"] == 2
    assert told["overall"]["worst_client"] == "b/c1"
    assert {name: found["accuracy"] for name, found in told["regions"].items()} == {
        "a": 0.9,
        "b": 0.2,
    }
    region.close()


def test_what_was_said_while_the_server_was_down_counts(
    centre: Callable[..., Centre], broker: LocalBroker
) -> None:
    here, region = centre(rounds=1, evaluation_timeout=LIMIT), Region(broker.port, federated=BEFORE)
    here.bridge()
    server = here.start()
    model = region.model(1).meta
    say(region, model, "a", 9, 10)
    evaluated_all(server, 1)
    server.kill()
    say(region, model, "b", 3, 5)
    assert here.start().wait(LIMIT) == 0
    told = here.read("summary.json")["federated"]
    assert told["overall"]["num_clients"] == 2
    assert told["overall"]["accuracy"] == pytest.approx(12 / 15)
    region.close()


@pytest.mark.parametrize("killed", [False, True], ids=["undisturbed", "server killed"])
def test_a_run_without_a_better_model_ends_early_at_the_same_model(
    centre: Callable[..., Centre], broker: LocalBroker, killed: bool
) -> None:
    """The played models call all beats abnormal: none is better than model 0."""
    here = centre(rounds=50, early_stop_rounds=2)
    region = Region(broker.port, allowed=2 if killed else 50)
    here.bridge()
    server = here.start()
    if killed:
        region.model(2)
        server.wait_for_log('"round": "2/50".*"model_evaluated"', LIMIT)
        server.kill()
        region.allow(50)
        server = here.start()
    assert server.wait(LIMIT) == 0
    states = {round: model.meta.state for round, model in region.models.items()}
    assert states == {0: "training", 1: "training", 2: "training", 3: "finished"}
    summary: dict[str, Any] = here.read("summary.json")
    assert (summary["status"], summary["rounds"], summary["best_round"]) == ("completed", 3, 0)
    assert "EARLY_STOP_ROUNDS=2" in summary["early_stop"]
    history = here.read("history.json")
    assert [record["evaluation"]["round"] for record in history["rounds"]] == [1, 2, 3]
    for name, round in (("model", 3), ("best", 0)):
        saved = decode((here.folder / f"{name}.safetensors").read_bytes(), ModelMeta)
        assert saved.vector.tobytes() == region.models[round].vector.tobytes()
    region.close()
