"""`make bench`: what a round costs when training is switched off, and how long the demo takes.

Starts the demo's own processes, watches the global models that are published, and writes a table,
`bench/results/latest.json` and a plot. Figures of different machines, and of the same machine at
another load, are not to be compared.
"""

import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fedfog import logs
from fedfog.cli.federation import Ended, Federation, Options
from fedfog.messages.codec import decode_meta
from fedfog.messages.schemas import ModelMeta, RunState, UpdateMeta
from fedfog.messages.topics import Topics
from fedfog.transport import mqtt

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
CASES = ((3, 1), (10, 2))  # clients in all, regions
WARM_UP, ROUNDS, RUNS = 2, 40, 3
START_RUNS = 3
LIMIT_SECONDS = 300


@dataclass(frozen=True)
class Overhead:
    """Seconds from one published model to the next, training switched off."""

    clients: int
    regions: int
    median_s: float
    p95_s: float
    n: int
    medians_of_runs: list[float]


@dataclass
class Watched:
    """What was seen of one run of a federation."""

    models_at: list[float]  # monotonic seconds at which model 0, 1, ... was received
    started_at: float
    update_bytes: int
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
        seen = Watched([], began, 0, {})
        try:
            federation.start()
            broker = federation.broker
            filters = [topics.global_model, topics.updates + "/region_0/client-1"]
            session = mqtt.Session("fedfog-bench", broker.host, broker.port, filters)
            session.start()
            federation.watch(session.events.put)
            while time.monotonic() - began < LIMIT_SECONDS:
                event = session.next(1.0)
                if isinstance(event, Ended):
                    raise RuntimeError(f"{event}; see {event.log}")
                if not isinstance(event, mqtt.Received) or not event.payload:
                    continue
                now = time.monotonic()
                if event.topic != topics.global_model:
                    meta = decode_meta(event.payload, UpdateMeta)
                    assert meta.client == "client-1"
                    seen.update_bytes = len(event.payload)
                    continue
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
    "mosquitto": "broker",
    "fedfog.cli.broker": "broker",
}


def options(clients: int, regions: int, rounds: int, folder: Path, task: str) -> Options:
    """`clients` in all; they are dealt to the regions evenly."""
    return Options(
        clients=clients // regions,
        rounds=rounds,
        regions=regions,
        seed=1,
        local_epochs=1 if task != "ecg5000" else 3,
        task=task,
        broker=None,
        runs_dir=folder,
        data_dir=ROOT / "data",
        time_limit=LIMIT_SECONDS,
    )


def measure_overhead(clients: int, regions: int, folder: Path) -> tuple[Overhead, Watched]:
    every: list[np.ndarray] = []
    for _ in range(RUNS):
        seen = watch(options(clients, regions, WARM_UP + ROUNDS, folder, "bench.idle:Idle"))
        every.append(np.diff(seen.models_at)[WARM_UP:])
    gaps = np.concatenate(every)
    overhead = Overhead(
        clients,
        regions,
        round(float(np.median(gaps)), 4),
        round(float(np.percentile(gaps, 95)), 4),
        len(gaps),
        [round(float(np.median(run)), 4) for run in every],
    )
    return overhead, seen


def machine() -> dict[str, Any]:
    """What the figures were seen on."""
    cpu = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []:
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_before": [round(x, 2) for x in os.getloadavg()],
        "date": time.strftime("%Y-%m-%d"),
    }


def plot(overheads: list[Overhead], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    labels = [f"{o.clients} clients\n{o.regions} region(s)" for o in overheads]
    medians = [1e3 * o.median_s for o in overheads]
    tails = [1e3 * (o.p95_s - o.median_s) for o in overheads]
    axes.bar(labels, medians, yerr=[[0.0] * len(tails), tails], capsize=6, color="#3572a5")
    axes.set_ylabel("ms per round, training off\n(median, 95th percentile)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> int:
    logs.configure("bench", "error")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")]))
    console = Console()
    about = machine()
    console.print(f"{about['cpu']}, {about['cores']} cores, {about['memory_gb']} GB")
    overheads: list[Overhead] = []
    memory: dict[str, float] = {}
    wire_bytes = 0
    with Progress(console=console) as progress, tempfile.TemporaryDirectory() as folder:
        steps = progress.add_task("measuring", total=len(CASES) + START_RUNS)
        for clients, regions in CASES:
            progress.update(steps, description=f"{clients} clients, {regions} region(s)")
            overhead, seen = measure_overhead(clients, regions, Path(folder))
            overheads.append(overhead)
            wire_bytes = seen.update_bytes
            progress.advance(steps)
        starts = []
        for _ in range(START_RUNS):
            progress.update(steps, description="start to final model, 3 clients, 3 rounds")
            seen = watch(options(3, 1, 3, Path(folder), "ecg5000"))
            starts.append(round(seen.models_at[-1] - seen.started_at, 2))
            memory = seen.pss_mb
            progress.advance(steps)

    table = Table("clients", "regions", "median ms", "p95 ms", "rounds", "medians of runs, ms")
    for o in overheads:
        runs = ", ".join(f"{1e3 * m:.0f}" for m in o.medians_of_runs)
        table.add_row(
            str(o.clients),
            str(o.regions),
            f"{1e3 * o.median_s:.0f}",
            f"{1e3 * o.p95_s:.0f}",
            str(o.n),
            runs,
        )
    console.print(table)
    parameters = 68_353
    report = {
        "machine": about,
        "round_overhead": [asdict(o) for o in overheads],
        "start_to_final_s": float(np.median(starts)),
        "start_to_final_runs_s": starts,
        "stack_pss_mb": round(sum(memory.values()), 1),
        "stack_pss_by_program_mb": memory,
        "update_wire_bytes": wire_bytes,
        "update_wire_ratio": round(wire_bytes / (4 * parameters), 5),
    }
    console.print(
        f"start to final model (3 clients, 3 rounds, real training): {starts} s\n"
        f"memory of that stack: {report['stack_pss_mb']} MB PSS {memory}\n"
        f"update on the wire: {wire_bytes} bytes, {report['update_wire_ratio']} of float32"
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "latest.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(overheads, RESULTS / "round-overhead.png")
    console.print(f"written: {RESULTS / 'latest.json'} and round-overhead.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
