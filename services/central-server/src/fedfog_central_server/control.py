"""The server's end of `fedfog.control`."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import structlog
from pydantic import ValidationError

from fedfog.control import Answer, Command, announce, command

log = structlog.get_logger()

ASK_SECONDS = 10.0


@dataclass(frozen=True)
class Asked:
    """Somebody waits for the answer to this command."""

    command: Command
    connection: Connection

    def answer(self, answer: Answer) -> None:
        try:
            self.connection.send_bytes(answer.model_dump_json().encode())
        except OSError as error:  # who asked has gone
            log.info("answer_not_taken", command=self.command.kind, reason=str(error))
        finally:
            self.connection.close()


class Control:
    """Listens for commands.

    Args:
        folder: where the socket is made; mode 0700.
        put: takes `Asked`; called from threads of this object.

    Raises:
        OSError: `runs_dir` cannot be written.
    """

    def __init__(self, folder: Path, runs_dir: Path, put: Callable[[Any], None]) -> None:
        self._put = put
        path = folder / "control.sock"
        self._listener = Listener(str(path), "AF_UNIX", backlog=8)
        announce(runs_dir, path)
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
                self._put(Asked(command.validate_json(connection.recv_bytes()), connection))
                return
            log.warning("command_missing", seconds=ASK_SECONDS)
        except (EOFError, OSError, ValidationError) as error:
            log.warning("command_not_understood", error=str(error))
        connection.close()
