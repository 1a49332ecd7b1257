"""The ledger on wire logs that are made up: it is content with a federation that keeps its
promises, and names what was broken by each of those that do not."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import wire
from chaos.ledger import Happened, Ledger, RunFolder, recovery, weighted_mean
from chaos.proxy import Sighting
from fedfog.messages.codec import Vector, decode_meta, digest_of, encode
from fedfog.messages.schemas import (
    ClientMetrics,
    PartialMeta,
    Receipt,
    RegionReceipt,
    RoundRecord,
    Status,
    Verdict,
)
from fedfog.runs import Rewind

Members = Mapping[str, int]
REGIONS: Mapping[str, Members] = {"region_0": {"c0": 10, "c1": 30}, "region_1": {"c2": 5}}


class Wire:
    """A federation of three clients in two regions, written down message by message, 0.1 s each."""

    fog_rounds = 1

    def __init__(self) -> None:
        self.log: list[Sighting] = []
        self.records: list[RoundRecord] = []
        self.model = wire.constant(0.0)
        self.faults: list[Happened] = []

    def put(self, service: str, topic: str, payload: bytes, up: bool = True) -> None:
        self.log.append(Sighting(0.1 * len(self.log), service, up, topic, payload))

    def publish_model(self, round: int, run: str = "run", finished: bool = False) -> None:
        payload = wire.model(self.model, round, run, finished=finished, fog_rounds=self.fog_rounds)
        self.put("server", "fl/global_model", payload)
        for region, members in REGIONS.items():
            self.put(f"{region}-aggregator", "fl/global_model", payload, up=False)
            for client in members:
                self.put(f"{region}-{client}", "fl/global_model", payload, up=False)

    def trained(self, client: str, round: int, base: Vector | None = None) -> Vector:
        base = self.model if base is None else base
        return base + np.float32(0.1 * (1 + int(client[1:])) / round)

    def update(self, region: str, client: str, round: int, **other: Any) -> None:
        fields = {"base": self.model, "vector": self.trained(client, round)} | other
        n = REGIONS[region][client]
        payload = wire.update(client=client, round=round, num_examples=n, region=region, **fields)
        self.put(f"{region}-{client}", f"fl/updates/{region}/{client}", payload)

    def receipt(
        self, region: str, client: str, round: int, verdict: Verdict, fog_round: int = 1
    ) -> None:
        told = Receipt(run="run", round=round, fog_round=fog_round, verdict=verdict, boot=1)
        topic = f"fl/receipts/{region}/{client}"
        for service, up in ((f"{region}-aggregator", True), (f"{region}-{client}", False)):
            self.put(service, topic, told.to_json(), up)

    def status(self, region: str, boot: int) -> None:
        told = Status(online=True, boot=boot).to_json()
        self.put(f"{region}-aggregator", f"fl/status/{region}", told)
        for client in REGIONS[region]:
            self.put(f"{region}-{client}", f"fl/status/{region}", told, up=False)

    def partial(
        self, region: str, round: int, members: Members | None = None, **other: Any
    ) -> tuple[PartialMeta, Vector]:
        members = REGIONS[region] if members is None else members
        vector = weighted_mean((self.trained(c, round), n) for c, n in members.items())
        vector = other.pop("vector", vector)
        fields: dict[str, Any] = {
            "run": "run",
            "round": round,
            "region": region,
            "digest": digest_of(vector),
            "num_clients": len(members),
            "num_examples": sum(members.values()),
            "members": dict(members),
            "metrics": ClientMetrics(train_loss=0.5),
        }
        meta = PartialMeta(**fields | other)
        self.put(f"{region}-aggregator", f"fl/partial/{region}", encode(meta, wire.TABLE, vector))
        return meta, vector

    def accept(self, region: str, round: int, *members: str, fog_round: int = 1) -> None:
        told = RegionReceipt(
            run="run", round=round, fog_round=fog_round, boot=1, members=list(members)
        )
        self.put(f"{region}-aggregator", f"fl/receipts/{region}", told.to_json())
        for client in REGIONS[region]:
            self.put(f"{region}-{client}", f"fl/receipts/{region}", told.to_json(), up=False)

    def close_round(self, round: int, left_out: Mapping[str, str] | None = None) -> None:
        """All of a round, from the updates to the record; the new model is not published."""
        parts = {}
        for region, members in REGIONS.items():
            for client in members:
                self.update(region, client, round)
                self.receipt(region, client, round, Verdict.RECEIVED)
            parts[region] = self.partial(region, round)
            self.accept(region, round, *members)
        self.record(round, parts, left_out)

    def record(
        self,
        round: int,
        parts: Mapping[str, tuple[PartialMeta, Vector]],
        left_out: Mapping[str, str] | None = None,
    ) -> None:
        kept = {region: p for region, p in parts.items() if region not in (left_out or {})}
        self.model = weighted_mean((vector, meta.num_examples) for meta, vector in kept.values())
        self.records.append(
            RoundRecord(
                run="run",
                round=round,
                regions={region: meta for region, (meta, _) in kept.items()},
                left_out=dict(left_out or {}),
                num_clients=0,
                num_examples=0,
            )
        )

    def audit(
        self, completed: bool = False, rewinds: tuple[Rewind, ...] = ()
    ) -> list[tuple[str, str]]:
        """Kind and id of all breaches."""
        final = digest_of(self.model)
        run = RunFolder("run", completed, tuple(self.records), rewinds, final)
        breaches = Ledger(self.log, [run], self.faults).breaches
        return [(breach.kind, breach.id) for breach in breaches]


@pytest.fixture
def seen() -> Wire:
    """Two boots and the first model."""
    log = Wire()
    for region in REGIONS:
        log.status(region, 1)
    log.publish_model(0)
    return log


def test_kept_promises_are_no_breach(seen: Wire) -> None:
    seen.close_round(1)
    seen.publish_model(1)
    seen.close_round(2, {"region_1": "bridge offline for 9 s (BRIDGE_GRACE)"})
    seen.publish_model(2, finished=True)
    assert seen.audit(completed=True) == []
    ledger = Ledger(seen.log, [RunFolder("run", True, tuple(seen.records))], [])
    figures = ledger.figures
    assert (figures["rounds"], figures["updates"], figures["accepted"]) == (2, 6, 6)
    assert figures["regions_left_out"] == 1


def break_update_twice(log: Wire) -> None:
    log.update("region_0", "c0", 1)
    log.update("region_0", "c0", 1, vector=wire.constant(9.0))


def break_sum(log: Wire) -> None:
    for client in REGIONS["region_0"]:
        log.update("region_0", client, 1)
    log.partial("region_0", 1, vector=log.trained("c0", 1))


def break_sum_by_one_bit(log: Wire) -> None:
    log.update("region_1", "c2", 1)
    vector = log.trained("c2", 1).copy()
    vector[3] = np.nextafter(vector[3], np.float32(9))
    log.partial("region_1", 1, vector=vector)


def break_count(log: Wire) -> None:
    for client in REGIONS["region_0"]:
        log.update("region_0", client, 1)
    again = [(log.trained(c, 1), n) for c, n in (("c0", 10), ("c1", 30), ("c0", 10))]
    log.partial("region_0", 1, vector=weighted_mean(again), num_examples=50)


def break_partial_twice(log: Wire) -> None:
    for client in REGIONS["region_0"]:
        log.update("region_0", client, 1)
    log.partial("region_0", 1)
    log.partial("region_0", 1, {"c0": 10})


def break_acceptance(log: Wire) -> None:
    log.update("region_0", "c0", 1)
    log.partial("region_0", 1, {"c0": 10})
    log.accept("region_0", 1, "c0", "c1")


def break_receipt(log: Wire) -> None:
    for client in REGIONS["region_0"]:
        log.update("region_0", client, 1)
        log.receipt("region_0", client, 1, Verdict.RECEIVED)
    log.partial("region_0", 1, {"c0": 10})


def break_model(log: Wire) -> None:
    log.close_round(1)
    log.model = log.trained("c0", 1)
    log.publish_model(1)


def break_history(log: Wire) -> None:
    log.close_round(1)
    log.publish_model(1)
    log.records[0] = log.records[0].model_copy(
        update={"regions": {"region_0": log.records[0].regions["region_0"]}}
    )


def break_order(log: Wire) -> None:
    log.close_round(1)
    log.publish_model(1)
    log.model = wire.constant(0.0)
    log.publish_model(0)


def break_debt(log: Wire) -> None:
    log.update("region_1", "c2", 1)
    log.receipt("region_1", "c2", 1, Verdict.RECEIVED)
    log.status("region_1", 2)
    for _ in range(100):
        log.status("region_0", 1)


def break_base(log: Wire) -> None:
    log.update("region_1", "c2", 1, base=wire.constant(9.0))
    log.partial("region_1", 1)


def break_late(log: Wire) -> None:
    log.close_round(1)
    log.receipt("region_1", "c2", 1, Verdict.LATE)


def break_rejection(log: Wire) -> None:
    log.update("region_1", "c2", 1)
    log.receipt("region_1", "c2", 1, Verdict.REJECTED)


@pytest.mark.parametrize(
    ("break_it", "breach"),
    [
        (break_update_twice, ("two versions", "run/1/region_0/c0")),
        (break_sum, ("wrong sum", "run/1/region_0")),
        (break_sum_by_one_bit, ("wrong sum", "run/1/region_1")),
        (break_count, ("double-counted", "run/1/region_0")),
        (break_partial_twice, ("two versions", "run/1/region_0")),
        (break_acceptance, ("lost", "run/1/region_0/c1")),
        (break_receipt, ("lost", "run/1/region_0/c1")),
        (break_model, ("wrong model", "run/1")),
        (break_history, ("lost", "run/1/region_1")),
        (break_order, ("went back", "run")),
        (break_debt, ("forgotten", "run/1/region_1/c2")),
        (break_base, ("wrong sum", "run/1/region_1/c2")),
        (break_late, ("contradicted", "run/1/region_1/c2")),
        (break_rejection, ("rejected", "run/1/region_1/c2")),
    ],
    ids=lambda value: getattr(value, "__name__", "") or "",
)
def test_each_broken_promise_is_named(
    seen: Wire, break_it: Callable[[Wire], None], breach: tuple[str, str]
) -> None:
    break_it(seen)
    assert breach in seen.audit()


def test_what_happened_to_its_owner_excuses_a_missing_update(seen: Wire) -> None:
    """Received by one boot, closed by the next one without it."""
    for client in REGIONS["region_0"]:
        seen.update("region_0", client, 1)
        seen.receipt("region_0", client, 1, Verdict.RECEIVED)
    seen.status("region_0", 2)
    seen.update("region_0", "c0", 1)
    seen.record(1, {"region_0": seen.partial("region_0", 1, {"c0": 10})})
    assert ("lost", "run/1/region_0/c1") in seen.audit()
    seen.faults = [Happened("freeze", "region_0-c1", 0.5, 1.0)]
    assert seen.audit() == []


def test_a_run_that_says_it_went_back_voids_its_rounds(seen: Wire) -> None:
    seen.close_round(1)
    seen.publish_model(1)
    good = seen.model
    seen.close_round(2)
    seen.publish_model(2)
    seen.records.pop()
    assert ("lost", "run/2/region_0") in seen.audit(completed=True)
    seen.model = good
    payload = wire.model(good, 1, "run-r1", started=2)
    seen.put("server", "fl/global_model", payload)
    rewind = Rewind(from_round=2, to_round=1, before="run", after="run-r1", why="damaged")
    assert seen.audit(rewinds=(rewind,)) == []
    seen.put("server", "fl/global_model", wire.model(good + np.float32(1), 1, "run-r1", started=2))
    assert ("two versions", "run-r1/1") in seen.audit(rewinds=(rewind,))


def test_recovery_is_the_time_to_the_next_partial_that_is_new(seen: Wire) -> None:
    seen.close_round(1)
    first = next(s for s in seen.log if s.topic == "fl/partial/region_0")
    healed = first.at + 0.01
    seen.log.append(replace(first, at=0.1 * len(seen.log)))  # the same once more is none
    seen.publish_model(1)
    seen.close_round(2)
    second = [s for s in seen.log if s.topic == "fl/partial/region_0"][-1]
    assert decode_meta(second.payload, PartialMeta).round == 2
    fault = Happened("kill", "region_0-c1", 0.0, healed)
    waits, pauses = recovery(seen.log, [fault])
    assert waits == {"kill client": [round(second.at - healed, 2)]}
    # The last fault's pauses are looked for until the log ends.
    ends = [first.at, second.at, max(s.at for s in seen.log)]
    assert pauses == {"kill client": [round(max(np.diff(ends)), 2)]}
