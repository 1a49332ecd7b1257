"""How a service starts, stops and fails, the same for all tiers."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

import structlog

from fedfog import logs
from fedfog.settings import CommonSettings
from fedfog.transport.mqtt import TransportError

log = structlog.get_logger()

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_SUCCEEDED_BY_ANOTHER = 3


class StopRequested:
    """Event that SIGTERM and SIGINT put into a service's queue."""


class ServiceError(Exception):
    """The service cannot go on; the text says why and what to do."""


def run(name: str, settings: CommonSettings, body: Callable[[], int], **context: object) -> None:
    """Run a service's body and end the process with its exit code; an error that it foresees is
    one log line, not a traceback."""
    logs.configure(name, settings.log_level, settings.log_format, **context)
    try:
        code = body()
    except (ServiceError, TransportError, OSError) as error:
        log.error("service_failed", error=str(error), kind=type(error).__name__)
        code = EXIT_FAILED
    sys.exit(code)


def on_stop(put: Callable[[StopRequested], None]) -> None:
    """Have SIGTERM and SIGINT put `StopRequested` into a queue."""

    def handle(_number: int, _frame: FrameType | None) -> None:
        put(StopRequested())

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)


def spawn(
    command: Sequence[str], log_file: Path, env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a child in a session of its own, its output in `log_file`, that on Linux dies with
    this process even if this is killed with SIGKILL.

    Args:
        env: variables on top of this process's own.
    """
    with log_file.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )


def _die_with_parent() -> None:
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
