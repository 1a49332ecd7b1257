"""ECG5000: 500 heartbeats to train on, 4500 to test on, all from one patient.

Origin, format and citation are in data/ECG5000/README.md.
"""

import hashlib
import io
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import TensorDataset

from fedfog.ml.cnn import EcgCnn
from fedfog.ml.task import DataError, Task

BEAT = 140  # samples
SHA256 = {
    "ECG5000_TRAIN.tsv": "df86ac15d7e283e731db6be7865f5004b65bc639014cb8b9753c26e24a9092a1",
    "ECG5000_TEST.tsv": "0192997dd1793880633bfb34ae3ad5129c09a8e0f210c469225451b92cdd8548",
}


class Ecg5000(Task):
    """Normal beats (class 1 of the archive) against all others."""

    name = "ecg5000"
    description = "normal or abnormal heartbeat, from one ECG beat of 140 samples"
    class_names: tuple[str, ...] = ("normal", "abnormal")
    input_shape = (1, BEAT)
    data_statement = (
        "ECG5000 of the UCR archive: 500 heartbeats for training, dealt to the clients, and 4,500 "
        "for the test."
    )
    limits = (
        "All beats are from ONE patient with severe congestive heart failure. The figures say "
        "nothing about other people, devices or arrhythmias.\n\n**This is not a medical device.** "
        "It must not be used for diagnosis, monitoring or treatment."
    )

    def __init__(self, data_dir: Path) -> None:
        self._folder = data_dir / "ECG5000"

    def new_model(self) -> nn.Module:
        classes = len(self.class_names)
        return EcgCnn(num_outputs=1 if classes == 2 else classes)

    def training_labels(self) -> NDArray[np.int64]:
        labels: NDArray[np.int64] = self._training_set.tensors[1].numpy()
        return labels

    def training_data(self, indices: NDArray[np.int64]) -> TensorDataset:
        return TensorDataset(*self._training_set[torch.from_numpy(indices)])

    def test_data(self) -> TensorDataset:
        return self._test_set

    def own_data(self, path: Path) -> TensorDataset:
        """As in any task; a .tsv is in the archive's layout, which counts the classes from 1."""
        if path.suffix.lower() != ".tsv":
            return super().own_data(path)
        try:
            return self._parse(path.read_bytes())
        except ValueError as error:
            raise DataError(
                f"{path} is not in the layout of ECG5000_TRAIN.tsv ({error})"
            ) from error

    @cached_property
    def _training_set(self) -> TensorDataset:
        return self._load("ECG5000_TRAIN.tsv")

    @cached_property
    def _test_set(self) -> TensorDataset:
        return self._load("ECG5000_TEST.tsv")

    def _load(self, file_name: str) -> TensorDataset:
        path = self._folder / file_name
        remedy = (
            "set DATA_DIR to the folder that holds ECG5000/, or run git checkout -- data/ECG5000"
        )
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
        if hashlib.sha256(content).hexdigest() != SHA256[file_name]:
            raise DataError(f"{path} is not the published file, its SHA-256 differs: {remedy}")
        return self._parse(content)

    def _parse(self, content: bytes) -> TensorDataset:
        table = np.loadtxt(io.BytesIO(content), dtype=np.float32, delimiter="\t", ndmin=2)
        # The archive counts classes from 1; those beyond the last named one fold into it.
        labels = np.minimum(table[:, 0].astype(np.int64), len(self.class_names)) - 1
        beats = np.ascontiguousarray(table[:, np.newaxis, 1:])
        return TensorDataset(torch.from_numpy(beats), torch.from_numpy(labels))


class Ecg5000FiveClass(Ecg5000):
    """All five classes. Training has 292, 177, 10, 19 and 2 beats of them, so that accuracy hides
    the rare ones: read the macro-F1."""

    name = "ecg5000-5class"
    description = "five kinds of heartbeat, from one ECG beat of 140 samples"
    class_names = ("normal", "R-on-T PVC", "PVC", "supraventricular or ectopic", "unclassified")
