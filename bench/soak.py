"""`python -m bench.soak 2000`: do memory and files of a federation stay flat over many rounds?

Runs the demo's processes (two regions of two clients each) on a model of a few bytes, and reads
at some rounds what each service has in memory and on disk. Memory is the proportional share of
anonymous pages (`Pss_Anon`): pages of programs and libraries cannot leak, and as all processes of
the machine share them, they would make the figures depend on what else is running.

What a run writes for its user, a line a round, is listed apart: history and logs.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import TensorDataset

from bench.rounds import PROGRAMS, ROOT
from fedfog import logs
from fedfog.cli.federation import Ended, Federation, Options
from fedfog.messages.codec import decode_meta
from fedfog.messages.schemas import ModelMeta
from fedfog.messages.topics import Topics
from fedfog.ml.task import Task
from fedfog.transport import mqtt

REGIONS, CLIENTS = 2, 2
MARKS = (0.1, 0.25, 0.5, 0.75, 1.0)  # of all rounds
SAMPLES = 5  # one a round: what a round needs for a moment comes and goes
SILENT_SECONDS = 120.0  # without a new model: the federation hangs


class Tiny(Task):
    """Two examples a client and a model of five parameters."""

    name = "tiny"
    description = "nothing: measures what grows"
    class_names = ("low", "high")

    def __init__(self, _data_dir: Path) -> None:
        labels = torch.arange(2 * REGIONS * CLIENTS) % 2
        self._data = TensorDataset(torch.randn(len(labels), 4) + labels[:, None], labels)

    def new_model(self) -> nn.Module:
        return nn.Linear(4, 1)

    def training_labels(self) -> NDArray[np.int64]:
        labels: NDArray[np.int64] = self._data.tensors[1].numpy()
        return labels

    def training_data(self, indices: NDArray[np.int64]) -> TensorDataset:
        return TensorDataset(*self._data[torch.from_numpy(indices)])

    def test_data(self) -> TensorDataset:
        return self._data


@dataclass(frozen=True)
class Reading:
    """Bytes in memory and on disk when model `round` has come, by service; `written` is what
    the user gets."""

    round: int
    memory: dict[str, int]
    files: dict[str, int]
    written: dict[str, int]


def memory() -> dict[str, int]:
    """Of all descendants of this process, by service."""
    sizes: dict[str, int] = defaultdict(int)
    for process in psutil.Process().children(recursive=True):
        try:
            command = " ".join(process.cmdline())
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        except (psutil.NoSuchProcess, OSError):
            continue
        name = next((n for n in PROGRAMS if n in command), "other")
        pages = next(line for line in rollup.splitlines() if line.startswith("Pss_Anon:"))
        sizes[PROGRAMS.get(name, name)] += 1024 * int(pages.split()[1])
    return dict(sizes)


def files(run: Path, private: Path) -> tuple[dict[str, int], dict[str, int]]:
    """What the services keep, and what they write for the user."""
    kept: dict[str, int] = defaultdict(int)
    written: dict[str, int] = defaultdict(int)
    for path in [*run.rglob("*"), *private.rglob("*")]:
        try:
            size = 0 if path.is_dir() else path.stat().st_size
        except FileNotFoundError:  # replaced just now
            continue
        if path.parent.name == "logs":
            written["logs"] += size
        elif path.name.startswith("history"):
            written["history"] += size
        elif path.is_relative_to(run):
            kept["run's folder"] += size
        elif path.parent != private:
            kept[path.relative_to(private).parts[0]] += size
    return dict(kept), dict(written)


def soak(rounds: int, private: Path) -> list[Reading]:
    """Run a federation for so many rounds, and read at each mark.

    Raises:
        RuntimeError: a process ended that should not, or no round ends any more.
    """
    topics, marks = Topics(), [int(rounds * mark) for mark in MARKS]
    options = Options(
        clients=CLIENTS,
        rounds=rounds + SAMPLES,
        regions=REGIONS,
        seed=1,
        local_epochs=1,
        task="bench.soak:Tiny",
        broker=None,
        runs_dir=private / "runs",
        data_dir=private,
        time_limit=0.0,
    )
    home = private / "private"
    home.mkdir()
    federation = Federation(options, "soak", home)
    readings: list[Reading] = []
    samples: list[dict[str, int]] = []
    newest, heard_at = -1, time.monotonic()
    try:
        federation.start()
        broker = federation.broker
        session = mqtt.Session("fedfog-soak", broker.host, broker.port, [topics.global_model])
        session.start()
        federation.watch(session.events.put)
        while time.monotonic() - heard_at < SILENT_SECONDS:
            event = session.next(1.0)
            if isinstance(event, Ended):
                raise RuntimeError(f"{event}; see {event.log}")
            if not isinstance(event, mqtt.Received) or not event.payload:
                continue
            model = decode_meta(event.payload, ModelMeta)
            if model.round <= newest:
                continue
            newest, heard_at = model.round, time.monotonic()
            if marks and newest >= marks[0]:
                samples.append(memory())
            if len(samples) == SAMPLES:
                median = {
                    name: int(statistics.median(sample.get(name, 0) for sample in samples))
                    for name in sorted(samples[-1])
                }
                readings.append(Reading(newest, median, *files(federation.folder, home)))
                samples.clear()
                marks.pop(0)
            if not marks:
                session.stop()
                return readings
        raise RuntimeError(f"no new model for {SILENT_SECONDS:.0f} s; see {federation.logs}")
    finally:
        federation.stop()


def show(console: Console, readings: list[Reading]) -> None:
    first, last = readings[0], readings[-1]
    for kind in ("memory", "files", "written"):
        head = [f"{reading.round}" for reading in readings]
        table = Table(f"{kind}, kB at round", *head, "growth", "bytes/round")
        for name in sorted(getattr(last, kind)):
            sizes = [getattr(reading, kind).get(name, 0) for reading in readings]
            grown = sizes[-1] - sizes[0]
            share = grown / max(sizes[0], 1)
            per_round = grown / (last.round - first.round)
            cells = [f"{size / 1e3:,.0f}" for size in sizes]
            table.add_row(name, *cells, f"{100 * share:+.1f} %", f"{per_round:,.0f}")
        console.print(table)


def main(rounds: int) -> int:
    """Prints a table on stderr, and the readings as JSON on stdout."""
    logs.configure("soak", "error")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")]))
    console = Console(stderr=True, width=140)
    with tempfile.TemporaryDirectory(prefix="fedfog-soak-") as folder:
        began = time.monotonic()
        readings = soak(rounds, Path(folder))
        console.print(f"{readings[-1].round} rounds in {time.monotonic() - began:.0f} s")
    show(console, readings)
    sys.stdout.write(json.dumps([asdict(reading) for reading in readings]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
