"""ECG5000 as it is loaded, against the facts of data/ECG5000/README.md."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fedfog.ml.ecg5000 import SHA256, Ecg5000, Ecg5000FiveClass
from fedfog.ml.task import DataError

DATA = Path(__file__).parents[2] / "data"
TRAIN, TEST = "ECG5000_TRAIN.tsv", "ECG5000_TEST.tsv"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A data directory whose files a test may spoil."""
    shutil.copytree(DATA / "ECG5000", tmp_path / "ECG5000")
    return tmp_path


def test_binary_task_sets_normal_beats_against_the_rest() -> None:
    task = Ecg5000(DATA)
    assert np.bincount(task.training_labels()).tolist() == [292, 177 + 10 + 19 + 2]
    assert torch.bincount(task.test_data().tensors[1]).tolist() == [2627, 1590 + 86 + 175 + 22]


def test_five_class_task_counts_classes_from_zero() -> None:
    task = Ecg5000FiveClass(DATA)
    assert np.bincount(task.training_labels()).tolist() == [292, 177, 10, 19, 2]
    assert torch.bincount(task.test_data().tensors[1]).tolist() == [2627, 1590, 86, 175, 22]


def test_beats_are_float32_of_one_channel_with_mean_0_and_deviation_1() -> None:
    beats = Ecg5000(DATA).test_data().tensors[0]
    assert beats.dtype == torch.float32
    assert beats.shape == (4500, 1, 140)
    assert torch.allclose(beats.mean(2), torch.zeros(4500, 1), atol=1e-5)
    assert torch.allclose(beats.std(2), torch.ones(4500, 1), atol=1e-5)


def test_slot_holds_exactly_the_examples_at_its_indices() -> None:
    task = Ecg5000(DATA)
    indices = np.array([499, 0, 17])
    whole, slot = task.training_data(np.arange(500)), task.training_data(indices)
    for all_rows, rows in zip(whole.tensors, slot.tensors, strict=True):
        assert torch.equal(rows, all_rows[torch.from_numpy(indices)])
    assert np.array_equal(slot.tensors[1].numpy(), task.training_labels()[indices])


def test_client_needs_the_training_file_only(copied: Path) -> None:
    (copied / "ECG5000" / TEST).unlink()
    assert len(Ecg5000(copied).training_data(np.arange(500))) == 500


def test_server_needs_the_test_file_only(copied: Path) -> None:
    (copied / "ECG5000" / TRAIN).unlink()
    assert len(Ecg5000(copied).test_data()) == 4500


def test_missing_file_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        Ecg5000(tmp_path).training_labels()
    assert str(tmp_path / "ECG5000" / TRAIN) in str(caught.value)
    assert "DATA_DIR" in str(caught.value)
    assert "git checkout -- data/ECG5000" in str(caught.value)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content.replace(b"1", b"2", 1),
        lambda content: content.replace(b"\n", b"\r\n"),
        lambda content: content[:-1],
        lambda content: b"",
    ],
    ids=["one digit", "windows line ends", "cut short", "empty"],
)
def test_altered_file_is_refused_before_it_is_parsed(copied: Path, spoil) -> None:  # type: ignore[no-untyped-def]
    path = copied / "ECG5000" / TEST
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DataError, match="SHA-256") as caught:
        Ecg5000(copied).test_data()
    assert str(path) in str(caught.value)
    assert "git checkout -- data/ECG5000" in str(caught.value)


def test_readme_tells_the_checksums_that_are_checked() -> None:
    readme = (DATA / "ECG5000" / "README.md").read_text()
    for name, digest in SHA256.items():
        row = next(line for line in readme.splitlines() if line.startswith(f"| `{name}`"))
        assert digest in row
