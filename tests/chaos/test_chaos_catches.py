"""The suite is able to fail: with one safeguard taken out of a service (see
`tests/hooks/mutations.py`), a few faults at the right instant make the ledger name what was broken.
The same faults break nothing in the services as they are."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chaos.federation import Federation
from chaos.proxy import Sighting
from chaos.schedule import SERVER, Fault
from conftest import LIMIT
from fedfog.cli.broker import installed_mosquitto
from fedfog.messages.codec import decode_json, decode_meta
from fedfog.messages.schemas import ModelMeta, PartialMeta, Receipt, Status

REGION = "region_0"
AGGREGATOR = f"{REGION}-aggregator"
CLIENTS = ("c0", "c1", "c2")

pytestmark = pytest.mark.skipif(installed_mosquitto() is None, reason="needs Mosquitto")


@pytest.fixture
def federation(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Federation]:
    """One region of three clients; the test's parameter is what is taken out."""
    patches = f"mutations:{request.param}" if request.param else ""
    made = Federation(
        tmp_path / "f", regions=1, clients=3, patches=patches, ROUNDS=60, ROUND_DEADLINE=30
    )
    try:
        made.start()
        yield made
    finally:
        made.close()


def breaches(federation: Federation) -> set[str]:
    return {breach.kind for breach in federation.ledger().breaches}


def partials(federation: Federation) -> int:
    return sum(s.up and s.topic == f"fl/partial/{REGION}" for s in federation.proxy.log)


def newest_boot(federation: Federation) -> int:
    topic = f"fl/status/{REGION}"
    seen = [s for s in federation.proxy.log if s.up and s.topic == topic]
    return decode_json(seen[-1].payload, Status).boot


def double_updates(federation: Federation) -> None:
    for client in CLIENTS[:2]:
        federation.inject(Fault(0, "duplicate", f"{REGION}-{client}", amount=30))
    before = partials(federation)
    federation.until(
        lambda: partials(federation) > before + 3 or "double-counted" in breaches(federation),
        LIMIT,
        "three rounds",
    )


def kill_at_the_receipt(federation: Federation) -> None:
    """The aggregator, when its first `accepted` is on its way."""

    def accepted(s: Sighting) -> bool:
        return s.up and s.topic == f"fl/receipts/{REGION}"

    kill_aggregator(federation, accepted)


def kill_at_the_partial(federation: Federation) -> None:
    """The aggregator, when its partial has left it and before anybody has got it."""

    def published(s: Sighting) -> bool:
        return s.up and s.topic == f"fl/partial/{REGION}"

    kill_aggregator(federation, published, Fault(0, "half-open", AGGREGATOR))
    before = partials(federation)
    federation.until(lambda: partials(federation) > before, LIMIT, "a partial of the new boot")


def kill_aggregator(
    federation: Federation, seen: Callable[[Sighting], bool], *faults: Fault
) -> None:
    boot = newest_boot(federation)
    killed = federation.when(seen, *faults, Fault(0, "kill", AGGREGATOR, 0.3))
    federation.until(killed.is_set, LIMIT, "the instant of the fault")
    federation.until(lambda: newest_boot(federation) > boot, LIMIT, "a new boot")


def kill_with_updates_in_memory(federation: Federation) -> None:
    """The aggregator, when it has received all updates but that of a client that is frozen."""
    federation.inject(Fault(0, "stop", f"{REGION}-c2", 10.0))

    def waits_for_one() -> bool:
        last: dict[str, int] = {}
        closed = 0
        for s in federation.proxy.log:
            if s.up and s.topic.startswith(f"fl/receipts/{REGION}/"):
                last[s.topic.split("/")[3]] = decode_json(s.payload, Receipt).round or 0
            elif s.up and s.topic == f"fl/partial/{REGION}":
                closed = decode_meta(s.payload, PartialMeta).round
        return last.get("c0", 0) == last.get("c1", 0) > max(closed, last.get("c2", 0))

    federation.until(waits_for_one, LIMIT, "a round that waits for c2 alone")
    federation.inject(Fault(0, "kill", AGGREGATOR, 0.3))
    before, boot = partials(federation), newest_boot(federation)
    federation.until(lambda: newest_boot(federation) > boot, LIMIT, "a new boot")
    federation.until(
        lambda: partials(federation) > before or "forgotten" in breaches(federation),
        LIMIT,
        "the round is closed",
    )


def kill_server(federation: Federation) -> None:
    """The central server, when it publishes a model."""
    topic = "fl/global_model"

    def models() -> int:
        return sum(s.up and s.topic == topic for s in federation.proxy.log)

    killed = federation.when(
        lambda s: s.up and s.topic == topic and decode_meta(s.payload, ModelMeta).round > 1,
        Fault(0, "kill", SERVER, 0.3),
    )
    federation.until(killed.is_set, LIMIT, "the instant of the fault")
    before = models()
    federation.until(lambda: models() > before, LIMIT, "the server publishes again")


@pytest.mark.parametrize("federation", ["count_again"], indirect=True)
def test_removed_deduplication_is_caught(federation: Federation) -> None:
    double_updates(federation)
    assert "double-counted" in breaches(federation)


@pytest.mark.parametrize("federation", ["receipt_before_commit"], indirect=True)
def test_receipt_before_the_commit_is_caught(federation: Federation) -> None:
    kill_at_the_receipt(federation)
    assert "lost" in breaches(federation)


@pytest.mark.parametrize("federation", ["no_outbox"], indirect=True)
def test_removed_outbox_is_caught(federation: Federation) -> None:
    kill_with_updates_in_memory(federation)
    assert "forgotten" in breaches(federation)


@pytest.mark.parametrize("federation", ["forget_partials"], indirect=True)
def test_aggregator_that_does_not_resume_is_caught(federation: Federation) -> None:
    kill_at_the_partial(federation)
    assert "two versions" in breaches(federation)


@pytest.mark.parametrize("federation", ["begin_anew"], indirect=True)
def test_server_that_does_not_resume_is_caught(federation: Federation) -> None:
    kill_server(federation)
    assert "went back" in breaches(federation)


@pytest.mark.parametrize("federation", [""], indirect=True, ids=["as it is"])
def test_services_as_they_are_break_nothing_at_these_instants(federation: Federation) -> None:
    double_updates(federation)
    kill_at_the_receipt(federation)
    kill_with_updates_in_memory(federation)
    kill_at_the_partial(federation)
    kill_server(federation)
    federation.finish()
    federation.stop()
    assert federation.failures == []
    assert federation.ledger().breaches == []
