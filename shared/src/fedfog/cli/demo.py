"""`fedfog demo`: a whole federation on this machine, every tier as its own process on loopback.

The processes find each other in whatever order they come up. They end with this one: at the end
of the run, on Ctrl-C and SIGTERM, when one of them dies, and (on Linux) when this process is
killed. Whatever is not needed to start them is imported after they were started.
"""

import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from fedfog.cli.broker import Kind, LocalBroker, free_port
from fedfog.service import EXIT_FAILED, EXIT_OK, ServiceError, spawn

if TYPE_CHECKING:
    from fedfog.cli.story import Story

STOP_SECONDS = 10.0
LOG_LINES = 12
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_KNOWN = ("service", "region", "client")  # the tier's name says it


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


@dataclass
class Tier:
    """One process of the federation."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def report_end(self, put: Callable[["Ended"], None]) -> None:
        """Have a thread wait for the process, and `put` its end into a queue."""

        def wait() -> None:
            put(Ended(self, self.process.wait()))

        threading.Thread(target=wait, name=self.name, daemon=True).start()


@dataclass(frozen=True)
class Ended:
    """A tier's process has ended, with this exit code (negative: killed by this signal)."""

    tier: Tier
    code: int

    def __str__(self) -> str:
        if self.code < 0:
            return f"{self.tier.name} was killed by {signal.Signals(-self.code).name}"
        return f"{self.tier.name} ended with exit code {self.code}"


class Stopped(BaseException):
    """SIGINT or SIGTERM came."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class DemoError(Exception):
    """The demo cannot go on; the text is for the user."""

    def __init__(self, text: str, exit_code: int = EXIT_FAILED) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class Federation:
    """The processes of a demo.

    Args:
        private: folder of what none of them needs after the demo.
    """

    def __init__(self, options: Options, run: str, private: Path) -> None:
        self.region_names = tuple(f"region_{i}" for i in range(options.regions))
        self.logs = options.runs_dir / run / "logs"
        self.logs.mkdir(parents=True)
        self.broker = LocalBroker(self.logs, options.broker)
        self.tiers: list[Tier] = []
        self._options, self._private = options, private
        self._flower_port = free_port()
        self._settings = {
            "MQTT_BROKER": self.broker.host,
            "MQTT_PORT": str(self.broker.port),
            "REGIONS": ",".join(self.region_names),
            "FLOWER_SERVER": f"127.0.0.1:{self._flower_port}",
            "TASK": options.task,
            "DATA_DIR": str(options.data_dir.resolve()),
            "EXIT_WHEN_FINISHED": "false",
            "LOG_FORMAT": "json",
            "OMP_NUM_THREADS": "1",  # as many processes as there are tiers share the cores
            "TMPDIR": str(private),
        }

    def start(self) -> None:
        """Start all tiers; the one whose chain of processes is the longest first.

        Raises:
            ServiceError: the broker does not come up.
        """
        options = self._options
        self._start(
            "central-server",
            "fedfog_central_server.main",
            RUN_ID=self.logs.parent.name,
            RUNS_DIR=options.runs_dir.resolve(),
            ROUNDS=options.rounds,
            SEED=options.seed,
            LOCAL_EPOCHS=options.local_epochs,
            MIN_AVAILABLE_CLIENTS=options.regions,
            MIN_FIT_CLIENTS=options.regions,
            FLOWER_HOST="127.0.0.1",
            FLOWER_PORT=self._flower_port,
            EXIT_WHEN_FINISHED="true",
        )
        self.broker.start()
        assert self.broker.process is not None
        self.tiers.append(Tier("broker", self.broker.process, self.logs / "broker.log"))
        for region in self.region_names:
            self._start(
                f"{region}-aggregator",
                "fedfog_aggregator.main",
                REGION=region,
                CLIENTS_EXPECTED=options.clients,
            )
            for i in range(1, options.clients + 1):
                self._start(
                    f"{region}-client-{i}",
                    "fedfog_client.main",
                    REGION=region,
                    CLIENT_ID=f"client-{i}",
                )
            self._start(f"{region}-bridge", "fedfog_bridge.main", REGION=region)

    def stop(self) -> list[str]:
        """End all tiers, the broker last; returns the names of those that had to be killed."""
        killed = []
        others = [tier for tier in self.tiers if tier.name != "broker"]
        for group in (others, [tier for tier in self.tiers if tier.name == "broker"]):
            for tier in group:
                tier.process.terminate()
            deadline = time.monotonic() + STOP_SECONDS
            for tier in group:
                try:
                    tier.process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    tier.process.kill()
                    tier.process.wait()
                    killed.append(tier.name)
        return killed

    def _start(self, name: str, module: str, **settings: object) -> None:
        home = self._private / name
        home.mkdir()
        env = {"STATE_DIR": str(home), "HEALTH_FILE": str(home / "health"), **self._settings}
        env |= {key: str(value) for key, value in settings.items()}
        log = self.logs / f"{name}.log"
        process = spawn([sys.executable, "-m", module], env, log)
        self.tiers.append(Tier(name, process, log))


def run(options: Options) -> int:
    """Run a federation from start to end; returns the exit code."""
    began = time.monotonic()
    for number in _SIGNALS:
        signal.signal(number, _interrupt)
    name = f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    try:
        with tempfile.TemporaryDirectory(prefix="fedfog-demo-") as private:
            federation = Federation(options, name, Path(private))
            try:
                federation.start()
                story = _watch(federation, options, began)
            finally:
                for number in _SIGNALS:
                    signal.signal(number, signal.SIG_IGN)
                federation.stop()
    except Stopped as stopped:
        sys.stderr.write(f"\nStopped by {stopped}; no process is left.\n")
        return stopped.exit_code
    except DemoError as failed:
        sys.stderr.write(f"\n{failed}\n")
        return failed.exit_code
    except (ServiceError, OSError) as error:
        sys.stderr.write(f"\n{error}\n")
        return EXIT_FAILED
    story.summarize(federation.logs.parent)
    return EXIT_OK


def _interrupt(number: int, _frame: FrameType | None) -> None:
    raise Stopped(number)


def _watch(federation: Federation, options: Options, began: float) -> "Story":
    """Show what happens until the central server has ended well.

    Raises:
        DemoError: a process ended that should not, or time is up.
    """
    from rich.console import Console

    from fedfog import logs
    from fedfog.cli.story import REFRESH_SECONDS, Story
    from fedfog.messages.catalog import read
    from fedfog.messages.codec import CodecError
    from fedfog.settings import CommonSettings, load
    from fedfog.transport import mqtt

    logs.configure("demo", "error")
    topics = load(CommonSettings).topics
    broker = federation.broker
    session = mqtt.Session(
        "fedfog-demo",
        broker.host,
        broker.port,
        [
            topics.global_model,
            topics.history,
            topics.status("+"),
            topics.progress("+"),
            topics.presence("+", "+"),
            topics.bridge("+"),
            topics.receipts("+"),
        ],
    )
    session.start()
    for tier in federation.tiers:
        tier.report_end(session.events.put)
    folder = federation.logs.parent
    story = Story(Console(highlight=False), federation.region_names, options, began)
    story.say(f"run {folder.name}: {broker.kind} on port {broker.port}; logs in {federation.logs}")
    with story:
        while True:
            event = session.next(REFRESH_SECONDS)
            now = time.monotonic()
            if isinstance(event, Ended):
                if event.tier.name == "central-server" and event.code == EXIT_OK:
                    break
                raise DemoError(_obituary(event), event.code if event.code > 0 else EXIT_FAILED)
            if now - began > options.time_limit:
                raise DemoError(
                    f"No end after {options.time_limit:.0f} s (--time-limit): {story.state()}. "
                    f"The logs are in {federation.logs}"
                )
            if isinstance(event, mqtt.Received):
                try:
                    story.see(read(topics, event.topic, event.payload), now)
                except CodecError as error:
                    story.say(f"{event.topic}: {error}")
            story.refresh()
    session.stop()
    return story


def _obituary(ended: Ended) -> str:
    """What a user needs to know of a tier that ended before its time."""
    lines = ended.tier.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
    end = "\n".join(f"  {_readable(line)}" for line in lines)
    return f"{ended}. Its log, {ended.tier.log}, ends with:\n{end}"


def _readable(line: str) -> str:
    """A JSON log line as text; any other line as it is."""
    try:
        fields: Any = json.loads(line)
    except ValueError:
        return line
    if not isinstance(fields, dict):
        return line
    first = [str(fields.pop(name, "")) for name in ("timestamp", "level", "event")]
    rest = [f"{name}={value}" for name, value in fields.items() if name not in _KNOWN]
    return " ".join(filter(None, [*first, *rest]))
