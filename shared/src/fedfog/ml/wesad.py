"""WESAD: stress or no stress of 15 people, from chest and wrist signals (Schmidt et al. 2018).

`python -m fedfog.ml.wesad DATA_DIR` makes a small table of features out of the recordings, once;
the tasks read that. Origin, format and citation are in data/WESAD/README.md.
"""

import io
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import TensorDataset

from fedfog.files import write_atomically
from fedfog.ml.pickled_arrays import PickleError, read_arrays
from fedfog.ml.task import DataError, Task, TaskError

SUBJECTS = tuple(f"S{number}" for number in (*range(2, 12), *range(13, 18)))
WINDOW_SECONDS, STEP_SECONDS = 60, 10
LABEL_RATE = 700  # Hz
BASELINE, STRESS, AMUSEMENT = 1, 2, 3
_MOST_BYTES = 2 << 30  # a recording of two hours has 1.2 GB
_HEART, _BREATH = (0.7, 3.5), (0.1, 0.5)  # Hz


class Signal(NamedTuple):
    """One of a recording's signals. The readme of WESAD spells two of them otherwise than its
    files do: on the chest they are `Temp` and `Resp`, on the wrist `TEMP`."""

    device: str
    key: str
    rate: int  # Hz
    columns: int
    band: tuple[float, float] | None = None  # Hz, of the rhythm in it

    def __str__(self) -> str:
        return f"{self.device} {self.key}"


SIGNALS = (
    Signal("chest", "ACC", 700, 3),
    Signal("chest", "ECG", 700, 1, _HEART),
    Signal("chest", "EMG", 700, 1),
    Signal("chest", "EDA", 700, 1),
    Signal("chest", "Temp", 700, 1),
    Signal("chest", "Resp", 700, 1, _BREATH),
    Signal("wrist", "ACC", 32, 3),
    Signal("wrist", "BVP", 64, 1, _HEART),
    Signal("wrist", "EDA", 4, 1),
    Signal("wrist", "TEMP", 4, 1),
)
FEATURES = tuple(
    f"{signal} {statistic}"
    for signal in SIGNALS
    for statistic in ("mean", "deviation", "minimum", "maximum", "slope", "rhythm")
    if signal.band or statistic != "rhythm"
)


class Recording(NamedTuple):
    """A subject's signals, arrays of shape (samples, columns), and labels (samples at 700 Hz,)."""

    signals: dict[Signal, NDArray[Any]]
    labels: NDArray[Any]


class Table(NamedTuple):
    """A row for each window: features (n, features) float32, WESAD's labels 1 to 3 and numbers of
    the subjects, both (n,) int64."""

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    subjects: NDArray[np.int64]


def read_recording(path: Path) -> Recording:
    """The official `S*.pkl`, without running it. Raises DataError."""
    try:
        with path.open("rb", buffering=1 << 20) as file:
            if path.stat().st_size > _MOST_BYTES:
                raise DataError(f"{path} is larger than {_MOST_BYTES} bytes")
            content = read_arrays(file)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
    except PickleError as error:
        raise DataError(f"{path} is no recording of WESAD: {error}") from error
    match content:
        case {
            b"subject": bytes(subject),
            b"signal": {b"chest": dict(chest), b"wrist": dict(wrist)},
            b"label": np.ndarray() as labels,
        }:
            devices = {"chest": chest, "wrist": wrist}
        case _:
            raise DataError(f"{path} has no subject, signal (chest and wrist) and label")
    if subject.decode("latin1") != path.stem:
        raise DataError(f"{path} is of subject {subject.decode('latin1')[:20]}")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"{path}: label has to be whole numbers in one column")
    signals = {signal: _signal(path, devices[signal.device], signal, labels) for signal in SIGNALS}
    return Recording(signals, labels)


def _signal(
    path: Path, device: dict[bytes, Any], signal: Signal, labels: NDArray[Any]
) -> NDArray[Any]:
    array = device.get(signal.key.encode())
    if not isinstance(array, np.ndarray):
        there = ", ".join(key.decode("latin1")[:20] for key in device)
        raise DataError(f"{path} has no {signal}, there are {there or 'none'}")
    seconds = len(labels) / LABEL_RATE
    # The devices were synchronised by hand: one may end a little before the other.
    if array.shape[1:] != (signal.columns,) or abs(len(array) / signal.rate - seconds) > 1:
        raise DataError(
            f"{path}: {signal} is {array.shape}, but {seconds:.0f} s at {signal.rate} Hz make "
            f"({seconds * signal.rate:.0f}, {signal.columns})"
        )
    return array


def windows(labels: NDArray[Any]) -> Iterator[tuple[int, int]]:
    """Start (s) and label of each window, every `STEP_SECONDS`, in which the whole time has the
    same label and that is baseline, stress or amusement."""
    for start in range(0, len(labels) // LABEL_RATE - WINDOW_SECONDS + 1, STEP_SECONDS):
        window = labels[start * LABEL_RATE : (start + WINDOW_SECONDS) * LABEL_RATE]
        if window[0] in (BASELINE, STRESS, AMUSEMENT) and (window == window[0]).all():
            yield start, int(window[0])


def features(recording: Recording, start: int) -> NDArray[np.float32]:
    """Shape (len(FEATURES),), of the window that begins at `start` (s)."""
    values: list[float] = []
    for signal, array in recording.signals.items():
        end = start + WINDOW_SECONDS
        window = array[start * signal.rate : end * signal.rate].astype(np.float64)
        # Of acceleration its size, which does not depend on how the device is worn.
        samples = np.linalg.norm(window, axis=1) if signal.columns > 1 else window[:, 0]
        seconds = (np.arange(len(samples)) - (len(samples) - 1) / 2) / signal.rate
        slope = float((seconds * samples).sum() / (seconds * seconds).sum())
        values += [samples.mean(), samples.std(), samples.min(), samples.max(), slope]
        if signal.band:
            # The ECG's own spectrum is that of its peaks' shape; their steepness comes per beat.
            rhythm = np.gradient(samples) ** 2 if signal.key == "ECG" else samples
            values.append(_rhythm(rhythm, signal.rate, signal.band))
    return np.array(values, np.float32)


def _rhythm(samples: NDArray[np.float64], rate: int, band: tuple[float, float]) -> float:
    """The strongest frequency (Hz) within the band."""
    spectrum = np.abs(np.fft.rfft((samples - samples.mean()) * np.hanning(len(samples))))
    frequencies = np.fft.rfftfreq(len(samples), 1 / rate)
    inside = (band[0] <= frequencies) & (frequencies <= band[1])
    return float(frequencies[inside][spectrum[inside].argmax()])


def windows_of(path: Path) -> Table:
    """All windows of one recording. Raises DataError."""
    recording = read_recording(path)
    found = list(windows(recording.labels))
    rows = np.array([features(recording, start) for start, _ in found])
    if not found or not np.isfinite(rows).all():
        raise DataError(f"{path} has no window with a label, or values that are not finite")
    labels = np.array([label for _, label in found])
    return Table(rows, labels, np.full(len(rows), int(path.stem[1:])))


def prepare(data_dir: Path) -> Iterator[str]:
    """Write WESAD/features.npz in `data_dir` from the recordings WESAD/S*/S*.pkl that are there;
    yields a line for each. One recording at a time is in memory.

    Raises DataError and OSError.
    """
    folder = data_dir / "WESAD"
    paths = [folder / name / f"{name}.pkl" for name in SUBJECTS]
    there = [path for path in paths if path.exists()]
    if not there:
        raise DataError(f"{folder} holds no S2/S2.pkl and so on: see data/WESAD/README.md")
    tables = []
    for path in there:
        tables.append(windows_of(path))
        counts = np.bincount(tables[-1].labels, minlength=AMUSEMENT + 1)[BASELINE:]
        yield f"{path.stem}: windows of baseline, stress, amusement: {counts}"
    table = Table(*map(np.concatenate, zip(*tables, strict=True)))
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **table._asdict())
    write_atomically(folder / "features.npz", content.getvalue())
    yield f"{folder / 'features.npz'}: {len(there)} of {len(SUBJECTS)} subjects"


class Wesad(Task):
    """Stress against baseline and amusement, of people that were not trained on.

    Each subject's features have mean 0 and deviation 1 over all windows of that subject, for which
    no label is needed: a calibration, and the most useful single step.

    Args:
        test: the subjects to test on, who are not trained on; `TASK=wesad?test=S2,S3`.

    Raises TaskError.
    """

    name = "wesad"
    description = "stress or no stress, from 60 s of chest and wrist signals scaled by subject"
    class_names = ("no stress", "stress")
    input_shape = (len(FEATURES),)
    limits = (
        "Few people, in one laboratory, with stress by one test: the figures say little about "
        "anybody else's days.\n\n**This is not a medical device.** It must not be used for "
        "diagnosis, monitoring or treatment."
    )

    def __init__(self, data_dir: Path, test: str = "S15,S16,S17") -> None:
        self._data_dir = data_dir
        if unknown := set(test.split(",")) - set(SUBJECTS):
            raise TaskError(
                f"TASK={self.name}?test={test}: no subject {', '.join(sorted(unknown))}; there are "
                + ", ".join(SUBJECTS)
            )
        self._test = [int(name[1:]) for name in test.split(",")]
        self.data_statement = (
            "WESAD (Schmidt et al. 2018): windows of 60 s. The subjects tested on, "
            f"{', '.join(test.split(','))}, are not in the training set."
        )

    def new_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(*self.input_shape, 32), nn.ReLU(), nn.Linear(32, 1))

    def training_labels(self) -> NDArray[np.int64]:
        labels: NDArray[np.int64] = self._training_set.tensors[1].numpy()
        return labels

    def training_groups(self) -> NDArray[np.int64]:
        """The number of each window's subject."""
        return self._part(tested=False).subjects

    def training_data(self, indices: NDArray[np.int64]) -> TensorDataset:
        return TensorDataset(*self._training_set[torch.from_numpy(indices)])

    def test_data(self) -> TensorDataset:
        return self._data_set(self._part(tested=True))

    def own_data(self, path: Path) -> TensorDataset:
        """A client's own recording, an official `S*.pkl`, or else what any task reads."""
        if path.suffix != ".pkl":
            return super().own_data(path)
        table = windows_of(path)
        if table.subjects[0] in self._test:
            raise DataError(
                f"{path} is of a subject to test on: leave this client out, or name others, "
                f"TASK={self.name}?test=S2,S3 for example"
            )
        return self._data_set(table)

    def _scaled(self, table: Table) -> NDArray[np.float32]:
        scaled = np.empty_like(table.features)
        for subject in np.unique(table.subjects):
            own = table.subjects == subject
            scaled[own] = _standardised(table.features[own], table.features[own])
        return scaled

    def _data_set(self, table: Table) -> TensorDataset:
        labels = (table.labels == STRESS).astype(np.int64)
        return TensorDataset(torch.from_numpy(self._scaled(table)), torch.from_numpy(labels))

    def _part(self, *, tested: bool) -> Table:
        which = np.isin(self._table.subjects, self._test) == tested
        return Table(*(column[which] for column in self._table))

    @cached_property
    def _training_set(self) -> TensorDataset:
        return self._data_set(self._part(tested=False))

    @cached_property
    def _table(self) -> Table:
        path = self._data_dir / "WESAD" / "features.npz"
        remedy = (
            f"run python -m fedfog.ml.wesad {self._data_dir}, or set DATA_DIR (with Docker Compose "
            "TASK_DIR, and add compose.task.yaml) to the folder that holds WESAD/ "
            "(data/WESAD/README.md)"
        )
        try:
            with np.load(path, allow_pickle=False) as content:
                table = Table(*(content[field] for field in Table._fields))
        except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
            raise DataError(f"{path} cannot be read ({error}): {remedy}") from error
        if table.features.shape[1:] != self.input_shape:
            raise DataError(f"{path} has other features than this version of FedFog: {remedy}")
        if missing := sorted(set(self._test) - set(table.subjects.tolist())):
            raise DataError(
                f"{path} has no window of subject {missing}: name others to test on, "
                f"TASK={self.name}?test=S2,S3 for example"
            )
        return table


class WesadUnscaled(Wesad):
    """Without a calibration for each subject: everybody's features are scaled alike, by mean and
    deviation over all windows that are trained on, which all have to know."""

    name = "wesad-unscaled"
    description = "stress or no stress, from 60 s of chest and wrist signals of anybody"

    def _scaled(self, table: Table) -> NDArray[np.float32]:
        return _standardised(table.features, self._part(tested=False).features)


def _standardised(features: NDArray[np.float32], by: NDArray[np.float32]) -> NDArray[np.float32]:
    mean, deviation = by.mean(0, np.float64), by.std(0, np.float64)
    # A feature that never changes tells nothing, and has nothing to be divided by.
    scaled: NDArray[np.float32] = (features - mean) / np.where(deviation > 0, deviation, 1)
    return scaled.astype(np.float32)


if __name__ == "__main__":
    try:
        for line in prepare(Path(*sys.argv[1:])):
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()
    except (DataError, OSError) as error:
        sys.exit(str(error))
