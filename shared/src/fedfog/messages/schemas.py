"""Fields of every message. A message that does not fit its schema is refused, never guessed at."""

from dataclasses import asdict
from enum import StrEnum
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from fedfog.core.metrics import Federated
from fedfog.core.partition import parse
from fedfog.core.phases import Phase
from fedfog.messages.topics import NAME_PATTERN

Name = Annotated[str, Field(pattern=NAME_PATTERN)]
RunId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$", description="name of the run")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Round = Annotated[int, Field(ge=0, le=10**9, description="number of the round")]
FogRound = Annotated[int, Field(ge=1, le=10**6, description="regional round in it, from 1")]
Examples = Annotated[int, Field(gt=0, le=10**15, description="number of examples")]
Boot = Annotated[
    int, Field(ge=0, lt=2**63, description="boot id of the sender: later ones are higher")
]
Seconds = Annotated[float, Field(ge=0)]
MAX_LOSS = 1e30  # times all Examples it is still finite
Loss = Annotated[float, Field(ge=-MAX_LOSS, le=MAX_LOSS)]
_NAME = NAME_PATTERN.strip("^$")
LARGE = 1 << 20  # bytes of fields that grow with the number of clients


class Payload(BaseModel):
    """Base of all messages: unknown fields, NaN and infinity are refused, and fields of more than
    `max_bytes` of JSON are not even parsed."""

    max_bytes: ClassVar[int] = 1 << 12

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    schema_version: Literal[1] = Field(1, description="of this message's fields")

    def to_json(self) -> bytes:
        return self.model_dump_json().encode()


def _partition(spec: str) -> str:
    parse(spec)
    return spec


Partition = Annotated[str, AfterValidator(_partition)]


class Training(BaseModel):
    """What decides how clients train, on which examples; also settings of the central server."""

    local_epochs: int = Field(
        3, ge=1, description="passes over a client's training examples in a round"
    )
    local_steps: int = Field(
        0,
        ge=0,
        description="batches that a client trains on in a round, in place of whole epochs; "
        "0: LOCAL_EPOCHS",
    )
    batch_size: int = Field(32, ge=1, description="examples per training step")
    optimizer: Literal["adam", "sgd"] = Field(
        "adam",
        description="of the clients, made anew in each round. `sgd` with LEARNING_RATE=0.1 is the "
        "stronger one where the clients' labels differ much, and slower where they hardly do",
    )
    learning_rate: FiniteFloat = Field(
        1e-3, gt=0, description="of the clients' OPTIMIZER; for `sgd` begin with 0.1"
    )
    lr_decay: FiniteFloat = Field(
        1.0, gt=0, le=1, description="factor of LEARNING_RATE from each global round to the next"
    )
    momentum: FiniteFloat = Field(0.0, ge=0, lt=1, description="of OPTIMIZER=sgd")
    proximal_mu: FiniteFloat = Field(
        0.0,
        ge=0,
        description="weight of FedProx's pull towards the global model in the clients' loss, with "
        "any STRATEGY; 0.1 helps a little where labels differ, 1 costs where they do not; 0: none",
    )
    clip_norm: FiniteFloat = Field(
        0.0, ge=0, description="norm that the gradient of a batch is clipped to; 0: it is not"
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none",
        description="`balanced`: in a client's loss each class that it has counts the same, "
        "however many examples of it there are",
    )
    seed: int = Field(
        42, ge=0, description="of initial weights, partition, validation split and shuffling"
    )
    region_partition: Partition = Field(
        "iid",
        description="how the training set is dealt to the regions: `iid`, `dirichlet:ALPHA` "
        "(labels), `sizes:ALPHA`, `shards:K` (classes per holder) or `group` (whole subjects or "
        "files)",
    )
    partition: Partition = Field(
        "iid",
        description="how a region's part is dealt to its clients, likewise",
    )
    fog_rounds: int = Field(
        1,
        ge=1,
        le=1000,
        description="times that each region averages its clients for one global model (HierFAVG): "
        "as many fewer legs to the centre for the same work",
    )


class Hyperparameters(Training):
    """How a client is to train in the next round."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Evaluation(BaseModel):
    """Metrics of a global model on the server's held-out examples."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    round: Round = Field(description="completed rounds of the model")
    num_examples: Examples = Field(description="number of held-out examples")
    loss: float | None = Field(description="mean cross-entropy; none if it is not finite")
    accuracy: float = Field(ge=0, le=1, description="share of right answers")
    auroc: float | None = Field(
        ge=0, le=1, description="none if the examples or the scores do not define it"
    )
    macro_f1: float = Field(ge=0, le=1, description="mean of the classes' F1")
    ece: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="expected calibration error, 15 bins; none if the scores are not finite",
    )
    confusion_matrix: list[list[int]] = Field(description="rows: true class, columns: predicted")
    task: dict[str, float | None] = Field(
        default_factory=dict, description="metrics of the task's own; none if one is not finite"
    )


class FederatedEvaluation(BaseModel):
    """How a global model does on its clients' own validation examples, as these say."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    num_clients: int = Field(ge=1, le=10**20, description="clients that evaluated it")
    num_examples: int = Field(ge=1, le=10**20, description="their validation examples")
    loss: Loss | None = Field(description="weighted by examples; none if one is not finite")
    accuracy: float = Field(ge=0, le=1, description="weighted by examples")
    mean_accuracy: float = Field(ge=0, le=1, description="each client counted once")
    std_accuracy: float = Field(ge=0, le=1, description="between the clients")
    worst_accuracy: float = Field(ge=0, le=1, description="of the worst client")
    worst_client: str = Field(
        pattern=rf"^{_NAME}/{_NAME}$", description="`region/client`; of equals the first by name"
    )
    best_accuracy: float = Field(ge=0, le=1, description="of the best client")

    @classmethod
    def of(cls, told: Federated | None) -> "FederatedEvaluation | None":
        return cls(**asdict(told)) if told else None

    @staticmethod
    def told(evaluation: "FederatedEvaluation | None") -> Federated | None:
        return Federated(**evaluation.model_dump()) if evaluation else None


class RegionShare(BaseModel):
    """What one region put into a global model."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    num_clients: int = Field(ge=1, description="clients whose update is in it")
    num_examples: Examples = Field(description="their training examples")


class RunState(StrEnum):
    TRAINING = "training"
    FINISHED = "finished"


def numbered(round: int, fog_round: int) -> str:
    """A round as ids have it: `3`, and `3.2` for what is of its second regional round."""
    return str(round) if fog_round == 1 else f"{round}.{fog_round}"


class ModelMeta(Payload):
    """Global model of a run after `round` completed rounds (model 0 is the initial one); or what a
    region has made of it in `fog_round` regional rounds."""

    max_bytes = LARGE

    run: RunId
    run_started: int = Field(
        ge=0, lt=2**63, description="orders the runs: unix seconds of its beginning"
    )
    round: Round = Field(description="completed rounds; clients train for the next one")
    fog_round: int = Field(
        0, ge=0, lt=10**6, description="completed regional rounds since then, likewise"
    )
    rounds: Round = Field(description="rounds that the run is to have")
    state: RunState = Field(description="`finished`: this is the run's last model")
    digest: Digest = Field(description="SHA-256 of the tensors' bytes")
    hyperparameters: Hyperparameters = Field(description="of the next round")
    regions: dict[Name, RegionShare] = Field(
        default_factory=dict, description="what each region put into this model"
    )
    evaluation: Evaluation | None = Field(
        default=None, description="newest evaluation known: of an earlier model of this run"
    )


class ClientMetrics(BaseModel):
    """What a client tells of its learning; never its data."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    train_loss: Loss = Field(description="mean over the last local epoch")
    validation_loss: Loss | None = Field(
        default=None, description="of the received model, before training; none if not finite"
    )
    validation_accuracy: float | None = Field(
        default=None, ge=0, le=1, description="of the received model, before training"
    )
    validation_examples: Examples | None = Field(
        default=None, description="that these two are of; none without a validation split"
    )


class UpdateMeta(Payload):
    """What one client trained in one round."""

    run: RunId
    round: Round
    fog_round: FogRound = 1
    region: Name = Field(description="as in the topic")
    client: Name = Field(description="as in the topic")
    base_digest: Digest = Field(description="digest of the model trained from")
    num_examples: Examples = Field(description="training examples, the weight in the mean")
    encoding: Literal["float32"] = Field("float32", description="of the tensors")
    metrics: ClientMetrics = Field(description="the client's own")
    train_seconds: Seconds = Field(0.0, description="that the training took")

    @property
    def id(self) -> str:
        """The id under which every tier logs this update."""
        return f"{self.run}/{numbered(self.round, self.fog_round)}/{self.region}/{self.client}"


class FogRoundRecord(BaseModel):
    """A regional round before the one that made the partial."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    num_clients: int = Field(ge=1, description="clients whose update is in the region's model")
    num_examples: Examples = Field(description="their training examples")
    train_loss: Loss = Field(description="mean over them, weighted by examples")
    seconds: dict[str, Seconds] = Field(default_factory=dict, description="per step")


class PartialMeta(Payload):
    """A region's aggregate of the updates that it accepted in one round; with FOG_ROUNDS, in the
    last regional round, whose examples are the region's weight in the global model."""

    max_bytes = LARGE

    run: RunId
    round: Round
    region: Name = Field(description="as in the topic")
    digest: Digest = Field(description="SHA-256 of the tensors' bytes")
    num_clients: int = Field(
        ge=1, le=10**9, description="clients whose update is in it, over all tiers"
    )
    num_examples: Examples = Field(description="the members' examples, summed")
    members: dict[Name, Examples] = Field(
        description="accepted clients, or regions if it is of an aggregator above others, and the "
        "examples that they counted with"
    )
    left_out: dict[Name, str] = Field(
        default_factory=dict,
        description="clients of the cohort, or regions below, that are not in it, and why",
    )
    base_digest: Digest | None = Field(
        default=None, description="digest of the global model trained from"
    )
    metrics: ClientMetrics = Field(
        description="only `train_loss`: mean over the members, weighted by examples"
    )
    federated: FederatedEvaluation | None = Field(
        default=None, description="of the global model that the round began with, by the members"
    )
    aggregation: str = Field("fedavg", description="rule that made it of the updates")
    suspicious: dict[Name, str] = Field(
        default_factory=dict,
        description="members that the rule left out or damped, and why; 1,000 at most",
    )
    suspicious_more: int = Field(default=0, ge=0, description="such members beyond those")
    regional: list[FogRoundRecord] = Field(
        default_factory=list, description="the regional rounds before this one"
    )
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
    fog_round: FogRound = 1
    verdict: Verdict = Field(
        description="`received`: in the memory of this boot, keep it; `accepted`: in a committed "
        "partial; `late`, `rejected`: in none (`late` is also a repeat, in a later round, of "
        "one that was accepted)"
    )
    reason: str = Field("", description="why it is `late` or `rejected`")
    boot: Boot


class RegionReceipt(Payload):
    """`accepted` for all members of a partial, sent once when the round closes."""

    max_bytes = LARGE

    run: RunId
    round: Round
    fog_round: FogRound = 1
    boot: Boot
    members: list[Name] = Field(description="clients whose update is accepted")


class Slot(Payload):
    """Which share of the training set a client is to use: part `slot` of `slots`, after the whole
    set was cut into `regions` parts of which this region has part `region_index`."""

    run: RunId
    slot: int = Field(ge=0, description="index of the client's slot in its region")
    slots: int = Field(ge=1, le=10**6, description="slots of the region")
    region_index: int = Field(ge=0, description="index of the region")
    regions: int = Field(ge=1, le=10**5, description="regions that the training set was cut for")

    @model_validator(mode="after")
    def _exists(self) -> "Slot":
        if self.slot >= self.slots or self.region_index >= self.regions:
            raise ValueError("no such slot or region")
        return self


class Presence(Payload):
    """Birth and death of a client, or of an aggregator at its parent. A death counts only for the
    boot that it names."""

    online: bool = Field(description="birth or death")
    boot: Boot
    slot: int | None = Field(
        default=None, ge=0, lt=2**63, description="the data slot it has, if any"
    )
    own_data: bool = Field(default=False, description="it has data of its own: needs no slot")
    deadline: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="of an aggregator towards its parent: its ROUND_DEADLINE"
    )
    version: str = Field("", description="of FedFog")


class Status(Payload):
    """State of a region's aggregator; published at boot and on a change of phase."""

    online: bool = Field(description="birth or death")
    boot: Boot
    run: RunId | None = None
    round: Round | None = None
    fog_round: FogRound = 1
    phase: Phase | None = Field(default=None, description="of the round in this region")


class Progress(Payload):
    """What a region is waiting for; at most twice a second."""

    run: RunId
    round: Round
    fog_round: FogRound = 1
    phase: Phase = Field(description="of the round in this region")
    received: int = Field(ge=0, description="updates that are in the sum")
    expected: int = Field(ge=0, description="updates that close the round")
    waiting_for: list[str] = Field(description="the first ten clients whose update is missing")
    seconds_left: float = Field(description="to the deadline; negative when it has passed")


class Bridge(Payload):
    """Birth and death of a fog bridge."""

    online: bool = Field(description="birth or death")
    boot: Boot
    node_id: int | None = Field(
        default=None,
        ge=0,
        lt=2**64,
        description="its Flower node id; none if it runs in a stock SuperNode",
    )
    session: int = Field(
        default=0,
        ge=0,
        description="number of its session with the SuperLink in this boot: what an earlier one "
        "had fetched is lost",
    )


class Cue(Payload):
    """The train messages of this round are in the SuperLink: fetch them."""

    run: RunId
    round: Round


class Bell(Payload):
    """The reply to this Flower message is in the SuperLink: pull it."""

    region: Name = Field(description="of the bridge")
    message_id: str = Field(description="Flower's id of the message that was answered")


class ClientEvaluation(Payload):
    """How a run's finished model does on one client's validation examples."""

    run: RunId
    round: Round = Field(description="completed rounds of the model")
    num_examples: Examples = Field(description="number of validation examples")
    loss: Loss | None = Field(description="none if it is not finite")
    accuracy: float = Field(ge=0, le=1, description="share of right answers")


class RoundRecord(Payload):
    """One line of a run's history: what went into model `round`, and how good it is."""

    max_bytes = 64 * LARGE

    run: RunId
    round: Round
    regions: dict[Name, PartialMeta] = Field(description="the partials, without their tensors")
    left_out: dict[Name, str] = Field(
        default_factory=dict, description="regions without a partial in this round, and why"
    )
    suspicious: dict[Name, str] = Field(
        default_factory=dict,
        description="regions whose partial AGGREGATION left out or damped, and why",
    )
    num_clients: int = Field(ge=0, description="clients whose update is in the model")
    num_examples: int = Field(ge=0, description="their training examples")
    train_loss: float | None = Field(
        default=None, description="mean over the regions, weighted by examples"
    )
    evaluation: Evaluation | None = Field(default=None, description="of the model of this round")
    federated: FederatedEvaluation | None = Field(
        default=None,
        description="of the model of the round before: the clients evaluate what they train from",
    )
    seconds: dict[str, Seconds] = Field(default_factory=dict, description="per step")
