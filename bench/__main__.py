"""`make bench` and `make bench-full`: FedFog and what users would pick instead, in one run.

Prints tables, and writes `bench/results/latest.json` (all sizes: `full.json` too) and plots.
Figures of different machines, and of the same machine at another load, are not to be compared.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from bench import big, raw, rivals, rounds, startup, width
from fedfog import logs

RESULTS = Path(__file__).parent / "results"
PARAMETERS = 68_353

# Clients in all, regions, timed rounds, runs.
QUICK = ((3, 1, 40, 3), (10, 2, 40, 3), (100, 2, 20, 2), (1000, 1, 10, 2))
FULL = (
    (3, 1, 40, 3),
    (10, 1, 40, 2),
    (10, 2, 40, 3),
    (30, 1, 30, 2),
    (30, 2, 30, 2),
    (100, 1, 20, 2),
    (100, 2, 20, 3),
    (100, 4, 20, 2),
    (104, 8, 20, 2),
    (300, 1, 15, 1),
    (300, 4, 15, 1),
    (1000, 1, 10, 3),
    (1000, 2, 10, 1),
    (1000, 4, 10, 1),
    (1000, 8, 10, 1),
)
QUICK_REAL = (
    (3, 1, 20, False),
    (3, 1, 10, True),
)  # real clients: clients, regions, rounds, training
FULL_REAL = (*QUICK_REAL, (10, 2, 20, False), (10, 2, 10, True))
QUICK_WIRE = ((10, 2, 5),)
FULL_WIRE = (*QUICK_WIRE, (1000, 1, 3))
BIG = (1_000, 68_000, 1_000_000, 11_000_000, 25_000_000)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--full", action="store_true", help="all sizes and rivals: half an hour")
    full = parser.parse_args().full
    logs.configure("bench", "error")
    root = str(Path(__file__).parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.getenv("PYTHONPATH")]))
    console = Console()
    report: dict[str, Any] = {"machine": machine(), "full": full}
    console.print(report["machine"])
    with console.status("starting") as status:

        def progress(text: str) -> None:
            status.update(f"{text} ({time.monotonic() - began:.0f} s so far)")

        began = time.monotonic()
        overhead(report, FULL if full else QUICK, progress)
        lower_bound(report, progress)
        progress("what passes through the broker")
        report["wire"] = [wire(*case) for case in (FULL_WIRE if full else QUICK_WIRE)]
        update_bytes = max(case["update_bytes"] for case in report["wire"])
        report["update_wire_ratio"] = round(update_bytes / (4 * PARAMETERS), 5)
        progress("real clients")
        real = [rounds.measure(*case) for case in (FULL_REAL if full else QUICK_REAL)]
        report["rounds_of_real_clients"] = [asdict(case) for case in real]
        demos(report, 5 if full else 3, progress)
        report["startup"] = startup.measure() if full else None
        report["rivals"] = [asdict(r) for r in rivals.measure(quick=not full, progress=progress)]
        report["big_models"] = big.measure(BIG if full else BIG[1:3], progress)
        report["seconds"] = round(time.monotonic() - began)
    RESULTS.mkdir(exist_ok=True)
    for name in ("latest.json", "full.json") if full else ("latest.json",):
        (RESULTS / name).write_text(json.dumps(report, indent=1) + "\n")
    show(report, console)
    plot(report, RESULTS / "round-overhead.png")
    console.print(f"Written: {RESULTS / 'latest.json'} and round-overhead.png")
    return 0


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


def overhead(
    report: dict[str, Any],
    cases: Sequence[tuple[int, int, int, int]],
    progress: Callable[[str], None],
) -> None:
    """Rounds without training: the protocol alone."""
    report["round_overhead"] = []
    for clients, regions, number, runs in cases:
        seen = []
        for run in range(runs):
            progress(f"{clients} clients in {regions} region(s), run {run + 1} of {runs}")
            seen.append(width.measure(clients, regions, number))
        gaps = [gap for one in seen for gap in one.gaps_s]
        report["round_overhead"].append(
            {
                "clients": clients,
                "regions": regions,
                **spread(gaps),
                "medians_of_runs_s": [round(float(np.median(one.gaps_s)), 4) for one in seen],
                "cpu_s": seen[-1].cpu_s,
                "aggregator_pss_mb": max(one.aggregator_pss_mb for one in seen),
                "aggregator_peak_mb": max(one.aggregator_peak_mb for one in seen),
                "clients_say": seen[-1].clients_say,
            }
        )


def spread(seconds: Sequence[float]) -> dict[str, float]:
    median, p95 = np.percentile(seconds, [50, 95])
    return {"median_s": round(float(median), 4), "p95_s": round(float(p95), 4), "n": len(seconds)}


def lower_bound(report: dict[str, Any], progress: Callable[[str], None]) -> None:
    """As wide as the widest case of one region."""
    clients = max(row["clients"] for row in report["round_overhead"] if row["regions"] == 1)
    seconds = []
    for run in range(2):
        progress(f"Mosquitto, paho and NumPy alone, {clients} clients, run {run + 1} of 2")
        seconds += raw.measure(clients, 10)
    report["raw_lower_bound"] = {"clients": clients, **spread(seconds)}


def wire(clients: int, regions: int, number: int) -> dict[str, Any]:
    counted = width.count(clients, regions, number)
    return {"clients": clients, "regions": regions, "rounds": number, **asdict(counted)}


def demos(report: dict[str, Any], runs: int, progress: Callable[[str], None]) -> None:
    seen = []
    for run in range(runs):
        progress(f"start to final model, run {run + 1} of {runs}")
        seen.append(rounds.demo())
    report["start_to_final_runs_s"] = [seconds for seconds, _ in seen]
    report["start_to_final_s"] = float(np.median(report["start_to_final_runs_s"]))
    report["stack_pss_by_program_mb"] = seen[-1][1]
    report["stack_pss_mb"] = round(sum(seen[-1][1].values()), 1)


def show(report: dict[str, Any], console: Console) -> None:
    table = Table("clients", "regions", "median ms", "p95 ms", "rounds", "aggregator MB (peak)")
    table.title = "A round without training"
    for row in report["round_overhead"]:
        memory = f"{row['aggregator_pss_mb']:.0f} ({row['aggregator_peak_mb']:.0f})"
        sizes = str(row["clients"]), str(row["regions"])
        table.add_row(*sizes, ms(row["median_s"]), ms(row["p95_s"]), str(row["n"]), memory)
    console.print(table)

    table = Table("what", "clients", "median ms", "p95 ms", "rounds", "note", title="Beside it")
    bound = report["raw_lower_bound"]
    table.add_row("raw lower bound", *cells(bound), "Mosquitto, paho, NumPy, no protocol")
    for row in report["rivals"]:
        table.add_row(f"{row['name']} {row['version']}", *cells(row), row["note"])
    console.print(table)

    for case in report["rounds_of_real_clients"]:
        title = f"{case['clients']} clients in {case['regions']} region(s), a process each, "
        title += f"training {'on' if case['training'] else 'off'}: {ms(case['median_s'])} ms"
        table = Table("step", "took ms", "done after ms", title=title)
        for name, step in case["waterfall"].items():
            table.add_row(name, f"{step['took_ms']:.1f}", f"{step['done_ms']:.1f}")
        console.print(table)

    for case in report["wire"]:
        title = f"{case['clients']} clients in {case['regions']} region(s), {case['rounds']} rounds"
        table = Table("arrow", "messages a round", "bytes a round", title=title)
        for name, (messages, size) in case["arrows"].items():
            table.add_row(name, f"{messages:.1f}", f"{size:,.0f}")
        console.print(table)
        console.print(
            f"updates published {case['updates']}, different {case['different_updates']}, "
            f"accepted {case['accepted']}; other messages twice: {case['other_twice'] or 'none'}"
        )
    console.print(
        f"an update is {report['update_wire_ratio']} times as long as its float32\n"
        f"start to final model, 3 clients, 3 rounds: {report['start_to_final_runs_s']} s\n"
        f"that stack: {report['stack_pss_mb']} MB PSS {report['stack_pss_by_program_mb']}"
    )


def ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:,.0f}"


def cells(row: dict[str, Any]) -> tuple[str, str, str, str]:
    return str(row["clients"]), ms(row["median_s"]), ms(row["p95_s"]), str(row["n"])


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    by_regions: dict[int, list[dict[str, Any]]] = {}
    for row in report["round_overhead"]:
        by_regions.setdefault(row["regions"], []).append(row)
    for regions, rows in sorted(by_regions.items()):
        medians = np.array([row["median_s"] for row in rows])
        tails = np.array([row["p95_s"] for row in rows]) - medians
        axes.errorbar(
            [row["clients"] for row in rows],
            medians,
            yerr=[0 * tails, tails],
            marker="o",
            capsize=3,
            label=f"FedFog, {regions} region(s)",
        )
    bound = report["raw_lower_bound"]
    axes.plot(bound["clients"], bound["median_s"], "k_", ms=14, label="raw lower bound")
    for row in report["rivals"]:
        if row["median_s"] is not None:
            axes.plot(row["clients"], row["median_s"], "x", label=f"{row['name']}")
    axes.set(xscale="log", yscale="log", xlabel="clients", ylabel="s per round, training off")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
