"""Flower at work on a run: its ServerApp is submitted, greeted, watched, and begun again when it
dies or is silent for too long, together with the SuperLink if need be."""

import random
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import structlog
from pydantic import BaseModel

from fedfog.messages.schemas import Bell, Bridge, Cue
from fedfog.service import ServiceError
from fedfog.settings import CentralSettings
from fedfog_central_server import link
from fedfog_central_server.active import ActiveRun, RunFailedError
from fedfog_central_server.tier import (
    FlowerTier,
    HungUp,
    Said,
    SubmitFailed,
    Submitted,
    SuperLinkExited,
)

log = structlog.get_logger()

# Waits before the Flower side is brought up again, counted since the last completed round.
RESTART_AFTER = (0.0, 1.0, 2.0, 4.0, 8.0)
JITTER = (0.8, 1.2)
SUBMIT_SECONDS = 90.0
SERVERAPP_SECONDS = 45.0
# On top of the settings, for a round's checkpoint: the ServerApp waits two minutes for room on a
# full disk.
ROUND_SLACK = 180.0
MAX_REGIONS = 10_000


class FlowerSide:
    """The SuperLink, and the ServerApp of the present run.

    Args:
        folder: for sockets and Flower's files.
        put: takes the events that `handle` is to be called with.
        cue: tells the bridges that train messages are there.
    """

    def __init__(
        self,
        settings: CentralSettings,
        folder: Path,
        put: Callable[[Any], None],
        cue: Callable[[Cue], object],
    ) -> None:
        self._tier = FlowerTier(settings, folder, put)
        self._cue = cue
        self._bridges: dict[str, Bridge] = {}
        self._run: ActiveRun | None = None
        self._ticket = 0  # of the newest submission: what comes of an older one is void
        self._flower_run: int | None = None
        self._server_app: Connection | None = None
        self._started = False
        self._expected, self._settings_of_limit, self._limit = "", "", 0.0
        self._due: float | None = None
        self._restart_at: float | None = None
        self._failures = 0

    @property
    def ready(self) -> bool:
        """A ServerApp is at work, or none is needed."""
        return self._run is None or self._server_app is not None

    def start(self) -> None:
        """Start the SuperLink. Raises ServiceError if FLOWER_PORT is taken."""
        self._tier.start()

    def attach(self, run: ActiveRun) -> None:
        """Have the rounds done that the run still lacks. Raises ServiceError as `start`."""
        self._run, self._failures = run, 0
        self._bring_up()

    def detach(self, done: bool) -> None:
        """Leave the run; unless it is `done`, which ends its ServerApp by itself, end that."""
        if self._run is None:
            return
        self._ticket += 1
        if not done:
            self._hang_up()
            if self._flower_run is not None:
                self._tier.stop_run(self._flower_run)
        self._run = self._server_app = self._flower_run = self._due = None

    def terminate(self) -> None:
        """Ask the SuperLink to end."""
        self._restart_at = None
        self._tier.terminate()

    def close(self) -> None:
        self._tier.close()

    def hear_bridge(self, region: str, bridge: Bridge) -> None:
        known = self._bridges.get(region)
        if bridge == known or (known is None and len(self._bridges) >= MAX_REGIONS):
            return
        later = known is None or bridge.boot > known.boot
        # The will of an earlier boot may come after the birth of its successor.
        if (later and bridge.online) or (known and bridge.boot == known.boot):
            self._bridges[region] = bridge
            self._tell(link.BridgeHeard(region=region, bridge=bridge))

    def hear_bell(self, bell: Bell) -> None:
        self._tell(link.BellHeard(bell=bell))

    # Events

    def handle(self, event: Any) -> None:
        """Raises RunFailedError, and ServiceError without a run."""
        match event:
            case Submitted(ticket, flower_run) if ticket == self._ticket:
                self._flower_run = flower_run
                self._expect("a word of the ServerApp", SERVERAPP_SECONDS)
            case Submitted(_, flower_run):
                self._tier.stop_run(flower_run)
            case SubmitFailed(ticket, reason) if ticket == self._ticket:
                log.error("run_not_submitted", reason=reason)
                self._tier.end_superlink()
            case Said(connection, link.Hello() as hello):
                self._greet(connection, hello)
            case Said(connection, message) if connection is self._server_app:
                self._said(message)
            case HungUp(connection):
                connection.close()
                if connection is self._server_app:
                    self._server_app = None
                    # With the SuperLink gone, too, its own event is the one that counts.
                    if self._tier.alive:
                        self._trouble("the ServerApp has ended")
            case SuperLinkExited(code):
                self._hang_up()
                self._ticket += 1
                self._flower_run = None
                self._trouble(f"the SuperLink has ended with code {code}")

    def tick(self, now: float, idle: bool) -> float | None:
        """Do what is due at `now` (monotonic); returns when something is due next.

        Args:
            idle: no event is waiting that may be the one that is waited for.

        Raises:
            RunFailedError, ServiceError: as `handle`.
        """
        if not self._started and self._server_app and self._run and self._run.checkpoint:
            self._started = True
            self._tell(self._run.start_message())
            self._expect_checkpoint(self._run)
        if self._due is not None and now >= self._due and idle:
            self._due = None
            log.error(
                "flower_silent",
                missing=self._expected,
                seconds=self._limit,
                settings=self._settings_of_limit or None,
                flower_run=self._flower_run,
            )
            self._hang_up()
            self._tier.end_superlink()
        if self._restart_at is not None and now >= self._restart_at:
            self._bring_up()
        return min((t for t in (self._due, self._restart_at) if t is not None), default=None)

    def _greet(self, connection: Connection, hello: link.Hello) -> None:
        if self._run is None or hello.flower_run != self._flower_run:
            self._tier.hang_up(connection)  # of a run that was given up: this ends it
            return
        self._server_app, self._started, self._due = connection, False, None
        log.info("serverapp_ready", pid=hello.pid, flower_run=hello.flower_run)
        for region, bridge in self._bridges.items():
            self._tell(link.BridgeHeard(region=region, bridge=bridge))

    def _said(self, message: link.FromServerApp) -> None:
        assert self._run is not None
        match message:
            case link.Checkpointed(round=round_):
                self._failures = 0
                self._run.checkpointed(round_)
                self._expect_checkpoint(self._run)
            case link.CueWanted(cue=cue):
                self._cue(cue)
            case link.Logged(level=level, event=event, fields=fields):
                getattr(log, level)(event, **fields)
            case link.Failed(error=error):
                raise RunFailedError(error)

    def _tell(self, message: BaseModel) -> None:
        if self._server_app is None:
            return
        try:
            link.say(self._server_app, message)
        except OSError as error:  # HungUp follows
            log.debug("serverapp_not_told", reason=str(error))

    # No wait without a limit

    def _expect(self, what: str, seconds: float, settings: str = "") -> None:
        self._expected, self._limit, self._settings_of_limit = what, seconds, settings
        self._due = time.monotonic() + seconds

    def _expect_checkpoint(self, run: ActiveRun) -> None:
        if run.trained:
            self._due = None
            return
        seconds = run.settings.regions_timeout + run.settings.round_timeout + ROUND_SLACK
        names = "REGIONS_TIMEOUT + ROUND_TIMEOUT"
        self._expect(f"the checkpoint of round {run.rounds + 1}", seconds, names)

    def _hang_up(self) -> None:
        """End the ServerApp if it still runs."""
        connection, self._server_app, self._due = self._server_app, None, None
        if connection is not None:
            self._tier.hang_up(connection)

    def _trouble(self, what: str) -> None:
        """Bring the Flower side up again, unless it was tried too often since the last round."""
        if self._run is not None and self._run.trained and self._tier.alive:
            return  # the ServerApp has nothing left to do
        if self._failures == len(RESTART_AFTER):
            text = f"{what}; gave up after {self._failures} restarts (FLWR_LOG_LEVEL=DEBUG tells "
            text += "what Flower does)"
            raise RunFailedError(text) if self._run else ServiceError(text)
        delay = RESTART_AFTER[self._failures] * random.uniform(*JITTER)
        self._failures += 1
        self._restart_at, self._due = time.monotonic() + delay, None
        log.warning(
            "flower_restarts", because=what, in_seconds=round(delay, 2), attempt=self._failures
        )

    def _bring_up(self) -> None:
        self._restart_at = None
        if not self._tier.alive:
            self._tier.start()
        run = self._run
        if run is None:
            return
        run.adopt()
        if run.trained:
            return
        replaced, self._flower_run = self._flower_run, None
        self._ticket += 1
        self._tier.submit(self._ticket, run.id, run.rounds + 1, run.settings.rounds, replaced)
        self._expect("the run's submission", SUBMIT_SECONDS)
