"""The fog's strategy: rounds through a played Flower."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedfog.core.aggregation import WeightedSum
from fedfog.core.metrics import Federated
from fedfog.flower.grid import FogGrid, RegionsError
from fedfog.flower.reply import pack
from fedfog.flower.strategy import (
    FogStrategy,
    GlobalModel,
    RoundFailedError,
    StrategyError,
    make_strategy,
)
from fedfog.messages.codec import TensorTable, Vector, digest_of, encode
from fedfog.messages.schemas import ClientMetrics, FederatedEvaluation, PartialMeta
from flower import PlayedFlower, PlayedFog
from wire import constant

TABLE = TensorTable((("bias", (3,)), ("weight", (5, 2))))
SIZE = TABLE.num_parameters
START = np.zeros(SIZE, np.float32)
NODES = {"a": 11, "b": 12, "c": 13}
USABLE = [
    *("Bulyan", "FedAdagrad", "FedAdam", "FedAvg", "FedAvgM", "FedMedian", "FedProx"),
    *("FedTrimmedAvg", "FedYogi", "Krum", "MultiKrum", "QFedAvg"),
]


def partial(
    region: str,
    round_: int,
    vector: Vector,
    num_examples: int = 10,
    table: TensorTable = TABLE,
    fields: Mapping[str, Any] | None = None,
) -> bytes:
    values: dict[str, Any] = {
        "run": "run",
        "round": round_,
        "region": region,
        "digest": digest_of(vector),
        "num_clients": 2,
        "num_examples": num_examples,
        "members": {"c1": num_examples - 1, "c2": 1},
        "metrics": ClientMetrics(train_loss=0.5),
    }
    return encode(PartialMeta(**values | dict(fields or {})), table, vector)


Partials = Callable[[str, int], bytes | None]


class Federation:
    """Three regions whose bridges answer with what `partials(region, round)` gives."""

    def __init__(self, partials: Partials, order: str = "abc") -> None:
        self.flower, self.fog = PlayedFlower(*NODES.values()), PlayedFog()
        self.models: list[GlobalModel] = []
        self.timeouts = {"regions_timeout": 1.0, "round_timeout": 1.0}
        self._partials = partials
        self._held: dict[str, Message] = {}
        self._order = order
        for region in order:
            self.fog.bridge(region, NODES[region])
        self.flower.on_push = self._on_push

    def run(self, rounds: int = 1, strategy: str = "FedAvg", **arguments: Any) -> None:
        fog_strategy = FogStrategy(
            make_strategy(strategy, 1, 0.1),
            **{
                "table": TABLE,
                "run": "run",
                "first_round": 1,
                "min_fit": 1,
                "min_available": len(self._order),
                "regions": [],
                "on_model": self.models.append,
                **self.timeouts,
                **arguments,
            },
        )
        fog_strategy.run_rounds(FogGrid(self.flower, self.fog, grace=5.0), START, rounds)

    def _on_push(self, message: Message) -> None:
        region = next(r for r, node in NODES.items() if node == message.metadata.dst_node_id)
        self._held[region] = message
        if set(self._held) < set(self._order):
            return
        for name in self._order:
            held = self._held.pop(name)
            payload = self._partials(name, int(held.metadata.group_id.split("/")[1]))
            if payload is not None:
                self.flower.reply(held, pack(name, payload))
                self.fog.bell(name, held)


def vectors(seed: int) -> dict[str, Vector]:
    generator = np.random.default_rng(seed)
    return {region: generator.normal(size=SIZE).astype(np.float32) for region in NODES}


EXAMPLES = {"a": 30, "b": 500, "c": 7}


def good(region: str, round_: int) -> bytes:
    return partial(region, round_, vectors(round_)[region], EXAMPLES[region])


def mean(of: Mapping[str, Vector], *regions: str) -> Vector:
    total = WeightedSum(SIZE)
    for region in regions:
        total.add(of[region], EXAMPLES[region])
    return total.mean()


def test_model_is_the_mean_over_regions_weighted_by_examples() -> None:
    federation = Federation(good)
    federation.run(rounds=2)
    assert [model.round for model in federation.models] == [1, 2]
    for model in federation.models:
        given = np.stack(list(vectors(model.round).values())).astype(np.float64)
        exact = np.average(given, axis=0, weights=list(EXAMPLES.values()))
        assert np.abs(model.vector / exact - 1).max() < 1e-7
        assert model.vector.dtype == np.float32


def test_record_tells_who_took_part_and_how_long_each_step_took() -> None:
    federation = Federation(good)
    federation.run()
    record = federation.models[0].record
    assert set(record.regions) == {"a", "b", "c"}
    assert (record.num_clients, record.num_examples) == (6, 537)
    assert record.train_loss == pytest.approx(0.5)
    assert set(record.seconds) == {"wait_regions", "push", "reply", "pull", "aggregate"}


def federated(region: str, clients: int, accuracy: float) -> FederatedEvaluation | None:
    return FederatedEvaluation.of(
        Federated(clients, 10 * clients, 1.0, accuracy, accuracy, 0.1, 0.0, f"{region}/c", 1.0)
    )


def test_record_tells_of_the_clients_of_all_regions_how_the_model_does() -> None:
    told = {"a": federated("a", 1, 0.5), "b": None, "c": federated("c", 2, 0.8)}

    def partials(region: str, round_: int) -> bytes:
        return partial(region, round_, constant(1), fields={"federated": told[region]})

    federation = Federation(partials)
    federation.run()
    record = federation.models[0].record
    assert {region: meta.federated for region, meta in record.regions.items()} == told
    assert record.federated is not None
    assert (record.federated.num_clients, record.federated.num_examples) == (3, 30)
    assert record.federated.accuracy == pytest.approx(0.7)
    assert record.federated.worst_client == "a/c"


def test_order_of_arrival_does_not_change_the_model() -> None:
    models = []
    for order in ("abc", "cab", "bca"):
        federation = Federation(good, order)
        federation.run()
        models.append(federation.models[0].vector.tobytes())
    assert len(set(models)) == 1


BAD: dict[str, dict[str, Any]] = {
    "another run": {"run": "other"},
    "another round": {"round": 7},
    "another region": {"region": "b"},
    "the digest": {"digest": "0" * 64},
    "num_examples": {"members": {"c1": 1}},
}


@pytest.mark.parametrize("what", [*BAD, "tensor table", "not finite", "not a safetensors"])
def test_bad_partial_is_left_out_and_changes_nothing(what: str) -> None:
    def partials(region: str, round_: int) -> bytes:
        vector = vectors(round_)[region]
        if region != "a":
            return partial(region, round_, vector, EXAMPLES[region])
        if what == "tensor table":
            other = TensorTable((("bias", (3,)), ("weight", (2, 5))))
            return partial(region, round_, vector, table=other)
        if what == "not finite":
            vector[4] = np.nan
        if what == "not a safetensors":
            return b"garbage"
        return partial(region, round_, vector, fields=BAD.get(what))

    federation = Federation(partials)
    federation.run()
    record = federation.models[0].record
    assert set(record.regions) == {"b", "c"}
    assert set(record.left_out) == {"a"}
    without = mean(vectors(1), "b", "c")
    assert federation.models[0].vector.tobytes() == without.tobytes()


def test_too_few_valid_partials_end_the_run_and_say_why() -> None:
    federation = Federation(lambda region, r: good(region, r) if region == "a" else None)
    with pytest.raises(RoundFailedError) as error:
        federation.run(min_fit=2, round_timeout=0.3)
    for part in ("round 1", "MIN_FIT_CLIENTS", "ROUND_TIMEOUT", "b: no partial", "c: no partial"):
        assert part in str(error.value)
    assert federation.models == []


def test_round_goes_on_with_enough_regions() -> None:
    federation = Federation(lambda region, r: None if region == "c" else good(region, r))
    federation.run(min_fit=2, round_timeout=0.3)
    assert set(federation.models[0].record.left_out) == {"c"}


def test_round_does_not_begin_without_enough_regions() -> None:
    federation = Federation(good, order="ab")
    with pytest.raises(RegionsError, match="MIN_AVAILABLE_CLIENTS"):
        federation.run(min_available=3, regions_timeout=0.2)


def test_resumed_run_goes_on_counting() -> None:
    federation = Federation(good)
    federation.run(rounds=2, first_round=5)
    assert [model.round for model in federation.models] == [5, 6]


@pytest.mark.parametrize("name", USABLE)
def test_every_strategy_takes_the_regions_partials(name: str) -> None:
    """Two rounds, because some keep a state that begins with the first."""
    federation = Federation(good)
    federation.run(rounds=2, strategy=name)
    assert [model.vector.shape for model in federation.models] == [(SIZE,), (SIZE,)]
    assert not np.array_equal(federation.models[0].vector, START)


def test_stateful_strategy_starts_each_round_from_the_published_model() -> None:
    """FedAvgM with its defaults is FedAvg: it must see the arrays that it was given."""
    plain, momentum = Federation(good), Federation(good)
    plain.run(rounds=2)
    momentum.run(rounds=2, strategy="FedAvgM")
    for one, other in zip(plain.models, momentum.models, strict=True):
        np.testing.assert_allclose(one.vector, other.vector, rtol=1e-4)


@pytest.mark.parametrize("name", ["FedSgd", "FedXgbBagging", "Result", "", "Strategy"])
def test_impossible_strategy_is_refused_with_the_possible_ones(name: str) -> None:
    with pytest.raises(StrategyError, match=r"STRATEGY=.*FedAdam.*FedAvg"):
        make_strategy(name, 1, 0.1)


def test_model_that_is_not_finite_ends_the_run() -> None:
    huge = np.full(SIZE, 3e38, np.float32)
    federation = Federation(lambda region, r: partial(region, r, huge * (-1) ** (r + 1)))
    with pytest.raises(StrategyError, match="STRATEGY=QFedAvg"), np.errstate(all="ignore"):
        federation.run(strategy="QFedAvg")
    assert federation.models == []


@pytest.mark.parametrize("strategy", ["FedAvg", "FedAvgM"])
def test_rule_makes_one_partial_of_the_regions_and_names_the_poisoned(strategy: str) -> None:
    """The strategy gets what the rule made; a region that claims everything counts as the rest."""
    near = vectors(1) | {"c": constant(-50)}
    claimed = {"a": 10, "b": 10, "c": 10**6}
    federation = Federation(lambda r, n: partial(r, n, near[r], claimed[r]))
    federation.run(strategy=strategy, aggregation="median", byzantine=0.2)
    (model,) = federation.models
    np.testing.assert_array_equal(model.vector, np.minimum(near["a"], near["b"]))
    assert list(model.record.suspicious) == ["c"]
    assert "it claims 1000000 examples, 15 were counted" in model.record.suspicious["c"]
    assert set(model.record.regions) == {"a", "b", "c"}


def test_rule_at_the_centre_starts_from_the_model_of_the_round_before() -> None:
    """Norm clipping is relative to it: equal steps in every round, although the model moves on."""
    federation = Federation(lambda r, n: partial(r, n, constant(n + 99.0 * (r == "c"))))
    federation.run(rounds=3, aggregation="norm_clip", byzantine=0.2)
    np.testing.assert_allclose([m.vector[0] for m in federation.models], [1, 2, 3], rtol=1e-6)
    assert all(list(m.record.suspicious) == ["c"] for m in federation.models)
