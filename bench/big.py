"""`python -m bench.big`: what a model's size costs, from a thousand to 25 million parameters.

Runs the demo's own processes, one region of three clients with training switched off, for three
rounds. Time is that from one published model to the next, of rounds 2 and 3 (Flower starts during
round 1). Memory is the peak of each service's largest process: `VmHWM`, what the kernel counted,
and the proportional set size (PSS), which is looked at a few times a second and so may miss a
short peak.
"""

import json
import os
import queue
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from bench.rounds import PROGRAMS, ROOT
from fedfog.cli.federation import SERVER, Ended, Federation, Options
from fedfog.logs import Step

SIZES = (1_000, 68_000, 1_000_000, 11_000_000, 25_000_000)
QUICK = (68_000, 5_000_000)
CLIENTS, ROUNDS = 3, 3
LIMIT_SECONDS = 600.0
LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class Measured:
    """One run. Bytes; `hwm` and `pss` of the largest process of each service."""

    parameters: int
    clients: int
    regions: int
    model_bytes: int
    start_s: float  # from nothing to model 1
    median_s: float  # of a round
    rounds_s: list[float]
    hwm: dict[str, int]
    pss: dict[str, int]


class _Memory(threading.Thread):
    """Looks at the memory of all descendants of this process until `stop`."""

    def __init__(self) -> None:
        super().__init__(name="memory", daemon=True)
        self.hwm: dict[str, int] = {}
        self.pss: dict[str, int] = {}
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            for process in psutil.Process().children(recursive=True):
                try:
                    command = " ".join(process.cmdline())
                    folder = Path("/proc", str(process.pid))
                    hwm = _kilobytes(folder / "status", "VmHWM:")
                    pss = _kilobytes(folder / "smaps_rollup", "Pss:")
                except (psutil.NoSuchProcess, OSError, StopIteration):
                    continue  # it has just ended
                name = next((PROGRAMS[p] for p in PROGRAMS if p in command), "other")
                self.hwm[name] = max(self.hwm.get(name, 0), hwm)
                self.pss[name] = max(self.pss.get(name, 0), pss)

    def stop(self) -> None:
        self._over.set()
        self.join()


def _kilobytes(path: Path, field: str) -> int:
    """A field of a file in /proc, in bytes."""
    line = next(line for line in path.read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def run(parameters: int, clients: int = CLIENTS, rounds: int = ROUNDS) -> Measured:
    """Run a federation with a model of that size.

    Raises:
        RuntimeError: a process ended that should not, or time is up; the text names its log.
    """
    os.environ["WIDE_PARAMETERS"] = str(parameters)
    with tempfile.TemporaryDirectory(prefix="fedfog-big-") as folder:
        options = Options(
            clients=clients,
            rounds=rounds,
            regions=1,
            seed=1,
            local_epochs=1,
            task="bench.wide_model:Wide",
            broker=None,
            runs_dir=Path(folder),
            data_dir=ROOT / "data",
            time_limit=LIMIT_SECONDS,
        )
        federation = Federation(options, "big", Path(folder))
        memory, ends = _Memory(), queue.SimpleQueue[Ended]()
        began = time.time()
        try:
            federation.start()
            memory.start()
            federation.watch(ends.put)
            ended = ends.get(timeout=LIMIT_SECONDS)
            if (ended.name, ended.code) != (SERVER, 0):
                end = ended.log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{ended}:\n{end}")
        except queue.Empty as error:
            log = (federation.logs / f"{SERVER}.log").read_text()[-2000:]
            raise RuntimeError(f"no end after {LIMIT_SECONDS:.0f} s:\n{log}") from error
        finally:
            if memory.is_alive():
                memory.stop()
            federation.stop()
        published = _published(federation.logs / f"{SERVER}.log")
    gaps = [later - earlier for earlier, later in pairwise(published[1:])]
    return Measured(
        parameters,
        clients,
        1,
        4 * parameters,
        round(published[1] - began, 3),
        round(statistics.median(gaps), 4),
        [round(gap, 4) for gap in gaps],
        memory.hwm,
        memory.pss,
    )


def _published(log: Path) -> list[float]:
    """When each model was published, in seconds."""
    lines = (json.loads(line) for line in log.read_text().splitlines() if line.startswith("{"))
    at = [line["timestamp"] for line in lines if line["event"] == Step.PUBLISH_MODEL]
    return [datetime.fromisoformat(text).timestamp() for text in at]


def measure(sizes: Sequence[int], progress: Callable[[str], None]) -> list[dict[str, object]]:
    """A row for each number of parameters, as JSON; `progress` is told what is measured."""
    rows = []
    for size in sizes:
        progress(f"a model of {size:,} parameters")
        rows.append(asdict(run(size)))
    return rows


def table(rows: list[Measured]) -> Table:
    """Memory in MB and, for large models, in multiples of the model."""
    names = sorted({name for row in rows for name in row.hwm})
    shown = Table("parameters", "MB", "s to model 1", "s a round", *names)
    for row in rows:
        cells = []
        for name in names:
            peak = row.hwm.get(name, 0)
            times = f" ({peak / row.model_bytes:.1f}x)" if row.model_bytes > 1_000_000 else ""
            cells.append(f"{peak / 1e6:.0f}{times} {row.pss.get(name, 0) / 1e6:.0f}")
        shown.add_row(
            f"{row.parameters:,}",
            f"{row.model_bytes / 1e6:.1f}",
            f"{row.start_s:.1f}",
            f"{row.median_s:.2f}",
            *cells,
        )
    return shown


def main() -> int:
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")]))
    console = Console(width=200)
    sizes = QUICK if "--quick" in sys.argv else SIZES
    chosen = [int(text) for text in sys.argv[1:] if text.isdecimal()]
    rows = [Measured(**row) for row in measure(chosen or sizes, console.print)]  # type: ignore[arg-type]
    console.print(table(rows), "Memory: VmHWM and peak PSS of the largest process, MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
