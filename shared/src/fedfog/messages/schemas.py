"""Fields of every message. A message that does not fit its schema is refused, never guessed at."""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from fedfog.core.phases import Phase
from fedfog.messages.topics import NAME_PATTERN

Name = Annotated[str, Field(pattern=NAME_PATTERN)]
RunId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Round = Annotated[int, Field(ge=0, le=10**9)]
Examples = Annotated[int, Field(gt=0, le=10**9)]
Seconds = Annotated[float, Field(ge=0)]


class Payload(BaseModel):
    """Base of all messages: unknown fields, NaN and infinity are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    schema_version: Literal[1] = 1

    def to_json(self) -> bytes:
        return self.model_dump_json().encode()


class Hyperparameters(BaseModel):
    """How a client is to train in the next round."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    local_epochs: int = Field(ge=1, description="passes over the client's training examples")
    batch_size: int = Field(ge=1, description="examples per step")
    learning_rate: float = Field(gt=0, description="of Adam")
    seed: int = Field(ge=0, description="of partition, validation split and shuffling")


class Evaluation(BaseModel):
    """Metrics of a global model on the server's held-out examples."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    round: Round
    num_examples: Examples
    loss: float | None = Field(description="mean cross-entropy; none if it is not finite")
    accuracy: float = Field(ge=0, le=1)
    auroc: float | None = Field(
        ge=0, le=1, description="none if the examples or the scores do not define it"
    )
    macro_f1: float = Field(ge=0, le=1)
    confusion_matrix: list[list[int]] = Field(description="rows: true class, columns: predicted")


class RegionShare(BaseModel):
    """What one region put into a global model."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    num_clients: int = Field(ge=1)
    num_examples: Examples


class RunState(StrEnum):
    TRAINING = "training"
    FINISHED = "finished"


class ModelMeta(Payload):
    """Global model of a run after `round` completed rounds (model 0 is the initial one)."""

    run: RunId
    run_started: int = Field(ge=0, description="orders the runs: unix seconds of its beginning")
    round: Round
    rounds: Round = Field(description="rounds that the run is to have")
    state: RunState
    digest: Digest = Field(description="SHA-256 of the tensors' bytes")
    hyperparameters: Hyperparameters
    regions: dict[Name, RegionShare] = Field(default_factory=dict)
    evaluation: Evaluation | None = Field(
        default=None, description="newest evaluation known: of an earlier model of this run"
    )


class ClientMetrics(BaseModel):
    """What a client tells of its learning; never its data."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    train_loss: float = Field(description="mean over the last local epoch")
    validation_loss: float | None = Field(
        default=None, description="of the received model, before training"
    )
    validation_accuracy: float | None = Field(default=None, ge=0, le=1)


class UpdateMeta(Payload):
    """What one client trained in one round."""

    run: RunId
    round: Round
    region: Name
    client: Name
    base_digest: Digest = Field(description="digest of the global model trained from")
    num_examples: Examples
    encoding: Literal["float32"] = "float32"
    metrics: ClientMetrics
    train_seconds: Seconds = 0.0

    @property
    def id(self) -> str:
        """The id under which every tier logs this update."""
        return f"{self.run}/{self.round}/{self.region}/{self.client}"


class PartialMeta(Payload):
    """A region's aggregate of the updates that it accepted in one round."""

    run: RunId
    round: Round
    region: Name
    digest: Digest
    num_clients: int = Field(ge=1)
    num_examples: Examples
    members: dict[Name, Examples] = Field(description="accepted clients and their examples")
    left_out: dict[Name, str] = Field(
        default_factory=dict, description="clients of the cohort without an update, and why"
    )
    metrics: ClientMetrics = Field(description="means over the members, weighted by examples")
    seconds: dict[str, Seconds] = Field(default_factory=dict, description="per step")

    @property
    def id(self) -> str:
        return f"{self.run}/{self.round}/{self.region}"


class Verdict(StrEnum):
    RECEIVED = "received"
    ACCEPTED = "accepted"
    LATE = "late"
    REJECTED = "rejected"


class Receipt(Payload):
    """The aggregator's word on one client's update."""

    run: RunId | None = None
    round: Round | None = None
    verdict: Verdict
    reason: str = ""
    boot: int = Field(ge=0, description="of the aggregator that answers")


class RegionReceipt(Payload):
    """`accepted` for all members of a partial, sent once when the round closes."""

    run: RunId
    round: Round
    boot: int = Field(ge=0)
    members: list[Name]


class Slot(Payload):
    """Which share of the training set a client is to use: part `slot` of `slots`, after the whole
    set was cut into `regions` parts of which this region has part `region_index`."""

    run: RunId
    slot: int = Field(ge=0)
    slots: int = Field(ge=1)
    region_index: int = Field(ge=0)
    regions: int = Field(ge=1)


class Presence(Payload):
    """Birth and death of a client. A death counts only for the boot that it names."""

    online: bool
    boot: int = Field(ge=0)
    slot: int | None = Field(default=None, description="the data slot it has, if any")
    own_data: bool = Field(default=False, description="it has data of its own: needs no slot")
    version: str = ""


class Status(Payload):
    """State of a region's aggregator; published at boot and on a change of phase."""

    online: bool
    boot: int = Field(ge=0)
    run: RunId | None = None
    round: Round | None = None
    phase: Phase | None = None


class Progress(Payload):
    """What a region is waiting for; at most twice a second."""

    run: RunId
    round: Round
    phase: Phase
    received: int = Field(ge=0)
    expected: int = Field(ge=0)
    waiting_for: list[str] = Field(description="the first ten clients whose update is missing")
    seconds_left: float = Field(description="to the deadline; negative when it has passed")


class Bridge(Payload):
    """Birth and death of a fog bridge."""

    online: bool
    boot: int = Field(ge=0)
    node_id: int | None = Field(
        default=None, description="its Flower node id; none if it runs in a stock SuperNode"
    )


class Cue(Payload):
    """The train messages of this round are in the SuperLink: fetch them."""

    run: RunId
    round: Round


class Bell(Payload):
    """The reply to this Flower message is in the SuperLink: pull it."""

    region: Name
    message_id: str


class RoundRecord(Payload):
    """One line of a run's history: what went into model `round`, and how good it is."""

    run: RunId
    round: Round
    regions: dict[Name, PartialMeta]
    left_out: dict[Name, str] = Field(
        default_factory=dict, description="regions without a partial in this round, and why"
    )
    num_clients: int = Field(ge=0)
    num_examples: int = Field(ge=0)
    train_loss: float | None = None
    evaluation: Evaluation | None = None
    seconds: dict[str, Seconds] = Field(default_factory=dict, description="per step")
