"""Stress in people whom the model has not seen, by features of WESAD's real recordings: with a
client for each subject it is learned as well as with all data in one place."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import wesad_table
from conftest import REPOSITORY
from fedfog.core.partition import slot_indices
from fedfog.messages.schemas import Hyperparameters
from fedfog.ml.evaluation import evaluate
from fedfog.ml.reference import fedavg
from fedfog.ml.task import Task, load_task
from fedfog.ml.training import Arrays, load_arrays

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not wesad_table.PATH.exists(),
        reason=f"the table of WESAD's features is not here ({wesad_table.PATH})",
    ),
]
# How and how long to train was chosen on three of the twelve training subjects of each fold.
SGD = Hyperparameters(optimizer="sgd", learning_rate=0.1, local_epochs=1, batch_size=32, seed=0)
ROUNDS, EPOCHS = 20, 10
LAST_FOLD = wesad_table.FOLDS[-1]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    wesad_table.convert(folder)
    return folder


def accuracy(task: Task, arrays: Arrays) -> float:
    model = task.build_model(0)
    load_arrays(model, arrays)
    return evaluate(task, model, task.test_data()).accuracy


@pytest.mark.parametrize(("scaling", "least"), [("Scaled", 0.94), ("Unscaled", 0.88)])
def test_a_client_for_each_subject_is_within_a_point_of_all_data_in_one_place(
    data_dir: Path, scaling: str, least: float
) -> None:
    """Over all 15 subjects, each of them tested on once and then not trained on."""
    reached: dict[str, list[float]] = {"central": [], "federated": []}
    for test in wesad_table.FOLDS:
        task = load_task(f"wesad_table:{scaling}?test={test}", data_dir=data_dir)
        groups = task.training_groups()
        assert groups is not None
        everybody = [np.arange(len(groups))]
        subjects = [np.flatnonzero(groups == subject) for subject in np.unique(groups)]
        for name, slots, rounds in (
            ("central", everybody, EPOCHS),
            ("federated", subjects, ROUNDS),
        ):
            *_, last = fedavg(task, [slots], SGD, rounds=rounds, validation_fraction=0)
            reached[name].append(accuracy(task, last))
    central, federated = (float(np.mean(folds)) for folds in reached.values())
    assert federated == pytest.approx(central, abs=0.01)
    assert federated > least  # 0.70 is everybody at ease


def test_regions_of_subjects_over_the_real_stack_give_the_model_of_one_process(
    data_dir: Path, tmp_path: Path
) -> None:
    """Three regions of four subjects each; nobody shares a subject."""
    spec = f"wesad_table:Scaled?test={LAST_FOLD}"
    chosen = SGD.model_dump() | {"partition": "group", "region_partition": "group"}
    done = subprocess.run(
        [sys.executable, "-m", "fedfog.cli.main", "simulate", "--clients", "12", "--regions", "3"],
        env={
            **os.environ,
            **{name.upper(): str(value) for name, value in chosen.items()},
            "ROUNDS": str(ROUNDS),
            "VALIDATION_FRACTION": "0",
            "TASK": spec,
            "DATA_DIR": str(data_dir),
            "RUNS_DIR": str(tmp_path),
            "PYTHONPATH": str(REPOSITORY / "tests"),
        },
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    task = load_task(spec, data_dir=data_dir)
    labels, groups = task.training_labels(), task.training_groups()
    assert groups is not None
    regions = [
        [
            slot_indices(
                labels,
                groups,
                slot=slot,
                slots=4,
                region_index=region,
                regions=3,
                seed=SGD.seed,
                partition="group",
                region_partition="group",
            )
            for slot in range(4)
        ]
        for region in range(3)
    ]
    for slots in regions:
        assert all(len(np.unique(groups[slot])) == 1 for slot in slots)
    history = json.loads((tmp_path / "latest" / "history.json").read_text())
    for record in history["rounds"]:
        held = [sorted(region["members"].values()) for region in record["regions"].values()]
        assert held == [sorted(map(len, slots)) for slots in regions]
    *_, expected = fedavg(task, regions, SGD, rounds=ROUNDS, validation_fraction=0)
    reached = load_file(tmp_path / "latest" / "model.safetensors")
    for name, array in expected.items():
        np.testing.assert_allclose(reached[name], array, atol=1e-4)
    assert accuracy(task, reached) > 0.93
