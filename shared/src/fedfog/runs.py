"""What is in the folder of a run: the schemas of its `settings.json`, `history.json` and
`summary.json`, and what they say of all runs in RUNS_DIR."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError, computed_field

from fedfog.messages.schemas import Evaluation, FederatedEvaluation, RoundRecord, RunId

CHECKPOINTS = "checkpoints"
CHECKPOINT_FILE = re.compile(r"^round-(\d{6,})\.safetensors$")


class Rewind(BaseModel):
    """The run went on under a new id: what the other tiers did under the old one after
    `to_round` is void."""

    from_round: int = Field(description="newest model that anybody has seen under the old id")
    to_round: int = Field(description="model that the run went on from; the rounds after it again")
    before: RunId = Field(description="the run's id in messages until then")
    after: RunId
    why: str


class RunInfo(BaseModel):
    """`settings.json`: what the run was begun with."""

    run: RunId
    run_started: int = Field(description="orders the runs: everybody ignores an earlier one")
    begun: datetime
    rewound: list[Rewind] = []
    versions: dict[str, str]
    settings: dict[str, Any]
    environment: dict[str, Any] = Field(
        description="what the server's environment said when the run was begun or resumed"
    )

    @computed_field  # type: ignore[prop-decorator]
    @property
    def rewinds(self) -> int:
        return len(self.rewound)


class FinalEvaluation(BaseModel):
    """How the finished model does on the clients' own validation examples."""

    overall: FederatedEvaluation | None = Field(description="none: no client has told")
    regions: dict[str, FederatedEvaluation] = Field(description="those that the clients are in")
    missing: int = Field(
        description="clients that evaluated in the last round, and not within EVALUATION_TIMEOUT "
        "after it"
    )
    missing_clients: list[str] = Field(
        description="if any are missing, the first ten of the last round that said nothing; not "
        "known of regions below others"
    )


class History(BaseModel):
    """`history.json`: what went into each model and how good it is."""

    run: RunId
    initial: Evaluation | None = Field(None, description="of model 0")
    rewinds: list[Rewind] = []
    rounds: list[RoundRecord] = []
    federated: FinalEvaluation | None = Field(
        None, description="of the finished model; of the others, see the round after each"
    )
    seconds: float = Field(0.0, description="of work on the run, pauses of the server left out")


class Status(StrEnum):
    COMPLETED = "completed"
    FAILED = "failed"
    STOPPED = "stopped"


class Summary(BaseModel):
    """`summary.json`: how the run ended. A run that is not completed can be taken up again."""

    run: RunId
    status: Status
    held: bool = Field(
        False, description="stopped by `fedfog stop`: goes on with `fedfog resume` only"
    )
    error: str = ""
    rounds: int = Field(description="that were completed")
    regions: list[str]
    clients: list[int] = Field(description="per round")
    rewinds: list[Rewind]
    test_accuracy: float | None
    test_auroc: float | None
    test_macro_f1: float | None
    test_loss: float | None
    test_ece: float | None = Field(None, description="expected calibration error")
    best_round: int | None = Field(None, description="model of the highest test accuracy")
    best_accuracy: float | None = None
    federated: FinalEvaluation | None = None
    early_stop: str = Field("", description="why the run has fewer rounds than ROUNDS")
    initial_accuracy: float | None = Field(description="of model 0")
    initial_loss: float | None
    seconds: float = Field(description="of work on the run, pauses of the server left out")
    task: str
    strategy: str
    seed: int
    versions: dict[str, str]


def figures(record: Mapping[str, Any]) -> dict[str, float]:
    """All numbers of a record of the history (as JSON) by name: those of its evaluation under their
    own, those of other parts as `seconds_push`; without the regions'."""
    rest = {name: part for name, part in record.items() if name not in _NO_FIGURES}
    return dict(_figures({**(record.get("evaluation") or {}), **rest}))


_NO_FIGURES = ("schema_version", "regions", "evaluation")


def _figures(part: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in part.items():
        if isinstance(value, Mapping):
            yield from _figures(value, f"{prefix}{name}_")
        elif isinstance(value, int | float):
            yield prefix + name, value


@dataclass(frozen=True)
class Listed:
    """A run as its folder tells of it; without a summary, it is at work or was cut off."""

    info: RunInfo
    summary: Summary | None
    rounds: int


def listed(runs_dir: Path) -> Iterator[Listed]:
    """All runs whose `settings.json` can be read, in order of their folders' names."""
    for folder in sorted(runs_dir.glob("*")):
        if folder.is_symlink():  # `latest`
            continue
        try:
            info = RunInfo.model_validate_json((folder / "settings.json").read_bytes())
        except (OSError, ValidationError):
            continue
        try:
            summary = Summary.model_validate_json((folder / "summary.json").read_bytes())
        except (OSError, ValidationError):
            summary = None
        found = [CHECKPOINT_FILE.match(p.name) for p in (folder / CHECKPOINTS).glob("*")]
        made = max((int(match[1]) for match in found if match), default=0)
        yield Listed(info, summary, summary.rounds if summary else made)
