"""Commands to a central server that stands: `fedfog run`, `stop`, `resume` and `runs`.

They go through a Unix socket in a folder of mode 0700, whose path is in `RUNS_DIR/.control`:
whoever can use it could as well run code as the server's user. There is no way to it from the
network. A frame has one JSON object of the schemas below.
"""

from multiprocessing.connection import Client
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from fedfog.files import write_atomically

PLACE = ".control"
ANSWER_SECONDS = 30.0


class ControlError(Exception):
    """No server answers, or it refuses; the text says why and what to do."""


class _Command(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field("", description="of the run")


class RunCommand(_Command):
    """Begin a run with the server's settings, except for those that are named here."""

    kind: Literal["run"] = "run"
    settings: dict[str, Any] = {}


class StopCommand(_Command):
    kind: Literal["stop"] = "stop"


class ResumeCommand(_Command):
    kind: Literal["resume"] = "resume"


class StatusQuestion(_Command):
    kind: Literal["status"] = "status"


Command = Annotated[
    RunCommand | StopCommand | ResumeCommand | StatusQuestion, Field(discriminator="kind")
]
command: TypeAdapter[Command] = TypeAdapter(Command)


class Answer(BaseModel):
    """What the server did or why it did not, and the run that it has."""

    refused: str = ""
    name: str = ""
    status: str = Field("", description="running, completed, stopped or failed")
    error: str = ""
    rounds: int = Field(0, description="completed rounds")
    of: int = 0
    accuracy: float | None = Field(None, description="newest that is known")


def announce(runs_dir: Path, socket: Path) -> None:
    """Note where the server's socket is. Raises OSError."""
    write_atomically(runs_dir / PLACE, str(socket).encode())


def ask(runs_dir: Path, asked: Command) -> Answer:
    """Give a command to the server that works in `runs_dir`.

    Raises:
        ControlError: it refuses, or there is none.
    """
    try:
        with Client((runs_dir / PLACE).read_text(), "AF_UNIX") as connection:
            connection.send_bytes(asked.model_dump_json().encode())
            if not connection.poll(ANSWER_SECONDS):
                raise ControlError(
                    f"The central server of RUNS_DIR={runs_dir} has not answered for "
                    f"{ANSWER_SECONDS:.0f} s: is its process stopped?"
                )
            answer = Answer.model_validate_json(connection.recv_bytes())
    except (OSError, EOFError, ValidationError) as error:
        raise ControlError(
            f"No central server answers for RUNS_DIR={runs_dir} ({error}). Start one without "
            "EXIT_WHEN_FINISHED, and call this on the same machine as the same user; with Compose: "
            "docker compose exec central-server fedfog ..."
        ) from error
    if answer.refused:
        raise ControlError(answer.refused)
    return answer
