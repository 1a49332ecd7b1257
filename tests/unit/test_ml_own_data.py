"""A client's own file: the formats, and what each fault says."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedfog.ml.ecg5000 import Ecg5000
from fedfog.ml.own_data import load
from fedfog.ml.task import DataError, Task

DATA = Path(__file__).parents[2] / "data"
X = np.array([[0.5, -1, 2], [3, 4, 5], [6, 7, 8.25]], np.float32)
Y = np.array([1, 0, 1])


class Sign(Task):
    name = "sign"
    description = "is the sum of three numbers positive?"
    class_names = ("negative", "positive")

    def new_model(self) -> nn.Module:
        return nn.Linear(3, 2)

    def training_labels(self) -> np.ndarray:
        return np.zeros(0, np.int64)

    def training_data(self, indices: np.ndarray) -> TensorDataset:
        raise NotImplementedError

    def test_data(self) -> TensorDataset:
        raise NotImplementedError


def csv(path: Path) -> None:
    path.write_text("label,a,b,c\n1,0.5,-1,2\n0,3,4,5\n1,6,7,8.25\n")


def csv_of_names(path: Path) -> None:
    path.write_text("positive,0.5,-1,2\nnegative,3,4,5\npositive,6,7,8.25\n")


def csv_of_numpy(path: Path) -> None:
    np.savetxt(path, np.column_stack([Y, X]), delimiter=",")


def tsv(path: Path) -> None:
    path.write_text("1\t0.5\t-1\t2\n\n0\t3\t4\t5\n1\t6\t7\t8.25\n")


def parquet(path: Path) -> None:
    columns = {"y": ["positive", "negative", "positive"], "a": X[:, 0], "b": X[:, 1], "c": X[:, 2]}
    pq.write_table(pa.table(columns), path)


def npz(path: Path) -> None:
    np.savez(path, x=X.astype(np.float64), y=Y.astype(np.int8))


@pytest.mark.parametrize(
    ("write", "suffix"),
    [
        (csv, ".csv"),
        (csv_of_names, ".csv"),
        (csv_of_numpy, ".CSV"),
        (tsv, ".tsv"),
        (parquet, ".parquet"),
        (npz, ".npz"),
    ],
)
def test_every_format_gives_the_same_examples(
    write: Callable[[Path], None], suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"own{suffix}"
    write(path)
    inputs, labels = load(Sign(), path).tensors
    assert torch.equal(inputs, torch.from_numpy(X))
    assert torch.equal(labels, torch.from_numpy(Y))


def test_row_of_a_table_gets_the_shape_of_the_tasks_examples(tmp_path: Path) -> None:
    path = tmp_path / "beats.csv"
    path.write_text("abnormal," + ",".join(map(str, range(140))) + "\n")
    inputs, labels = load(Ecg5000(DATA), path).tensors
    assert torch.equal(inputs, torch.arange(140.0).reshape(1, 1, 140))
    assert labels.tolist() == [1]


def test_part_of_the_ecg5000_archive_is_read_as_the_archive_means_it(tmp_path: Path) -> None:
    lines = (DATA / "ECG5000" / "ECG5000_TRAIN.tsv").read_text().splitlines(keepends=True)
    path = tmp_path / "mine.tsv"
    path.write_text("".join(lines[280:310]))
    task = Ecg5000(DATA)
    inputs, labels = load(task, path).tensors
    expected = task.training_data(np.arange(280, 310)).tensors
    assert set(labels.tolist()) == {0, 1}, "a file of one class would prove nothing"
    assert torch.equal(inputs, expected[0])
    assert torch.equal(labels, expected[1])


def text(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content)


def arrays(**named: np.ndarray) -> Callable[[Path], object]:
    return lambda path: np.savez(path, **named)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "write", "hint"),
    [
        ("a.csv", lambda _: None, "cannot be read (No such file"),
        ("a.xlsx", text("x"), "use .csv, .tsv, .parquet or .npz"),
        ("a.csv", text(""), "holds no example"),
        ("a.csv", text("label,a,b,c\n"), "holds no example"),
        ("a.csv", text("0,1,2,3\n1,1,x,3\n"), "line 2: could not convert string to float: 'x'"),
        ("a.csv", text("id,a,b,c\n0,1,2,3\n"), "a header begins with `label`"),
        ("a.csv", text("0,1,2,3\n\n1,1,2\n"), "line 3: 3 columns, but there were 4 before"),
        ("a.csv", text("0,1,2,3\n2,1,2,3\n"), "'2' of example 2 is none: use 0 to 1 or negative"),
        ("a.csv", text("0,1,2,3\n0.5,1,2,3\n"), "'0.5' of example 2"),
        ("a.csv", text("0,1,2,3\n1,1,nan,3\n"), "example 2 has NaN or infinity"),
        ("a.csv", text("0,1,2\n1,1,2\n"), "does not take examples of shape (2,)"),
        ("a.csv", lambda path: path.write_bytes(b"\xff\xfe\0\0"), "line 0"),
        ("a.parquet", text("0,1,2,3\n"), "no table whose first column is the label"),
        ("a.parquet", lambda p: pq.write_table(pa.table({"a": [1], "b": ["x"]}), p), "no table"),
        ("a.npz", text("0,1,2,3\n"), "no .npz of plain arrays `x` and `y`"),
        ("a.npz", arrays(x=X), "no .npz of plain arrays `x` and `y`"),
        ("a.npz", arrays(x=X.astype(object), y=Y), "no .npz of plain arrays"),
        ("a.npz", arrays(x=X, y=Y[:2]), "`y` is int64 (2,)"),
        ("a.npz", arrays(x=X, y=Y.astype(float)), "`y` is float64 (3,)"),
        ("a.npz", arrays(x=X[:0], y=Y[:0]), "holds no example"),
        ("a.npz", arrays(x=X, y=Y + 1), "labels 2, but the classes are 0 to 1"),
        ("a.npz", arrays(x=X[:, :2], y=Y), "does not take examples of shape (2,)"),
    ],
)
def test_fault_names_the_file_and_what_is_wrong(
    name: str, write: Callable[[Path], object], hint: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    write(path)
    with pytest.raises(DataError) as caught:
        load(Sign(), path)
    assert str(path) in str(caught.value)
    assert hint in str(caught.value)


def test_values_that_do_not_make_an_example_of_the_task_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "beats.csv"
    path.write_text("0,1,2,3\n")
    with pytest.raises(DataError, match=r"3 values, but the task's has shape \(1, 140\)"):
        load(Ecg5000(DATA), path)


def test_file_of_the_archives_kind_with_a_fault_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.tsv"
    path.write_text("1\t2\t3\n")
    with pytest.raises(DataError, match=r"mine\.tsv"):
        load(Ecg5000(DATA), path)
