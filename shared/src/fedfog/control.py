"""Commands to a central server that stands (`fedfog run`, `stop`, `resume` and `runs`), and to
enrolment (`fedfog token` and `client`).

They go through a Unix socket in a folder of mode 0700, whose path is in `RUNS_DIR/.control` or
`PKI_DIR/ca/.control`: whoever can use it could as well run code as the server's user. There is no
way to it from the network. A frame has one JSON object of the schemas below.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Annotated, Any, Literal

import structlog
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from fedfog.files import write_atomically

log = structlog.get_logger()

PLACE = ".control"
ASK_SECONDS, ANSWER_SECONDS = 10.0, 30.0


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


class IdentityCommand(BaseModel):
    """A command to enrolment; `subject` is a region, a token's id, or the name in a certificate."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["create token", "revoke token", "tokens", "revoke client", "clients"]
    subject: str = ""
    uses: int = Field(1, ge=1)
    hours: float = Field(24.0, gt=0, le=1e6)


class IdentityAnswer(BaseModel):
    """What enrolment did or why it did not."""

    refused: str = ""
    token: str = ""
    note: str = Field("", description="what the operator should know, too")
    rows: list[list[str]] = []


identity_command = TypeAdapter(IdentityCommand)


@dataclass(frozen=True)
class Asked:
    """Somebody waits for the answer to this command."""

    command: Any
    connection: Connection

    def answer(self, answer: BaseModel) -> None:
        try:
            self.connection.send_bytes(answer.model_dump_json().encode())
        except OSError as error:  # who asked has gone
            log.info("answer_not_taken", command=self.command.kind, reason=str(error))
        finally:
            self.connection.close()


class Control:
    """The server's end: listens for commands.

    Args:
        folder: where the socket is made; mode 0700.
        announced: folder in which clients look for the socket.
        put: takes `Asked`; called from threads of this object.
        commands: that are understood.

    Raises:
        OSError: `announced` cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        announced: Path,
        put: Callable[[Any], None],
        commands: TypeAdapter[Any] = command,
    ) -> None:
        self._put, self._commands = put, commands
        path = folder / "control.sock"
        self._listener = Listener(str(path), "AF_UNIX", backlog=8)
        write_atomically(announced / PLACE, str(path).encode())
        threading.Thread(target=self._accept, name="control", daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._listen, args=(connection,), daemon=True).start()

    def _listen(self, connection: Connection) -> None:
        try:
            if connection.poll(ASK_SECONDS):
                asked = self._commands.validate_json(connection.recv_bytes())
                self._put(Asked(asked, connection))
                return
            log.warning("command_missing", seconds=ASK_SECONDS)
        except (EOFError, OSError, ValidationError) as error:
            log.warning("command_not_understood", error=str(error))
        connection.close()


def ask(runs_dir: Path, asked: Command) -> Answer:
    """Give a command to the server that works in `runs_dir`.

    Raises:
        ControlError: it refuses, or there is none.
    """
    try:
        answer = Answer.model_validate_json(_exchange(runs_dir, asked))
    except (OSError, EOFError, ValidationError) as error:
        raise ControlError(
            f"No central server answers for RUNS_DIR={runs_dir} ({error}). Start one without "
            "EXIT_WHEN_FINISHED, and call this on the same machine as the same user; with Compose: "
            "docker compose exec central-server fedfog ..."
        ) from error
    if answer.refused:
        raise ControlError(answer.refused)
    return answer


def ask_enrolment(pki_dir: Path, asked: IdentityCommand) -> IdentityAnswer:
    """Give a command to the enrolment service that works in `pki_dir`.

    Raises:
        ControlError: it refuses, or there is none.
    """
    try:
        answer = IdentityAnswer.model_validate_json(_exchange(pki_dir / "ca", asked))
    except (OSError, EOFError, ValidationError) as error:
        raise ControlError(
            f"No enrolment service answers for PKI_DIR={pki_dir} ({error}). Call this on the same "
            "machine as the same user; with Compose: docker compose exec enrolment fedfog ..."
        ) from error
    if answer.refused:
        raise ControlError(answer.refused)
    return answer


def _exchange(folder: Path, asked: BaseModel) -> bytes:
    with Client((folder / PLACE).read_text(), "AF_UNIX") as connection:
        connection.send_bytes(asked.model_dump_json().encode())
        if not connection.poll(ANSWER_SECONDS):
            raise TimeoutError(f"no answer for {ANSWER_SECONDS:.0f} s: is its process stopped?")
        return connection.recv_bytes()
