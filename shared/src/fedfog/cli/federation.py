"""The processes of a demo: every tier of a federation on loopback, started and ended together.

It needs few imports: the tiers are on their way before the rest of the demo is loaded.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from fedfog.cli import clients
from fedfog.cli.broker import Kind, LocalBroker, free_port
from fedfog.service import ServiceError, allow_open_files, spawn

SERVER, BROKER = "central-server", "broker"
STOP_SECONDS = 10.0
PATIENCE = 3600  # seconds, of a simulated federation
LIMITS = ("ROUND_DEADLINE", "COHORT_LIMIT", "ROUND_TIMEOUT")


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    clients: int  # in each region
    rounds: int
    regions: int
    seed: int
    local_epochs: int
    task: str
    broker: Kind | None
    runs_dir: Path
    data_dir: Path
    time_limit: float  # seconds
    tiers: int = 2  # that average: the regions, aggregators above them, and the server
    processes: int | None = None  # for the clients of a region; None: one for each client
    client_module: str = ""  # run for each region in place of its clients
    secure: bool = False  # TLS, identities and access lists, as in the compose stack
    environment: Mapping[str, str] = field(default_factory=dict)  # settings of all tiers
    server: Mapping[str, str] = field(default_factory=dict)  # settings, in place of those above


@dataclass(frozen=True)
class Ended:
    """A tier has ended, with this exit code (negative: killed by this signal)."""

    name: str
    log: Path
    code: int

    def __str__(self) -> str:
        if self.code < 0:
            return f"{self.name} was killed by {signal.Signals(-self.code).name}"
        return f"{self.name} ended with exit code {self.code}"


@dataclass(frozen=True)
class Tier:
    """A process of the federation."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def wait(self) -> Ended:
        """Wait for its end. Of the clients, it is one that ended first, as their last line says."""
        code = self.process.wait()
        try:
            first = json.loads(self.log.read_text(errors="replace").splitlines()[-1])
            return Ended(first["name"], Path(first["log"]), first["code"])
        except (LookupError, TypeError, ValueError):
            return Ended(self.name, self.log, code)


class Federation:
    """All processes of a demo.

    Args:
        run: name of the run; its folder must not be there yet.
        private: folder of what none of them needs after the demo.

    Raises:
        OSError: the run's folder cannot be made.
    """

    def __init__(self, options: Options, run: str, private: Path) -> None:
        self.regions = [f"region_{i}" for i in range(options.regions)]
        # All aggregators, and how many clients or regions each has below it.
        self.below = dict.fromkeys(self.regions, options.clients)
        self._parents: dict[str, str] = {}
        self._top = self.regions
        for tier in range(2, options.tiers):  # each of them over two of the tier below
            parents = [f"fog-{tier}-{i}" for i in range((len(self._top) + 1) // 2)]
            self._parents |= {child: parents[i // 2] for i, child in enumerate(self._top)}
            self.below |= Counter(self._parents[child] for child in self._top)
            self._top = parents
        self.folder = options.runs_dir / run
        self.logs = self.folder / "logs"
        self.logs.mkdir(parents=True)
        self._pki = private / "pki" if options.secure else None
        self.broker = LocalBroker(
            self.logs, options.broker, tls_dir=self._pki and self._pki / "broker"
        )
        self._tiers: list[Tier] = []
        self._options, self._private = options, private
        self._flower_port, self._enrolment_port = free_port(), free_port()

    @property
    def observer_dir(self) -> Path | None:
        """TLS_DIR of who only listens; None: the broker is plain MQTT."""
        return self._pki and self._pki / "monitor"

    def start(self) -> None:
        """Start all tiers; the one whose chain of processes is the longest first.

        Raises:
            ServiceError: the broker does not come up.
        """
        options = self._options
        allow_open_files(options.clients * options.regions, "--clients")
        if self._pki:
            self._make_pki()
        server = self._env(
            SERVER,
            **self._identity(SERVER),
            RUN_ID=self.folder.name,
            RUNS_DIR=options.runs_dir.resolve(),
            ROUNDS=options.rounds,
            SEED=options.seed,
            LOCAL_EPOCHS=options.local_epochs,
            REGIONS=",".join(self._top),
            MIN_AVAILABLE_CLIENTS=len(self._top),
            MIN_FIT_CLIENTS=len(self._top),
            FLOWER_HOST="127.0.0.1",
            FLOWER_PORT=self._flower_port,
            EXIT_WHEN_FINISHED="true",
        )
        self._start(SERVER, "fedfog_central_server.main", server | dict(options.server))
        self.broker.start()
        assert self.broker.process is not None
        self._tiers.append(Tier(BROKER, self.broker.process, self.logs / "broker.log"))
        if self._pki:
            guard = self._private / "guard.sock"
            env = self._pki_env("guard", GUARD_SOCKET=guard, BROKER_PID=self.broker.process.pid)
            self._start("guard", "fedfog_enrolment.guard", env)
            env = self._pki_env("enrolment", GUARD_SOCKET=guard)
            self._start("enrolment", "fedfog_enrolment.main", env)
        self._start_clients()
        for number, region in enumerate(self.below):
            name = f"{region}-aggregator"
            settings: dict[str, object] = {"CLIENTS_EXPECTED": options.clients}
            if children := [c for c, parent in self._parents.items() if parent == region]:
                settings = {
                    "CHILD_REGIONS": ",".join(children),
                    # Those of the regions are enough; it has to be longer in each tier.
                    "ROUND_DEADLINE": options.time_limit + number,
                }
            settings |= self._identity(f"aggregator.{region}")
            parent = self._parents.get(region, "")
            env = self._env(name, REGION=region, PARENT_REGION=parent, **settings)
            self._start(name, "fedfog_aggregator.main", env)
        for region in self._top:
            name = f"{region}-bridge"
            env = self._env(name, REGION=region, **self._identity(f"bridge.{region}"))
            self._start(name, "fedfog_bridge.main", env)

    def watch(self, put: Callable[[Ended], None]) -> None:
        """Have the end of each tier `put`, by a thread, whenever it comes."""

        def wait(tier: Tier) -> None:
            put(tier.wait())

        for tier in self._tiers:
            threading.Thread(target=wait, args=(tier,), name=tier.name, daemon=True).start()

    def stop(self) -> None:
        """End all tiers, the broker last, and then whatever they have left behind."""
        family = psutil.Process().children(recursive=True)
        for group in (
            [tier for tier in self._tiers if tier.name != BROKER],
            [tier for tier in self._tiers if tier.name == BROKER],
        ):
            for tier in group:
                tier.process.terminate()
            deadline = time.monotonic() + STOP_SECONDS
            for tier in group:
                try:
                    tier.process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    sys.stderr.write(f"{tier.name} does not end by itself and is killed.\n")
                    tier.process.kill()
                    tier.process.wait()
        # A ServerApp that was just being started does not hear of it before it is up.
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, STOP_SECONDS)

    def _make_pki(self) -> None:
        """Raises ServiceError: it cannot be made."""
        log = self.logs / "pki.log"
        command = [sys.executable, "-m", "fedfog_enrolment.pki"]
        if spawn(command, self._pki_env("pki"), log).wait():
            raise ServiceError(f"no PKI ({log}): {log.read_text(errors='replace')[-500:]}")

    def _pki_env(self, name: str, **settings: object) -> dict[str, str]:
        parents = ",".join(f"{child}={parent}" for child, parent in self._parents.items())
        return self._env(name) | {
            "PKI_DIR": str(self._pki),
            "REGIONS": ",".join(self.below),
            "REGION_PARENTS": parents,
            "ENROLMENT_PORT": str(self._enrolment_port),
            **{key: str(value) for key, value in settings.items()},
        }

    def _identity(self, reader: str) -> dict[str, object]:
        """Settings of a service that has its certificate from the PKI."""
        return {"TLS_DIR": self._pki / reader} if self._pki else {}

    def _admission(self, region: str) -> dict[str, object]:
        """Settings of a client, which gets its certificate by itself."""
        if not self._pki:
            return {}
        return {
            "TLS_DIR": self._pki / f"client.{region}",
            "ENROLMENT_URL": f"https://localhost:{self._enrolment_port}",
            "JOIN_TOKEN_FILE": self._pki / f"client.{region}" / "token",
        }

    def _start(self, name: str, module: str, env: dict[str, str], *arguments: str) -> None:
        log = self.logs / f"{name}.log"
        self._tiers.append(
            Tier(name, spawn([sys.executable, "-m", module, *arguments], env, log), log)
        )

    def _start_clients(self) -> None:
        count = self._options.clients
        if module := self._options.client_module:
            for region in self.regions:
                name = f"{region}-clients"
                self._start(name, module, self._env(name, REGION=region, CLIENTS_PER_PROCESS=count))
            return
        processes = self._options.processes or count
        start = []
        for region in self.regions:
            for number in range(1, processes + 1):
                # The whole of the clients, as evenly as it goes.
                hosted = count * number // processes - count * (number - 1) // processes
                name = f"{region}-client-{number}"
                env = self._env(
                    name,
                    REGION=region,
                    CLIENT_ID=f"client-{number}",
                    CLIENTS_PER_PROCESS=hosted,
                    **self._admission(region),
                )
                start.append(clients.Client(name, str(self.logs / f"{name}.log"), env))
        path = self._private / "clients.json"
        clients.save(start, path)
        self._start("clients", clients.__name__, self._env("clients"), str(path))

    def _env(self, name: str, **settings: object) -> dict[str, str]:
        """Environment of a tier, on top of the user's."""
        home = self._private / name
        home.mkdir()
        direct = os.environ.get("no_proxy", os.environ.get("NO_PROXY", ""))
        direct = ",".join(filter(None, [direct, self.broker.host, "localhost"]))
        env = {
            "MQTT_BROKER": self.broker.host,
            "MQTT_PORT": self.broker.port,
            "REGIONS": ",".join(self.regions),
            "FLOWER_SERVER": f"127.0.0.1:{self._flower_port}",
            "TLS_DIR": "",
            "TASK": self._options.task,
            "DATA_DIR": self._options.data_dir.resolve(),
            "STATE_DIR": home,
            "HEALTH_FILE": home / "health",
            "EXIT_WHEN_FINISHED": "false",
            "LOG_FORMAT": "json",
            "OMP_NUM_THREADS": 1,  # the tiers share the cores
            "TMPDIR": self._private,
            "no_proxy": direct,  # Flower's requests would go to the user's proxy
            "NO_PROXY": direct,
            **self._options.environment,
        } | settings
        if self._options.processes:  # many trainings on few cores: nobody is to be left out
            env = {key: os.environ.get(key, PATIENCE) for key in LIMITS} | env
        return {key: str(value) for key, value in env.items()}
