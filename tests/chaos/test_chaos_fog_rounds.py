"""The chaos suite with FOG_ROUNDS: each regional round keeps the promises of a round."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import wire
from chaos.federation import Federation
from chaos.ledger import Ledger, RunFolder, weighted_mean
from chaos.schedule import Fault
from chaos.test_chaos_ledger import REGIONS, Members, Wire
from chaos.test_chaos_seeds import endure
from conftest import LIMIT
from fedfog.cli.broker import installed_mosquitto
from fedfog.messages.codec import Vector, decode_meta, encode
from fedfog.messages.schemas import (
    FogRoundRecord,
    ModelMeta,
    PartialMeta,
    RegionShare,
    Verdict,
)

SECONDS = 30.0
FOG_ROUNDS = 3
Part = tuple[PartialMeta, Vector]

NEEDS_MOSQUITTO = pytest.mark.skipif(installed_mosquitto() is None, reason="needs Mosquitto")


class FogWire(Wire):
    """The same three clients, whose regions average them twice for each global model."""

    fog_rounds = 2

    def regional(
        self, region: str, round: int, members: Members | None = None, **other: Any
    ) -> Vector:
        """The region's model after the first regional round of `round`."""
        members = REGIONS[region] if members is None else members
        mean = weighted_mean((self.trained(c, round), n) for c, n in members.items())
        vector: Vector = other.pop("vector", mean)
        share = {"num_clients": len(members), "num_examples": sum(members.values())} | other
        meta = decode_meta(wire.model(vector, round - 1, fog_rounds=2), ModelMeta)
        told = {"fog_round": 1, "regions": {region: RegionShare(**share)}}
        payload = encode(meta.model_copy(update=told), wire.TABLE, vector)
        self.put(f"{region}-aggregator", f"fl/regional_model/{region}", payload)
        for client in REGIONS[region]:
            self.put(f"{region}-{client}", f"fl/regional_model/{region}", payload, up=False)
        return vector

    def first(self, region: str, round: int) -> Vector:
        """All of a region's first regional round; returns the model of it."""
        for client in REGIONS[region]:
            self.update(region, client, round)
            self.receipt(region, client, round, Verdict.RECEIVED)
        self.accept(region, round, *REGIONS[region])
        return self.regional(region, round)

    def second(self, region: str, round: int, base: Vector) -> None:
        """The updates of the last regional round."""
        for client in REGIONS[region]:
            vector = self.trained(client, round, base)
            self.update(region, client, round, fog_round=2, base=base, vector=vector)
            self.receipt(region, client, round, Verdict.RECEIVED, fog_round=2)

    def last(self, region: str, round: int, base: Vector, **other: Any) -> Part:
        """Their partial."""
        members = REGIONS[region]
        vector = weighted_mean((self.trained(c, round, base), n) for c, n in members.items())
        examples = sum(members.values())
        first = FogRoundRecord(num_clients=len(members), num_examples=examples, train_loss=0.5)
        fields = {"vector": vector, "regional": [first]} | other
        return self.partial(region, round, members, **fields)

    def close_round(self, round: int, left_out: Mapping[str, str] | None = None) -> None:
        bases = {region: self.first(region, round) for region in REGIONS}
        parts = {}
        for region, base in bases.items():
            self.second(region, round, base)
            parts[region] = self.last(region, round, base)
            self.accept(region, round, *REGIONS[region], fog_round=2)
        self.record(round, parts, left_out)


@pytest.fixture
def seen() -> FogWire:
    log = FogWire()
    for region in REGIONS:
        log.status(region, 1)
    log.publish_model(0)
    return log


def test_regional_rounds_without_a_breach(seen: FogWire) -> None:
    seen.close_round(1)
    seen.publish_model(1)
    seen.close_round(2, {"region_1": "bridge offline for 9 s (BRIDGE_GRACE)"})
    seen.publish_model(2, finished=True)
    assert seen.audit(completed=True) == []
    figures = Ledger(seen.log, [RunFolder("run", True, tuple(seen.records))], []).figures
    assert (figures["updates"], figures["accepted"]) == (12, 12)
    assert (figures["regional_models"], figures["partials"]) == (4, 4)


def break_update_twice(log: FogWire) -> None:
    base = log.first("region_0", 1)
    log.second("region_0", 1, base)
    log.update("region_0", "c0", 1, fog_round=2, base=base, vector=wire.constant(9.0))


def updates_of_region_0(log: FogWire) -> None:
    for client in REGIONS["region_0"]:
        log.update("region_0", client, 1)


def break_sum(log: FogWire) -> None:
    updates_of_region_0(log)
    log.accept("region_0", 1, "c0", "c1")
    log.regional("region_0", 1, vector=log.trained("c0", 1))


def break_sum_by_one_bit(log: FogWire) -> None:
    log.update("region_1", "c2", 1)
    log.accept("region_1", 1, "c2")
    vector = log.trained("c2", 1).copy()
    vector[3] = np.nextafter(vector[3], np.float32(9))
    log.regional("region_1", 1, vector=vector)


def break_model_twice(log: FogWire) -> None:
    log.first("region_0", 1)
    log.regional("region_0", 1, vector=wire.constant(9.0))


def break_count(log: FogWire) -> None:
    updates_of_region_0(log)
    log.accept("region_0", 1, "c0", "c1")
    again = [(log.trained(c, 1), n) for c, n in (("c0", 10), ("c1", 30), ("c0", 10))]
    log.regional("region_0", 1, vector=weighted_mean(again), num_examples=50)


def break_acceptance(log: FogWire) -> None:
    updates_of_region_0(log)
    log.accept("region_0", 1, "c0", "c1")
    log.regional("region_0", 1, {"c0": 10})


def break_acceptance_of_one(log: FogWire) -> None:
    updates_of_region_0(log)
    log.accept("region_0", 1, "c0")
    log.regional("region_0", 1, {"c0": 10})
    log.receipt("region_0", "c1", 1, Verdict.ACCEPTED)


def break_second_acceptance(log: FogWire) -> None:
    log.first("region_0", 1)
    log.accept("region_0", 1, "c0")


def break_receipt(log: FogWire) -> None:
    updates_of_region_0(log)
    log.receipt("region_0", "c1", 1, Verdict.RECEIVED)
    log.accept("region_0", 1, "c0")
    log.regional("region_0", 1, {"c0": 10})


def close_without_region_0(log: FogWire) -> None:
    """And nobody says why."""
    base = log.first("region_1", 1)
    log.second("region_1", 1, base)
    log.record(1, {"region_1": log.last("region_1", 1, base)})


def break_publication(log: FogWire) -> None:
    """Accepted for a model of the region that is never published."""
    log.update("region_0", "c0", 1)
    log.accept("region_0", 1, "c0")
    close_without_region_0(log)


def break_end(log: FogWire) -> None:
    """A model of the region that no partial comes of."""
    log.first("region_0", 1)
    close_without_region_0(log)


def break_late_before_the_end(log: FogWire) -> None:
    """An update is sent away from a regional round that is still open."""
    base = log.first("region_0", 1)
    log.second("region_0", 1, base)
    log.receipt("region_0", "c0", 1, Verdict.LATE, fog_round=2)
    close_without_region_0(log)


def break_base(log: FogWire) -> None:
    """A client trains from the global model in the second regional round."""
    base = log.first("region_1", 1)
    log.update("region_1", "c2", 1, fog_round=2, vector=log.trained("c2", 1, base))
    log.last("region_1", 1, base)


def break_rounds_apart(log: FogWire) -> None:
    """The partial has an update of the first regional round again."""
    base = log.first("region_0", 1)
    log.second("region_0", 1, base)
    log.last(
        "region_0",
        1,
        base,
        vector=weighted_mean([(log.trained("c0", 1), 10), (log.trained("c1", 1, base), 30)]),
    )


def break_history(log: FogWire) -> None:
    base = log.first("region_0", 1)
    log.second("region_0", 1, base)
    log.last("region_0", 1, base, regional=[])


def break_late(log: FogWire) -> None:
    log.first("region_0", 1)
    log.receipt("region_0", "c0", 1, Verdict.LATE)


def break_order(log: FogWire) -> None:
    log.close_round(1)
    log.publish_model(1)
    log.first("region_0", 2)
    log.regional("region_0", 1)


def break_debt(log: FogWire) -> None:
    """The region's older model, which the broker hands out, excuses nobody."""
    base = log.first("region_1", 1)
    log.second("region_1", 1, base)
    log.status("region_1", 2)
    log.regional("region_1", 1)
    for _ in range(100):
        log.status("region_0", 1)


@pytest.mark.parametrize(
    ("break_it", "breach"),
    [
        (break_update_twice, ("two versions", "run/1.2/region_0/c0")),
        (break_sum, ("wrong sum", "run/1.1/region_0")),
        (break_sum_by_one_bit, ("wrong sum", "run/1.1/region_1")),
        (break_model_twice, ("two versions", "run/1.1/region_0")),
        (break_count, ("double-counted", "run/1.1/region_0")),
        (break_acceptance, ("lost", "run/1.1/region_0")),
        (break_acceptance_of_one, ("lost", "run/1/region_0/c1")),
        (break_second_acceptance, ("two versions", "run/1.1/region_0")),
        (break_receipt, ("lost", "run/1/region_0/c1")),
        (break_publication, ("lost", "run/1/region_0/c0")),
        (break_end, ("lost", "run/1.1/region_0")),
        (break_late_before_the_end, ("lost", "run/1.2/region_0/c0")),
        (break_base, ("wrong sum", "run/1/region_1/c2")),
        (break_rounds_apart, ("wrong sum", "run/1/region_0")),
        (break_history, ("wrong sum", "run/1/region_0")),
        (break_late, ("contradicted", "run/1/region_0/c0")),
        (break_order, ("went back", "run")),
        (break_debt, ("forgotten", "run/1.2/region_1/c2")),
    ],
    ids=lambda value: getattr(value, "__name__", "") or "",
)
def test_each_broken_promise_of_a_regional_round_is_named(
    seen: FogWire, break_it: Callable[[FogWire], None], breach: tuple[str, str]
) -> None:
    break_it(seen)
    assert breach in seen.audit()


def test_region_that_is_left_out_by_name_may_stop_between_its_regional_rounds(
    seen: FogWire,
) -> None:
    seen.first("region_0", 1)
    close_without_region_0(seen)
    assert ("lost", "run/1.1/region_0") in seen.audit()
    left_out = {"region_0": "no partial for 60 s (ROUND_TIMEOUT)"}
    seen.records[0] = seen.records[0].model_copy(update={"left_out": left_out})
    assert seen.audit() == []


def test_late_is_no_breach_for_who_was_not_in_it(seen: FogWire) -> None:
    updates_of_region_0(seen)
    seen.accept("region_0", 1, "c0")
    seen.regional("region_0", 1, {"c0": 10})
    seen.receipt("region_0", "c1", 1, Verdict.LATE)
    seen.receipt("region_0", "c0", 1, Verdict.ACCEPTED)
    assert seen.audit() == []


@NEEDS_MOSQUITTO
@pytest.mark.parametrize(
    ("mutation", "kind"), [("count_late", "wrong sum"), ("late_to_members", "contradicted")]
)
def test_aggregator_that_takes_an_update_for_one_of_another_regional_round_is_caught(
    mutation: str, kind: str, tmp_path: Path
) -> None:
    federation = Federation(
        tmp_path / "f",
        regions=1,
        clients=3,
        patches=f"mutations:{mutation}",
        FOG_ROUNDS=FOG_ROUNDS,
        ROUNDS=60,
        ROUND_DEADLINE=30,
    )
    try:
        federation.start()
        for client in ("c0", "c1", "c2"):
            federation.inject(Fault(0, "duplicate", f"region_0-{client}", amount=30))
        federation.until(
            lambda: kind in {breach.kind for breach in federation.ledger().breaches}, LIMIT, kind
        )
    finally:
        federation.close()


@NEEDS_MOSQUITTO
def test_nothing_is_lost_or_counted_twice_in_regional_rounds(tmp_path: Path) -> None:
    layout = {"clients": 3, "FOG_ROUNDS": FOG_ROUNDS, "ROUNDS": 10}
    figures, story = endure(tmp_path, 3, SECONDS, **layout)
    assert figures["faults"] >= 5, story
    assert figures["accepted"] > figures["partials"], story
    assert figures["regional_models"] >= (FOG_ROUNDS - 1) * figures["partials"] > 0, story
