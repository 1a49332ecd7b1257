"""The chaos suite on three tiers: an aggregator over two of three regions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import wire
from chaos.ledger import weighted_mean
from chaos.test_chaos_ledger import REGIONS, Members, Wire
from chaos.test_chaos_seeds import SECONDS, endure
from fedfog.cli.broker import installed_mosquitto
from fedfog.messages.codec import Vector, digest_of, encode
from fedfog.messages.schemas import ClientMetrics, PartialMeta, Verdict

Part = tuple[PartialMeta, Vector]


class DeepWire(Wire):
    """The same three clients, and `top` over their two regions."""

    def partial(
        self, region: str, round: int, members: Members | None = None, **other: Any
    ) -> Part:
        part = super().partial(region, round, members, base_digest=digest_of(self.model), **other)
        sent = self.log.pop()
        self.put(sent.service, f"fl/partial/top/{region}", sent.payload)
        return part

    def close_round(self, round: int, left_out: Mapping[str, str] | None = None) -> None:
        parts = {}
        for region, members in REGIONS.items():
            for client in members:
                self.update(region, client, round)
                self.receipt(region, client, round, Verdict.RECEIVED)
            parts[region] = self.partial(region, round)
            self.accept(region, round, *members)
        self.record(round, {"top": self.top(round, parts, left_out or {})})

    def top(
        self, round: int, parts: Mapping[str, Part], left_out: Mapping[str, str], **other: Any
    ) -> Part:
        kept = {region: part for region, part in parts.items() if region not in left_out}
        members = {region: meta.num_examples for region, (meta, _) in kept.items()}
        vector = weighted_mean((vector, meta.num_examples) for meta, vector in kept.values())
        vector = other.pop("vector", vector)
        fields: dict[str, Any] = {
            "run": "run",
            "round": round,
            "region": "top",
            "digest": digest_of(vector),
            "num_clients": sum(meta.num_clients for meta, _ in kept.values()),
            "num_examples": sum(members.values()),
            "members": members,
            "left_out": dict(left_out),
            "metrics": ClientMetrics(train_loss=0.5),
        }
        meta = PartialMeta(**fields | other)
        self.put("top-aggregator", "fl/partial/top", encode(meta, wire.TABLE, vector))
        return meta, vector


@pytest.fixture
def seen() -> DeepWire:
    log = DeepWire()
    log.publish_model(0)
    return log


def test_rounds_of_three_tiers_without_a_breach(seen: DeepWire) -> None:
    for round in (1, 2):
        seen.close_round(round)
        seen.publish_model(round)
    assert seen.audit(completed=True) == []


def test_partial_that_its_parent_does_not_count_must_be_named_by_it(seen: DeepWire) -> None:
    seen.close_round(1, {"region_1": "no update in time"})
    seen.publish_model(1)
    assert seen.audit() == []
    parts = {"region_0": seen.partial("region_0", 2), "region_1": seen.partial("region_1", 2)}
    for region, members in REGIONS.items():
        for client in members:
            seen.update(region, client, 2)
    unsaid = {"region_0": parts["region_0"]}
    seen.record(2, {"top": seen.top(2, unsaid, {})})
    assert seen.audit() == [("lost", "run/2/region_1")]


@pytest.mark.parametrize(
    ("other", "breach"),
    [
        ({"vector": wire.constant(3.0)}, ("wrong sum", "run/1/top")),
        ({"num_examples": 90}, ("double-counted", "run/1/top")),
    ],
)
def test_wrong_partial_of_a_parent_is_named(
    seen: DeepWire, other: dict[str, Any], breach: tuple[str, str]
) -> None:
    parts = {}
    for region, members in REGIONS.items():
        for client in members:
            seen.update(region, client, 1)
        parts[region] = seen.partial(region, 1)
    seen.record(1, {"top": seen.top(1, parts, {}, **other)})
    assert breach in seen.audit()


@pytest.mark.skipif(installed_mosquitto() is None, reason="needs Mosquitto")
def test_nothing_is_lost_or_counted_twice_on_three_tiers(tmp_path: Path) -> None:
    figures, story = endure(tmp_path, 5, SECONDS, regions=3, clients=2, parent="top")
    assert figures["faults"] >= 10, story
    assert figures["accepted"] > 0, story
