"""A task from a package outside this repository in the images: mounted, and installed."""

from pathlib import Path

import numpy as np
import pytest

from outside import TASK, write_package
from stacks import Stack

pytestmark = pytest.mark.compose

SETTINGS = {"TASK": TASK, "LEARNING_RATE": "0.01", "ROUNDS": "5", "EXIT_WHEN_FINISHED": "true"}
SETTINGS |= {"CLIENTS_EXPECTED": "3", "VALIDATION_FRACTION": "0"}
TRAINING = 1437  # examples


def test_mounted_task_is_learned_by_replicas_and_a_device_with_its_own_data(
    stack: Stack, tmp_path: Path
) -> None:
    package = write_package(tmp_path)
    own = tmp_path / "own"
    own.mkdir()
    with np.load(package / "digits.npz") as file:
        np.savetxt(own / "digits.csv", np.column_stack([file["y"], file["x"]])[:90], delimiter=",")
    files = "compose.yaml:compose.task.yaml"
    project = stack(files, TASK_DIR=str(package), **SETTINGS)
    project.ok("up", "--detach", "--scale", "client=2")
    device = ("--volume", f"{own}:/own:ro", "--env", "CLIENT_DATA=/own/digits.csv", "client")
    project.ok("run", "--detach", *device)
    project.ok("wait", "central-server")
    summary = project.result("summary.json")
    assert summary["status"] == "completed"
    assert summary["test_accuracy"] > 0.9
    for record in project.result("history.json")["rounds"]:
        members = sorted(record["regions"]["region_0"]["members"].values())
        assert members == [90, TRAINING // 2, TRAINING - TRAINING // 2]


def test_installed_task_is_learned(stack: Stack, tmp_path: Path) -> None:
    package = write_package(tmp_path)
    files = f"compose.yaml:{package / 'compose.yaml'}"
    project = stack(files, TASK_DIR=str(package), **SETTINGS)
    project.ok("build", "central-server", "client")
    run = ("up", "--exit-code-from", "central-server", "--scale", "client=3")
    code, _, said = project.command(*run)
    assert code == 0, said
    assert project.result("summary.json")["test_accuracy"] > 0.9
