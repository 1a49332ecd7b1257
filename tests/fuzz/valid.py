"""Valid messages of every kind, to be mutated, by their topics."""

import numpy as np

import wire
from fedfog.core.phases import Phase
from fedfog.messages.codec import digest_of, encode
from fedfog.messages.schemas import (
    Bell,
    Bridge,
    ClientEvaluation,
    ClientMetrics,
    Cue,
    Evaluation,
    FederatedEvaluation,
    PartialMeta,
    Presence,
    Progress,
    Receipt,
    RegionReceipt,
    RoundRecord,
    Slot,
    Status,
    Verdict,
)

BASE = wire.constant(0.25)
VECTOR = np.arange(wire.SIZE, dtype=np.float32)
FEDERATED = FederatedEvaluation(
    num_clients=2,
    num_examples=5,
    loss=0.4,
    accuracy=0.6,
    mean_accuracy=0.5,
    std_accuracy=0.1,
    worst_accuracy=0.4,
    worst_client="region_0/a",
    best_accuracy=0.6,
)
PARTIAL = PartialMeta(
    run="run",
    round=1,
    region="region_0",
    digest=digest_of(VECTOR),
    num_clients=2,
    num_examples=30,
    members={"a": 10, "b": 20},
    left_out={"c": "offline"},
    base_digest=digest_of(BASE),
    metrics=ClientMetrics(train_loss=0.5),
    federated=FEDERATED,
    seconds={"collect": 0.25},
)
EVALUATION = Evaluation(
    round=1,
    num_examples=40,
    loss=0.3,
    accuracy=0.9,
    auroc=None,
    macro_f1=0.8,
    ece=0.1,
    confusion_matrix=[[20, 1], [3, 16]],
)
RECORD = RoundRecord(
    run="run",
    round=1,
    regions={"region_0": PARTIAL},
    left_out={"north": "no partial within 600 s (ROUND_TIMEOUT)"},
    num_clients=2,
    num_examples=30,
    train_loss=0.5,
    evaluation=EVALUATION,
    federated=FEDERATED,
    seconds={"push": 0.01},
)
REGION = "region_0"


def messages(client: str = "m") -> dict[str, list[bytes]]:
    """Topic -> payloads; those of a client are of `client`."""
    partial = encode(PARTIAL, wire.TABLE, VECTOR)
    child = PARTIAL.model_copy(update={"region": client, "num_clients": 3})
    birth = Presence(online=True, boot=3, slot=1, deadline=5.0, version="1.0")
    received = Receipt(run="run", round=1, verdict=Verdict.RECEIVED, boot=5)
    rejected = Receipt(verdict=Verdict.REJECTED, reason="header", boot=5)
    return {
        f"fl/updates/{REGION}/{client}": [
            wire.update(BASE, VECTOR, client),
            wire.update(BASE, wire.constant(2.0), client, num_examples=7),
        ],
        f"fl/presence/{REGION}/{client}": [birth.to_json(), wire.birth(), wire.death(4)],
        "fl/global_model": [
            wire.model(BASE),
            wire.model(VECTOR, round=2),
            wire.model(BASE, finished=True),
        ],
        f"fl/partial/{REGION}": [partial],
        f"fl/partial/{REGION}/{client}": [encode(child, wire.TABLE, VECTOR)],
        f"fl/receipts/{REGION}/{client}": [received.to_json(), rejected.to_json()],
        f"fl/receipts/{REGION}": [
            RegionReceipt(run="run", round=1, boot=5, members=["a", client]).to_json()
        ],
        f"fl/slots/{REGION}/{client}": [
            Slot(run="run", slot=1, slots=3, region_index=0, regions=2).to_json()
        ],
        f"fl/status/{REGION}": [
            Status(online=True, boot=5, run="run", round=1, phase=Phase.OPEN).to_json(),
            Status(online=False, boot=5).to_json(),
        ],
        f"fl/progress/{REGION}": [
            Progress(
                run="run",
                round=1,
                phase=Phase.OPEN,
                received=1,
                expected=2,
                waiting_for=["b"],
                seconds_left=3.5,
            ).to_json()
        ],
        f"fl/bridge/{REGION}": [
            Bridge(online=True, boot=3, node_id=2**63 + 5).to_json(),
            Bridge(online=False, boot=3).to_json(),
        ],
        f"fl/evaluations/{REGION}/{client}": [
            ClientEvaluation(run="run", round=1, num_examples=5, loss=0.4, accuracy=0.6).to_json()
        ],
        "fl/cue": [Cue(run="run", round=1).to_json()],
        "fl/bell": [Bell(region=REGION, message_id="ab" * 32).to_json()],
        "fl/history": [RECORD.to_json()],
    }
