"""Flower's processes as seen by the central server: the SuperLink's process, the run on it, and the
socket on which the run's ServerApp reports.

Everything that happens becomes one of the events below in the server's queue.
"""

import os
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
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
from fedfog.transport import tls
from fedfog_central_server.link import (
    SOCKET_VARIABLE,
    FromServerApp,
    Hello,
    from_server_app,
)

log = structlog.get_logger()

BOOT_SECONDS = 60.0
PORT_SECONDS = 5.0
TERMINATE_SECONDS = 3.0
# Seconds between two looks for new bridges, and at most while a key is refused.
REGISTER_EVERY, REGISTER_AGAIN = 2.0, 60.0


@dataclass(frozen=True)
class SuperLinkExited:
    code: int


@dataclass(frozen=True)
class Submitted:
    ticket: int
    flower_run: int


@dataclass(frozen=True)
class SubmitFailed:
    ticket: int
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
        folder: for the socket and Flower's files.
        put: takes the events; called from threads of this object.
    """

    def __init__(self, settings: CentralSettings, folder: Path, put: Callable[[Any], None]) -> None:
        self._settings, self._put = settings, put
        everywhere = settings.flower_host in ("0.0.0.0", "::")
        host = "127.0.0.1" if everywhere else settings.flower_host
        self._address = f"{host}:{settings.flower_port}"
        self._tls_dir = settings.superlink_dir
        self._tls: ssl.SSLContext | None = None
        path = str(folder / "server.sock")
        self._listener = Listener(path, "AF_UNIX", backlog=8)
        self._pids: dict[Connection, int] = {}  # of the ServerApps that are connected
        self._environment = {
            **FLOWER_ENVIRONMENT,
            "FLWR_HOME": str(folder / "flower"),
            # Flower starts its own commands by name; a virtual environment need not be active.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
            "FLWR_LOG_LEVEL": os.environ.get("FLWR_LOG_LEVEL", "ERROR"),
            SOCKET_VARIABLE: path,
        }
        self._superlink: Popen[bytes] | None = None
        _in_background(self._accept)

    @property
    def alive(self) -> bool:
        """The SuperLink runs."""
        return self._superlink is not None and self._superlink.poll() is None

    def start(self) -> None:
        """Start the SuperLink. Only for the main thread.

        Raises:
            ServiceError: FLOWER_PORT is taken.
            IdentityError: SUPERLINK_TLS_DIR has no CA certificate.
        """
        self._wait_for_port()
        settings = self._settings
        command = [sys.executable, "-m", "fedfog.flower.superlink"]
        command += ["--host", settings.flower_host, "--port", str(settings.flower_port)]
        command += self._tls_arguments()
        self._superlink = process = spawn(command, self._environment)
        if self._tls_dir is not None:
            _in_background(self._register, process, self._tls_dir)

        def wait() -> None:
            self._put(SuperLinkExited(process.wait()))

        _in_background(wait)

    def submit(
        self, ticket: int, run: str, first_round: int, rounds: int, replaces: int | None = None
    ) -> None:
        """Have rounds `first_round` to `rounds` done; begins when the SuperLink is up."""
        config = {"run": run, "first-round": first_round, "num-server-rounds": rounds}
        _in_background(self._submit, ticket, config, replaces)

    def stop_run(self, flower_run: int) -> None:
        """Have Flower forget a run."""
        _in_background(self._stop, flower_run)

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

    def hang_up(self, connection: Connection) -> None:
        """End the ServerApp at the other end; HungUp follows."""
        # A close would not be noticed by the thread that reads from it, nor by the other side.
        with suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as stream:
            stream.shutdown(socket.SHUT_RDWR)
        # One that is stopped (SIGSTOP) would write another checkpoint when it is continued.
        with suppress(ProcessLookupError, KeyError):
            os.kill(self._pids[connection], signal.SIGKILL)

    def close(self) -> None:
        for connection in list(self._pids):
            self.hang_up(connection)
        self.end_superlink()
        self._listener.close()

    def _tls_arguments(self) -> list[str]:
        if (folder := self._tls_dir) is None:
            return ["--insecure"]
        self._tls = tls.context(folder)
        return [
            f"--ssl-ca-certfile={folder / 'ca.crt'}",
            f"--ssl-certfile={folder / 'tls.crt'}",
            f"--ssl-keyfile={folder / 'tls.key'}",
            "--enable-supernode-auth",
        ]

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

    def _register(self, process: Popen[bytes], folder: Path) -> None:
        """Admit the bridges whose public keys are in `folder`, also those that come there later:
        a SuperLink that starts knows none."""
        with suppress(TimeoutError):  # then it has no use, and the submission of a run says so
            self._healthy()
        from fedfog.flower import fleet

        admitted: set[Path] = set()
        pause = REGISTER_EVERY
        while process.poll() is None:
            pause, longer = REGISTER_EVERY, min(2 * pause, REGISTER_AGAIN)
            for path in sorted(set(folder.glob("*.pub")) - admitted):
                try:
                    key = path.read_bytes()
                    fleet.register_node(self._address, path.stem, key, self._tls)
                except (fleet.ControlError, OSError) as error:
                    pause = longer
                    log.error(
                        "bridge_not_registered",
                        key=str(path),
                        reason=str(error),
                        retry_in=pause,
                        remedy="remove a key that is not needed; fedfog-pki makes new ones",
                    )
                else:
                    log.info("bridge_registered", bridge=path.stem)
                    admitted.add(path)
            time.sleep(pause)

    def _submit(self, ticket: int, config: dict[str, str | int], replaces: int | None) -> None:
        try:
            if not self._healthy():
                return
        except OSError as error:
            self._put(SubmitFailed(ticket, str(error)))
            return
        # Not before: it would hold up the import of PyTorch, and with it model 0, for 0.5 s.
        from fedfog.flower import fleet

        try:
            if replaces is not None:
                self._stop(replaces)
            with as_file(files("fedfog.flower") / "app") as folder:
                run = fleet.submit_run(self._address, folder, config, self._tls)
            self._put(Submitted(ticket, run))
        except (fleet.ControlError, OSError) as error:
            self._put(SubmitFailed(ticket, str(error)))

    def _stop(self, flower_run: int) -> None:
        from fedfog.flower import fleet

        try:
            fleet.stop_run(self._address, flower_run, self._tls)
        except fleet.ControlError as error:
            log.debug("flower_run_not_stopped", run=flower_run, reason=str(error))

    def _healthy(self) -> bool:
        """Wait for the SuperLink; False if it has ended, which is an event of its own."""
        deadline = time.monotonic() + BOOT_SECONDS
        url = f"{'https' if self._tls else 'http'}://{self._address}/health"
        while self.alive:
            try:
                with urlopen(url, timeout=2.0, context=self._tls):
                    log.debug("superlink_up", address=self._address)
                    return True
            except (URLError, OSError) as error:
                reason = str(error)
                time.sleep(0.05)
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer of the SuperLink in {BOOT_SECONDS:.0f} s: {reason}")
        return False

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except OSError:
                return  # closed
            _in_background(self._listen, connection)

    def _listen(self, connection: Connection) -> None:
        while True:
            try:
                message = from_server_app.validate_json(connection.recv_bytes())
            except (EOFError, OSError):
                break
            except ValidationError as error:
                log.error("serverapp_not_understood", error=str(error))
                break
            if isinstance(message, Hello):
                self._pids[connection] = message.pid
            self._put(Said(connection, message))
        self._pids.pop(connection, None)
        self._put(HungUp(connection))


def _in_background(work: Callable[..., None], *arguments: object) -> None:
    threading.Thread(target=work, args=arguments, name=work.__name__, daemon=True).start()
