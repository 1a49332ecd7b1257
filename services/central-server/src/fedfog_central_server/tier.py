"""The Flower side as seen by the supervisor: the SuperLink's process, the run on it, and the
socket on which the run's ServerApp reports.

Everything that happens becomes one of the events below in the supervisor's queue.
"""

import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import as_file, files
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import structlog
from pydantic import ValidationError

from fedfog.flower import FLOWER_ENVIRONMENT
from fedfog.service import ServiceError, spawn
from fedfog.settings import CentralSettings
from fedfog_central_server.link import (
    FOLDER_VARIABLE,
    SOCKET_VARIABLE,
    FromServerApp,
    from_server_app,
)

log = structlog.get_logger()

BOOT_SECONDS = 60.0
PORT_SECONDS = 5.0
TERMINATE_SECONDS = 3.0


@dataclass(frozen=True)
class SuperLinkExited:
    code: int


@dataclass(frozen=True)
class Submitted:
    flower_run: int


@dataclass(frozen=True)
class SubmitFailed:
    reason: str


@dataclass(frozen=True)
class Said:
    connection: Connection
    message: FromServerApp


@dataclass(frozen=True)
class HungUp:
    """The process at the other end of this connection has ended."""

    connection: Connection


class FlowerTier:
    """Starts and ends the SuperLink, submits runs to it, listens to their ServerApps.

    Args:
        run_folder: where the ServerApp finds the checkpoints.
        put: takes the events; called from threads of this object.
    """

    def __init__(
        self, settings: CentralSettings, run_folder: Path, put: Callable[[Any], None]
    ) -> None:
        self._settings, self._put = settings, put
        everywhere = settings.flower_host in ("0.0.0.0", "::")
        host = "127.0.0.1" if everywhere else settings.flower_host
        self._address = f"{host}:{settings.flower_port}"
        self._folder = Path(tempfile.mkdtemp(prefix="fedfog-"))  # mode 0700
        path = str(self._folder / "supervisor.sock")
        self._listener = Listener(path, "AF_UNIX")
        self._environment = {
            **FLOWER_ENVIRONMENT,
            "FLWR_HOME": str(self._folder / "flower"),
            # Flower starts its own commands by name; a virtual environment need not be active.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
            "FLWR_LOG_LEVEL": os.environ.get("FLWR_LOG_LEVEL", "ERROR"),
            SOCKET_VARIABLE: path,
            FOLDER_VARIABLE: str(run_folder.resolve()),
        }
        self._superlink: Popen[bytes] | None = None
        threading.Thread(target=self._accept, name="accept", daemon=True).start()

    @property
    def alive(self) -> bool:
        """The SuperLink runs."""
        return self._superlink is not None and self._superlink.poll() is None

    def start(self) -> None:
        """Start the SuperLink. Only for the main thread.

        Raises:
            ServiceError: FLOWER_PORT is taken.
        """
        self._wait_for_port()
        settings = self._settings
        command = [sys.executable, "-m", "fedfog.flower.superlink", "--insecure"]
        command += ["--host", settings.flower_host, "--port", str(settings.flower_port)]
        self._superlink = process = spawn(command, self._environment)

        def wait() -> None:
            self._put(SuperLinkExited(process.wait()))

        threading.Thread(target=wait, name="superlink", daemon=True).start()

    def submit(self, run: str, first_round: int, rounds: int, replaces: int | None = None) -> None:
        """Have rounds `first_round` to `rounds` done; begins when the SuperLink is up."""
        config = {"run": run, "first-round": first_round, "num-server-rounds": rounds}
        threading.Thread(
            target=self._submit, args=(config, replaces), name="submit", daemon=True
        ).start()

    def terminate(self) -> None:
        """Ask the SuperLink to end; SuperLinkExited follows."""
        if self._superlink is not None:
            self._superlink.terminate()

    def end_superlink(self) -> None:
        """Have it end at once; SuperLinkExited follows."""
        process = self._superlink
        if process is None:
            return
        self.terminate()
        try:
            process.wait(TERMINATE_SECONDS)
        except TimeoutExpired:
            log.warning("superlink_killed", after_seconds=TERMINATE_SECONDS)
            process.kill()
            process.wait()

    @staticmethod
    def hang_up(connection: Connection) -> None:
        """End the ServerApp at the other end; HungUp follows."""
        # A close would not be noticed by the thread that reads from it, nor by the other side.
        with socket.socket(fileno=os.dup(connection.fileno())) as stream:
            stream.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.end_superlink()
        self._listener.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _wait_for_port(self) -> None:
        """A SuperLink that died a moment ago may still hold it. Somebody else's would take our
        run for its own."""
        settings = self._settings
        family = socket.AF_INET6 if ":" in settings.flower_host else socket.AF_INET
        deadline = time.monotonic() + PORT_SECONDS
        while True:
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((settings.flower_host, settings.flower_port))
                except OSError as error:
                    if time.monotonic() > deadline:
                        raise ServiceError(
                            f"FLOWER_HOST={settings.flower_host}, "
                            f"FLOWER_PORT={settings.flower_port}: {error.strerror}. Is another "
                            "central server running? Choose another port"
                        ) from error
                else:
                    return
            time.sleep(0.1)

    # Threads

    def _submit(self, config: dict[str, str | int], replaces: int | None) -> None:
        # Imported here, in parallel with the SuperLink's start: it costs 0.7 s of a core.
        from fedfog.flower import fleet

        try:
            if not self._healthy():
                return
            if replaces is not None:
                try:
                    fleet.stop_run(self._address, replaces)
                except fleet.ControlError as error:
                    log.debug("flower_run_not_stopped", run=replaces, reason=str(error))
            with as_file(files("fedfog.flower") / "app") as folder:
                self._put(Submitted(fleet.submit_run(self._address, folder, config)))
        except (fleet.ControlError, OSError) as error:
            self._put(SubmitFailed(str(error)))

    def _healthy(self) -> bool:
        """Wait for the SuperLink; False if it has ended, which is an event of its own."""
        deadline = time.monotonic() + BOOT_SECONDS
        while self.alive:
            try:
                with urlopen(f"http://{self._address}/health", timeout=2.0):
                    log.debug("superlink_up", address=self._address)
                    return True
            except (URLError, OSError):
                time.sleep(0.05)
            if time.monotonic() > deadline:
                raise TimeoutError(f"the SuperLink is not healthy after {BOOT_SECONDS:.0f} s")
        return False

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(
                target=self._listen, args=(connection,), name="serverapp", daemon=True
            ).start()

    def _listen(self, connection: Connection) -> None:
        while True:
            try:
                message = from_server_app.validate_json(connection.recv_bytes())
            except (EOFError, OSError):
                break
            except ValidationError as error:
                log.error("serverapp_not_understood", error=str(error))
                break
            self._put(Said(connection, message))
        self._put(HungUp(connection))
