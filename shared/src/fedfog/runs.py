"""What is in the folder of a run: the schemas of its `settings.json`, `history.json` and
`summary.json`, and what they say of all runs in RUNS_DIR."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError, computed_field

from fedfog.messages.schemas import Evaluation, RoundRecord, RunId

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


class History(BaseModel):
    """`history.json`: what went into each model and how good it is."""

    run: RunId
    initial: Evaluation | None = Field(None, description="of model 0")
    rewinds: list[Rewind] = []
    rounds: list[RoundRecord] = []
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
    initial_accuracy: float | None = Field(description="of model 0")
    initial_loss: float | None
    seconds: float = Field(description="of work on the run, pauses of the server left out")
    task: str
    strategy: str
    seed: int
    versions: dict[str, str]


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
