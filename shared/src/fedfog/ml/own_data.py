"""A client's own examples, out of a file that it names (CLIENT_DATA)."""

import csv
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from fedfog.ml.task import DataError, Task

LABEL = "label"  # begins a header

Columns = tuple[list[str], NDArray[np.float32]]


def load(task: Task, path: Path) -> TensorDataset:
    """The examples in `path` as the task reads them, checked for what a model can be trained on.

    Raises DataError.
    """
    try:
        dataset = task.own_data(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
    if len(dataset) == 0:
        raise DataError(f"{path} holds no example")
    inputs, labels = dataset.tensors
    classes = len(task.class_names)
    if outside := set(labels.tolist()) - set(range(classes)):
        some = ", ".join(map(str, sorted(outside)[:10]))
        raise DataError(f"{path} has labels {some}, but the classes are 0 to {classes - 1}")
    finite = inputs.isfinite().flatten(1).all(1)
    if not finite.all():
        bad = int((~finite).nonzero()[0]) + 1
        raise DataError(f"{path}: example {bad} has NaN or infinity: leave it out or fill it in")
    try:
        with torch.inference_mode():
            task.build_model(0).eval()(inputs[:1])
    except RuntimeError as error:
        shape = tuple(inputs.shape[1:])
        raise DataError(
            f"{path}: the model of {task.name} does not take examples of shape {shape} ({error})"
        ) from error
    return dataset


def read(path: Path, class_names: Sequence[str], shape: Sequence[int]) -> TensorDataset:
    """Examples from a file, by its suffix.

    `.csv`, `.tsv`, `.parquet`: one example in a row, its label first, number or name of a class;
    then its values, which are brought into `shape`. `.npz`: arrays `x` (n, ...) and `y` (n,).

    Raises DataError and OSError.
    """
    match path.suffix.lower():
        case ".npz":
            return _numpy(path)
        case ".csv" | ".tsv":
            labels, values = _text(path)
        case ".parquet":
            labels, values = _parquet(path)
        case suffix:
            raise DataError(f"{path}: use .csv, .tsv, .parquet or .npz instead of {suffix!r}")
    if not labels:
        raise DataError(f"{path} holds no example")
    number = {label: _class_of(label, class_names) for label in set(labels)}
    if unknown := [label for label in labels if number[label] is None]:
        raise DataError(
            f"{path}: the first column is the label, and {unknown[0]!r} of example "
            f"{labels.index(unknown[0]) + 1} is none: use 0 to {len(class_names) - 1} or "
            f"{', '.join(class_names)}"
        )
    try:
        inputs = values.reshape(len(values), *shape)
    except ValueError as error:
        raise DataError(
            f"{path}: an example has {values.shape[1]} values, but the task's has shape "
            f"{tuple(shape)}"
        ) from error
    return _dataset(inputs, np.array([number[label] for label in labels], np.int64))


def _class_of(label: str, class_names: Sequence[str]) -> int | None:
    if label in class_names:
        return class_names.index(label)
    with suppress(ValueError, OverflowError):
        if (number := int(float(label))) == float(label) and 0 <= number < len(class_names):
            return number
    return None


def _dataset(inputs: NDArray[np.float32], labels: NDArray[np.int64]) -> TensorDataset:
    return TensorDataset(torch.from_numpy(inputs), torch.from_numpy(labels))


def _text(path: Path) -> Columns:
    labels: list[str] = []
    rows: list[NDArray[np.float32]] = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        try:
            for row in lines:
                if not row or (not rows and row[0].strip().lower() == LABEL):
                    continue
                labels.append(row[0].strip())
                rows.append(np.array(row[1:], np.float32))
                if len(rows[-1]) != len(rows[0]):
                    raise DataError(
                        f"{path}, line {lines.line_num}: {len(row)} columns, but there were "
                        f"{len(rows[0]) + 1} before"
                    )
        except (ValueError, csv.Error) as error:
            raise DataError(
                f"{path}, line {lines.line_num}: {error}. The first column is the label, all "
                f"others are numbers; a header begins with `{LABEL}`"
            ) from error
    return labels, np.array(rows)


def _parquet(path: Path) -> Columns:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table
    except ImportError as error:
        raise DataError(
            f"{path}: Parquet needs the package pyarrow (pip install 'fedfog[parquet]'); or use "
            ".csv or .npz"
        ) from error
    try:
        labels, *columns = read_table(path).columns
        values = [np.asarray(column.to_numpy(), np.float32) for column in columns]
    except (ArrowException, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is no table whose first column is the label and all others numbers ({error})"
        ) from error
    return [str(label) for label in labels.to_pylist()], np.stack(values, axis=1)


def _numpy(path: Path) -> TensorDataset:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            x, y = arrays["x"], arrays["y"]
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no .npz of plain arrays `x` and `y` ({error})") from error
    if x.dtype.kind not in "fiu" or y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
        raise DataError(
            f"{path}: `x` is {x.dtype} {x.shape}, `y` is {y.dtype} {y.shape}: they have to be "
            "float32 (n, ...) and int64 (n,)"
        )
    return _dataset(x.astype(np.float32), y.astype(np.int64))
