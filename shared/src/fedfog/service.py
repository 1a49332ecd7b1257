"""How a service starts, stops and fails, the same for all tiers.

What only a running service needs is imported when it runs: `fedfog demo` has started all tiers
before it would have imported it.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from fedfog.settings import CommonSettings

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_SUCCEEDED_BY_ANOTHER = 3

OTHER_FILES = 200  # of a process, beside its connections


class StopRequested:
    """Event that SIGTERM and SIGINT put into a service's queue."""


class ServiceError(Exception):
    """The service cannot go on; the text says why and what to do."""


def run(
    name: str, settings: "CommonSettings", body: Callable[[], int], **context: object
) -> NoReturn:
    """Run a service's body and end the process with its exit code; an error that it foresees is
    one log line, not a traceback."""
    import structlog

    from fedfog import logs
    from fedfog.transport.mqtt import TransportError

    logs.configure(name, settings.log_level, settings.log_format, **context)
    try:
        code = body()
    except (ServiceError, TransportError, OSError) as error:
        structlog.get_logger().error("service_failed", error=str(error), kind=type(error).__name__)
        code = EXIT_FAILED
    exit_now(code)


def exit_now(code: int) -> NoReturn:
    """End the process, but do not have the interpreter take its modules apart before: with
    PyTorch among them that lasts half a second. Nothing that `atexit` knows is done."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def on_stop(put: Callable[[StopRequested], None]) -> None:
    """Have SIGTERM and SIGINT put `StopRequested` into a queue."""

    def handle(_number: int, _frame: FrameType | None) -> None:
        put(StopRequested())

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)


def allow_open_files(connections: int, setting: str) -> None:
    """Raise the limit of open files, of this process and of those that it starts, if so many
    connections need it.

    Raises:
        ServiceError: the system's own limit is lower; the text names `setting`, which asks for it.
    """
    import resource  # not on Windows

    needed = connections + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ServiceError(
            f"{setting}={connections} needs {needed} open files, but a process may have {hard}: "
            "raise the limit (`ulimit -Hn`, in Compose `ulimits: nofile`)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


M_MMAP_THRESHOLD, LARGE_BLOCK = -3, 1 << 20
PR_SET_PDEATHSIG = 1
# Loaded here: after a fork is not the time to load anything.
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def give_memory_back() -> None:
    """Have freed blocks of a megabyte and more go back to the system at once. Otherwise glibc
    learns to keep those of up to 32 MB, and a large message would cost its size twice."""
    if mallopt := getattr(_libc, "mallopt", None):  # not with musl
        mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)


def die_with(parent: int) -> None:
    """In a process just forked by the main thread of `parent`: be killed when that ends, in
    whatever way (on Linux).

    The kernel takes the end of the thread that forked for the end of the parent (prctl(2)).
    """
    if _libc is not None and _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before the call above
        os._exit(EXIT_FAILED)


def spawn(
    command: Sequence[str], env: Mapping[str, str] | None = None, log_file: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a child that does not outlive this process, not even if it is killed (on Linux).

    Only for the main thread, see `die_with`. The child has a session of its own, so that Ctrl-C
    reaches it only through this process.

    Args:
        env: variables on top of this process's own.
        log_file: where the child's output is appended; default: this process's output.
    """
    parent = os.getpid()
    output = log_file.open("ab") if log_file else None
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            env={**os.environ, **(env or {})},
            start_new_session=True,
            preexec_fn=lambda: die_with(parent),
        )
    finally:
        if output:
            output.close()
