"""Which run the server works on, and the folder of a run."""

import os
import platform
import re
import secrets
import time
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import structlog
from pydantic import BaseModel, ValidationError

from fedfog.files import sync_folder, write_atomically
from fedfog.messages.schemas import RegionShare, RoundRecord
from fedfog.runs import CHECKPOINTS, Rewind, RunInfo, Status, Summary, listed
from fedfog.service import ServiceError
from fedfog.settings import CHOOSABLE, CentralSettings, why
from fedfog_central_server.checkpoints import Checkpoint, CheckpointError, Checkpoints
from fedfog_central_server.history import HistoryFile

log = structlog.get_logger()

M = TypeVar("M", bound=BaseModel)

# A run is the same job only while these are the same.
DEFINING = ("task", *CHOOSABLE)
# The id in messages gets a suffix at each rewind, and may have 63 characters.
NAME_LENGTH = 55
_REWOUND = re.compile(r"-r\d+$")
_PACKAGES = ("fedfog", "flwr", "torch", "numpy")


class Run:
    """A run's folder, opened by this process.

    Args:
        settings: the server's; those that define the run are taken from `info`.
        others: the newest `run_started` of all other runs in RUNS_DIR.

    Raises:
        ServiceError: the settings in `info` are impossible.
    """

    def __init__(self, info: RunInfo, settings: CentralSettings, others: int) -> None:
        self.folder, self.info = settings.runs_dir / info.run, info
        self.settings = with_chosen(settings, _defining(info.settings))
        self.checkpoints = Checkpoints(self.folder / CHECKPOINTS, settings.keep_checkpoints)
        self.history = HistoryFile(info, self.folder / "history.json")
        self._others = others
        self._since, self._before = time.monotonic(), 0.0

    @property
    def id(self) -> str:
        """Under which the run is known to the other tiers. They ignore a lower round of a run
        that they know, so a run that has to go back takes a new id."""
        rewinds = self.info.rewinds
        return f"{self.info.run}-r{rewinds}" if rewinds else self.info.run

    @property
    def seconds(self) -> float:
        """How long the run has been worked on, over all starts of the server."""
        return self._before + time.monotonic() - self._since

    def ends_early_with(self, round_: int) -> str:
        """Why the model of this round is the last one, before ROUNDS; empty if it is not.

        The models before it decide, so that clients train while one is evaluated, and a restart
        finds the same.
        """
        patience, best = self.settings.early_stop_rounds, self.history.best(before=round_)
        if not patience or best is None or round_ == self.settings.rounds:
            return ""
        if round_ - 1 - best.round < patience:
            return ""
        return (
            f"model {best.round} had accuracy {best.accuracy:.4f}, and none of the "
            f"{round_ - 1 - best.round} after it a higher one (EARLY_STOP_ROUNDS={patience})"
        )

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
        try:
            checkpoint, damaged = self.checkpoints.newest()
        except CheckpointError as error:
            raise ServiceError(str(error)) from error
        reasons = [f"the checkpoint of round {number} is damaged" for number in damaged]
        if self.info.run_started < self._others:
            # Everybody ignores what began earlier, and aggregators forget other runs' updates.
            reasons.append("another run was worked on since")
            self.info.run_started = max(int(time.time()), self._others + 1)
            self.save_info()
        if checkpoint and reasons:
            self._rewind(max(damaged, default=checkpoint.round), checkpoint.round, reasons)
        # Not before: a crash in between would leave nothing that tells of the rewind.
        self.checkpoints.set_aside(damaged)
        self.history.load(checkpoint.round if checkpoint else -1, self.checkpoints.records())
        self._before = self.history.seconds
        return checkpoint

    def _rewind(self, from_round: int, to_round: int, reasons: list[str]) -> None:
        before, number = self.id, self.info.rewinds + 1
        rewind = Rewind(
            from_round=from_round,
            to_round=to_round,
            before=before,
            after=f"{self.info.run}-r{number}",
            why="; ".join(reasons),
        )
        self.info.rewound.append(rewind)
        # Also of two lives of the same run, the later one counts.
        self.info.run_started = max(int(time.time()), self.info.run_started + 1)
        self.save_info()
        log.warning("run_goes_back", **rewind.model_dump())


def open_at_start(settings: CentralSettings) -> Run | None:
    """The run that a start of the server works on: the newest one if it is not completed and the
    environment is as it was; else the one that RUN_ID names, or a new one. None if the newest one
    was stopped by `fedfog stop`, and the server is to stand by.

    Raises:
        ServiceError: RUN_ID names a run that is completed or was begun with other settings, or the
            newest run's settings cannot be read.
        OSError: RUNS_DIR cannot be written.
    """
    settings.runs_dir.mkdir(parents=True, exist_ok=True)
    info = _latest(settings) or _named(settings)
    if info is None:
        return open_new(settings, settings.run_id, {})
    summary = _read(Summary, settings.runs_dir / info.run / "summary.json")
    if summary and summary.held and not settings.exit_when_finished:
        log.warning(
            "standing_by",
            because=f"run {info.run} was stopped by `fedfog stop`",
            do=f"`fedfog resume {info.run}`, or `fedfog run` for a new one",
        )
        return None
    return _take_up(info, settings)


def open_new(settings: CentralSettings, name: str, chosen: Mapping[str, Any]) -> Run:
    """A new run.

    Args:
        name: default: now.
        chosen: settings that are not those of the environment.

    Raises:
        ServiceError: the name is taken or cannot be one, or a setting is impossible.
        OSError: RUNS_DIR cannot be written.
    """
    now = datetime.now().astimezone()
    name = name or f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    if len(name) > NAME_LENGTH or _REWOUND.search(name):
        raise ServiceError(
            f"{name!r} cannot be the name of a run: at most {NAME_LENGTH} characters, and not "
            "`-r` and a number at the end (which the server adds)"
        )
    if unknown := sorted(chosen.keys() - set(CHOOSABLE)):
        raise ServiceError(
            f"{unknown[0].upper()} cannot be chosen for a run, only {', '.join(CHOOSABLE)}; the "
            "clients have their task from their environment (TASK)"
        )
    others = _newest_start(settings)
    try:
        info = RunInfo(
            run=name,
            run_started=max(int(now.timestamp()), others + 1),  # even if the clock was put back
            begun=now,
            versions={"python": platform.python_version()} | {p: _version(p) for p in _PACKAGES},
            settings=with_chosen(settings, chosen).model_dump(mode="json"),
            environment=_environment(settings),
        )
    except ValidationError as error:
        raise ServiceError(f"{name!r} cannot be the name of a run (a-z, 0-9, _ and -)") from error
    if (settings.runs_dir / name / "settings.json").exists():
        raise ServiceError(f"There is a run {name} already: choose another name")
    return _opened(Run(info, settings, others), "run_begins")


def open_again(settings: CentralSettings, name: str) -> Run:
    """A run that is not completed, to go on where it was.

    Raises:
        ServiceError: there is no such run, it is completed, or the clients have another task.
        OSError: RUNS_DIR cannot be written.
    """
    folder = settings.runs_dir / name
    info = _read(RunInfo, folder / "settings.json") if name else None
    if info is None or info.run != name:
        raise ServiceError(f"There is no run {name!r} in {settings.runs_dir}: see `fedfog runs`")
    if _is_completed(folder):
        raise ServiceError(f"Run {name} is completed")
    if info.settings["task"] != settings.task:
        raise ServiceError(
            f"Run {name} was begun with TASK={info.settings['task']}, and the server's environment "
            f"says {settings.task}, as that of the clients should: correct it and start them again"
        )
    return _take_up(info, settings)


def with_chosen(settings: CentralSettings, chosen: Mapping[str, Any]) -> CentralSettings:
    """The settings with some of them replaced.

    Raises:
        ServiceError: one is impossible.
    """
    try:
        return CentralSettings(**(settings.model_dump() | dict(chosen)))
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        name = str(detail["loc"][0]).upper()
        raise ServiceError(f"{name}={detail['input']!r}: {why(detail)}") from error


def _latest(settings: CentralSettings) -> RunInfo | None:
    path = settings.runs_dir / "latest" / "settings.json"
    found = _read(RunInfo, path)
    if found is None:
        if path.exists() and not settings.run_id:
            raise ServiceError(
                f"{path} is damaged: restore it from a backup to go on with that run, or set "
                "RUN_ID to the name of a new one"
            )
        return None
    if settings.run_id and found.environment.get("run_id") != settings.run_id:
        return None
    if obstacle := _obstacle(settings.runs_dir / found.run, found.environment, settings):
        log.info("run_not_taken_up", because=f"{found.run} {obstacle}")
        return None
    return found


def _named(settings: CentralSettings) -> RunInfo | None:
    if not settings.run_id:
        return None
    path = settings.runs_dir / settings.run_id / "settings.json"
    found = _read(RunInfo, path)
    if path.exists() and not found:
        raise ServiceError(f"{path} is damaged: set another RUN_ID for a new run")
    if found and (obstacle := _obstacle(path.parent, found.settings, settings)):
        raise ServiceError(
            f"RUN_ID={settings.run_id}: this run {obstacle}; set another RUN_ID for a new run"
        )
    return found


def _take_up(info: RunInfo, settings: CentralSettings) -> Run:
    info.environment = _environment(settings)
    run = _opened(Run(info, settings, _newest_start(settings, info.run)), "run_resumed")
    # What it says is no longer so, and a restart must not take the run for a stopped one.
    (run.folder / "summary.json").unlink(missing_ok=True)
    return run


def _opened(run: Run, event: str) -> Run:
    run.folder.mkdir(exist_ok=True)
    run.save_info()
    _point(run.folder.with_name("latest"), run.info.run)
    log.info(event, run=run.id, folder=str(run.folder))
    return run


def _environment(settings: CentralSettings) -> dict[str, Any]:
    return settings.model_dump(mode="json", include={*DEFINING, "run_id"})


def _defining(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What defines a run, of its recorded settings; an older FedFog recorded fewer of them, and did
    what is the default now."""
    fields = CentralSettings.model_fields
    return {name: settings.get(name, fields[name].default) for name in DEFINING}


def _newest_start(settings: CentralSettings, but: str = "") -> int:
    """Of all runs but one. The run that began last, or was resumed last after another one, is the
    one that the other tiers know."""
    found = (run.info for run in listed(settings.runs_dir))
    return max((info.run_started for info in found if info.run != but), default=0)


def _obstacle(folder: Path, begun_with: Mapping[str, Any], settings: CentralSettings) -> str:
    """Why a start does not take a run up; empty if it does."""
    if _is_completed(folder):
        return "is completed"
    now = _environment(settings)
    other = [
        f"{name.upper()}={value}, not {now[name]}"
        for name, value in _defining(begun_with).items()
        if value != now[name]
    ]
    return f"was begun with {'; '.join(other)}" if other else ""


def _is_completed(folder: Path) -> bool:
    summary = _read(Summary, folder / "summary.json")
    return summary is not None and summary.status is Status.COMPLETED


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
    sync_folder(link.parent)


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
