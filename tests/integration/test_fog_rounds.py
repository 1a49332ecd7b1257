"""Regional rounds between two global models (FOG_ROUNDS): each with the guarantees of a round."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import LIMIT, REPOSITORY, Peer, Service
from fedfog.cli.broker import LocalBroker, free_port
from fedfog.core.partition import slot_indices
from fedfog.messages.codec import TensorMessage, Vector, decode, decode_meta
from fedfog.messages.schemas import ModelMeta
from fedfog.ml.reference import fedavg
from fedfog.ml.task import load_task
from halting import Halt
from region import BASE, Region
from wire import constant

Services = Callable[..., Service]
Peers = Callable[..., Peer]

REGIONAL = "fl/regional_model/region_0"
COMMIT = "fedfog_aggregator.store:PartialStore.commit_regional"
EXAMPLES = {"a": 12, "b": 8}
PUBLISH = "fedfog.transport.mqtt:Session.publish"


def regional_model(peer: Peer, fog_round: int, after: int = 0) -> TensorMessage[ModelMeta]:
    def seen(topic: str, payload: bytes) -> bool:
        return topic == REGIONAL and decode_meta(payload, ModelMeta).fog_round == fog_round

    return decode(peer.wait_for(seen, after=after), ModelMeta)


def members(peer: Peer, fog_round: int) -> list[str]:
    """Of the first `accepted` of a regional round."""

    def seen(topic: str, payload: bytes) -> bool:
        return topic == "fl/receipts/region_0" and json.loads(payload)["fog_round"] == fog_round

    return list(json.loads(peer.wait_for(seen))["members"])


def send(region: Region, fog_round: int, base: Vector, **values: float) -> None:
    for client, value in values.items():
        examples = EXAMPLES.get(client, 10)
        region.send(client, value, base, fog_round=fog_round, num_examples=examples)


# Both updates are as far from the model that they were trained from: norms are not clipped.
@pytest.mark.parametrize("rule", ["fedavg", "norm_clip"])
@pytest.mark.parametrize(
    ("site", "when", "pattern", "committed"),
    [
        pytest.param(COMMIT, "before", "", False, id="before its commit"),
        pytest.param(COMMIT, "after", "", True, id="after its commit"),
        pytest.param(PUBLISH, "before", "regional_model", True, id="before the publish"),
    ],
)
def test_aggregator_killed_in_a_regional_round_counts_each_update_once(
    services: Services,
    broker: LocalBroker,
    peers: Peers,
    tmp_path: Path,
    site: str,
    when: str,
    pattern: str,
    committed: bool,
    rule: str,
) -> None:
    peer = peers(broker.port, "fl/receipts/#", "fl/partial/#", "fl/status/#", REGIONAL)
    halt = Halt(tmp_path / "halt", site)
    settings: dict[str, object] = {"clients_expected": 2, "aggregation": rule}
    first = services("fedfog_aggregator.main", broker, **settings, **halt.settings)
    region = Region(first, peer)
    region.open("a", "b", fog_rounds=3)
    send(region, 1, BASE, a=1.25, b=1.25)
    one = regional_model(peer, 1)
    assert (one.meta.round, one.meta.regions["region_0"].num_examples) == (0, 20)
    np.testing.assert_allclose(one.vector, constant(1.25), rtol=1e-6)

    halt.arm(site, when, pattern)
    send(region, 2, one.vector, a=2.25, b=0.25)
    halt.kill_there(first)
    after = len(peer.received)
    region.service = services("fedfog_aggregator.main", broker, **settings)
    regional_model(peer, 2 if committed else 1, after)
    send(region, 2, one.vector, a=2.25, b=0.25)
    two = regional_model(peer, 2, after)
    np.testing.assert_allclose(two.vector, constant(1.45), rtol=1e-6)
    send(region, 2, one.vector, a=2.25, c=9)
    assert region.receipt("a", "accepted", after)["fog_round"] == 2
    assert region.receipt("c", "late", after)["fog_round"] == 2

    send(region, 3, two.vector, a=2.45, b=0.45)
    partial = region.partial()
    np.testing.assert_allclose(partial.vector, constant(1.65), rtol=1e-6)
    assert partial.meta.members == EXAMPLES
    assert [r.num_examples for r in partial.meta.regional] == [20, 20]
    for fog_round in (1, 2, 3):
        assert members(peer, fog_round) == ["a", "b"]


def test_kills_in_the_middle_of_regional_rounds_and_the_model_is_that_of_one_process(
    services: Services, broker: LocalBroker, peers: Peers, tmp_path: Path
) -> None:
    """Aggregator and clients are killed in regional rounds 2 and 3 of 3; with K as a number every
    client is waited for, so all of them are in each aggregate."""
    peer = peers(broker.port, REGIONAL)
    fog: dict[str, object] = {"regions": "region_0,region_1"}
    flower = free_port()
    server = services(
        "fedfog_central_server.main",
        broker,
        **fog,
        fog_rounds=3,
        local_epochs=1,
        region_partition="sizes:2",
        run_id="run",
        runs_dir=tmp_path / "runs",
        rounds=3,
        min_available_clients=2,
        min_fit_clients=2,
        flower_port=flower,
        exit_when_finished="true",
    )

    def aggregator(region: str, clients: int) -> Service:
        own: dict[str, object] = {"region": region, "clients_expected": clients, "k": clients}
        own["round_deadline"] = 600
        return services("fedfog_aggregator.main", broker, f"agg-{region}", **fog, **own)

    def client(name: str, region: str) -> Service:
        return services("fedfog_client.main", broker, name, client_id=name, region=region)

    region_0 = aggregator("region_0", 2)
    aggregator("region_1", 1)
    for region in ("region_0", "region_1"):
        address = f"127.0.0.1:{flower}"
        services("fedfog_bridge.main", broker, f"b-{region}", region=region, flower_server=address)
    a, b = client("a", "region_0"), client("b", "region_0")
    client("c", "region_1")

    regional_model(peer, 1)
    region_0.kill()
    b.kill()
    aggregator("region_0", 2)
    client("b", "region_0")
    regional_model(peer, 2)
    a.kill()
    client("a", "region_0")
    assert server.wait(2 * LIMIT) == 0

    results = tmp_path / "runs" / "run"
    history = json.loads((results / "history.json").read_text())["rounds"]
    for record in history:
        for name, clients in (("region_0", 2), ("region_1", 1)):
            partial = record["regions"][name]
            assert len(partial["members"]) == partial["federated"]["num_clients"] == clients
            assert [r["num_clients"] for r in partial["regional"]] == [clients, clients]
    reached = decode((results / "model.safetensors").read_bytes(), ModelMeta)
    np.testing.assert_allclose(reached.vector, one_process(reached, [2, 1]), rtol=0, atol=1e-4)


def one_process(reached: TensorMessage[ModelMeta], slots: list[int]) -> Vector:
    """What the reference makes with the same hyperparameters and slots of each region."""
    parameters = reached.meta.hyperparameters
    task = load_task("ecg5000", data_dir=REPOSITORY / "data")
    held = [
        [
            slot_indices(
                task.training_labels(),
                task.training_groups(),
                slot=slot,
                slots=count,
                region_index=index,
                regions=len(slots),
                seed=parameters.seed,
                region_partition=parameters.region_partition,
            )
            for slot in range(count)
        ]
        for index, count in enumerate(slots)
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    *_, last = fedavg(task, held, parameters, rounds=3, validation_fraction=0.1)
    torch.set_num_threads(threads)
    return reached.table.flatten(last)
