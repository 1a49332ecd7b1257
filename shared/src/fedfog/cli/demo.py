"""`fedfog demo`: a whole federation on this machine, every tier as its own process on loopback.

The processes find each other in whatever order they come up. They end with this one: at the end
of the run, on Ctrl-C and SIGTERM, when one of them dies, and (on Linux) when this process is
killed.
"""

import json
import re
import signal
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from fedfog.cli.federation import SERVER, Ended, Federation, Options
from fedfog.service import EXIT_FAILED, EXIT_OK, ServiceError

if TYPE_CHECKING:  # imported when all tiers are on their way
    from fedfog.cli.story import Story

LOG_LINES = 12
SIGNALS = (signal.SIGINT, signal.SIGTERM)
_TOLD_BY_NAME = ("service", "region", "client")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class Stopped(BaseException):
    """SIGINT or SIGTERM came."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class DemoError(Exception):
    """The demo cannot go on; the text is for the user."""

    def __init__(self, text: str, exit_code: int = EXIT_FAILED) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def run(options: Options, kind: str = "demo") -> int:
    """Run a federation from start to end; returns the exit code. Its name begins with `kind`."""
    if sys.platform == "win32":
        sys.stderr.write("fedfog demo needs Linux, macOS or WSL: use Docker Compose (README.md).\n")
        return EXIT_FAILED
    began = time.monotonic()
    for number in SIGNALS:
        signal.signal(number, interrupt)
    name = f"{kind}-{datetime.now():%Y%m%d-%H%M%S}"
    try:
        with tempfile.TemporaryDirectory(prefix="fedfog-demo-") as private:
            federation = Federation(options, name, Path(private))
            try:
                federation.start()
                story = _watch(federation, options, began)
            finally:
                for number in SIGNALS:
                    signal.signal(number, signal.SIG_IGN)
                federation.stop()
    except Stopped as stopped:
        sys.stderr.write(f"\nStopped by {stopped}; no process is left.\n")
        return stopped.exit_code
    except DemoError as error:
        sys.stderr.write(f"\n{error}\n")
        return error.exit_code
    except (ServiceError, OSError) as error:
        sys.stderr.write(f"\n{error}\n")
        return EXIT_FAILED
    story.summarize(federation.folder)
    return EXIT_OK


def interrupt(number: int, _frame: FrameType | None) -> None:
    """Raises Stopped."""
    raise Stopped(number)


def _watch(federation: Federation, options: Options, began: float) -> "Story":
    """Show what happens until the central server has ended well.

    Raises:
        DemoError: a process ended that should not, or time is up.
    """
    from rich.console import Console

    from fedfog import logs
    from fedfog.cli.story import REFRESH_SECONDS, Story
    from fedfog.messages.catalog import read
    from fedfog.messages.codec import CodecError
    from fedfog.settings import CommonSettings, load
    from fedfog.transport import mqtt
    from fedfog.transport.tls import Identity

    logs.configure("demo", "error")
    topics = load(CommonSettings).topics
    broker = federation.broker
    session = mqtt.Session(
        "fedfog-demo",
        broker.host,
        broker.port,
        [
            topics.global_model,
            topics.history,
            topics.status("+"),
            topics.progress("+"),
            topics.presence("+", "+"),
            topics.bridge("+"),
            topics.receipts("+"),
        ],
        tls=Identity.of(federation.observer_dir),
    )
    session.start()
    federation.watch(session.events.put)
    story = Story(Console(highlight=False), federation.below, options, began)
    story.say(
        f"run {federation.folder.name} with {broker.kind} at {broker.host}:{broker.port}; "
        f"logs in {federation.logs}/"
    )
    with story.live:
        while True:
            event = session.next(REFRESH_SECONDS)
            now = time.monotonic()
            match event:
                case Ended(name=name, code=code) if name == SERVER and code == EXIT_OK:
                    break
                case Ended(code=code):
                    raise DemoError(obituary(event), code if code > 0 else EXIT_FAILED)
                case mqtt.Received(topic, payload) if payload:
                    try:
                        story.see(read(topics, topic, payload), now)
                    except CodecError as error:
                        story.say(f"{topic}: {error}")
            if now - began > options.time_limit:
                raise DemoError(
                    f"No end after {options.time_limit:g} s (--time-limit): {story.state()}. "
                    f"The logs are in {federation.logs}/"
                )
            story.refresh()
    session.stop()
    return story


def obituary(ended: Ended) -> str:
    """What a user needs to know of a tier that ended before its time."""
    lines = ended.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
    if not lines:
        return f"{ended}. Its log, {ended.log}, is empty."
    end = "\n".join(f"  {_readable(line)}" for line in lines)
    return f"{ended}. Its log, {ended.log}, ends with:\n{end}"


def _readable(line: str) -> str:
    """A JSON log line as text; any other line without its colours."""
    try:
        fields: Any = json.loads(line)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        return _COLOURS.sub("", line)
    first = [str(fields.pop(name, "")) for name in ("timestamp", "level", "event")]
    rest = [f"{name}={value}" for name, value in fields.items() if name not in _TOLD_BY_NAME]
    return " ".join(filter(None, [*first, *rest]))
