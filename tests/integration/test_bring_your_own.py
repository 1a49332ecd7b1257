"""A task from a package outside this repository, and clients with data of their own, over the whole
stack."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from conftest import REPOSITORY
from fedfog.ml.ecg5000 import Ecg5000
from outside import TASK, write_package


def demo(runs: Path, *arguments: str, **environment: object) -> dict[str, Any]:
    """Run `fedfog demo` to its end; returns its summary."""
    settings = {name: str(value) for name, value in environment.items()}
    done = subprocess.run(
        [sys.executable, "-m", "fedfog.cli.main", "demo", *arguments],
        env={**os.environ, "RUNS_DIR": str(runs), **settings},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary: dict[str, Any] = json.loads((runs / "latest" / "summary.json").read_text())
    return summary


def test_task_of_an_outside_package_is_federated_without_a_change_to_fedfog(tmp_path: Path) -> None:
    package = write_package(tmp_path)
    installed = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-deps", "--no-build-isolation", "--target", str(installed), str(package)]
    subprocess.run(pip, check=True, timeout=120)
    summary = demo(
        tmp_path / "runs",
        "--rounds=5",
        PYTHONPATH=installed,
        TASK=TASK,
        DATA_DIR=package,
        LEARNING_RATE=0.01,
    )
    assert summary["clients"] == [3] * 5
    assert summary["initial_accuracy"] < 0.3
    assert summary["test_accuracy"] > 0.9
    history = json.loads((tmp_path / "runs" / "latest" / "history.json").read_text())
    last = history["rounds"][-1]["evaluation"]
    assert last["accuracy"] < last["task"]["top2_accuracy"] < 1
    card = (tmp_path / "runs" / "latest" / "README.md").read_text()
    assert "which digit was written" in card


def test_clients_that_all_have_data_of_their_own_need_no_training_set(tmp_path: Path) -> None:
    whole = Ecg5000(REPOSITORY / "data")
    clients = [f"region_{r}/client-{n}" for r in (0, 1) for n in (1, 2)]
    sizes = {}
    for i, client in enumerate(clients):
        inputs, labels = whole.training_data(np.arange(i, 500, 4)[i:]).tensors
        path = tmp_path / "own" / f"{client}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, x=inputs.numpy(), y=labels.numpy())
        sizes[client] = len(labels)
    data = tmp_path / "data" / "ECG5000"
    data.mkdir(parents=True)
    (data / "ECG5000_TEST.tsv").symlink_to(REPOSITORY / "data" / "ECG5000" / "ECG5000_TEST.tsv")
    summary = demo(
        tmp_path / "runs",
        "--regions=2",
        "--clients=2",
        DATA_DIR=data.parent,
        CLIENT_DATA=tmp_path / "own" / "{region}" / "{client}.npz",
        VALIDATION_FRACTION=0,
    )
    assert summary["clients"] == [4] * 3
    assert summary["test_accuracy"] > 0.9
    history = json.loads((tmp_path / "runs" / "latest" / "history.json").read_text())
    for record in history["rounds"]:
        members = {
            f"{region}/{client}": examples
            for region, partial in record["regions"].items()
            for client, examples in partial["members"].items()
        }
        assert members == sizes


def test_rounds_that_everybody_sits_out_are_trained_after_the_deadline(tmp_path: Path) -> None:
    summary = demo(
        tmp_path / "runs",
        "--rounds=2",
        DATA_DIR=REPOSITORY / "data",
        CLIENT_DROPOUT=0.999999,
        ROUND_DEADLINE=3,
    )
    assert summary["status"] == "completed"
    assert min(summary["clients"]) >= 1
    logs = (tmp_path / "runs" / "latest" / "logs").glob("*-client-*.log")
    assert all(text.count("sits_round_out") == 2 for text in map(Path.read_text, logs))
