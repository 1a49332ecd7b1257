"""The bridge under Flower's stock SuperNode: this process keeps the SuperNode alive, shows the
region on MQTT and takes its partials from there; `client_app` answers with them, in processes that
the SuperNode starts."""

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
from fedfog.files import write_atomically
from fedfog.flower import FLOWER_ENVIRONMENT
from fedfog.flower.fleet import SuperLinkLostError
from fedfog.health import BEAT_SECONDS, Heartbeat
from fedfog.settings import BridgeSettings
from fedfog.transport import mqtt
from fedfog_bridge.client_app import partial_file
from fedfog_bridge.node import open_session
from fedfog_bridge.presence import Presence

log = structlog.get_logger()

BACKOFF_SECONDS = (1.0, 30.0)
STOP_SECONDS = 5.0


class SuperNodeBridge:
    """The fog bridge of one region, as a stock SuperNode."""

    def __init__(self, settings: BridgeSettings) -> None:
        self._settings = settings
        self._partials = settings.topics.partial_of(settings.region)
        self._presence = Presence(settings, [self._partials])
        self._child: subprocess.Popen[bytes] | None = None
        self._retry_at, self._attempts = 0.0, 0
        self._lost_since = time.monotonic()

    def run(self) -> int:
        """Serve until SIGTERM or until another bridge takes over; returns the exit code.

        Raises:
            ServiceError: the SuperLink does not admit this bridge for FLOWER_TIMEOUT seconds.
        """
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
                if isinstance(event, mqtt.Received) and event.topic == self._partials:
                    write_atomically(partial_file(self._settings), event.payload)
            return service.EXIT_SUCCEEDED_BY_ANOTHER
        finally:
            if not self._presence.superseded:
                self._presence.offline()
            self._stop_child()
            session.stop()

    def _keep_child(self) -> None:
        now = time.monotonic()
        if self._child is not None and (code := self._child.poll()) is not None:
            self._child, self._lost_since = None, now
            self._presence.offline()
            log.warning("supernode_ended", exit_code=code, retry_in=self._back_off())
        if self._child is None and now >= self._retry_at and self._admitted():
            self._child = self._start_child()
            self._presence.online(None)

    def _back_off(self) -> float:
        """Seconds until the next attempt."""
        first, longest = BACKOFF_SECONDS
        delay: float = min(first * 2**self._attempts, longest) * random.uniform(0.5, 1.0)
        self._attempts += 1
        self._retry_at = time.monotonic() + delay
        return round(delay, 1)

    def _admitted(self) -> bool:
        """Whether the SuperLink will admit a SuperNode with this bridge's key: it refuses one that
        it believes to be online, and by a session of our own, a SuperNode that was killed is
        signed off."""
        if self._settings.tls_dir is None:
            return True
        try:
            open_session(self._settings).close()
        except SuperLinkLostError as error:
            limit = self._settings.flower_timeout
            if time.monotonic() - self._lost_since > limit:
                raise service.ServiceError(
                    f"not admitted by the SuperLink at {self._settings.flower_server} "
                    f"(FLOWER_SERVER) for {limit:.0f} s (FLOWER_TIMEOUT): {error}"
                ) from error
            log.info("waiting_for_superlink", reason=str(error), retry_in=self._back_off())
            return False
        return True

    def _start_child(self) -> subprocess.Popen[bytes]:
        home = self._settings.state_dir.absolute() / "flower"
        home.mkdir(parents=True, exist_ok=True)
        scripts = Path(sys.executable).parent
        command = [
            str(scripts / "flower-supernode"),
            *self._tls_arguments(),
            f"--superlink={self._settings.flower_server}",
            "--host=127.0.0.1",
            f"--port={_free_port()}",
        ]
        environment = {
            **FLOWER_ENVIRONMENT,
            "STATE_DIR": str(self._settings.state_dir.absolute()),
            "FLWR_HOME": os.environ.get("FLWR_HOME", str(home)),
            # The SuperNode starts its helpers by name.
            "PATH": os.pathsep.join([str(scripts), os.environ.get("PATH", "")]),
        }
        log.info("supernode_starting", server=self._settings.flower_server)
        return service.spawn(command, environment)

    def _tls_arguments(self) -> list[str]:
        if (folder := self._settings.tls_dir) is None:
            return ["--insecure"]
        return [
            f"--root-certificates={folder / 'ca.crt'}",
            f"--auth-supernode-private-key={folder / 'supernode.key'}",
        ]

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
