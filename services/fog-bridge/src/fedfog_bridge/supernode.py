"""The bridge under Flower's stock SuperNode: this process keeps the SuperNode alive and shows the
region on MQTT; the work is done by `client_app` in processes that the SuperNode starts."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import structlog

from fedfog import service
from fedfog.flower import FLOWER_ENVIRONMENT
from fedfog.health import BEAT_SECONDS, Heartbeat
from fedfog.settings import BridgeSettings
from fedfog_bridge.presence import Presence

log = structlog.get_logger()

BACKOFF_SECONDS = (1.0, 30.0)
STOP_SECONDS = 5.0


class SuperNodeBridge:
    """The fog bridge of one region, as a stock SuperNode."""

    def __init__(self, settings: BridgeSettings) -> None:
        self._settings = settings
        self._presence = Presence(settings, [])
        self._child: subprocess.Popen[bytes] | None = None
        self._retry_at, self._attempts = 0.0, 0

    def run(self) -> int:
        """Serve until SIGTERM or until another bridge takes over; returns the exit code."""
        session, health = self._presence.session, Heartbeat()
        service.on_stop(session.events.put)
        session.start()
        try:
            while not self._presence.superseded:
                self._keep_child()
                health.beat("ready" if self._child and session.connected else "waiting")
                event = session.next(min(BEAT_SECONDS, 1.0))
                if isinstance(event, service.StopRequested):
                    return service.EXIT_OK
                self._presence.observe(event)
            return service.EXIT_SUCCEEDED_BY_ANOTHER
        finally:
            if not self._presence.superseded:
                self._presence.offline()
            self._stop_child()
            session.stop()

    def _keep_child(self) -> None:
        now = time.monotonic()
        if self._child is not None and (code := self._child.poll()) is not None:
            self._child = None
            self._presence.offline()
            first, longest = BACKOFF_SECONDS
            delay = min(first * 2**self._attempts, longest) * random.uniform(0.5, 1.0)
            self._attempts += 1
            self._retry_at = now + delay
            log.warning("supernode_ended", exit_code=code, retry_in=round(delay, 1))
        if self._child is None and now >= self._retry_at:
            self._child = self._start_child()
            self._presence.online(None)

    def _start_child(self) -> subprocess.Popen[bytes]:
        home = self._settings.state_dir.absolute() / "flower"
        home.mkdir(parents=True, exist_ok=True)
        scripts = Path(sys.executable).parent
        command = [
            str(scripts / "flower-supernode"),
            "--insecure",
            f"--superlink={self._settings.flower_server}",
            "--host=127.0.0.1",
            f"--port={_free_port()}",
        ]
        environment = {
            **FLOWER_ENVIRONMENT,
            "FLWR_HOME": os.environ.get("FLWR_HOME", str(home)),
            # The SuperNode starts its helpers by name.
            "PATH": os.pathsep.join([str(scripts), os.environ.get("PATH", "")]),
        }
        log.info("supernode_starting", server=self._settings.flower_server)
        return service.spawn(command, environment)

    def _stop_child(self) -> None:
        if self._child is None:
            return
        # Its SuperExec and the ClientApp are in its process group.
        os.killpg(self._child.pid, signal.SIGTERM)
        try:
            self._child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning("supernode_killed", after=STOP_SECONDS)
            os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()


def _free_port() -> int:
    """A port for the SuperNode's own API, so that several run on one host."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
