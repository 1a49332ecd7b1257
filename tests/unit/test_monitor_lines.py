"""`fedfog monitor`: what it says of every message, and of what is none."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import wire
from fedfog.cli.monitor import describe
from fedfog.cli.regions import Regions
from fedfog.core.phases import Phase
from fedfog.messages import schemas
from fedfog.messages.catalog import CHANNELS, UnknownTopicError, read
from fedfog.messages.codec import TensorTable, encode
from fedfog.messages.topics import Topics

TOPICS = Topics()
CNN = TensorTable((("conv.bias", (3,)), ("conv.weight", (1000, 5))))
DIGEST = "ab" * 32
METRICS = schemas.ClientMetrics(train_loss=0.25, validation_accuracy=0.875)
EVALUATION = schemas.Evaluation(
    round=1,
    num_examples=4500,
    loss=0.2372,
    accuracy=0.9502,
    auroc=0.9891,
    macro_f1=0.9485,
    confusion_matrix=[[1, 2], [3, 4]],
    task={"kappa": 0.75, "f2": None},
)
FEDERATED = schemas.FederatedEvaluation(
    num_clients=2,
    num_examples=30,
    loss=None,
    accuracy=0.9,
    mean_accuracy=0.85,
    std_accuracy=0.05,
    worst_accuracy=0.8,
    worst_client="region_0/client-1",
    best_accuracy=0.9,
)
PARTIAL = schemas.PartialMeta(
    run="run-1",
    round=2,
    region="region_0",
    digest=DIGEST,
    num_clients=2,
    num_examples=300,
    members={"client-1": 100, "client-2": 200},
    left_out={"client-3": "offline"},
    suspicious={"client-2": "too far"},
    metrics=METRICS,
    federated=FEDERATED,
)
MODEL = schemas.ModelMeta(
    run="run-1",
    run_started=1,
    round=2,
    rounds=3,
    state=schemas.RunState.TRAINING,
    digest=DIGEST,
    hyperparameters=schemas.Hyperparameters(
        local_epochs=1, batch_size=32, learning_rate=1e-3, seed=1
    ),
    regions={"region_0": schemas.RegionShare(num_clients=3, num_examples=1449)},
    evaluation=EVALUATION,
)
UPDATE = schemas.UpdateMeta(
    run="run-1",
    round=2,
    region="region_0",
    client="client-1",
    base_digest=DIGEST,
    num_examples=1150,
    metrics=METRICS,
    train_seconds=1.25,
)

# Topic, message, and what a user must be able to read in its line.
MESSAGES: list[tuple[str, schemas.Payload, list[str]]] = [
    (
        "fl/global_model",
        MODEL,
        [
            "model 2 of 3",
            "run-1",
            "training",
            "region_0",
            "3 clients",
            "1,449 examples",
            "accuracy 0.9502",
            "kappa 0.7500, f2 not finite",
            "AUROC 0.9891",
            "loss 0.2372",
            "2 tensors",
            "5,003 float32",
            "kB",
        ],
    ),
    (
        "fl/updates/region_0/client-1",
        UPDATE,
        [
            "update for round 2",
            "1,150 examples",
            "train loss 0.2500",
            "accuracy 0.8750",
            "1.2 s",
            "2 tensors",
            "5,003 float32",
            "kB",
        ],
    ),
    (
        "fl/partial/region_0",
        PARTIAL,
        [
            "partial of round 2",
            "2 clients",
            "client-1, client-2",
            "300 examples",
            "2 clients found its accuracy 0.9000, at worst 0.8000 (region_0/client-1)",
            "left out: client-3 (offline)",
            "suspicious: client-2 (too far)",
            "2 tensors",
            "kB",
        ],
    ),
    (
        "fl/receipts/region_0/client-1",
        schemas.Receipt(verdict=schemas.Verdict.REJECTED, reason="NaN", round=2, boot=7),
        ["rejected", "round 2", "NaN"],
    ),
    (
        "fl/receipts/region_0/client-1",
        schemas.Receipt(verdict=schemas.Verdict.RECEIVED, boot=7),
        ["received"],
    ),
    (
        "fl/receipts/region_0",
        schemas.RegionReceipt(run="run-1", round=2, boot=7, members=["client-1", "client-2"]),
        ["accepted", "round 2", "client-1, client-2"],
    ),
    (
        "fl/evaluations/region_0/client-1",
        schemas.ClientEvaluation(run="run-1", round=3, num_examples=17, loss=None, accuracy=0.5),
        ["finished model 3", "run-1", "accuracy 0.5000", "not finite", "17 validation examples"],
    ),
    (
        "fl/slots/region_0/client-1",
        schemas.Slot(run="run-1", slot=1, slots=3, region_index=0, regions=2),
        ["slot 1 of 3", "part 0 of 2"],
    ),
    (
        "fl/presence/region_0/client-1",
        schemas.Presence(online=True, boot=7, slot=1, version="0.1.0"),
        ["online", "slot 1", "0.1.0"],
    ),
    ("fl/presence/region_0/client-1", schemas.Presence(online=False, boot=7), ["offline", "7"]),
    (
        "fl/status/region_0",
        schemas.Status(online=True, boot=7, run="run-1", round=2, phase=Phase.STARVING),
        ["starving", "round 2", "run-1"],
    ),
    ("fl/status/region_0", schemas.Status(online=False, boot=7), ["offline"]),
    (
        "fl/progress/region_0",
        schemas.Progress(
            run="run-1",
            round=2,
            phase=Phase.OPEN,
            received=1,
            expected=3,
            waiting_for=["client-2", "client-3"],
            seconds_left=42.0,
        ),
        ["round 2", "1 of 3 updates", "waits for client-2, client-3", "42 s"],
    ),
    ("fl/bridge/region_0", schemas.Bridge(online=True, boot=7, node_id=99), ["online", "99"]),
    ("fl/bridge/region_0", schemas.Bridge(online=False, boot=7), ["offline"]),
    ("fl/cue", schemas.Cue(run="run-1", round=2), ["round 2"]),
    ("fl/bell", schemas.Bell(region="region_0", message_id="m" * 64), ["region_0"]),
    (
        "fl/history",
        schemas.RoundRecord(
            run="run-1",
            round=2,
            regions={"region_0": PARTIAL},
            left_out={"region_1": "no partial"},
            num_clients=2,
            num_examples=300,
            train_loss=0.3134,
            evaluation=EVALUATION,
        ),
        [
            "round 2",
            "1 region",
            "2 clients",
            "train loss 0.3134",
            "accuracy 0.9502",
            "left out: region_1 (no partial)",
        ],
    ),
]


def payload_of(message: schemas.Payload) -> bytes:
    if isinstance(message, schemas.ModelMeta | schemas.UpdateMeta | schemas.PartialMeta):
        return encode(message, CNN, np.zeros(CNN.num_parameters, np.float32))
    return message.to_json()


@pytest.mark.parametrize(("topic", "message", "words"), MESSAGES)
def test_line_says_what_the_message_says(
    topic: str, message: schemas.Payload, words: list[str]
) -> None:
    line = describe(topic, payload_of(message), TOPICS)
    assert [word for word in words if word not in line] == []
    assert "\n" not in line
    assert len(line) < 400


def test_every_kind_of_message_is_described() -> None:
    assert {type(message) for _, message, _ in MESSAGES} == {c.payload for c in CHANNELS}


def test_weights_are_never_shown() -> None:
    payload = encode(UPDATE, CNN, np.full(CNN.num_parameters, 0.123, np.float32))
    assert "0.123" not in describe("fl/updates/region_0/client-1", payload, TOPICS)


def test_renamed_topics_are_decoded() -> None:
    topics = Topics("other", "clinic/up", "other/partial", "other/global_model")
    payload = payload_of(UPDATE)
    assert "update for round 2" in describe("clinic/up/region_0/client-1", payload, topics)
    assert "not a topic" in describe("fl/updates/region_0/client-1", payload, topics)


def test_message_that_names_another_sender_than_its_topic_is_pointed_out() -> None:
    line = describe("fl/updates/region_0/intruder", payload_of(UPDATE), TOPICS)
    assert "client-1" in line
    assert "topic does not" in line


@pytest.mark.parametrize(
    "payload", [b"\xff\xfe", b"null", b"[]", b"{}", b"not JSON", bytes(range(250)) * 20], ids=repr
)
@pytest.mark.parametrize("channel", CHANNELS)
def test_malformed_payload_is_described_with_its_size(channel: Any, payload: bytes) -> None:
    topic = channel.template(TOPICS).format(region="region_0", client="client-1")
    line = describe(topic, payload, TOPICS)
    assert line.startswith("MALFORMED")
    assert f"{len(payload)} B" in line or "5.0 kB" in line


@given(st.binary(max_size=300), st.sampled_from([*(t for t, _, _ in MESSAGES), "fl", "x/y", ""]))
@example(b"\xff\xfe", "fl/updates/region_0/client-1")
def test_no_payload_breaks_the_line_or_the_terminal(payload: bytes, topic: str) -> None:
    line = describe(topic, payload, TOPICS)
    assert line.isprintable()
    assert len(line) < 400


def test_text_of_a_peer_cannot_take_over_the_terminal() -> None:
    evil = "\x1b[2J\x1b]0;owned\x07\n"
    rejected = schemas.Receipt(verdict=schemas.Verdict.REJECTED, reason=evil, boot=1)
    born = schemas.Presence(online=True, boot=1, version=evil)
    unknown = json.dumps({"x": evil}).encode()
    assert describe("fl/receipts/region_0/client-1", rejected.to_json(), TOPICS).isprintable()
    assert describe("fl/presence/region_0/client-1", born.to_json(), TOPICS).isprintable()
    assert describe("fl/other", unknown, TOPICS).isprintable()


def test_cleared_retained_message_is_told() -> None:
    assert "cleared" in describe("fl/global_model", b"", TOPICS)


def test_topic_with_an_impossible_name_is_none_of_the_federation() -> None:
    with pytest.raises(UnknownTopicError):
        read(TOPICS, "fl/updates/region_0/..", wire.birth())


def test_regions_show_who_is_there_and_whom_a_round_waits_for() -> None:
    regions = Regions()

    def see(topic: str, message: schemas.Payload) -> None:
        regions.see(read(TOPICS, topic, message.to_json()))

    for client in ("client-1", "client-2", "client-3"):
        see(f"fl/presence/region_0/{client}", schemas.Presence(online=True, boot=1))
    see("fl/presence/region_0/client-3", schemas.Presence(online=False, boot=1))
    see(
        "fl/status/region_0",
        schemas.Status(online=True, boot=1, run="run-1", round=2, phase=Phase.OPEN),
    )
    region = regions.by_name["region_0"]
    assert region.online == {"client-1", "client-2"}
    assert (region.phase, region.round, region.received, region.expected) == ("open", "2", 0, 2)
    see(
        "fl/progress/region_0",
        schemas.Progress(
            run="run-1",
            round=2,
            phase=Phase.OPEN,
            received=1,
            expected=2,
            waiting_for=["client-2"],
            seconds_left=5.0,
        ),
    )
    assert (region.received, region.waiting_for) == (1, ["client-2"])
    see("fl/receipts/region_0", schemas.RegionReceipt(run="run-1", round=2, boot=1, members=["a"]))
    see("fl/status/region_0", schemas.Status(online=False, boot=1))
    assert (region.phase, region.received) == ("offline", 1)
