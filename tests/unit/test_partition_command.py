"""`fedfog partition` shows the split that the clients would use."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import REPOSITORY
from fedfog.core.partition import deal
from fedfog.ml.task import load_task

DATA = REPOSITORY / "data"


def shown(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedfog.cli.main", "partition", "--data-dir", str(DATA)]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)


def test_table_and_picture_have_the_classes_of_each_slot(tmp_path: Path) -> None:
    picture = tmp_path / "split.png"
    done = shown(
        *("--clients", "2", "--regions", "2", "--seed", "7", "--partition", "dirichlet:0.3"),
        *("--region-partition", "shards:1", "--show", "--out", str(picture)),
    )
    assert done.returncode == 0, done.stderr
    labels = load_task("ecg5000", data_dir=DATA).training_labels()
    how = {"partition": "dirichlet:0.3", "region_partition": "shards:1"}
    expected = []
    for region, slots in enumerate(deal(labels, None, [2, 2], seed=7, **how)):
        for slot, indices in enumerate(slots):
            counts = np.bincount(labels[indices], minlength=2)
            expected.append([f"region_{region}", *map(str, (slot, len(indices), *counts))])
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(" region_")]
    assert rows == expected
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--partition", "dirichlet:0"], "PARTITION=dirichlet:0: "),
        (["--region-partition", "group"], "REGION_PARTITION=group: "),
        (["--clients", "501", "--partition", "sizes:1"], "PARTITION=sizes:1: 500 examples"),
        (["--task", "nothing"], "TASK=nothing"),
    ],
)
def test_what_cannot_be_shown_is_named(arguments: list[str], named: str) -> None:
    done = shown(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(named)
