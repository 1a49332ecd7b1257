"""`make chaos SECONDS=600 SEED=7`: hurt a federation for so long, then say whether it kept its
promises. Exit code 1: one was broken."""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from chaos import schedule
from chaos.federation import Federation


def main() -> int:
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0, help="how long faults are made")
    parser.add_argument("--seed", type=int, default=7, help="of the schedule")
    parser.add_argument("--replay", type=Path, help="a schedule.json to be carried out again")
    parser.add_argument(
        "--one-by-one", action="store_true", help="each fault alone, to see how long it takes"
    )
    parser.add_argument(
        "--tiers",
        type=int,
        choices=[2, 3],
        default=2,
        help="3: an aggregator over two of 3 regions",
    )
    parser.add_argument("--fog-rounds", type=int, default=1, help="regional rounds in a global one")
    parser.add_argument("--folder", type=Path, help="takes logs, schedule.json and report.json")
    arguments = parser.parse_args()
    name = f"chaos-{arguments.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = (arguments.folder or Path("runs") / name).resolve()
    folder.mkdir(parents=True)
    console = Console()

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    rounds: dict[str, Any] = {"FOG_ROUNDS": arguments.fog_rounds}
    if arguments.one_by_one:  # a fault must not meet the end of a run and the start of the next
        rounds["ROUNDS"] = 100_000
    regions, clients, parent = (3, 3, "top") if arguments.tiers == 3 else (2, 4, "")
    federation = Federation(
        folder / "federation", regions, clients, parent=parent, say=say, **rounds
    )
    problem = ""
    try:
        if arguments.replay:
            faults = schedule.load(arguments.replay)
        elif arguments.one_by_one:
            faults = schedule.one_by_one(arguments.seed, federation.targets)
            arguments.seconds = faults[-1].at + schedule.HALF_OPEN_GAP
        else:
            faults = schedule.draw(arguments.seed, arguments.seconds, federation.targets)
        schedule.save(faults, folder / "schedule.json")
        say(f"{len(faults)} faults of seed {arguments.seed}, saved in {folder}/schedule.json:")
        for fault in faults:
            say(str(fault))
        federation.start()
        federation.torment(faults, arguments.seconds, finish=not arguments.one_by_one)
        federation.stop()
    except TimeoutError as error:
        problem = str(error)
    finally:
        federation.close()
    report = federation.report()
    report["problem"] = problem
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    show(console, report)
    say(f"written: {folder}/report.json")
    return 1 if problem or report["breaches"] or report["failures"] else 0


def show(console: Console, report: dict[str, dict[str, object]]) -> None:
    figures = Table("figure", "", title="what the ledger says")
    for name, value in report["figures"].items():
        figures.add_row(name.replace("_", " "), str(value))
    console.print(figures)
    for key, title in (
        ("recovery_s", "healed fault to next closed partial"),
        ("pause_s", "longest pause between partials until the next fault"),
    ):
        waits = Table("fault", "n", "median s", "max s", title=title)
        for name, times in report[key].items():
            assert isinstance(times, dict)
            waits.add_row(name, *(str(round(times[key], 2)) for key in ("n", "median", "max")))
        console.print(waits)
    for line in (*report["breaches"], *report["failures"], report["problem"]):
        if line:
            console.print(f"BROKEN: {line}", highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # the proxy's connections are not waited for
