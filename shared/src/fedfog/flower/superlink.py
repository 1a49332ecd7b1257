"""`python -m fedfog.flower.superlink`: Flower's `flower-superlink` with the same arguments.

Four things are different:

- The SuperExec, and the ServerApps that it starts, are forked from here with all modules loaded.
  As commands of their own, which Flower makes of them, each loads the same modules again: 1.2 s of
  a core before it does anything, and 50 MB.
- They die with the process that started them. Flower's own watch lets them live on for a while.
- The heap of loaded modules is frozen. A full collection of it would hold the interpreter's lock
  for 60-77 ms in the middle of a round (p95 of a round of two regions 217 -> 141 ms), and would
  write to all the memory that the forked processes share.
- Only this host may submit runs and take tasks, and requests go shorter ways (`routes.py`).
"""

import ctypes
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from fedfog.service import die_with

_SUPERLINK = "flower-superlink"
_commands: dict[str, Callable[[], None]] = {}
_fork = multiprocessing.get_context("fork")


class _Forked:
    """What Flower uses of the `subprocess.Popen` of one of its own commands."""

    def __init__(self, args: list[str], quiet: bool) -> None:
        self._args = args
        self._process = _fork.Process(target=_become, args=(args, os.getpid(), quiet))
        self._process.start()

    def terminate(self) -> None:
        self._process.terminate()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._args, timeout or 0.0)
        return self._process.exitcode


class _Popen(subprocess.Popen[Any]):
    """Forks Flower's own commands, which it starts in the main thread; others start as ever."""

    def __new__(cls, args: Any, **kwargs: Any) -> Self | _Forked:  # type: ignore[misc]
        if args[0] in _commands:
            return _Forked(args, kwargs.get("stdout") == subprocess.DEVNULL)
        return super().__new__(cls)


def _become(args: list[str], parent: int, quiet: bool) -> None:
    """Turn this forked process into a command of Flower's."""
    from fedfog.flower.fleet import forget_exit_handlers

    die_with(parent)
    # What the parent does about signals and at its end is not for its child to do.
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    forget_exit_handlers()
    os.setsid()
    if quiet:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.dup2(nothing, sys.stderr.fileno())
    _show_as(args[0])
    sys.argv = args
    _commands[args[0]]()


def _show_as(name: str) -> None:
    """Have `ps` show this name: the kernel reads a command line where it once put it, between
    `arg_start` and `arg_end` of proc_pid_stat(5)."""
    if sys.platform != "linux":
        return
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, name.encode(), min(len(name), end - start - 1))


def main() -> None:
    gc.disable()  # while modules are loaded, there is nothing to collect: 0.2 s of a core
    from fedfog.flower.fleet import load_commands
    from fedfog.flower.routes import lay_ways

    _commands.update(load_commands())
    lay_ways()
    gc.freeze()
    gc.enable()
    subprocess.Popen = _Popen  # type: ignore[assignment, misc]
    sys.argv[0] = _SUPERLINK
    _commands[_SUPERLINK]()


if __name__ == "__main__":
    main()
