"""The folder of a run: where it is, what it was begun with, what is known of its rounds."""

import os
import platform
import secrets
import time
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import structlog
from pydantic import BaseModel, ValidationError

from fedfog.files import write_atomically
from fedfog.messages.schemas import RegionShare, RoundRecord
from fedfog.runs import RunInfo, Status, Summary
from fedfog.service import ServiceError
from fedfog.settings import CentralSettings
from fedfog_central_server.checkpoints import Checkpoint, CheckpointError, Checkpoints
from fedfog_central_server.history import HistoryFile

log = structlog.get_logger()

M = TypeVar("M", bound=BaseModel)

# A run is the same job only while these are the same.
DEFINING = (
    "task",
    "seed",
    "rounds",
    "local_epochs",
    "batch_size",
    "learning_rate",
    "strategy",
)
_PACKAGES = ("fedfog", "flwr", "torch", "numpy", "scikit-learn")


class Run:
    """A run's folder, opened by this process."""

    def __init__(self, folder: Path, info: RunInfo, keep: int) -> None:
        self.folder, self.info = folder, info
        self.checkpoints = Checkpoints(folder / "checkpoints", keep)
        self.history = HistoryFile(info.run, folder / "history.json")
        self._since, self._before = time.monotonic(), 0.0

    @property
    def id(self) -> str:
        """Under which the run is known to the other tiers. They ignore a lower round of a run
        that they know, so a run that has to go back takes a new id."""
        rewinds = self.info.rewinds
        return f"{self.info.run[:55]}-r{rewinds}" if rewinds else self.info.run

    @property
    def seconds(self) -> float:
        """How long the run has been worked on, over all starts of the server."""
        return self._before + time.monotonic() - self._since

    def save_info(self) -> None:
        """Raises OSError."""
        data = self.info.model_dump_json(indent=1).encode()
        write_atomically(self.folder / "settings.json", data)

    def recover(self) -> Checkpoint | None:
        """The newest good checkpoint; the history is brought to the same round.

        Raises:
            ServiceError: all checkpoints are damaged.
            OSError: the folder cannot be written.
        """
        last = self.checkpoints.last_round
        try:
            checkpoint = self.checkpoints.newest()
        except CheckpointError as error:
            raise ServiceError(str(error)) from error
        if checkpoint and checkpoint.round < last:
            self.info.rewinds += 1
            self.info.run_started = max(int(time.time()), self.info.run_started + 1)
            self.save_info()
            log.warning("run_goes_back", from_round=last, to_round=checkpoint.round, now=self.id)
        self.history.load(checkpoint.round if checkpoint else -1, self.checkpoints.records())
        self._before = self.history.seconds
        return checkpoint


def open_run(settings: CentralSettings) -> Run:
    """The run that RUN_ID names; without RUN_ID the newest one, if it is not completed and was
    begun with the same settings; else a new one.

    Raises:
        ServiceError: RUN_ID names a run that is completed or was begun with other settings.
        OSError: RUNS_DIR cannot be written.
    """
    root = settings.runs_dir
    root.mkdir(parents=True, exist_ok=True)
    latest = _read(RunInfo, root / "latest" / "settings.json")
    if settings.run_id:
        path = root / settings.run_id / "settings.json"
        found = _read(RunInfo, path)
        if path.exists() and not found:
            raise ServiceError(f"{path} is damaged: set another RUN_ID for a new run")
        if found and (obstacle := _obstacle(root / found.run, found, settings)):
            raise ServiceError(
                f"RUN_ID={settings.run_id}: this run {obstacle}; set another RUN_ID for a new run"
            )
    else:
        found = latest
        if found and (obstacle := _obstacle(root / found.run, found, settings)):
            log.info("new_run", because=f"{found.run} {obstacle}")
            found = None
    info = found or _new(settings, after=latest.run_started if latest else 0)
    run = Run(root / info.run, info, settings.keep_checkpoints)
    if not found:
        run.folder.mkdir(exist_ok=True)
        run.save_info()
    _point(root / "latest", info.run)
    log.info("run_resumed" if found else "run_begins", run=run.id, folder=str(run.folder))
    return run


def _new(settings: CentralSettings, after: int) -> RunInfo:
    now = datetime.now()
    return RunInfo(
        run=settings.run_id or f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}",
        # Everybody ignores a run that began before the one they know: never behind it, even if
        # the clock was put back.
        run_started=max(int(now.timestamp()), after + 1),
        versions={"python": platform.python_version()} | {p: _version(p) for p in _PACKAGES},
        settings=settings.model_dump(mode="json"),
    )


def _obstacle(folder: Path, info: RunInfo, settings: CentralSettings) -> str:
    """Why a run cannot be taken up again; empty if it can."""
    summary = _read(Summary, folder / "summary.json")
    if summary and summary.status is Status.COMPLETED:
        return "is completed"
    now = settings.model_dump(mode="json", include=set(DEFINING))
    other = [
        f"{name.upper()}={info.settings.get(name)}, not {now[name]}"
        for name in DEFINING
        if info.settings.get(name) != now[name]
    ]
    return f"was begun with {'; '.join(other)}" if other else ""


def _read(schema: type[M], path: Path) -> M | None:
    """What is in a file of ours; None if there is none, or if it is damaged, which is logged."""
    try:
        return schema.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        log.error("file_damaged", path=str(path), error=error.errors()[0]["msg"])
        return None


def _point(link: Path, target: str) -> None:
    temporary = link.with_name(f".latest.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def shares(record: RoundRecord) -> dict[str, RegionShare]:
    """What each region put into a model."""
    return {
        region: RegionShare(num_clients=p.num_clients, num_examples=p.num_examples)
        for region, p in record.regions.items()
    }
