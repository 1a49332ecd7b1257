"""Where the time of a round goes, read from the logs that the services write anyway.

Every service logs its step of a round with a time in microseconds, and on one machine they share a
clock.
"""

import json
from collections import defaultdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from fedfog.logs import Step

# A round, from the publication of the model that it starts from to that of its own; in order.
STEPS = {
    "fan-out": Step.APPLY_MODEL,
    "train": Step.TRAIN,
    "upload": Step.PUBLISH_UPDATE,
    "aggregate, commit": Step.AGGREGATE_REGION,
    "publish partial": Step.PUBLISH_PARTIAL,
    "bridge to Flower": Step.BRIDGE,
    "Flower, average": Step.AGGREGATE_GLOBAL,
    "checkpoint, publish": Step.PUBLISH_MODEL,
}
EVALUATED = "model_evaluated"


def waterfall(logs: Path, skip: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each step, medians over the rounds after the first `skip`.

    `done_ms` counts from the publication of the last model to the slowest client or region;
    `took_ms` is what the step adds to that. `evaluate` happens beside the steps, not after them.
    """
    began: dict[int, float] = {}
    done: dict[str, dict[int, float]] = defaultdict(dict)
    for line in _lines(logs):
        event, at = line["event"], datetime.fromisoformat(line["timestamp"]).timestamp()
        if event == Step.PUBLISH_MODEL:
            began[_round(line) + 1] = at
        # What is said of a model belongs to the round that starts from it.
        starts = event in (Step.APPLY_MODEL, EVALUATED)
        number = _round(line) + starts
        done[event][number] = max(at, done[event].get(number, 0.0))
    rounds = sorted(began.keys() & done[Step.PUBLISH_MODEL].keys())[skip:]
    times = {
        name: 1e3 * float(np.median([done[event][r] - began[r] for r in rounds]))
        for name, event in {**STEPS, "evaluate": EVALUATED}.items()
        if rounds and all(r in done[event] for r in rounds)
    }
    result, before = {}, 0.0
    for name, at in times.items():
        result[name] = {"done_ms": round(at, 2), "took_ms": round(at - before, 2)}
        before = at
    if "evaluate" in result:
        result["evaluate"]["took_ms"] = result["evaluate"]["done_ms"]
    return result


def _lines(logs: Path) -> list[dict[str, Any]]:
    wanted = {*STEPS.values(), EVALUATED}
    lines = []
    for path in logs.glob("*.log"):
        for text in path.read_text().splitlines():
            line = json.loads(text) if text.startswith("{") else {}
            if line.get("event") in wanted:
                lines.append(line)
    return lines


def _round(line: dict[str, Any]) -> int:
    """Of an update `run/round/region/client`, a partial `run/round/region`, or `round/rounds`."""
    if identity := line.get("update") or line.get("partial"):
        return int(identity.split("/")[1])
    return int(str(line["round"]).split("/")[0])
