"""`fedfog experiment SWEEP.TOML`: a grid of settings and seeds, run by run on one federation.

A run's name says which point of the grid it is, so what is there already need not be done again:
completed runs are skipped, and one that was cut off goes on from its checkpoint. The clients have
fixed names, and a run does not begin without all of them; so they have the same examples whichever
process was killed when, and the table is that of an undisturbed sweep.
"""

import hashlib
import json
import os
import queue
import re
import shutil
import signal
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import product
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fedfog import settings as services
from fedfog.cli import report, results
from fedfog.cli.demo import SIGNALS, Stopped, interrupt, obituary
from fedfog.cli.federation import LIMITS, PATIENCE, Ended, Federation, Options
from fedfog.cli.results import PLAN, Row
from fedfog.control import (
    PLACE,
    Answer,
    ControlError,
    ResumeCommand,
    RunCommand,
    StatusQuestion,
    ask,
)
from fedfog.files import write_atomically
from fedfog.messages.topics import NAME_PATTERN
from fedfog.runs import Status
from fedfog.service import EXIT_FAILED, EXIT_OK, ServiceError
from fedfog.settings import CHOOSABLE

POLL_SECONDS = 0.2
NAME_LENGTH = 40  # of the part that says which point of the grid it is
HOW_ONLY = {"processes", "data_dir", "secure", "broker"}  # nothing of it is in the figures

Scalar = str | bool | int | float


class SweepError(Exception):
    """The sweep is impossible, or a part of it failed; the text says what to do."""


class Stack(BaseModel):
    """The federation, as `fedfog demo` has it. What is not listed here is a setting of the
    services (docs/settings.md), such as `k`."""

    model_config = ConfigDict(extra="allow", frozen=True)

    clients: int = Field(3, ge=1, description="in each region")
    regions: int = Field(1, ge=1)
    tiers: int = Field(2, ge=2, le=5)
    processes: int | None = Field(None, ge=1, description="that host the clients of a region")
    task: str = "ecg5000"
    data_dir: Path = Field(default_factory=lambda: Path(os.environ.get("DATA_DIR", "data")))
    secure: bool = False
    broker: Literal["mosquitto", "embedded"] | None = None


class Sweep(BaseModel):
    """What is in `sweep.toml`.

    A value of the grid is a setting's, or a table of settings that belong together; its `name`, if
    it has one, is what the results call it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=NAME_PATTERN)
    stack: Stack = Stack()
    settings: dict[str, Scalar] = {}
    grid: dict[str, Annotated[list[Scalar | dict[str, Scalar]], Field(min_length=1)]] = {}
    seeds: list[int] = Field([42], min_length=1)

    @classmethod
    def read(cls, path: Path) -> "Sweep":
        """Raises SweepError."""
        try:
            return cls(**({"name": path.stem} | tomllib.loads(path.read_text())))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise SweepError(f"{path}: {error}") from error
        except ValidationError as error:
            detail = error.errors(include_url=False)[0]
            where = ".".join(map(str, detail["loc"]))
            raise SweepError(f"{path}: {where}: {detail['msg']}") from error

    def runs(self) -> "list[Planned]":
        """All runs, seeds innermost. Raises SweepError."""
        if len(set(self.seeds)) < len(self.seeds):
            raise SweepError("a seed stands twice")
        if taken := {"run", "seed", "round", *results.METRICS} & self.grid.keys():
            raise SweepError(f"[grid] {min(taken)}: a column of the results has this name")
        points = list(
            product(*([_Value.of(axis, v) for v in vs] for axis, vs in self.grid.items()))
        )
        names = _names([[value.label for value in point] for point in points])
        planned = []
        for name, point in zip(names, points, strict=True):
            chosen = dict(self.settings)
            for value in point:
                chosen |= value.settings
            if unknown := sorted(chosen.keys() - {*CHOOSABLE} | chosen.keys() & {"seed"}):
                raise SweepError(
                    f"{unknown[0]}: not a setting of a run. These are {', '.join(CHOOSABLE)}"
                    " (the seed has a list of its own, `seeds`); others can stand in [stack]"
                )
            labels = dict(zip(self.grid, (value.label for value in point), strict=True))
            for seed in self.seeds:
                own = chosen | {"seed": seed}
                planned.append(Planned(f"{name}s{seed}", labels, seed, own))
        return planned


@dataclass(frozen=True)
class _Value:
    label: Scalar
    settings: dict[str, Scalar]

    @classmethod
    def of(cls, axis: str, value: Scalar | dict[str, Scalar]) -> "_Value":
        if not isinstance(value, dict):
            return cls(value, {axis: value})
        settings = {name: v for name, v in value.items() if name != "name"}
        return cls(value.get("name", " ".join(f"{k}={v}" for k, v in settings.items())), settings)


@dataclass(frozen=True)
class Planned:
    """A run of the sweep: its point of the grid and all settings that are not the default."""

    name: str
    labels: dict[str, Scalar]
    seed: int
    settings: dict[str, Scalar]

    def complete_settings(self) -> dict[str, Any]:
        """With those that it has from the environment and by default. Raises SweepError."""
        try:
            known = services.CentralSettings(**self.settings)  # type: ignore[arg-type]
        except ValidationError as error:
            detail = error.errors(include_url=False)[0]
            name = str(detail["loc"][0]) if detail["loc"] else "settings"
            raise SweepError(f"{name} = {detail['input']!r}: {services.why(detail)}") from error
        return known.model_dump(mode="json", include={*CHOOSABLE})


def _names(points: Sequence[Sequence[Scalar]]) -> list[str]:
    """A different beginning of a run's name for each point; with a digest of the point where it
    would be too long, or another one's, too."""
    texts = [json.dumps(point) for point in points]
    if len(set(texts)) < len(texts):
        raise SweepError("a value stands twice in [grid]: give tables different names")
    slugs = ["".join(f"{_slug(value)}_" for value in point) for point in points]
    return [
        slug
        if len(slug) <= NAME_LENGTH and slugs.count(slug) == 1
        else f"{slug[:NAME_LENGTH]}{hashlib.sha256(text.encode()).hexdigest()[:6]}_"
        for slug, text in zip(slugs, texts, strict=True)
    ]


def _slug(value: Scalar) -> str:
    return re.sub("[^a-z0-9]+", "-", str(value).lower()).strip("-") or "x"


def run_sweep(
    source: Path | Sweep, runs_dir: Path = Path("runs"), console: Console | None = None
) -> list[Row]:
    """Do what is missing of a sweep, and write its results into `runs_dir/<name of the sweep>`.
    Only for the main thread, which starts the processes.

    Args:
        source: `sweep.toml`, or what would be in it.
        console: shows the progress.

    Returns:
        A row for each run and round: `run`, a column for each axis of the grid, `seed`, `round`,
        the metrics; seconds last. `fedfog.cli.results.summarize` makes means over the seeds of it.

    Raises:
        SweepError: it is impossible, or a run failed; the others are done, and a later call does
            only what is missing.
    """
    sweep = Sweep.read(source) if isinstance(source, Path) else source
    planned = sweep.runs()
    environment = _environment(sweep.stack)
    folder = runs_dir / sweep.name
    console = console or Console(quiet=True)
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise SweepError("results need pyarrow: pip install 'fedfog[experiments]'") from error
    with _alone(folder):
        _require_same(sweep, planned, folder)
        plan = {
            "name": sweep.name,
            "stack": sweep.stack.model_dump(mode="json"),
            "settings": sweep.settings,
            "axes": [*sweep.grid],
            "runs": {run.name: {**run.labels, "seed": run.seed} for run in planned},
        }
        write_atomically(folder / PLAN, json.dumps(plan, indent=1).encode())
        missing = [run for run in planned if not results.completed(folder / run.name)]
        console.print(f"{len(planned)} runs in {folder}/, {len(missing)} to do")
        failed = _do(sweep, missing, folder, environment, console) if missing else {}
        rows = results.rows_of_sweep(folder)
        results.save(rows, folder)
        write_atomically(folder / "curves.png", results.curves(rows, [*sweep.grid]))
        report.write(folder)
    if failed:
        told = "; ".join(f"{name}: {error}" for name, error in failed.items())
        raise SweepError(f"{len(failed)} runs failed ({told}). The same command tries them again")
    return rows


def run(path: Path, runs_dir: Path) -> int:
    """Do a sweep and show its summary; returns the exit code."""
    if sys.platform == "win32":
        sys.stderr.write("fedfog experiment needs Linux, macOS or WSL.\n")
        return EXIT_FAILED
    # Into a pipe, a line stays a line.
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    try:
        sweep = Sweep.read(path)
        rows = run_sweep(sweep, runs_dir, console)
    except Stopped as stopped:
        sys.stderr.write(f"Stopped by {stopped}; the same command goes on.\n")
        return stopped.exit_code
    except (SweepError, ServiceError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_FAILED
    axes = [*sweep.grid]
    table = Table(*axes, "runs", *results.METRICS, box=box.SIMPLE, pad_edge=False)
    for line in results.summarize(rows, axes):
        cells = [results.cell(line, metric) for metric in results.METRICS]
        table.add_row(*(str(line[axis]) for axis in axes), str(line["runs"]), *cells)
    console.print(table)
    console.print(f"Results: {runs_dir / sweep.name}/ (results.csv, results.parquet, report.html)")
    return EXIT_OK


def _interrupt(number: int, frame: FrameType | None) -> None:
    for other in SIGNALS:  # the end of all processes is not to be cut off
        signal.signal(other, signal.SIG_IGN)
    interrupt(number, frame)


def _environment(stack: Stack) -> dict[str, str]:
    """Settings of all services. Raises SweepError."""
    classes = [kind for kind in vars(services).values() if isinstance(kind, type)]
    known = {name for kind in classes for name in getattr(kind, "model_fields", ())}
    for name in stack.model_extra or {}:
        if name not in known or name in CHOOSABLE:
            where = "a setting of a run: [settings] or [grid]" if name in CHOOSABLE else "unknown"
            raise SweepError(f"[stack] {name}: {where}")
    patience = {name: os.environ.get(name, str(PATIENCE)) for name in LIMITS}
    return patience | _texts(stack.model_extra or {})


def _texts(values: dict[str, Any]) -> dict[str, str]:
    """As environment variables, of which an empty one stands for the default."""
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}
    return {name.upper(): "" if text == "null" else text for name, text in texts.items()}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Raises SweepError: another process works on this sweep."""
    import fcntl  # not on Windows

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SweepError(f"Another process works on the sweep in {folder}") from error
        yield


def _require_same(sweep: Sweep, planned: Sequence[Planned], folder: Path) -> None:
    """Raises SweepError: what is there of the sweep was begun with other settings."""
    for path, wanted in (
        (folder / PLAN, sweep.stack.model_dump(mode="json", exclude=HOW_ONLY)),
        *((folder / run.name / "settings.json", run.complete_settings()) for run in planned),
    ):
        try:
            found = json.loads(path.read_bytes())
        except FileNotFoundError:
            continue
        except ValueError as error:
            raise SweepError(f"{path} is damaged: delete {path.parent} ({error})") from error
        begun = found["stack" if path.name == PLAN else "settings"]
        for name, value in wanted.items():
            if begun.get(name, value) != value:
                raise SweepError(
                    f"{path.parent} was begun with {name} = {begun[name]}, and now it is {value}: "
                    "give the sweep another name, or delete that folder"
                )


def _do(
    sweep: Sweep,
    runs: Sequence[Planned],
    folder: Path,
    environment: dict[str, str],
    console: Console,
) -> dict[str, str]:
    """Do runs on a federation that is started for them; returns those that failed, and why."""
    first = runs[0].complete_settings() | {"run_id": runs[0].name, "exit_when_finished": False}
    stack = sweep.stack
    options = Options(
        clients=stack.clients,
        rounds=1,  # this, seed and local epochs are in `first`
        seed=0,
        local_epochs=1,
        regions=stack.regions,
        task=stack.task,
        broker=stack.broker,
        runs_dir=folder,
        data_dir=stack.data_dir,
        time_limit=PATIENCE,
        tiers=stack.tiers,
        processes=stack.processes,
        secure=stack.secure,
        environment=environment,
        server=_texts(first),
    )
    failed = {}
    progress = Progress(console=console, transient=True, disable=not console.is_terminal)
    with _federation(options, folder) as ended, progress:
        bar_of_all = progress.add_task(sweep.name, total=len(runs))
        answer = _answer(folder, ended)
        for run in runs:
            bar = progress.add_task(run.name, total=run.complete_settings()["rounds"])
            answer = _finish(run, answer, folder, ended, partial(progress.update, bar))
            progress.remove_task(bar)
            progress.advance(bar_of_all)
            accuracy = "" if answer.accuracy is None else f", accuracy {answer.accuracy:.4f}"
            told = f"{run.name} {answer.status}{accuracy} {answer.error}".rstrip()
            console.print(told, markup=False)
            if answer.status != Status.COMPLETED:
                failed[run.name] = answer.error or answer.status
    return failed


@contextmanager
def _federation(options: Options, folder: Path) -> Iterator["queue.Queue[Ended]"]:
    """A federation at work; what it puts is the end of a process of it."""
    left = folder / ".private"
    if left.exists():  # of one that was killed
        shutil.rmtree(left.read_text(), ignore_errors=True)
    (folder / PLACE).unlink(missing_ok=True)
    ended: queue.Queue[Ended] = queue.Queue()
    with tempfile.TemporaryDirectory(prefix="fedfog-sweep-") as private:
        write_atomically(left, private.encode())
        federation = Federation(options, f"stack-{datetime.now():%Y%m%d-%H%M%S-%f}", Path(private))
        try:
            federation.start()
            federation.watch(ended.put)
            yield ended
        finally:
            federation.stop()
    left.unlink()


def _answer(folder: Path, ended: "queue.Queue[Ended]") -> Answer:
    """Of the server, as soon as it listens. Raises SweepError: a process has ended."""
    while True:
        try:
            raise SweepError(obituary(ended.get(timeout=POLL_SECONDS)))
        except queue.Empty:
            pass
        try:
            return ask(folder, StatusQuestion())
        except ControlError:  # it is starting; if it has ended, that is told
            continue


def _finish(
    run: Planned,
    answer: Answer,
    folder: Path,
    ended: "queue.Queue[Ended]",
    tell: Callable[..., object],
) -> Answer:
    """Begin a run or go on with it, until it is over; returns the server's last word on it.

    Raises:
        SweepError: a process of the federation has ended.
    """
    if (answer.name, answer.status) != (run.name, "running"):
        there = (folder / run.name / "settings.json").exists()
        command = RunCommand(name=run.name, settings=run.complete_settings())
        try:
            answer = ask(folder, ResumeCommand(name=run.name) if there else command)
        except ControlError as error:
            return Answer(name=run.name, status=Status.FAILED, error=str(error))
    while answer.status == "running":
        answer = _answer(folder, ended)
        tell(completed=answer.rounds)
    return answer
