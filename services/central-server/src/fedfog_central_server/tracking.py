"""TENSORBOARD_DIR: the figures of each round, for TensorBoard to show while the run is at work.

A thread writes them, so that a slow or a full disk holds up no round; what cannot be written is
logged and left out, for the history has it all.
"""

import queue
import threading
from pathlib import Path
from typing import Any

import structlog

from fedfog.messages.schemas import RoundRecord
from fedfog.runs import figures
from fedfog.service import ServiceError

log = structlog.get_logger()

FLUSH_SECONDS = 5
CLOSE_SECONDS = 5.0
_GROUPS = ("federated", "seconds")  # charts that TensorBoard shows together


class Tracking:
    """Writes into a folder of `folder` for each run.

    Raises:
        ServiceError: tensorboardX is not installed, or the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import tensorboardX
        except ImportError as error:
            raise ServiceError(
                "TENSORBOARD_DIR needs tensorboardX: pip install 'fedfog[tensorboard]'"
            ) from error
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ServiceError(f"{error} (TENSORBOARD_DIR)") from error
        self._folder, self._make_writer = folder, tensorboardX.SummaryWriter
        self._run = ""
        self._writer: Any = None
        self._records: queue.Queue[tuple[str, RoundRecord] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def add(self, run: str, record: RoundRecord) -> None:
        """Have a round's figures written; returns at once."""
        self._records.put((run, record))

    def close(self) -> None:
        """Write what is left, if that does not take long."""
        self._records.put(None)
        self._thread.join(CLOSE_SECONDS)

    def _work(self) -> None:
        while (item := self._records.get()) is not None:
            try:
                self._write(*item)
            except OSError as error:
                log.warning("tracking_failed", setting="TENSORBOARD_DIR", error=str(error))
        if self._writer is not None:
            self._writer.close()

    def _write(self, run: str, record: RoundRecord) -> None:
        if run != self._run or self._writer is None:
            if self._writer is not None:
                self._writer.close()
            # What an earlier start of the server has written of this round and later ones is void.
            self._writer = self._make_writer(
                str(self._folder / run), purge_step=record.round, flush_secs=FLUSH_SECONDS
            )
            self._run = run
        values: dict[str, Any] = record.model_dump(mode="json", exclude={"run", "regions"})
        for name, value in figures(values).items():
            group, _, rest = name.partition("_")
            tag = f"{group}/{rest}" if group in _GROUPS else name
            self._writer.add_scalar(tag, value, record.round)
