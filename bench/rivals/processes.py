"""A rival's processes: started, watched, and all gone at the end."""

import os
import signal
import subprocess
import sys
import sysconfig
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from fedfog.service import spawn

ROOT = Path(__file__).parents[2]
# Every process of a rival inherits this, also one that has left its parent and session.
TOKEN = "RIVAL_TOKEN"
INSTALL_SECONDS = 300.0
POLL_SECONDS = 0.05


class NotMeasuredError(Exception):
    """A rival does not install or run; the text says why."""


class Processes:
    """The processes of one measurement. Leaving the context ends them and all their descendants.

    Args:
        folder: for their logs.
        env: variables on top of this process's own.
    """

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self._folder, self._token = folder, uuid.uuid4().hex
        self._env = {"PYTHONPATH": str(ROOT), **env, TOKEN: self._token}
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        while found := self._alive():
            for process in found:
                try:
                    process.send_signal(signal.SIGKILL)
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(found, timeout=5.0)
        for child in self._started.values():
            child.wait()

    def start(
        self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start one, in the folder and with its output in NAME.log there."""
        log = self._folder / f"{name}.log"
        process = spawn(command, {**self._env, **(env or {})}, log)
        self._started[name] = process
        return process

    def run(self, name: str, command: Sequence[str], limit: float) -> None:
        """Start one that ends by itself, and wait for that.

        Raises:
            NotMeasuredError: it fails, or takes more than `limit` seconds.
        """
        try:
            self.start(name, command).wait(limit)
        except subprocess.TimeoutExpired as error:
            raise NotMeasuredError(f"{name} is not done after {limit:.0f} s") from error
        self.check()

    def wait_for_line(self, name: str, text: str, limit: float) -> None:
        """Wait until `text` is in the log of process `name`.

        Raises:
            NotMeasuredError: it is not there after `limit` seconds, or a process has failed.
        """
        deadline = time.monotonic() + limit
        while text not in (self._folder / f"{name}.log").read_text(errors="replace"):
            self.check()
            if time.monotonic() > deadline:
                raise NotMeasuredError(f"{name} does not log {text!r} within {limit:.0f} s")
            time.sleep(POLL_SECONDS)

    def check(self) -> None:
        """Raise NotMeasuredError, with the end of its log, if one has failed."""
        for name, process in self._started.items():
            if process.poll():
                text = " ".join((self._folder / f"{name}.log").read_text(errors="replace").split())
                raise NotMeasuredError(f"{name} exits with {process.returncode}: {text[-200:]}")

    def _alive(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if (
                    process.environ().get(TOKEN) == self._token
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found


def environment(processes: Processes, requirement: str, borrow: bool = False) -> str:
    """The Python of a virtual environment of the rival's own, kept in the user's cache.

    Args:
        requirement: package==version.
        borrow: it also sees the packages of this environment, which then need no second copy
            (PyTorch).

    Raises:
        NotMeasuredError: it does not install.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "fedfog-bench" / requirement.replace("==", "-")
    python, done = str(folder / "bin" / "python"), folder / "installed"
    if not done.exists():
        venv = [sys.executable, "-m", "venv", "--clear", str(folder)]
        processes.run("venv", venv, INSTALL_SECONDS)
        if borrow:
            ours = Path(sysconfig.get_path("purelib"))
            theirs = folder / ours.relative_to(sys.prefix)
            (theirs / "borrowed.pth").write_text(f"{ours}\n")
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        processes.run("pip", [*install, requirement], INSTALL_SECONDS)
        done.touch()
    return python
