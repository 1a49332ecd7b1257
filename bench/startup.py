"""How long the services take to load and to come up, and where the time of a demo goes from its
start to the final model.

`python -m bench.startup` prints both, and whether the first update is there before Flower is up.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.rounds import options, watch
from fedfog import logs

RUNS = 5  # of each import
DEMOS = 3
ROUNDS = 3

# What each process has loaded when it is at work.
IMPORTS = {
    "central-server": "fedfog_central_server.main fedfog.flower.fleet "
    "fedfog.ml.evaluation fedfog.ml.ecg5000",
    "SuperLink": "flwr.superlink.main fedfog_central_server.server_app",
    "fog-aggregator": "fedfog_aggregator.main",
    "fog-bridge": "fedfog_bridge.main fedfog_bridge.resident",
    "client": "fedfog_client.main fedfog.ml.evaluation fedfog.ml.training fedfog.ml.ecg5000",
    "monitor": "fedfog_monitor.main",
}
_LOAD = """
import importlib, sys
for module in sys.argv[1:]:
    importlib.import_module(module)
sizes = open("/proc/self/smaps_rollup").read().splitlines() if sys.platform == "linux" else []
print(next((line.split()[1] for line in sizes if line.startswith("Pss:")), 0))
"""
IMAGES = ("central-server", "fog-aggregator", "fog-bridge", "client", "monitor")

Line = dict[str, Any]
# Steps by the first line, among the logs of all tiers, that tells of them.
STEPS: dict[str, Callable[[Line], bool]] = {
    "central server is at work": lambda line: line["event"] == "run_begins",
    "clients are at work": lambda line: line["event"] == "client_started",
    "model 0 published": lambda line: _published(line, 0),
    "round 1: first update published": lambda line: line["event"] == "step_2_update_published",
    "SuperLink is up": lambda line: line["event"] == "superlink_up",
    "ServerApp is up": lambda line: line["event"] == "serverapp_ready",
    "bridge is online": lambda line: line["event"] == "bridge_online",
} | {
    name: step
    for r in range(1, ROUNDS + 1)
    for name, step in {
        f"round {r}: closed in the region": lambda line, r=r: _closed(line, r),
        f"model {r} published": lambda line, r=r: _published(line, r),
    }.items()
}
FIRST_UPDATE = "round 1: first update published"


def measure() -> dict[str, Any]:
    """Seconds, MB and bytes, each a median; the time line begins with the start of the demo.

    Raises:
        RuntimeError: a demo did not come to its end.
    """
    demos = [timeline() for _ in range(DEMOS)]
    line = {name: _median([demo[name] for demo in demos]) for name in STEPS}
    return {
        "imports": {name: _load(modules) for name, modules in IMPORTS.items()},
        "timeline_s": dict(sorted(line.items(), key=lambda step: step[1])),
        "start_to_final_runs_s": [demo[f"model {ROUNDS} published"] for demo in demos],
        "first_update_before_flower_s": [
            round(min(demo["SuperLink is up"], demo["ServerApp is up"]) - demo[FIRST_UPDATE], 2)
            for demo in demos
        ],
        "first_update_before_serverapp_s": [
            round(demo["ServerApp is up"] - demo[FIRST_UPDATE], 2) for demo in demos
        ],
        "images_mb": image_sizes(),
    }


def timeline() -> dict[str, float]:
    """Seconds from the start of a demo (3 clients, 3 rounds, real training) to each of `STEPS`."""
    before = os.environ.get("LOG_LEVEL")
    os.environ["LOG_LEVEL"] = "debug"  # tells when the SuperLink is up
    try:
        with tempfile.TemporaryDirectory(prefix="fedfog-bench-") as name:
            seen = watch(options(3, 1, ROUNDS, Path(name), training=True))
            began = time.time() - (time.monotonic() - seen.started_at)
            lines = [
                json.loads(text)
                for path in Path(name).glob("*/logs/*.log")
                for text in path.read_text().splitlines()
                if text.startswith("{")
            ]
    finally:
        if before is None:
            del os.environ["LOG_LEVEL"]
        else:
            os.environ["LOG_LEVEL"] = before
    return {
        name: round(min(_at(line) for line in lines if step(line)) - began, 2)
        for name, step in STEPS.items()
    }


def image_sizes() -> dict[str, float] | str:
    """MB of each image, uncompressed, as far as they are built."""
    if shutil.which("docker") is None:
        return "no Docker engine"
    sizes = {}
    for name in IMAGES:
        found = subprocess.run(
            ["docker", "image", "inspect", "--format", "{{.Size}}", f"fedfog-{name}:0.1.0"],
            capture_output=True,
            text=True,
        )
        if found.returncode == 0:
            sizes[name] = round(int(found.stdout) / 1e6, 1)
    return sizes or "no images: docker compose build"


def _load(modules: str) -> dict[str, float]:
    """What a process costs that loads these modules and ends."""
    walls, cpus, sizes = [], [], []
    for _ in range(RUNS):
        cpu, wall = _cpu_of_children(), time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", _LOAD, *modules.split()],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        walls.append(time.monotonic() - wall)
        cpus.append(_cpu_of_children() - cpu)
        sizes.append(int(done.stdout) * 1024 / 1e6)
    return {"wall_s": _median(walls), "cpu_s": _median(cpus), "pss_mb": round(_median(sizes), 1)}


def _cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _median(values: list[float]) -> float:
    return round(float(np.median(values)), 2)


def _at(line: Line) -> float:
    return datetime.fromisoformat(line["timestamp"]).timestamp()


def _published(line: Line, round_: int) -> bool:
    is_model = line["event"] == "step_7_global_model_published"
    return is_model and str(line["round"]).startswith(f"{round_}/")


def _closed(line: Line, round_: int) -> bool:
    is_partial = line["event"] == "step_3_regional_aggregation"
    return is_partial and str(line["partial"]).split("/")[1] == str(round_)


def show(report: dict[str, Any], console: Console) -> None:
    table = Table("service", "wall s", "CPU s", "PSS MB", title="Loading its modules, alone")
    for name, cost in report["imports"].items():
        table.add_row(name, *(f"{cost[key]:g}" for key in ("wall_s", "cpu_s", "pss_mb")))
    console.print(table)
    title = "From the start of a demo (3 clients, 3 rounds) to the final model"
    table = Table("step", "at s", "after s", title=title)
    before = 0.0
    for name, at in report["timeline_s"].items():
        table.add_row(name, f"{at:.2f}", f"{at - before:.2f}")
        before = at
    console.print(table)
    console.print(
        f"final model after {report['start_to_final_runs_s']} s\n"
        f"first update before the SuperLink and the ServerApp are up, by "
        f"{report['first_update_before_flower_s']} s; before the ServerApp alone, by "
        f"{report['first_update_before_serverapp_s']} s\n"
        f"images, MB: {report['images_mb']}"
    )


def main() -> int:
    logs.configure("bench", "error")
    show(measure(), Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
