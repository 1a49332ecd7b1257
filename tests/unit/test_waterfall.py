"""The benchmark's waterfall says of a round what its services' logs say."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from bench.waterfall import waterfall

Line = tuple[float, str, dict[str, str | int]]  # milliseconds, event, fields

START = datetime(2026, 1, 1, tzinfo=UTC)


def write(path: Path, *lines: Line) -> None:
    """Lines as a service writes them, after what is no JSON."""
    text = ["Traceback that some library printed"]
    for at, event, fields in lines:
        stamp = (START + timedelta(milliseconds=at)).isoformat().replace("+00:00", "Z")
        text.append(json.dumps({"event": event, "timestamp": stamp, **fields}))
    path.write_text("\n".join(text) + "\n")


def of_round(number: int, begins: float, slow: float) -> dict[str, list[Line]]:
    """A round of two clients, the second of which trains `slow` ms; the model comes at +100."""
    ids = [f"run/{number}/region_0/{client}" for client in "ab"]
    partial: dict[str, str | int] = {"partial": f"run/{number}/region_0"}
    model: dict[str, str | int] = {"round": f"{number - 1}/9"}
    clients: list[list[Line]] = [
        [
            (begins + 5, "step_8_global_model_received", model),
            (begins + 5 + trains, "step_1_local_training", {"update": update}),
            (begins + 6 + trains, "step_2_update_published", {"update": update}),
        ]
        for update, trains in zip(ids, (10.0, slow), strict=True)
    ]
    return {
        "a": clients[0],
        "b": clients[1],
        "aggregator": [
            (begins + 50, "step_3_regional_aggregation", partial),
            (begins + 52, "step_4_partial_published", partial),
        ],
        "bridge": [(begins + 70, "step_5_partial_bridged_to_flower", partial)],
        "server": [
            (begins + 20, "model_evaluated", model),
            (begins + 90, "step_6_global_aggregation", {"round": number}),
            (begins + 100, "step_7_global_model_published", {"round": f"{number}/9"}),
        ],
    }


def test_steps_add_up_to_the_round_and_count_the_slowest_client(tmp_path: Path) -> None:
    published: Line = (0.0, "step_7_global_model_published", {"round": "0/9"})
    first, second = of_round(1, 0.0, 999.0), of_round(2, 100.0, 30.0)
    for name in first:
        own = [published] if name == "server" else []
        write(tmp_path / f"{name}.log", *own, *first[name], *second[name])
    steps = waterfall(tmp_path, skip=1)
    assert steps["train"]["done_ms"] == pytest.approx(35.0)
    assert steps["evaluate"]["took_ms"] == pytest.approx(20.0)
    assert steps["checkpoint, publish"]["done_ms"] == pytest.approx(100.0)
    took = sum(step["took_ms"] for name, step in steps.items() if name != "evaluate")
    assert took == pytest.approx(100.0)


def test_a_step_that_nobody_logged_is_left_out(tmp_path: Path) -> None:
    logs = of_round(1, 0.0, 30.0)
    logs["server"].insert(0, (0.0, "step_7_global_model_published", {"round": "0/9"}))
    write(tmp_path / "server.log", *logs["server"])
    assert "train" not in waterfall(tmp_path, skip=0)
    assert waterfall(tmp_path, skip=0)["checkpoint, publish"]["took_ms"] == pytest.approx(10.0)
