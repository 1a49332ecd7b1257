"""The Flower ServerApp: strategy, Grid and checkpoints. It runs in a process that SuperExec starts,
without PyTorch and without MQTT; what it has to say to the fog goes through the central server."""

import os
import queue
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Client
from pathlib import Path

import structlog
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy
from pydantic import BaseModel
from pydantic_core import to_jsonable_python
from structlog.typing import EventDict

from fedfog.flower.grid import BellRung, BridgeSeen, FogEvent, FogGrid, RegionsError
from fedfog.flower.strategy import (
    FogStrategy,
    GlobalModel,
    RoundFailedError,
    StrategyError,
    make_strategy,
)
from fedfog.logs import Step
from fedfog.messages.codec import TensorTable
from fedfog.messages.schemas import Cue
from fedfog.runs import CHECKPOINTS
from fedfog.settings import CentralSettings
from fedfog_central_server import link, strategy_state
from fedfog_central_server.checkpoints import Checkpoint, CheckpointError, Checkpoints

log = structlog.get_logger()

# Bells that may wait. They are hints: a reply whose bell was lost is found by a look for it.
MAX_BELLS = 10_000

app = ServerApp()


class SaveError(Exception):
    """A checkpoint cannot be written; the text names the path."""


class Server:
    """The central server as seen from here; it is the Grid's `Fog`, and takes the log."""

    def __init__(self, path: str) -> None:
        self.events: queue.Queue[FogEvent] = queue.Queue()
        self._start: queue.SimpleQueue[link.Start] = queue.SimpleQueue()
        self._connection = Client(path, "AF_UNIX")
        self._lock = threading.Lock()
        self._log_from("debug")
        threading.Thread(target=self._listen, name="server", daemon=True).start()

    def wait_for_start(self) -> tuple[link.Start, CentralSettings]:
        """What is to be done; comes when model 0 is there. The server's end ends the wait, too."""
        start = self._start.get()
        settings = CentralSettings(**start.settings)
        self._log_from(settings.log_level)
        return start, settings

    def say(self, message: BaseModel) -> None:
        with self._lock:
            link.say(self._connection, message)

    def cue(self, run: str, round_: int) -> None:
        self.say(link.CueWanted(cue=Cue(run=run, round=round_)))

    def _log_from(self, level: str) -> None:
        structlog.configure(
            processors=[structlog.processors.format_exc_info, self._take_line],
            wrapper_class=structlog.make_filtering_bound_logger(level),
        )

    def _take_line(self, _logger: object, level: str, line: EventDict) -> EventDict:
        fields = to_jsonable_python(line, fallback=str)
        self.say(link.Logged(level=level, event=fields.pop("event"), fields=fields))
        raise structlog.DropEvent

    def _listen(self) -> None:
        while True:
            try:
                message = link.from_server.validate_json(self._connection.recv_bytes())
            except (EOFError, OSError):
                # The server died or gave this process up: whoever resumes the run must be the
                # only one to write checkpoints.
                os._exit(1)
            if isinstance(message, link.Start):
                self._start.put(message)
            elif isinstance(message, link.BridgeHeard):
                self.events.put(BridgeSeen(message.region, message.bridge))
            elif self.events.qsize() < MAX_BELLS:
                self.events.put(BellRung(message.bell))


@dataclass(frozen=True)
class Checkpointer:
    """Makes each new model a checkpoint and tells the server."""

    checkpoints: Checkpoints
    table: TensorTable
    inner: Strategy
    server: Server

    def save(self, model: GlobalModel) -> None:
        """Raises SaveError."""
        record = model.record
        log.info(
            Step.AGGREGATE_GLOBAL,
            round=model.round,
            partials=[partial.id for _, partial in sorted(record.regions.items())],
            left_out=record.left_out or None,
            clients=record.num_clients,
            examples=record.num_examples,
            train_loss=record.train_loss,
            seconds=round(record.seconds.get("aggregate", 0.0), 4),
        )
        state = strategy_state.arrays_of(self.inner)
        # Also the strategy that goes on continues from what was saved, to the last bit.
        strategy_state.restore(self.inner, state)
        self._write(Checkpoint(record, self.table, model.vector, state))
        self.server.say(link.Checkpointed(round=model.round))

    def _write(self, checkpoint: Checkpoint) -> None:
        path = self.checkpoints.path(checkpoint.round)
        for delay in (*self.checkpoints.again_after, None):
            try:
                self.checkpoints.save(checkpoint)
                return
            except OSError as error:
                if delay is None:
                    raise SaveError(
                        f"the checkpoint {path} cannot be written ({error.strerror}): make room "
                        "or correct RUNS_DIR, then start the server again or call `fedfog resume`"
                    ) from error
                log.error(
                    "checkpoint_not_written",
                    path=str(path),
                    error=error.strerror,
                    again_in_seconds=delay,
                )
                time.sleep(delay)


@app.main()
def main(grid: Grid, context: Context) -> None:
    server = Server(os.environ[link.SOCKET_VARIABLE])
    server.say(link.Hello(flower_run=context.run_id, pid=os.getpid()))
    config = context.run_config
    first_round = int(config["first-round"])
    try:
        told, settings = server.wait_for_start()
        folder = Path(told.folder) / CHECKPOINTS
        checkpoints = Checkpoints(folder, settings.keep_checkpoints)
        start = checkpoints.load(first_round - 1)
        inner = make_strategy(
            settings.strategy,
            settings.min_fit_clients,
            settings.learning_rate,
            **settings.strategy_options,
        )
        strategy_state.restore(inner, start.strategy)
        strategy = FogStrategy(
            inner,
            table=start.table,
            run=told.run,
            first_round=first_round,
            min_fit=settings.min_fit_clients,
            min_available=settings.min_available_clients,
            regions=settings.region_list,
            regions_timeout=settings.regions_timeout,
            round_timeout=settings.round_timeout,
            on_model=Checkpointer(checkpoints, start.table, inner, server).save,
            aggregation=settings.aggregation,
            byzantine=settings.byzantine,
        )
        strategy.run_rounds(
            FogGrid(grid, server, settings.bridge_grace),
            start.vector,
            int(config["num-server-rounds"]) - first_round + 1,
        )
    except (RegionsError, RoundFailedError, StrategyError, CheckpointError, SaveError) as error:
        server.say(link.Failed(error=str(error)))
        raise
    except Exception:
        log.exception("serverapp_raised")
        raise
