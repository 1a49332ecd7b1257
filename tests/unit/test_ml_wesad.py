"""WESAD as it is read, on small files of exactly the official form."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedfog.ml import wesad
from fedfog.ml.own_data import load
from fedfog.ml.task import DataError, TaskError, load_task
from fedfog.ml.wesad import FEATURES, Wesad, WesadUnscaled, read_recording, windows
from recordings import BREATH, PULSE, recording, write

WINDOWS = {1: [10, 20, 30, 40], 2: [120, 130], 3: [270]}  # label: start (s)
SHORT = ((1, 62),)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the features of four subjects, made by the command that a user gives."""
    folder = tmp_path_factory.mktemp("data")
    for number, name in enumerate(("S2", "S3", "S4", "S15")):
        write(folder, recording(name), protocol=(0, 2)[number % 2])
    command = [sys.executable, "-m", "fedfog.ml.wesad", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.splitlines()[0] == "S2: windows of baseline, stress, amusement: [4 2 1]"
    assert done.stdout.splitlines()[-1].endswith("features.npz: 4 of 15 subjects")
    return folder


def test_windows_hold_one_label_throughout_and_are_of_the_three_conditions() -> None:
    found = list(windows(recording("S2")["label"]))
    assert found == sorted((start, label) for label, starts in WINDOWS.items() for start in starts)


def test_a_window_may_end_with_the_recording() -> None:
    assert list(windows(np.full(60 * 700, 2))) == [(0, 2)]
    assert list(windows(np.full(60 * 700 - 1, 2))) == []


def test_table_holds_a_row_for_each_window_of_each_subject(data_dir: Path) -> None:
    with np.load(data_dir / "WESAD" / "features.npz") as table:
        assert table["features"].shape == (4 * 7, len(FEATURES))
        assert table["labels"].tolist() == [1, 1, 1, 1, 2, 2, 3] * 4
        assert table["subjects"].tolist() == np.repeat([2, 3, 4, 15], 7).tolist()


def test_features_are_the_statistics_of_each_signal_and_the_rhythm_of_heart_and_breath(
    tmp_path: Path,
) -> None:
    content = recording("S2")
    row = wesad.features(read_recording(write(tmp_path, content)), 20)
    values = dict(zip(FEATURES, row, strict=True))
    temperature = content["signal"]["wrist"]["TEMP"][20 * 4 : 80 * 4, 0]
    seconds = np.arange(60 * 4) / 4
    assert values["wrist TEMP mean"] == pytest.approx(temperature.mean())
    assert values["wrist TEMP deviation"] == pytest.approx(temperature.std())
    assert values["wrist TEMP minimum"] == pytest.approx(temperature.min())
    assert values["wrist TEMP maximum"] == pytest.approx(temperature.max())
    slope = np.polyfit(seconds, temperature, 1)[0]
    assert values["wrist TEMP slope"] == pytest.approx(slope, rel=1e-3)
    size = np.linalg.norm(content["signal"]["chest"]["ACC"][20 * 700 : 80 * 700], axis=1)
    assert values["chest ACC mean"] == pytest.approx(size.mean())
    assert values["chest ECG rhythm"] == pytest.approx(PULSE, abs=0.02)
    assert values["wrist BVP rhythm"] == pytest.approx(PULSE, abs=0.02)
    assert values["chest Resp rhythm"] == pytest.approx(BREATH, abs=0.02)


def test_task_sets_stress_against_baseline_and_amusement_of_other_people(data_dir: Path) -> None:
    task = load_task("wesad?test=S3,S15", data_dir=data_dir)
    assert task.training_labels().tolist() == [0, 0, 0, 0, 1, 1, 0] * 2
    groups = task.training_groups()
    assert groups is not None
    assert groups.tolist() == [2] * 7 + [4] * 7
    inputs, labels = task.test_data().tensors
    assert labels.tolist() == [0, 0, 0, 0, 1, 1, 0] * 2
    assert inputs.shape == (14, len(FEATURES))
    assert inputs.dtype == torch.float32
    assert task.build_model(0)(inputs).shape == (14, 1)
    chosen = task.training_data(np.array([13, 2]))
    whole = task.training_data(np.arange(14))
    assert torch.equal(chosen.tensors[0], whole.tensors[0][[13, 2]])
    assert chosen.tensors[1].tolist() == [0, 0]


def test_scaled_by_subject_everybody_has_mean_0_and_deviation_1(data_dir: Path) -> None:
    task = Wesad(data_dir, "S3,S15")
    inputs = torch.cat(
        [task.training_data(np.arange(14)).tensors[0], task.test_data().tensors[0]]
    ).reshape(4, 7, -1)
    assert torch.allclose(inputs.mean(1), torch.zeros(4, len(FEATURES)), atol=1e-5)
    varying = inputs.abs().amax((0, 1)) > 0
    assert torch.allclose(inputs.std(1, correction=0)[:, varying].amax(0), torch.ones(1), atol=1e-4)


def test_unscaled_the_test_subjects_have_no_part_in_the_scale(data_dir: Path) -> None:
    task = WesadUnscaled(data_dir, "S15")
    inputs = task.training_data(np.arange(21)).tensors[0]
    assert torch.allclose(inputs.mean(0), torch.zeros(len(FEATURES)), atol=1e-5)
    assert inputs.reshape(3, 7, -1).mean(1).abs().amax() > 0.5
    assert task.test_data().tensors[0].mean(0).abs().amax() > 0.5


def test_feature_that_never_changes_becomes_0(tmp_path: Path) -> None:
    for name in ("S2", "S3"):
        content = recording(name, SHORT)
        content["signal"]["wrist"]["TEMP"][:] = 33.3
        write(tmp_path, content)
    list(wesad.prepare(tmp_path))
    for task in (Wesad(tmp_path, "S3"), WesadUnscaled(tmp_path, "S3")):
        inputs = task.training_data(np.arange(1)).tensors[0]
        assert inputs.isfinite().all()
        assert (inputs[:, FEATURES.index("wrist TEMP mean")] == 0).all()


def test_client_with_its_own_recording_has_what_the_table_has_of_it(data_dir: Path) -> None:
    path = data_dir / "WESAD" / "S2" / "S2.pkl"
    for name in ("wesad", "wesad-unscaled"):
        task = load_task(f"{name}?test=S15", data_dir=data_dir)
        own, dealt = load(task, path), task.training_data(np.arange(7))
        assert torch.equal(own.tensors[1], dealt.tensors[1])
        assert torch.allclose(own.tensors[0], dealt.tensors[0])


def test_calibrated_client_needs_nothing_but_its_own_recording(tmp_path: Path) -> None:
    task = Wesad(tmp_path)
    inputs, _ = load(task, write(tmp_path, recording("S7", SHORT))).tensors
    assert task.build_model(0)(inputs).shape == (1, 1)


def test_client_with_the_recording_of_a_subject_to_test_on_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, recording("S7", SHORT))
    with pytest.raises(DataError, match=r"S7\.pkl is of a subject to test on.*TASK=wesad\?test="):
        load(Wesad(tmp_path, "S2,S7"), path)


def test_card_names_the_subjects_to_test_on(tmp_path: Path) -> None:
    assert "tested on, S2, S7, are not" in Wesad(tmp_path, "S2,S7").data_statement


def drop(*keys: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


def put(value: Any, *keys: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value(content[keys[-1]]) if callable(value) else value

    return change


def spell_as_in_the_readme(content: dict[str, Any]) -> None:
    chest = content["signal"]["chest"]
    chest["TEMP"], chest["RESP"] = chest.pop("Temp"), chest.pop("Resp")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (drop("label"), "no subject, signal"),
        (drop("signal", "wrist"), "no subject, signal"),
        (put(1, "signal"), "no subject, signal"),
        (put("S3", "subject"), "is of subject S3"),
        (spell_as_in_the_readme, "no chest Temp, there are ACC, ECG, EMG, EDA, TEMP, RESP"),
        (drop("signal", "wrist", "BVP"), "no wrist BVP, there are ACC, EDA, TEMP"),
        (put("text", "signal", "chest", "ECG"), "no chest ECG"),
        (put(lambda a: a[:-800], "signal", "chest", "ECG"), r"\(42600, 1\).*62 s at 700 Hz"),
        (put(lambda a: a[:, :2], "signal", "wrist", "ACC"), r"wrist ACC is \(1984, 2\).*, 3\)"),
        (put(lambda a: a[:, 0], "signal", "wrist", "EDA"), r"wrist EDA is \(248,\)"),
        (put(lambda a: a[::2], "label"), "31 s at 700 Hz"),
        (put(lambda a: a.astype(float), "label"), "label has to be"),
        (put(lambda a: a * 0, "label"), "no window"),
        (put(lambda a: a + np.nan, "signal", "wrist", "BVP"), "not finite"),
    ],
)
def test_recording_of_another_form_is_refused_and_named(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], text: str
) -> None:
    content = recording("S2", SHORT)
    change(content)
    path = write(tmp_path, content, "S2")
    with pytest.raises(DataError, match=text) as caught:
        list(wesad.prepare(tmp_path))
    assert str(path) in str(caught.value)
    assert not (tmp_path / "WESAD" / "features.npz").exists()


def test_wrist_that_ends_a_second_early_is_read(tmp_path: Path) -> None:
    content = recording("S2", SHORT)
    put(lambda a: a[:-64], "signal", "wrist", "BVP")(content)
    assert len(wesad.windows_of(write(tmp_path, content)).labels) == 1


def test_recording_that_would_run_code_is_refused_and_named(tmp_path: Path) -> None:
    path = write(tmp_path, recording("S2", SHORT))
    path.write_bytes(b"cos\nmkdir\n(S'" + str(tmp_path / "ran").encode() + b"'\ntR.")
    command = [sys.executable, "-m", "fedfog.ml.wesad", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{path} is no recording of WESAD: it asks for os.mkdir")
    assert not (tmp_path / "ran").exists()


def test_huge_file_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path, recording("S2", SHORT))
    with path.open("r+b") as file:
        file.truncate(3 << 30)  # takes no room on the disk
    with pytest.raises(DataError, match="larger than"):
        read_recording(path)


def test_without_recordings_the_command_says_where_they_belong(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no S2/S2\.pkl.*data/WESAD/README\.md"):
        list(wesad.prepare(tmp_path))


def test_without_features_the_task_says_the_command_that_makes_them(tmp_path: Path) -> None:
    said = f"run python -m fedfog.ml.wesad {tmp_path}, or set DATA_DIR .*TASK_DIR"
    with pytest.raises(DataError, match=said):
        Wesad(tmp_path).training_labels()


def test_features_that_are_damaged_or_of_another_version_are_to_be_made_anew(
    data_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "WESAD" / "features.npz"
    path.parent.mkdir()
    good = (data_dir / "WESAD" / "features.npz").read_bytes()
    other = {"features": np.ones((1, 3), np.float32), "labels": [1], "subjects": [15]}
    for content in (b"", b"text", good[: len(good) // 2], {}, other):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            np.savez(path, **content)  # type: ignore[arg-type]
        with pytest.raises(DataError, match=r"run python -m fedfog\.ml\.wesad"):
            Wesad(tmp_path, "S15").test_data()


def test_subject_to_test_on_that_has_no_features_is_named(data_dir: Path) -> None:
    with pytest.raises(DataError, match=r"no window of subject \[5\].*wesad\?test="):
        Wesad(data_dir, "S2,S5").test_data()


@pytest.mark.parametrize(
    "spec",
    ["wesad?test=S12", "wesad?test=", "wesad?test=2", "wesad?tests=S2", "wesad?S2"],
)
def test_subject_that_is_none_and_an_argument_that_is_none_are_named(
    data_dir: Path, spec: str
) -> None:
    with pytest.raises(TaskError, match=r"TASK=wesad\?"):
        load_task(spec, data_dir=data_dir)


@pytest.mark.parametrize("name", ["wesad", "wesad-unscaled"])
def test_task_is_found_by_the_name_it_bears(data_dir: Path, name: str) -> None:
    assert load_task(name, data_dir=data_dir).name == name
