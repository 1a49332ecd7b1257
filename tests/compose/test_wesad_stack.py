"""WESAD over the stack, as data/WESAD/README.md has it: regions are groups of people, and whom the
model is tested on nobody trains on."""

import os
import subprocess
from pathlib import Path

import pytest

from recordings import recording, write
from stacks import SECONDS, Stack

pytestmark = pytest.mark.compose

# Windows of each subject, a number of its own by which it is known in the history.
DEALT = {"S2": 3, "S3": 4, "S4": 5, "S5": 6}
OWN = {"S6": 7}  # trained on from its recording alone
TESTED = {"S15": 9}
REGIONS = ("region_0", "region_1")


def record(data_dir: Path, windows: dict[str, int]) -> None:
    for name, number in windows.items():
        rest = 60 + 10 * (number - 2)  # seconds
        write(data_dir, recording(name, ((1, rest), (2, 60))))


def test_regions_of_subjects_learn_and_are_tested_on_another_one(
    stack: Stack, tmp_path: Path
) -> None:
    data, own = tmp_path / "data", tmp_path / "own"
    record(data, DEALT | TESTED)
    record(own, OWN)
    docker = ["docker", "run", "--rm", "--user", f"{os.getuid()}:{os.getgid()}"]
    docker += ["--volume", f"{data}:/data", "--entrypoint", "python", "fedfog-client:0.1.0"]
    made = subprocess.check_output([*docker, "-m", "fedfog.ml.wesad", "/data"], timeout=SECONDS)
    assert made.decode().splitlines()[-1] == "/data/WESAD/features.npz: 5 of 15 subjects"

    settings = {
        "TASK": "wesad?test=S15",
        "TASK_DIR": str(data),
        "PARTITION": "group",
        "REGION_PARTITION": "group",
        "VALIDATION_FRACTION": "0",
        "REGIONS": ",".join(REGIONS),
        "MIN_AVAILABLE_CLIENTS": "2",
        "MIN_FIT_CLIENTS": "2",
    }
    first = stack(
        "compose.yaml:compose.task.yaml",
        CLIENTS_EXPECTED="2",
        EXIT_WHEN_FINISHED="true",
        **settings,
    )
    second = stack(
        "compose.region.yaml:compose.task.yaml",
        "-1",
        REGION=REGIONS[1],
        FEDFOG_PROJECT=first.name,
        CLIENTS_EXPECTED="3",
        **settings,
    )
    first.ok("up", "--detach", "--scale", "client=2")
    second.ok("up", "--detach", "--scale", "client=2")
    device = ("--volume", f"{own}/WESAD/S6:/own:ro", "--env", "CLIENT_DATA=/own/S6.pkl", "client")
    second.ok("run", "--detach", *device)
    first.ok("wait", "central-server")
    assert first.result("summary.json")["status"] == "completed"
    models = first.result("history.json")["rounds"]
    assert len(models) == 3
    for model in models:
        held = [sorted(model["regions"][name]["members"].values()) for name in REGIONS]
        assert held[1].pop() == OWN["S6"]
        assert [len(subjects) for subjects in held] == [2, 2]
        assert sorted(held[0] + held[1]) == sorted(DEALT.values())
        assert model["evaluation"]["num_examples"] == TESTED["S15"]
