"""What is in the folder of a run: the schemas of its `settings.json`, `history.json` and
`summary.json`."""

from enum import StrEnum
from typing import Any

from pydantic import BaseModel, Field

from fedfog.messages.schemas import Evaluation, RoundRecord, RunId


class RunInfo(BaseModel):
    """`settings.json`: what the run was begun with."""

    run: RunId
    run_started: int
    rewinds: int = Field(0, description="how often a damaged checkpoint was gone back behind")
    versions: dict[str, str]
    settings: dict[str, Any]


class History(BaseModel):
    """`history.json`: what went into each model and how good it is."""

    run: RunId
    initial: Evaluation | None = Field(None, description="of model 0")
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
    error: str = ""
    rounds: int = Field(description="that were completed")
    regions: list[str]
    clients: list[int] = Field(description="per round")
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
