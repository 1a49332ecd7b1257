"""The running aggregator, over a real broker, against well- and ill-behaved clients."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from conftest import Peer, Service
from fedfog.cli.broker import LocalBroker
from fedfog.messages.codec import TensorTable, Vector
from fedfog.messages.schemas import ClientMetrics
from region import BASE, Region
from wire import SIZE, TABLE, constant, death, model, update

MODULE = "fedfog_aggregator.main"


@pytest.fixture
def start(
    broker: LocalBroker, services: Callable[..., Service], peers: Callable[..., Peer]
) -> Iterator[Callable[..., Region]]:
    def begin(**settings: object) -> Region:
        defaults: dict[str, object] = {"cohort_settle": 0.2, "round_deadline": 60}
        service = services(MODULE, broker, **(defaults | settings))
        filters = ("fl/receipts/#", "fl/partial/#", "fl/status/#", "fl/slots/#", "fl/progress/#")
        return Region(service, peers(broker.port, *filters))

    yield begin


def test_partial_is_the_mean_weighted_by_examples(start: Callable[..., Region]) -> None:
    region = start(clients_expected=3)
    region.open("a", "b", "c")
    for client, value, examples in (("a", 1, 10), ("b", 2, 10), ("c", 6, 80)):
        region.send(client, value, num_examples=examples)
    partial = region.partial()
    assert partial.meta.members == {"a": 10, "b": 10, "c": 80}
    assert partial.meta.num_examples == 100
    np.testing.assert_allclose(partial.vector, 5.1, rtol=1e-7)
    accepted = json.loads(region.peer.on("fl/receipts/region_0"))
    assert accepted["members"] == ["a", "b", "c"]


def validated(examples: int, accuracy: float, train_loss: float = 0.5) -> ClientMetrics:
    return ClientMetrics(
        train_loss=train_loss,
        validation_examples=examples,
        validation_loss=1 - accuracy,
        validation_accuracy=accuracy,
    )


def test_partial_tells_how_the_model_does_on_the_clients_own_examples(
    start: Callable[..., Region],
) -> None:
    region = start(clients_expected=4)
    region.open("a", "b", "c", "d")
    told = {"a": validated(2, 1.0), "b": validated(10, 0.6), "c": validated(8, 0.5)}
    for client, metrics in told.items():
        region.send(client, 1, metrics=metrics)
    region.send("b", 1, metrics=told["b"])  # a copy is not counted
    region.send("d", 1)  # has no validation split
    federated = region.partial().meta.federated
    assert federated is not None
    assert (federated.num_clients, federated.num_examples) == (3, 20)
    assert federated.accuracy == pytest.approx(12 / 20)
    assert federated.loss == pytest.approx(8 / 20)
    assert federated.mean_accuracy == pytest.approx(0.7)
    assert federated.std_accuracy == pytest.approx(np.std([1.0, 0.6, 0.5]))
    assert (federated.worst_client, federated.worst_accuracy) == ("region_0/c", 0.5)
    assert federated.best_accuracy == 1


def test_metrics_at_the_bounds_do_not_end_the_aggregator(start: Callable[..., Region]) -> None:
    """A mean of these two losses is above both, by rounding."""
    region = start(clients_expected=2)
    region.open("a", "b")
    for client, examples in (("a", 765_827), ("b", 343_535)):
        told = validated(examples, 1.0, train_loss=1e30)
        told = told.model_copy(update={"validation_loss": 1e30})
        region.send(client, 1, num_examples=examples, metrics=told)
    meta = region.partial().meta
    assert meta.metrics.train_loss == 1e30
    assert meta.federated is not None
    assert (meta.federated.loss, meta.federated.accuracy) == (1e30, 1)


def hostile_payloads() -> dict[str, tuple[bytes, str]]:
    """Payload of client `m`, and a word of the reason that it is refused with."""
    good = update(BASE, constant(9), "m")
    bigger = TensorTable((("bias", (3,)), ("weight", (5, 3))))
    nan, infinity = constant(1), constant(1)
    nan[4], infinity[4] = np.nan, np.inf
    return {
        "not safetensors": (b"\xff\xfe", "header"),
        "empty json": (b"{}", "header"),
        "null": (b"null", "header"),
        "list": (b"[]", "header"),
        "huge header length": (b"\xff" * 7 + b"\x7f" + b"{}", "header"),
        "cut off": (good[:-4], "bytes"),
        "oversized": (good + bytes(10_000_000), "bytes"),
        "wrong shape": (
            update(BASE, constant(1, bigger.num_parameters), "m", table=bigger),
            "table",
        ),
        "wrong dtype": (good.replace(b'"F32"', b'"F64"', 1), "table"),
        "unknown field": (good.replace(b"schema_version", b"schema_virgins"), "schema"),
        "other client's name": (update(BASE, constant(9), "a"), "topic"),
        "other region": (update(BASE, constant(9), "m", region="north"), "topic"),
        "NaN": (update(BASE, nan, "m"), "NaN"),
        "infinity": (update(BASE, infinity, "m"), "NaN or infinity"),
        "other base model": (update(constant(3), constant(9), "m"), "base digest"),
        "no examples": (good.replace(b'num_examples\\":10', b'num_examples\\":0 '), "examples"),
        "negative examples": (
            good.replace(b'num_examples\\":10', b'num_examples\\":-5'),
            "examples",
        ),
        "a loss whose sum is not finite": (
            good.replace(
                b'train_loss\\":0.5,\\"validation_loss\\":null',
                b'train_loss\\":9e300,\\"validation_loss\\":10',
            ),
            "train_loss",
        ),
        "too many examples": (
            update(BASE, constant(9), "m", num_examples=10**8),
            "MAX_EXAMPLES",
        ),
        "too many validation examples": (
            update(BASE, constant(9), "m", metrics=validated(10**8, 0.5)),
            "MAX_EXAMPLES",
        ),
    }


def test_bad_updates_get_a_reason_and_do_not_change_a_bit(start: Callable[..., Region]) -> None:
    region = start(clients_expected=3)
    region.open("a", "b", "c")
    region.send("a", 0.1, num_examples=7)
    for name, (payload, word) in hostile_payloads().items():
        after = len(region.peer.received)
        region.peer.publish("fl/updates/region_0/m", payload)
        receipt = region.receipt("m", "rejected", after)
        assert word in receipt["reason"], name
    for name, payload, word in (
        ("another run", update(BASE, constant(9), "m", run="other"), "run"),
        ("an earlier round", update(BASE, constant(9), "m", round=0), "round"),
    ):
        after = len(region.peer.received)
        region.peer.publish("fl/updates/region_0/m", payload)
        assert word in region.receipt("m", "late", after)["reason"], name
    for _ in range(3):  # a duplicate, and another update in the same round
        region.send("a", 0.1, num_examples=7)
        region.send("a", 55.0, num_examples=7)
    region.send("b", 0.2, num_examples=11)
    region.send("c", 0.7, num_examples=13)
    vectors = [constant(v).astype(np.float64) for v in (0.1, 0.2, 0.7)]
    expected = (7 * vectors[0] + 11 * vectors[1] + 13 * vectors[2]) / 31
    partial = region.partial()
    assert partial.meta.members == {"a": 7, "b": 11, "c": 13}
    assert partial.vector.tobytes() == expected.astype(np.float32).tobytes()


def test_unnamed_senders_and_broken_presence_leave_the_aggregator_alive(
    start: Callable[..., Region],
) -> None:
    region = start(clients_expected=1)
    for topic in ("presence/region_0/x", "status/region_0", "global_model", "updates/region_0/x"):
        for payload in (b"\xff\xfe", b"[]", b"null", b"{}", b'{"online": 7}'):
            region.peer.publish(f"fl/{topic}", payload)
    region.peer.publish("fl/updates/region_0/NotAName", b"x")
    region.open("a")
    region.send("a", 1)
    assert region.partial().meta.members == {"a": 10}


def test_round_closes_with_k_updates(start: Callable[..., Region]) -> None:
    region = start(k=2, clients_expected=3)
    region.open("a", "b", "c")
    region.send("a", 1)
    region.send("c", 3)
    partial = region.partial()
    assert partial.meta.members == {"a": 10, "c": 10}
    assert partial.meta.left_out == {"b": "no update in time"}
    after = len(region.peer.received)
    region.send("b", 5)
    region.receipt("b", "late", after)


def test_cohort_forms_when_the_quorum_is_there_and_nobody_has_to_share_a_slot(
    start: Callable[..., Region],
) -> None:
    region = start(k=2, cohort_settle=0.5)
    region.present("a")
    region.peer.publish("fl/global_model", model(BASE), retain=True)
    region.wait_phase("forming", 1)
    with pytest.raises(AssertionError):  # one client alone does not settle
        region.wait_phase("open", 1, timeout=1.5)
    region.present("b")
    region.wait_phase("open", 1)
    slots = {c: json.loads(region.peer.on(f"fl/slots/region_0/{c}"))["slot"] for c in "ab"}
    assert sorted(slots.values()) == [0, 1]


def test_round_that_closes_at_once_is_answered_by_one_accepted_for_all(
    start: Callable[..., Region],
) -> None:
    region = start(clients_expected=2, round_deadline=600)
    region.open("a", "b")
    region.send("a", 1)
    region.send("b", 3)
    region.partial()
    region.open("a", "b", round=2)
    region.send("b", 3, round=2)
    # It is sent with all other `received` that are due, and after one for a.
    assert region.receipt("b", "received")["round"] == 2
    receipts = [json.loads(p) for t, p in region.peer.received if t.startswith("fl/receipts/")]
    assert [r.get("members") for r in receipts if r["round"] == 1] == [["a", "b"]]


def test_round_closes_at_the_deadline_without_a_silent_client(
    start: Callable[..., Region],
) -> None:
    region = start(clients_expected=3, round_deadline=4)
    region.open("a", "b", "c")
    region.send("a", 1)
    region.send("b", 3)
    partial = region.partial()
    assert partial.meta.left_out == {"c": "no update in time"}
    np.testing.assert_allclose(partial.vector, 2.0, rtol=1e-7)


def test_round_closes_at_once_when_the_missing_client_dies(start: Callable[..., Region]) -> None:
    region = start(clients_expected=2, round_deadline=600)
    region.open("a", "b")
    region.send("a", 1)
    region.receipt("a", "received")
    region.peer.publish("fl/presence/region_0/b", death(), retain=True)
    assert region.partial().meta.left_out == {"b": "offline"}


def test_starving_round_says_whom_it_waits_for(start: Callable[..., Region]) -> None:
    region = start(clients_expected=2, min_clients=2, round_deadline=0.5)
    region.open("a", "b")
    region.send("a", 1)
    region.wait_phase("starving", 1)
    # It is said at each deadline; at the first one, a may not have come either.
    starving = r'(?=.*"round_starving").*"waiting_for": \["b"\]'
    assert json.loads(region.service.wait_for_log(starving))["setting"] == "MIN_CLIENTS"
    region.send("b", 3)
    assert region.partial().meta.members == {"a": 10, "b": 10}


def test_updates_do_not_leak_into_the_next_round(start: Callable[..., Region]) -> None:
    region = start(clients_expected=2, k=1)
    region.open("a", "b")
    region.send("a", 1)
    region.partial(1)
    region.send("b", 100)
    region.receipt("b", "late")
    region.open("a", "b", round=2)
    region.send("b", 4, round=2)
    np.testing.assert_allclose(region.partial(2).vector, 4.0, rtol=1e-7)


@pytest.mark.parametrize("rule", ["fedavg", "median"])
def test_killed_in_an_open_round_it_counts_the_repeated_updates_once(
    start: Callable[..., Region], rule: str
) -> None:
    region = start(clients_expected=2, aggregation=rule)
    region.open("a", "b")
    region.send("a", 1)
    boot = region.receipt("a", "received")["boot"]
    region.service.kill()
    after = len(region.peer.received)
    again = start(clients_expected=2, aggregation=rule)
    again.service.wait_for_log("round_open")
    region.send("a", 1)
    assert region.receipt("a", "received", after)["boot"] > boot
    region.send("b", 3)
    partial = region.partial(after=after)
    assert partial.meta.members == {"a": 10, "b": 10}
    np.testing.assert_allclose(partial.vector, 2.0, rtol=1e-7)


@pytest.mark.parametrize("rule", ["fedavg", "geometric_median"])
def test_restarted_after_the_commit_it_publishes_the_same_partial_and_answers_accepted(
    start: Callable[..., Region], rule: str
) -> None:
    region = start(clients_expected=1, aggregation=rule)
    region.open("a")
    region.send("a", 1)
    first = region.partial()
    region.service.kill()
    region.peer.publish("fl/partial/region_0", b"", retain=True)  # the broker forgets it
    after = len(region.peer.received)
    start(clients_expected=1, aggregation=rule)
    second = region.partial(after=after)
    assert second.meta == first.meta
    assert second.vector.tobytes() == first.vector.tobytes()
    region.send("a", 1)
    region.receipt("a", "accepted", after)


def test_second_aggregator_of_a_region_takes_over_and_the_first_exits(
    start: Callable[..., Region],
) -> None:
    region = start(clients_expected=1)
    region.open("a")
    higher = json.dumps({"online": True, "boot": 2**40})
    region.peer.publish("fl/status/region_0", higher, retain=True)
    assert region.service.wait() == 3
    assert "another aggregator" in region.service.log.read_text()


def test_stale_will_is_overwritten(start: Callable[..., Region]) -> None:
    region = start(clients_expected=1)
    region.open("a")
    after = len(region.peer.received)
    region.peer.publish("fl/status/region_0", json.dumps({"online": False, "boot": 1}), True)
    region.wait_phase("open", 1, after)


def test_broker_restart_without_memory_loses_nothing(
    start: Callable[..., Region], broker: LocalBroker
) -> None:
    region = start(clients_expected=2)
    region.open("a", "b")
    region.send("a", 1)
    region.receipt("a", "received")
    broker.stop()
    after = len(region.peer.received)
    broker.start()
    region.wait_phase("open", 1, after)  # published again by its owner
    region.send("b", 3)
    assert region.partial().meta.members == {"a": 10, "b": 10}


def test_broker_that_comes_up_late_is_waited_for(
    broker: LocalBroker, services: Callable[..., Service]
) -> None:
    broker.stop()
    service = services(MODULE, broker)
    service.wait_for_log("mqtt_waiting_for_broker")
    broker.start()
    service.wait_for_log("mqtt_connected")
    assert service.stop() == 0


def test_absent_broker_ends_in_an_error_that_names_the_setting(
    broker: LocalBroker, services: Callable[..., Service]
) -> None:
    broker.stop()
    service = services(MODULE, broker, mqtt_timeout=1)
    assert service.wait() == 1
    assert "MQTT_TIMEOUT" in service.log.read_text()


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("K", "0", "K="),
        ("K", "some", "K="),
        ("MQTT_PORT", "70000", "MQTT_PORT"),
        ("REGION", "North Pole", "REGION"),
        ("REGIONS", "a,b", "REGIONS"),
        ("TOPIC_UPDATES", "fl/+", "TOPIC_UPDATES"),
    ],
)
def test_impossible_setting_is_named(
    broker: LocalBroker, services: Callable[..., Service], name: str, value: str, word: str
) -> None:
    service = services(MODULE, broker, **{name: value})
    assert service.wait() in (1, 2)
    assert word in service.log.read_text()


def test_slots_are_disjoint_and_a_returning_client_keeps_its_own(
    start: Callable[..., Region],
) -> None:
    region = start(clients_expected=3, regions="north,region_0")
    region.open("a", "b", "c")
    slots = {c: json.loads(region.peer.on(f"fl/slots/region_0/{c}")) for c in "abc"}
    assert sorted(s["slot"] for s in slots.values()) == [0, 1, 2]
    assert {(s["slots"], s["region_index"], s["regions"]) for s in slots.values()} == {(3, 1, 2)}
    region.peer.publish("fl/presence/region_0/b", death(), retain=True)
    after = len(region.peer.received)
    region.present("b", boot=2)
    again = json.loads(region.peer.on("fl/slots/region_0/b", after=after))
    assert again["slot"] == slots["b"]["slot"]


def test_full_disk_keeps_the_round_open_and_names_the_path(
    start: Callable[..., Region], tmp_path: Path
) -> None:
    region = start(clients_expected=1)
    region.open("a")
    database = tmp_path / MODULE / "state" / "aggregator.db"
    import sqlite3

    blocker = sqlite3.connect(database)
    blocker.execute("begin exclusive")  # the store cannot be written, as with a full disk
    region.send("a", 1)
    region.wait_phase("degraded", 1)
    assert "aggregator.db" in region.service.wait_for_log("partial_not_stored")
    assert not [t for t, p in region.peer.received if t == "fl/partial/region_0"]
    blocker.rollback()
    blocker.close()
    assert region.partial().meta.members == {"a": 10}


def test_terminated_it_says_goodbye_and_exits_with_zero(start: Callable[..., Region]) -> None:
    region = start(clients_expected=1)
    region.open("a")
    after = len(region.peer.received)
    assert region.service.stop() == 0
    status = json.loads(region.peer.on("fl/status/region_0", after=after))
    assert status["online"] is False


def test_old_retained_model_of_an_earlier_run_is_ignored(start: Callable[..., Region]) -> None:
    region = start(clients_expected=1)
    region.open("a", run="second", started=20)
    region.peer.publish("fl/global_model", model(BASE, 5, run="first", started=10), retain=True)
    region.service.wait_for_log("older_model_ignored")
    region.send("a", 1, run="second")
    assert region.partial().meta.run == "second"
    assert TABLE.num_parameters == region.partial().vector.size


def spread(value: float, seed: int) -> Vector:
    """A vector of about this value."""
    noise = np.random.default_rng(seed).normal(scale=0.05, size=SIZE)
    return (constant(value) + noise).astype(np.float32)


def test_geometric_median_stays_with_the_honest_and_names_the_poisoned_client(
    start: Callable[..., Region],
) -> None:
    """The fourth sends ten times the negative of its update, and claims many examples for it. All
    that it gains is a longer step, by what its examples were counted with."""
    region = start(clients_expected=4, aggregation="geometric_median")
    region.open("a", "b", "c", "m")
    honest = [spread(1.25, seed) for seed in range(3)]
    poisoned = BASE - 10 * (spread(1.25, 3) - BASE)
    for client, vector in zip("mabc", (poisoned, *honest), strict=True):
        payload = update(BASE, vector, client, num_examples=1000 if client == "m" else 10)
        region.peer.publish(f"fl/updates/region_0/{client}", payload)
    partial = region.partial()
    step = 15 / 10 * (np.mean(honest, axis=0) - BASE)
    assert np.linalg.norm(partial.vector - BASE - step) < 0.2 * np.linalg.norm(step)
    meta = partial.meta
    assert meta.aggregation == "geometric_median"
    assert list(meta.suspicious) == ["m"]
    assert "as far from the aggregate as the median update" in meta.suspicious["m"]
    assert "it claims 1000 examples, 15 were counted" in meta.suspicious["m"]
    assert meta.members == {"m": 15, "a": 10, "b": 10, "c": 10}
    assert meta.num_examples == 45
    # The verdict is on the exactly-once delivery and tells an attacker nothing.
    accepted = json.loads(region.peer.on("fl/receipts/region_0"))
    assert accepted["members"] == ["a", "b", "c", "m"]
    assert '"client": "m"' in region.service.wait_for_log("update_suspicious")


@pytest.mark.parametrize("rule", ["median", "krum"])
def test_rule_that_protects_nobody_among_so_few_says_so_when_the_round_opens(
    start: Callable[..., Region], rule: str
) -> None:
    region = start(clients_expected=3, aggregation=rule)
    region.open("a", "b", "c")
    for client in "abc":
        region.send(client, 1)
    assert region.partial().meta.aggregation == rule
    warned = "aggregation_protects_nobody" in region.service.log.read_text()
    assert warned == (rule == "krum")


def test_robust_rule_keeps_large_updates_apart_until_the_round_closes(
    start: Callable[..., Region],
) -> None:
    """Messages of this size are read into buffers of their own, and there the updates stay."""
    size = 100_000
    table = TensorTable((("weights", (size,)),))
    base = constant(0, size)
    region = start(clients_expected=5, aggregation="trimmed_mean")
    region.present(*"abcde")
    region.peer.publish("fl/global_model", model(base, table=table), retain=True)
    region.wait_phase("open", 1)
    vectors = np.random.default_rng(0).normal(size=(5, size)).astype(np.float32)
    for client, vector in zip("abcde", vectors, strict=True):
        payload = update(base, vector, client, table=table)
        region.peer.publish(f"fl/updates/region_0/{client}", payload)
    expected = np.sort(vectors, axis=0)[1:4].mean(axis=0, dtype=np.float64)
    np.testing.assert_array_equal(region.partial().vector, expected.astype(np.float32))
