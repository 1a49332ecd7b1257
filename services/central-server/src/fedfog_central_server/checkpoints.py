"""What a run is resumed from: a file per round with the model, the strategy's state and the record.

A checkpoint is written before its model is published, so what anybody has seen of a run can be
read again. Each is one `.safetensors` file: the model's tensors under their own names and the
arrays of the strategy (FedAdam's moments) under names that begin with `@`, all float32.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import structlog

from fedfog.files import write_atomically
from fedfog.messages.codec import (
    CodecError,
    TensorTable,
    Vector,
    decode,
    decode_meta,
    digest_of,
    encode,
)
from fedfog.messages.schemas import Digest, Payload, RoundRecord
from fedfog.runs import CHECKPOINT_FILE

log = structlog.get_logger()

STRATEGY = "@"


class CheckpointError(Exception):
    """The file is damaged; the text names it and says what is wrong."""


class CheckpointMeta(Payload):
    """Fields of a checkpoint."""

    max_bytes = 2 * RoundRecord.max_bytes

    digest: Digest  # of record, tensor table and tensors
    record: RoundRecord


@dataclass(frozen=True)
class Checkpoint:
    """Model `record.round` of a run, and what the strategy needs to go on from it."""

    record: RoundRecord
    table: TensorTable
    vector: Vector
    strategy: Mapping[str, Vector] = field(default_factory=dict)

    @property
    def round(self) -> int:
        return self.record.round

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the model's tensors."""
        return digest_of(self.vector)

    def to_bytes(self) -> bytes:
        tensors = self.table.unflatten(self.vector)
        tensors |= {STRATEGY + name: array for name, array in self.strategy.items()}
        table = TensorTable.of(tensors)
        vector = table.flatten(tensors)
        meta = CheckpointMeta(digest=_digest(self.record, table, vector), record=self.record)
        return encode(meta, table, vector)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Checkpoint":
        """Raises CodecError if a bit is not what was written."""
        message = decode(data, CheckpointMeta)
        if _digest(message.meta.record, message.table, message.vector) != message.meta.digest:
            raise CodecError("the digest is not that of the content")
        tensors = message.table.unflatten(message.vector)
        model = {name: array for name, array in tensors.items() if not name.startswith(STRATEGY)}
        strategy = {
            name.removeprefix(STRATEGY): array
            for name, array in tensors.items()
            if name.startswith(STRATEGY)
        }
        table = TensorTable.of(model)
        vector = table.flatten(model) if strategy else message.vector
        return cls(message.meta.record, table, vector, strategy)


def _digest(record: RoundRecord, table: TensorTable, vector: Vector) -> str:
    content = hashlib.sha256(record.to_json())
    content.update(json.dumps(table.header).encode())
    content.update(np.ascontiguousarray(vector, np.float32).data)
    return content.hexdigest()


class Checkpoints:
    """The checkpoints of one run, of which the newest `keep` stay, see `prune`."""

    # Waits before one is saved again, two minutes in all: time to make room on a full disk.
    again_after = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep

    def path(self, round_: int) -> Path:
        return self._folder / f"round-{round_:06}.safetensors"

    def save(self, checkpoint: Checkpoint) -> None:
        """Write it so that a crash leaves it whole or not there.

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path(checkpoint.round), checkpoint.to_bytes())

    def prune(self, written: int) -> None:
        """Delete the oldest ones, but none whose record only the checkpoint has: the records of
        all rounds up to `written` are in the history. Raises OSError."""
        for round_ in self._rounds()[: -self._keep]:
            if round_ <= written:
                self.path(round_).unlink(missing_ok=True)

    def load(self, round_: int) -> Checkpoint:
        """Raises CheckpointError if the file is damaged or gone."""
        path = self.path(round_)
        try:
            checkpoint = Checkpoint.from_bytes(path.read_bytes())
        except (OSError, CodecError) as error:
            raise CheckpointError(f"{path}: {error}") from error
        if checkpoint.round != round_:
            raise CheckpointError(f"{path}: it holds round {checkpoint.round}")
        return checkpoint

    def newest(self) -> tuple[Checkpoint | None, list[int]]:
        """The newest one that is whole, None if there was never any; and the rounds of the damaged
        ones that come after it.

        Raises:
            CheckpointError: there are some, but all are damaged.
        """
        damaged: list[int] = []
        for round_ in reversed(self._rounds()):
            try:
                return self.load(round_), damaged
            except CheckpointError as error:
                log.error("checkpoint_damaged", error=str(error))
                damaged.append(round_)
        if damaged:
            raise CheckpointError(
                f"{self.path(damaged[-1])} is damaged, and there is no older checkpoint: restore "
                "one from a backup, or begin a new run with another RUN_ID"
            )
        return None, []

    def set_aside(self, damaged: Iterable[int]) -> None:
        """Rename damaged ones, so that they are not taken for the newest any more. Raises
        OSError."""
        for round_ in damaged:
            self.path(round_).rename(self.path(round_).with_suffix(".damaged"))

    @property
    def last_round(self) -> int:
        """Of the checkpoints that are there, whole or not; -1 without any."""
        return max(self._rounds(), default=-1)

    def records(self) -> list[RoundRecord]:
        """Records of the kept rounds whose file has a readable header, oldest first."""
        records = []
        for round_ in self._rounds():
            try:
                records.append(decode_meta(self.path(round_).read_bytes(), CheckpointMeta).record)
            except (OSError, CodecError) as error:
                log.warning("checkpoint_unreadable", round=round_, error=str(error))
        return records

    def _rounds(self) -> list[int]:
        if not self._folder.exists():
            return []
        matches = (CHECKPOINT_FILE.match(path.name) for path in self._folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)
