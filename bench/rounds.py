"""Federations of the demo's own processes, as a user would start them: what a round takes with
training on and off, where its time goes, how long the demo takes, and what it has in memory."""

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from bench.waterfall import waterfall
from fedfog.cli.federation import Ended, Federation, Options
from fedfog.messages.codec import decode_meta
from fedfog.messages.schemas import ModelMeta, RunState
from fedfog.messages.topics import Topics
from fedfog.transport import mqtt

ROOT = Path(__file__).parents[1]
IDLE, REAL = "bench.idle:Idle", "ecg5000"
WARM_UP = 2
LIMIT_SECONDS = 300


@dataclass(frozen=True)
class Rounds:
    """Rounds of real clients, a process each: seconds from one published model to the next."""

    clients: int
    regions: int
    training: bool
    median_s: float
    p95_s: float
    n: int
    waterfall: dict[str, dict[str, float]]


@dataclass
class Watched:
    """What was seen of one run of a federation."""

    models_at: list[float]  # monotonic seconds at which model 0, 1, ... was received
    started_at: float
    pss_mb: dict[str, float]


def watch(options: Options) -> Watched:
    """Run a federation to its end and note when its models came.

    Raises:
        RuntimeError: a process ended that should not, or time is up.
    """
    topics = Topics()
    with tempfile.TemporaryDirectory(prefix="fedfog-bench-") as private:
        began = time.monotonic()
        federation = Federation(options, f"bench-{time.monotonic_ns()}", Path(private))
        seen = Watched([], began, {})
        try:
            federation.start()
            broker = federation.broker
            session = mqtt.Session("fedfog-bench", broker.host, broker.port, [topics.global_model])
            session.start()
            federation.watch(session.events.put)
            while time.monotonic() - began < LIMIT_SECONDS:
                event = session.next(1.0)
                if isinstance(event, Ended):
                    raise RuntimeError(f"{event}; see {event.log}")
                if not isinstance(event, mqtt.Received) or not event.payload:
                    continue
                now = time.monotonic()
                model = decode_meta(event.payload, ModelMeta)
                if model.round == len(seen.models_at):
                    seen.models_at.append(now)
                if model.state is RunState.FINISHED:
                    seen.pss_mb = memory_of(os.getpid())
                    session.stop()
                    return seen
            raise RuntimeError(f"no end after {LIMIT_SECONDS} s; see {federation.logs}")
        finally:
            federation.stop()


def memory_of(root: int) -> dict[str, float]:
    """Proportional set size in MB of all descendants of a process, by program."""
    sizes: dict[str, float] = {}
    for process in psutil.Process(root).children(recursive=True):
        try:
            pss = process.memory_full_info().pss / 1e6
            command = " ".join(process.cmdline())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        name = next((n for n in PROGRAMS if n in command), "other")
        sizes[PROGRAMS.get(name, name)] = sizes.get(PROGRAMS.get(name, name), 0.0) + pss
    return {name: round(size, 1) for name, size in sorted(sizes.items())}


PROGRAMS = {
    "fedfog_central_server": "central-server",
    "fedfog.flower.superlink": "SuperLink",
    "flower-superexec": "SuperExec",
    "flwr-serverapp": "ServerApp",
    "fedfog_aggregator": "aggregators",
    "fedfog_bridge": "bridges",
    "fedfog.cli.clients": "clients",
    "bench.swarm": "clients",
    "mosquitto": "broker",
    "fedfog.cli.broker": "broker",
}


def options(clients: int, regions: int, rounds: int, folder: Path, training: bool) -> Options:
    """`clients` in all; they are dealt to the regions evenly."""
    return Options(
        clients=clients // regions,
        rounds=rounds,
        regions=regions,
        seed=1,
        local_epochs=3 if training else 1,
        task=REAL if training else IDLE,
        broker=None,
        runs_dir=folder,
        data_dir=ROOT / "data",
        time_limit=LIMIT_SECONDS,
    )


def measure(clients: int, regions: int, rounds: int, training: bool) -> Rounds:
    """Raises RuntimeError: a process ended that should not, or time is up."""
    with tempfile.TemporaryDirectory(prefix="fedfog-bench-") as name:
        folder = Path(name)
        seen = watch(options(clients, regions, WARM_UP + rounds, folder, training))
        gaps = np.diff(seen.models_at)[WARM_UP:]
        [logs] = folder.glob("bench-*/logs")
        steps = waterfall(logs, WARM_UP)
    median, p95 = (round(float(q), 4) for q in np.percentile(gaps, [50, 95]))
    return Rounds(clients, regions, training, median, p95, len(gaps), steps)


def demo() -> tuple[float, dict[str, float]]:
    """Seconds from the start of 3 clients to the final model of 3 rounds of real training, and the
    memory of that stack, MB of proportional set size by program."""
    with tempfile.TemporaryDirectory(prefix="fedfog-bench-") as name:
        seen = watch(options(3, 1, 3, Path(name), training=True))
    return round(seen.models_at[-1] - seen.started_at, 2), seen.pss_mb
