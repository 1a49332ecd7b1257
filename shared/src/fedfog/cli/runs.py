"""`fedfog run`, `stop`, `resume` and `runs`: the runs of a central server that stands."""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from fedfog.control import (
    Answer,
    ControlError,
    ResumeCommand,
    RunCommand,
    StatusQuestion,
    StopCommand,
    ask,
)
from fedfog.runs import Listed, listed
from fedfog.service import EXIT_FAILED, EXIT_OK

POLL_SECONDS = 0.5
RUNNING = "running"


def run(runs_dir: Path, name: str, settings: dict[str, Any], follow: bool) -> int:
    """Begin a run; returns the exit code."""
    command = RunCommand(name=name, settings=settings)
    return _told(lambda: _begun(runs_dir, ask(runs_dir, command), "begun", follow))


def resume(runs_dir: Path, name: str, follow: bool) -> int:
    """Go on with a run; returns the exit code."""
    command = ResumeCommand(name=name)
    return _told(lambda: _begun(runs_dir, ask(runs_dir, command), "resumed", follow))


def stop(runs_dir: Path, name: str) -> int:
    """Stop the present run; returns the exit code."""

    def work() -> int:
        answer = ask(runs_dir, StopCommand(name=name))
        if answer.status != "stopped":
            raise ControlError(f"Run {answer.name} {answer.status}: {answer.error}")
        sys.stdout.write(
            f"Run {answer.name} stopped, {_done(answer)}. `fedfog resume {answer.name}` goes on.\n"
        )
        return EXIT_OK

    return _told(work)


def show(runs_dir: Path) -> int:
    """List all runs; returns the exit code."""
    present: Answer | None = None
    with suppress(ControlError):  # a list needs no server; without one, nothing is running
        present = ask(runs_dir, StatusQuestion())
    columns = ("run", "status", "rounds", "accuracy", "begun", "strategy", "seed")
    table = Table(*columns, box=box.SIMPLE, pad_edge=False)
    for found in sorted(listed(runs_dir), key=lambda found: found.info.begun):
        mine = present if present and present.name == found.info.run else None
        table.add_row(*_cells(found, mine))
    if not table.rows:
        sys.stdout.write(f"No runs in {runs_dir}.\n")
        return EXIT_OK
    # Into a pipe, a line stays a line.
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table)
    return EXIT_OK


def _cells(found: Listed, present: Answer | None) -> list[str]:
    info, summary = found.info, found.summary
    running = present is not None and present.status == RUNNING
    if present is not None and running:
        status, rounds, accuracy = RUNNING, present.rounds, present.accuracy
    elif summary is not None:
        status, rounds, accuracy = str(summary.status), summary.rounds, summary.test_accuracy
    else:
        status, rounds, accuracy = "interrupted", found.rounds, None
    return [
        info.run,
        status,
        f"{rounds} of {info.settings['rounds']}",
        "-" if accuracy is None else f"{accuracy:.4f}",
        f"{info.begun:%Y-%m-%d %H:%M}",
        str(info.settings["strategy"]),
        str(info.settings["seed"]),
    ]


def _told(work: Callable[[], int]) -> int:
    try:
        return work()
    except ControlError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_FAILED


def _begun(runs_dir: Path, answer: Answer, how: str, follow: bool) -> int:
    sys.stdout.write(f"Run {answer.name} {how}, {_done(answer)}.\n")
    return _follow(runs_dir, answer) if follow else EXIT_OK


def _follow(runs_dir: Path, answer: Answer) -> int:
    """Tell each round until the run's end; its exit code."""
    name, told = answer.name, answer.rounds
    while answer.status == RUNNING:
        time.sleep(POLL_SECONDS)
        answer = ask(runs_dir, StatusQuestion())
        if answer.name != name:
            raise ControlError(f"The server is at work on {answer.name}: see `fedfog runs`")
        if answer.rounds != told and answer.status == RUNNING:
            told = answer.rounds
            sys.stdout.write(f"{_done(answer)}\n")
    sys.stdout.write(f"Run {name} {answer.status}, {_done(answer)}. {answer.error}".rstrip() + "\n")
    return EXIT_OK if answer.status == "completed" else EXIT_FAILED


def _done(answer: Answer) -> str:
    accuracy = "" if answer.accuracy is None else f", accuracy {answer.accuracy:.4f}"
    return f"{answer.rounds} of {answer.of} rounds done{accuracy}"
