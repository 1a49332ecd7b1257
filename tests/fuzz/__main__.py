"""`make fuzz SEED=1`: hostile bytes at everything that reads what others send. Exit code 1: a
service died, hung, grew, or did not count an honest update."""

import argparse
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import structlog
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fuzz import enrolment, live, pure

# Thousands of stores are made and synced there.
MEMORY = Path("/dev/shm")


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of all mutants")
    parser.add_argument("--pure", type=int, default=150_000, help="payloads at readers, in process")
    parser.add_argument("--live", type=int, default=40_000, help="payloads through a broker")
    parser.add_argument("--raw", type=int, default=10_000, help="MQTT packets at the broker")
    parser.add_argument("--http", type=int, default=2_000, help="HTTP requests at the enrolment")
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fedfog-fuzz-"))
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    console, began = Console(), time.monotonic()
    table = Table("what was fed", "how many", "memory (MB)", title=f"seed {asked.seed}")
    problem = ""
    with Progress(console=console, redirect_stdout=False) as progress:

        def bar(name: str, total: int) -> Callable[[int], None]:
            task = progress.add_task(name, total=total)
            return lambda done: progress.update(task, completed=done)

        try:
            told = bar("payloads at readers", asked.pure)
            with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as states:
                for result in pure.run(Path(states), asked.pure, asked.seed, told):
                    name = f"{result.reader}: payloads of up to {result.largest / 1e3:.0f} kB"
                    size = f"at most {result.memory / 1e6:.2f}"
                    table.add_row(name, f"{result.payloads:,}", size)
            told(asked.pure)
            with live.fog(folder / "live") as running:
                told = bar("payloads through a broker", asked.live)
                grown = live.publish(running, asked.live, asked.seed, told)
                table.add_row("running services: payloads", f"{asked.live:,}", "")
                for memory in grown:
                    size = f"{memory.first / 1e6:.0f} -> {memory.last / 1e6:.0f}"
                    table.add_row(f"    {memory.process}", "", size)
                told = bar("packets at the broker", asked.raw)
                live.knock(running.port, asked.raw, asked.seed, told)
                running.honest_update_counted()
                table.add_row("broker: MQTT packets", f"{asked.raw:,}", "")
            told = bar("requests at the enrolment", asked.http)
            enrolment.knock(folder / "enrolment", asked.http, asked.seed, told)
            table.add_row("enrolment: HTTP requests", f"{asked.http:,}", "")
        except (AssertionError, pure.FuzzError, OSError) as error:
            problem = f"{type(error).__name__}: {error}"
    console.print(table)
    total = asked.pure + asked.live + asked.raw + asked.http
    console.print(
        f"{total:,} in {time.monotonic() - began:.0f} s; logs in {folder}", highlight=False
    )
    console.print(problem or "Nothing died, hung or grew, and every honest update counted.")
    return 1 if problem else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # threads of the services that were read in process
