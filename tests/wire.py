"""Messages as the tiers make them, for tests that stand in for a tier."""

import numpy as np

from fedfog.messages.codec import TensorTable, Vector, digest_of, encode
from fedfog.messages.schemas import (
    ClientMetrics,
    Hyperparameters,
    ModelMeta,
    Presence,
    RunState,
    UpdateMeta,
)

TABLE = TensorTable((("bias", (3,)), ("weight", (5, 2))))
SIZE = TABLE.num_parameters
METRICS = ClientMetrics(train_loss=0.5)


def constant(value: float, size: int = SIZE) -> Vector:
    return np.full(size, value, np.float32)


def model(
    vector: Vector,
    round: int = 0,
    run: str = "run",
    rounds: int = 3,
    table: TensorTable = TABLE,
    started: int = 1,
    finished: bool = False,
    local_epochs: int = 1,
    partition: str = "iid",
    fog_rounds: int = 1,
) -> bytes:
    """A global model as central-server publishes it."""
    meta = ModelMeta(
        run=run,
        run_started=started,
        round=round,
        rounds=rounds,
        state=RunState.FINISHED if finished else RunState.TRAINING,
        digest=digest_of(vector),
        hyperparameters=Hyperparameters(
            local_epochs=local_epochs,
            batch_size=32,
            learning_rate=1e-3,
            seed=7,
            partition=partition,
            fog_rounds=fog_rounds,
        ),
    )
    return encode(meta, table, vector)


def update(
    base: Vector,
    vector: Vector,
    client: str,
    round: int = 1,
    num_examples: int = 10,
    run: str = "run",
    region: str = "region_0",
    table: TensorTable = TABLE,
    metrics: ClientMetrics = METRICS,
    fog_round: int = 1,
) -> bytes:
    """An update as a client publishes it, trained from the model `base`."""
    meta = UpdateMeta(
        run=run,
        round=round,
        fog_round=fog_round,
        region=region,
        client=client,
        base_digest=digest_of(base),
        num_examples=num_examples,
        metrics=metrics,
    )
    return encode(meta, table, vector)


def birth(boot: int = 1, slot: int | None = None) -> bytes:
    return Presence(online=True, boot=boot, slot=slot).to_json()


def death(boot: int = 1) -> bytes:
    return Presence(online=False, boot=boot).to_json()


BASE_META = UpdateMeta(
    run="run",
    round=1,
    region="region_0",
    client="a",
    base_digest="0" * 64,
    num_examples=10,
    metrics=METRICS,
)
