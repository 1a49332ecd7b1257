"""A local MQTT broker for `fedfog demo`: Mosquitto if it is installed, else an embedded one.

The embedded one is rumqttd (package `iotcore`). It keeps nothing over a restart and is made for
the demo and tests; a deployment uses Mosquitto (see `mosquitto/mosquitto.conf`).
"""

import itertools
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

from fedfog.service import ServiceError, spawn

Kind = Literal["mosquitto", "embedded"]

START_SECONDS = 15.0
MAX_PACKET_BYTES = 268_435_455  # all that MQTT has a length for
PORTS = (20_000, 32_000)
_numbers = itertools.count(random.randrange(*PORTS))

# Started by root, Mosquitto would change to another user, and the kernel would forget that it is
# to die with its parent (prctl(2)).
_MOSQUITTO = """\
user root
listener {port} 127.0.0.1
{access}
max_inflight_messages 200
max_queued_messages 20000
max_queued_bytes 0
max_packet_size {max_packet}
set_tcp_nodelay true
persistence {persistence}
persistence_location {folder}/
autosave_interval 10
"""

# As in mosquitto/mosquitto.conf, where the reasons are.
_CLOSED = """\
allow_anonymous false
cafile {tls}/ca.crt
certfile {tls}/tls.crt
keyfile {tls}/tls.key
crlfile {tls}/ca.crl
tls_version tlsv1.2
require_certificate true
use_identity_as_username true
use_username_as_clientid true
acl_file {tls}/acl
max_keepalive 120
max_qos 1
max_topic_alias 0"""

# The MQTT 5 listener exists only with a configuration file; its default limit is 20 kB.
_EMBEDDED = """\
id = 0
[router]
id = 0
max_connections = 10010
max_outgoing_packet_count = 200
max_segment_size = 104857600
max_segment_count = 4
[v5.1]
name = "fedfog"
listen = "127.0.0.1:{port}"
next_connection_delay_ms = 1
[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = {max_packet}
max_inflight_count = 100
dynamic_filters = true
"""


def installed_mosquitto() -> str | None:
    """Path of the `mosquitto` program; Debian puts it into an `sbin` beside the `bin` that is in
    a user's PATH."""
    folders = [Path(folder) for folder in os.get_exec_path()]
    both = [*folders, *(folder.with_name("sbin") for folder in folders if folder.name)]
    return shutil.which("mosquitto", path=os.pathsep.join(map(str, both)))


def free_port() -> int:
    """A TCP port on loopback that nobody listens on; each call takes the next one, so that what
    one process starts a while later does not meet.

    Below the ports that systems give to outgoing connections: a peer that keeps trying to reach
    one of those before its server listens can be given the very same port, and is then connected
    to itself.
    """
    for number in itertools.islice(_numbers, 100):
        port = PORTS[0] + number % (PORTS[1] - PORTS[0])
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise ServiceError(f"no free port among {PORTS[0]} to {PORTS[1]} on loopback")


class LocalBroker:
    """A broker process on loopback, with its configuration in `folder`.

    Args:
        kind: `mosquitto` or `embedded`; default: Mosquitto if it is installed.
        persistence: Mosquitto keeps sessions and retained messages over a restart.
        tls_dir: folder with ca.crt, tls.crt, tls.key, ca.crl and acl: only certificates of this CA
            get in, to what this access list allows them. Default: anybody, to everything.

    Raises:
        ServiceError: the embedded broker has no access list.
    """

    def __init__(
        self,
        folder: Path,
        kind: Kind | None = None,
        persistence: bool = False,
        tls_dir: Path | None = None,
    ) -> None:
        self.kind: Kind = kind or ("mosquitto" if installed_mosquitto() else "embedded")
        if tls_dir and self.kind == "embedded":
            raise ServiceError(
                "the embedded broker knows no certificates and no access list: install Mosquitto"
            )
        self.host, self.port = "127.0.0.1", free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self._log = folder / "broker.log"
        # The embedded broker tells the format of its configuration by the ending.
        self._config = folder / ("broker.conf" if self.kind == "mosquitto" else "broker.toml")
        folder.mkdir(parents=True, exist_ok=True)
        template = _MOSQUITTO if self.kind == "mosquitto" else _EMBEDDED
        self._config.write_text(
            template.format(
                port=self.port,
                access=_CLOSED.format(tls=tls_dir.resolve()) if tls_dir else "allow_anonymous true",
                max_packet=MAX_PACKET_BYTES,
                persistence=str(persistence).lower(),
                folder=folder.resolve(),
            )
        )

    def start(self) -> "LocalBroker":
        """Start it, and return when it takes connections.

        Raises:
            ServiceError: it does not come up; the text has the end of its log.
        """
        if self.kind == "mosquitto":
            program = installed_mosquitto()
            if program is None:
                raise ServiceError("Mosquitto is not installed: use the embedded broker")
            command = [program, "-c", str(self._config)]
        else:
            command = [sys.executable, "-m", "fedfog.cli.broker", str(self._config)]
        self.process = spawn(command, log_file=self._log)
        deadline = time.monotonic() + START_SECONDS
        while not self._listens():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                end = self._log.read_text(errors="replace")[-500:]
                raise ServiceError(f"the {self.kind} broker does not start ({self._log}): {end}")
            time.sleep(0.01)
        return self

    def stop(self, timeout: float = 3.0) -> None:
        """Terminate it, and kill it if that does not help."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def _listens(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex((self.host, self.port)) == 0


if __name__ == "__main__":
    import iotcore

    iotcore.Broker(config_path=sys.argv[1]).run_forever()
