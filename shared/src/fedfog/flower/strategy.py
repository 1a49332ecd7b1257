"""A Flower strategy for a fog: any of Flower's own strategies, fed with regions' partials.

The inner strategy sees ordinary replies (arrays and `num-examples`), one of each region; what it
asks to send to the nodes is not sent, because the models travel over MQTT.
"""

import inspect
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import structlog
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as strategies
from flwr.serverapp.strategy import Strategy

from fedfog.core.aggregation import WeightedSum
from fedfog.core.metrics import merge
from fedfog.core.robust import Rule, Updates
from fedfog.flower.grid import FogGrid, train_message
from fedfog.flower.reply import group_id, unpack
from fedfog.messages.codec import (
    CodecError,
    TensorMessage,
    TensorTable,
    Vector,
    decode,
    digest_of,
)
from fedfog.messages.schemas import FederatedEvaluation, PartialMeta, RoundRecord

log = structlog.get_logger()

_MODEL = "model"


class StrategyError(ValueError):
    """The setting STRATEGY is impossible, or its result is."""


class RoundFailedError(Exception):
    """Too few regions have a valid partial; the text says why each is missing."""


@dataclass(frozen=True)
class GlobalModel:
    """The outcome of a round: `vector` is float32, shape (parameters,)."""

    round: int
    vector: Vector
    record: RoundRecord


class FedAvg(strategies.FedAvg):
    """Flower's FedAvg (McMahan et al. 2017, https://arxiv.org/abs/1602.05629), summed in float64.

    Flower sums in float32: a parameter whose values nearly cancel loses up to four digits
    (relative error 1e-3 instead of 6e-8), and the mean over regions would differ visibly from the
    mean over all clients.
    """

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        total: WeightedSum | None = None
        for reply in replies:
            vector = to_vector(reply.content.array_records["arrays"])
            examples = reply.content.metric_records["metrics"][self.weighted_by_key]
            total = total or WeightedSum(vector.size)
            total.add(vector, cast(int, examples))
        return (to_record(total.mean()) if total else None), None


def make_strategy(
    name: str, min_regions: int, learning_rate: float, **options: float | None
) -> Strategy:
    """Flower's strategy of class `name`, over all regions.

    Args:
        name: class name in `flwr.serverapp.strategy` (setting STRATEGY).
        min_regions: least regions in a round.
        learning_rate: of the clients, for the strategies that need it.
        options: settings of the same names; None: as the strategy has it. Those that it does not
            have are named in the log.

    Raises:
        StrategyError: there is no such strategy, or it is not one for regions' models.
    """
    offered = {
        "fraction_evaluate": 0.0,
        "min_train_nodes": min_regions,
        "min_available_nodes": min_regions,
        "client_learning_rate": learning_rate,
        "train_loss_key": "train-loss",
    }
    usable = _usable_strategies(offered.keys())
    if name not in usable:
        raise StrategyError(f"STRATEGY={name!r}: not one of {', '.join(sorted(usable))}")
    wanted = inspect.signature(usable[name]).parameters
    arguments = {key: value for key, value in offered.items() if key in wanted}
    for option, value in options.items():
        key = "eta" if option == "server_learning_rate" and "eta" in wanted else option
        if value is not None and key in wanted:
            arguments[key] = value
        elif value is not None:
            log.warning("option_not_used", setting=f"{option.upper()}={value}", strategy=name)
    return usable[name](**arguments)


def _usable_strategies(offered: Iterable[str]) -> dict[str, type[Strategy]]:
    """FedAvg and its descendants that average tensors and need no argument that we lack; what they
    take from Flower's FedAvg they take from ours."""
    found: dict[str, type[Strategy]] = {}
    for name in strategies.__all__:
        kind = getattr(strategies, name)
        needed = {
            key
            for key, parameter in inspect.signature(kind).parameters.items()
            if parameter.default is parameter.empty
        }
        trees = name.startswith("FedXgb")
        if issubclass(kind, strategies.FedAvg) and not trees and needed <= set(offered):
            found[name] = FedAvg if name == "FedAvg" else type(name, (kind, FedAvg), {})
    return found


def to_record(vector: Vector) -> ArrayRecord:
    """Flower's record of a model, as one array: to every usable strategy it is the same as an
    array for each tensor, because they compute element by element or with the whole model."""
    return ArrayRecord({_MODEL: Array(vector)})


def to_vector(record: ArrayRecord) -> Vector:
    """The model in a record, float32 of shape (parameters,)."""
    return record[_MODEL].numpy().astype(np.float32, copy=False)


class FogStrategy(Strategy):
    """Wraps `inner` so that a round is: wait for the regions, ask them, check their partials,
    aggregate, hand the new model to `on_model`.

    Args:
        inner: strategy that averages the regions.
        table: tensor table of the model.
        run: id of the run.
        first_round: number of the first round of this start; Flower counts from 1 each time.
        min_fit: least valid partials that make a round (MIN_FIT_CLIENTS).
        min_available: least regions online before a round (MIN_AVAILABLE_CLIENTS).
        regions: names of the regions to wait for; empty: whoever comes (REGIONS).
        regions_timeout: seconds to wait for regions (REGIONS_TIMEOUT).
        round_timeout: seconds until a round ends with what it has (ROUND_TIMEOUT).
        on_model: called with each new model, before the next round begins.
        aggregation: rule that makes one partial of the regions', which is then all that `inner`
            gets; `fedavg`: `inner` gets them all (AGGREGATION).
        byzantine: share of the regions that the rule has to bear (BYZANTINE).
    """

    def __init__(
        self,
        inner: Strategy,
        *,
        table: TensorTable,
        run: str,
        first_round: int,
        min_fit: int,
        min_available: int,
        regions: Sequence[str],
        regions_timeout: float,
        round_timeout: float,
        on_model: Callable[[GlobalModel], None],
        aggregation: Literal["fedavg"] | Rule = "fedavg",
        byzantine: float = 0.2,
    ) -> None:
        self.inner, self._table, self._run = inner, table, run
        self._first_round = first_round
        self._min_fit, self._min_available = min_fit, min_available
        self._regions = regions
        self._regions_timeout, self._round_timeout = regions_timeout, round_timeout
        self._on_model = on_model
        self._aggregation, self._byzantine = aggregation, byzantine
        self._weakness: str | None = None
        self._base: Vector | None = None
        self._grid: FogGrid | None = None
        self._seconds: dict[str, float] = {}

    def run_rounds(self, grid: FogGrid, model: Vector, num_rounds: int) -> None:
        """Do `num_rounds` rounds from `model` (float32, shape (parameters,)).

        Raises:
            RegionsError, RoundFailedError, StrategyError: the run cannot go on.
        """
        self.start(grid, to_record(model), num_rounds=num_rounds, timeout=self._round_timeout)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """An empty train message for each node that the inner strategy chooses."""
        if not isinstance(grid, FogGrid):
            raise TypeError("FogStrategy needs a FogGrid")
        self._grid, self._base = grid, to_vector(arrays)
        start = time.monotonic()
        minimum = max(self._min_available, self._min_fit)
        grid.wait_for_regions(minimum, self._regions, self._regions_timeout)
        self._seconds = {"wait_regions": time.monotonic() - start}
        number = self._number(server_round)
        chosen = self.inner.configure_train(number, arrays, config, grid)
        group = group_id(self._run, number)
        return [
            train_message(message.metadata.dst_node_id, group, self._round_timeout)
            for message in chosen
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The inner strategy's aggregate of the valid partials. Its metrics are left to the record:
        Flower would keep those of all rounds.

        Raises:
            RoundFailedError: fewer valid partials than MIN_FIT_CLIENTS.
            StrategyError: the inner strategy gave no finite model.
        """
        assert self._grid is not None and self._base is not None
        start = time.monotonic()
        number = self._number(server_round)
        left_out = dict(self._grid.left_out)
        regions: dict[str, PartialMeta] = {}
        valid: list[Message] = []
        updates: Updates | None = None
        if self._aggregation != "fedavg":
            updates = Updates(self._aggregation, self._byzantine, self._base)
        for reply in replies:
            region, payload = unpack(reply)
            try:
                partial = self._check(number, region, payload)
            except CodecError as error:
                left_out[region] = f"bad partial: {error}"
                log.warning("partial_left_out", region=region, round=number, reason=str(error))
                continue
            regions[region] = meta = partial.meta
            if updates is None:
                loss = meta.metrics.train_loss
                reply.content = self._for_inner(partial.vector, meta.num_examples, loss)
            else:
                updates.add(partial.vector, meta.num_examples)
            valid.append(reply)
        if len(valid) < self._min_fit:
            reasons = "; ".join(f"{region}: {why}" for region, why in sorted(left_out.items()))
            raise RoundFailedError(
                f"round {number} has {len(valid)} valid partials, not {self._min_fit} "
                f"(MIN_FIT_CLIENTS), after at most {self._round_timeout:.0f} s (ROUND_TIMEOUT). "
                f"Left out: {reasons or 'nobody'}"
            )
        num_examples = sum(meta.num_examples for meta in regions.values())
        loss = sum(meta.num_examples * meta.metrics.train_loss for meta in regions.values())
        loss /= num_examples
        federated = merge(*(FederatedEvaluation.told(meta.federated) for meta in regions.values()))
        suspicious: dict[str, str] = {}
        if updates is not None:
            suspicious = self._suspicious(number, list(regions), updates)
            valid = valid[:1]
            valid[0].content = self._for_inner(updates.mean(), updates.weight, loss)
        arrays, _metrics = self.inner.aggregate_train(number, valid)
        vector = self._vector(number, arrays)
        self._seconds |= {**self._grid.seconds, "aggregate": time.monotonic() - start}
        record = RoundRecord(
            run=self._run,
            round=number,
            regions=regions,
            left_out=left_out,
            suspicious=suspicious,
            num_clients=sum(meta.num_clients for meta in regions.values()),
            num_examples=num_examples,
            train_loss=loss,
            federated=FederatedEvaluation.of(federated),
            seconds=self._seconds,
        )
        self._on_model(GlobalModel(number, vector, record))
        # What the clients got, to the last bit, is what the next round starts from.
        return to_record(vector), None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: clients evaluate the models that they receive over MQTT."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        return None

    def summary(self) -> None:
        self.inner.summary()

    def _number(self, server_round: int) -> int:
        return self._first_round + server_round - 1

    def _check(self, number: int, region: str, payload: bytes) -> TensorMessage[PartialMeta]:
        partial = decode(payload, PartialMeta, self._table)
        meta = partial.meta
        if (meta.run, meta.round, meta.region) != (self._run, number, region):
            raise CodecError(f"it is {meta.id}, not {self._run}/{number}/{region}")
        if digest_of(partial.vector) != meta.digest:
            raise CodecError("its tensors do not have the digest that it names")
        if meta.num_examples != sum(meta.members.values()):
            raise CodecError("its num_examples is not the sum of its members'")
        if not np.isfinite(partial.vector).all():
            raise CodecError("it has values that are not finite")
        return partial

    def _suspicious(self, number: int, regions: Sequence[str], updates: Updates) -> dict[str, str]:
        """Say whom the rule left out or damped, and if it protects nobody among so many."""
        before, self._weakness = self._weakness, updates.weakness(len(regions))
        if self._weakness not in (None, before):
            setting = f"AGGREGATION={self._aggregation}"
            log.warning("aggregation_protects_nobody", reason=self._weakness, setting=setting)
        found = {regions[i]: why for i, why in updates.aggregate().suspicious.items()}
        for region, why in found.items():
            log.warning("partial_suspicious", round=number, region=region, reason=why)
        return found

    @staticmethod
    def _for_inner(vector: Vector, num_examples: int, loss: float) -> RecordDict:
        metrics = MetricRecord({"num-examples": num_examples, "train-loss": loss})
        return RecordDict({"arrays": to_record(vector), "metrics": metrics})

    def _vector(self, number: int, arrays: ArrayRecord | None) -> Vector:
        name = type(self.inner).__name__
        if arrays is None:
            raise StrategyError(f"STRATEGY={name} gave no model in round {number}")
        vector = to_vector(arrays)
        if not np.isfinite(vector).all():
            raise StrategyError(f"STRATEGY={name} gave values that are not finite, round {number}")
        return vector
