"""`history.json`, written so that a round costs the same whether it is the tenth or the thousandth.

The file has a line for each round, and is whole JSON at every instant: a record is written over the
closing bracket, together with the next one. Of what was written, memory keeps the evaluations and
the number of clients only.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import structlog
from pydantic import ValidationError

from fedfog import runs
from fedfog.files import write_atomically
from fedfog.messages.schemas import Evaluation, RoundRecord

log = structlog.get_logger()


class HistoryFile:
    """The history of a run.

    `seconds` are those of work on the run before this start.
    """

    def __init__(self, info: runs.RunInfo, path: Path) -> None:
        self.initial: Evaluation | None = None
        self.federated: runs.FinalEvaluation | None = None
        self.federated_accuracy: dict[int, float] = {}  # of each model that clients trained from
        self.clients: dict[int, int] = {}
        self.regions: set[str] = set()
        self.seconds = 0.0
        self._info, self._path = info, path
        self._evaluations: list[Evaluation] = []
        self._waiting: dict[int, RoundRecord] = {}  # for their evaluation
        self._unwritten: list[bytes] = []
        self._new_head = True
        self._head = self._end = 0  # offsets of the first record and of what comes after the last
        self._tail = b""

    @property
    def rounds(self) -> int:
        """The newest round that is known."""
        return max(self.clients, default=0)

    @property
    def written(self) -> int:
        """After `save`, the records of all rounds up to this one are in the file."""
        return min((r for r in self._waiting if r > 0), default=self.rounds + 1) - 1

    @property
    def evaluations(self) -> list[Evaluation]:
        """All that are known, oldest first."""
        return [self.initial, *self._evaluations] if self.initial else self._evaluations

    def best(self, before: int | None = None) -> Evaluation | None:
        """The highest accuracy of all models, or of those before round `before`; the first of
        equals."""
        known = (e for e in self.evaluations if before is None or e.round < before)
        return max(known, key=lambda evaluation: evaluation.accuracy, default=None)

    def lacks_evaluation(self, round_: int) -> bool:
        return round_ in self._waiting

    def add(self, record: RoundRecord) -> None:
        """A model was made; its record is written when its evaluation is there."""
        if record.round > 0 and record.round not in self.clients:
            self._count(record)
            self._waiting[record.round] = record
        elif record.round == 0 and self.initial is None:
            self._waiting[0] = record

    def evaluated(
        self, round_: int, evaluation: Evaluation | None, seconds: float
    ) -> RoundRecord | None:
        """Take the evaluation of a model, or that there is none; returns the model's record, or
        None if it was not waited for."""
        record = self._waiting.pop(round_, None)
        if record is None:
            return None
        times = {**record.seconds, "evaluate": round(seconds, 4)}
        record = record.model_copy(update={"evaluation": evaluation, "seconds": times})
        if round_ == 0:
            self.initial, self._new_head = evaluation, True
            return record
        self._unwritten.append(record.to_json())
        if evaluation is not None:
            self._evaluations.append(evaluation)
        return record

    def save(self, seconds: float) -> None:
        """Write what is new. After an error it is kept for the next call.

        Args:
            seconds: of work on the run.

        Raises:
            OSError: the file cannot be written.
        """
        self.seconds = seconds
        new = b",\n".join(self._unwritten)
        if self._new_head:
            body = self._path.read_bytes()[self._head : self._end] if self._end else b""
            self._write(b",\n".join(filter(None, [body, new])))
        else:
            separator = b",\n" if new and self._end > self._head else b""
            self._append(separator + new)
        self._unwritten.clear()

    def close(self, seconds: float) -> None:
        """Write also the records that lack their evaluation. Raises OSError."""
        for record in self._waiting.values():
            if record.round > 0:
                self._unwritten.append(record.to_json())
        self._waiting.clear()
        self.save(seconds)

    def load(self, newest: int, records: Iterable[RoundRecord]) -> None:
        """Read what a former start has written, repaired from the records that the checkpoints
        have, and write it anew without rounds after `newest`, from which the run goes on.

        Raises:
            OSError: the file cannot be read or written.
        """
        known = self._read() if self._path.exists() else {}
        for record in records:
            known.setdefault(record.round, record)
        if missing := sorted(set(range(1, newest + 1)) - known.keys()):
            log.error("history_incomplete", path=str(self._path), rounds=missing)
        lines = []
        for round_, record in sorted(known.items()):
            if not 0 < round_ <= newest:
                continue
            if record.evaluation is None and round_ == newest:
                self.add(record)
                continue
            self._count(record)
            lines.append(record.to_json())
            if record.evaluation:
                self._evaluations.append(record.evaluation)
        self._write(b",\n".join(lines))

    def _count(self, record: RoundRecord) -> None:
        self.clients[record.round] = record.num_clients
        self.regions.update(record.regions)
        if record.federated:
            self.federated_accuracy[record.round - 1] = record.federated.accuracy

    def _read(self) -> dict[int, RoundRecord]:
        """Line by line, so that what a power loss has left of the file can be read, too."""
        first, *lines = self._path.read_bytes().splitlines() or [b""]
        damaged = 0
        try:
            head = runs.History.model_validate_json(first + b"]}")
            self.initial = head.initial
        except ValidationError:
            damaged += 1
        try:
            self.seconds = float(json.loads(b'{"":[' + lines.pop())["seconds"])
        except (IndexError, ValueError, KeyError, TypeError):
            damaged += 1
        known = {}
        for line in filter(None, lines):
            try:
                record = RoundRecord.model_validate_json(line.removesuffix(b","))
            except ValidationError:
                damaged += 1
            else:
                known[record.round] = record
        if damaged:
            log.error("history_damaged", path=str(self._path), lines=damaged)
        return known

    def _write(self, body: bytes) -> None:
        info = self._info
        known = runs.History(run=info.run, initial=self.initial, rewinds=info.rewound)
        first = known.model_dump_json(include={"run", "initial", "rewinds"}).removesuffix("}")
        head = f'{first},"rounds":[\n'.encode()
        tail = self._closing()
        write_atomically(self._path, head + body + tail)
        self._head, self._end, self._tail = len(head), len(head) + len(body), tail
        self._new_head = False

    def _append(self, new: bytes) -> None:
        tail = self._closing()
        file = os.open(self._path, os.O_WRONLY)
        try:
            try:
                _write_at(file, self._end, new + tail)
                os.fsync(file)
            except OSError:
                _write_at(file, self._end, self._tail)  # its place on the disk is still there
                os.truncate(file, self._end + len(self._tail))
                raise
        finally:
            os.close(file)
        self._end, self._tail = self._end + len(new), tail

    def _closing(self) -> bytes:
        final = f',"federated":{self.federated.model_dump_json()}' if self.federated else ""
        return f'\n]{final},"seconds":{self.seconds:.3f}}}\n'.encode()


def _write_at(file: int, offset: int, data: bytes) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        offset, data = offset + written, data[written:]
