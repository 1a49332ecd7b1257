"""What a user would pick instead of FedFog: how long their rounds take with training off.

An update is the model plus a constant, of the same tensors as FedFog's CNN; FedAvg over clients
that count the same; a process per client on loopback. Each rival is used as its own examples do
it, with its defaults. Every model is compared with the mean that it should be.
"""

import json
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.rivals.model import CLIENTS, MARKS, ROUNDS, mean_step


@dataclass(frozen=True)
class Rival:
    """Seconds per round, None where nothing could be measured; the note says why, or how.

    `n` is the number of timed rounds.
    """

    name: str
    version: str
    clients: int
    median_s: float | None
    p95_s: float | None
    n: int
    note: str


@dataclass(frozen=True)
class Case:
    """One measurement: `warm_up` rounds that do not count, then `rounds` that do."""

    name: str
    clients: int
    warm_up: int
    rounds: int
    limit: float
    quick: bool = False


CASES = (
    Case("flower", 3, 0, 3, 100),
    Case("flower", 10, 0, 2, 120, quick=True),
    Case("flower-torch", 3, 0, 3, 170),
    Case("flower-torch", 10, 0, 2, 170, quick=True),
    Case("flower-grpc", 3, 2, 20, 60),
    Case("flower-grpc", 10, 2, 20, 60, quick=True),
    Case("sdflmq", 4, 1, 5, 150),  # it wants two aggregators and four clients at least
    Case("sdflmq", 10, 1, 5, 170),
    Case("nvflare", 3, 1, 10, 90),
    Case("nvflare", 10, 1, 10, 150),
)
NAMES = tuple(dict.fromkeys(case.name for case in CASES))
HOW = {
    "flower": "SuperLink and a SuperNode per client, all defaults, an app that imports only NumPy",
    "flower-torch": "the same with an app that imports PyTorch, as one that trains with it does",
    "flower-grpc": "start_server and start_client, deprecated: the floor of Flower",
    "sdflmq": "on Mosquitto; some of its clients aggregate",
    "nvflare": "its simulator with a process per client",
}


def measure(
    names: Collection[str] = NAMES,
    quick: bool = False,
    progress: Callable[[str], None] = lambda _step: None,
) -> list[Rival]:
    """Time the rounds of rivals, one case after the other.

    Args:
        names: some of NAMES.
        quick: only Flower, with 10 clients.
        progress: is told what is measured next.

    Raises:
        ValueError: no such rival.
    """
    if unknown := set(names) - set(NAMES):
        raise ValueError(f"no such rival: {', '.join(sorted(unknown))}; there are {NAMES}")
    rivals = []
    for case in CASES:
        if case.name in names and (case.quick or not quick):
            progress(f"{case.name}, {case.clients} clients")
            rivals.append(run(case))
    return rivals


def run(case: Case) -> Rival:
    """Measure one case."""
    # Imported here: the environments of the rivals have this package, but not what it needs.
    from bench.rivals.processes import NotMeasuredError, Processes
    from bench.rivals.starters import STARTERS

    models = 1 + case.warm_up + case.rounds
    with tempfile.TemporaryDirectory(prefix="fedfog-rival-") as name:
        folder = Path(name)
        marks = folder / "marks"
        marks.touch()
        # More rounds than are timed: nothing that ends a run is in the figures.
        env = {MARKS: str(marks), CLIENTS: str(case.clients), ROUNDS: str(models + 1)}
        try:
            with Processes(folder, env) as processes:
                version = STARTERS[case.name](processes, folder, case.clients)
                deadline = time.monotonic() + case.limit
                while len(lines := marks.read_text().splitlines()) < models:
                    processes.check()
                    if time.monotonic() > deadline:
                        break
                    time.sleep(0.05)
        except NotMeasuredError as error:
            return Rival(case.name, "", case.clients, None, None, 0, f"not measured: {error}")
    return _rival(case, version, [json.loads(line) for line in lines[:models]])


def _rival(case: Case, version: str, marks: list[dict[str, float]]) -> Rival:
    gaps = np.diff([mark["at"] for mark in marks])[case.warm_up :]
    missing = case.rounds - len(gaps)
    if not len(gaps):
        note = f"not measured: {len(marks)} models within {case.limit:.0f} s"
        return Rival(case.name, version, case.clients, None, None, 0, note)
    note = HOW[case.name]
    if missing:
        note += f"; {missing} rounds more did not come within {case.limit:.0f} s"
    steps = np.diff([mark["value"] for mark in marks])
    if not np.allclose(steps, mean_step(case.clients)):
        note += "; its models are not the mean of the updates"
    median, p95 = (round(float(s), 4) for s in np.percentile(gaps, [50, 95]))
    return Rival(case.name, version, case.clients, median, p95, len(gaps), note)
