"""How a service starts, stops and fails, the same for all tiers."""

import signal
import sys
from collections.abc import Callable
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
