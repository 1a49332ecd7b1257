"""Kills of services at exact instants; the halting itself is done by `tests/hooks/halts.py`."""

import json
import os
import signal
import time
from pathlib import Path

import psutil

from conftest import LIMIT, REPOSITORY, Service


class Halt:
    """Halts a service that was started with `settings` where the test wants it.

    Args:
        file: one that only this object uses.
        sites: `module:qualified.name` of functions and methods. Not of the module that is run as
            a program: its functions belong to `__main__`.
    """

    def __init__(self, file: Path, *sites: str) -> None:
        self._file, self._sites = file, sites
        self._reached = file.with_name(f"{file.name}.reached")

    @property
    def settings(self) -> dict[str, object]:
        hooks = [REPOSITORY / "tests/hooks", REPOSITORY / "tests"]
        return {
            "pythonpath": os.pathsep.join(map(str, hooks)),
            "test_patches": "halts:install",
            "halt_sites": ",".join(self._sites),
            "halt_file": self._file,
        }

    def arm(self, site: str, when: str, pattern: str = "") -> "Halt":
        """Halt the next call of `site` with `pattern` in an argument, `before` or `after` it."""
        assert site in self._sites
        assert when in ("before", "after")
        temporary = self._file.with_name(f"{self._file.name}.tmp")
        temporary.write_text(json.dumps([site, when, pattern]))
        temporary.replace(self._file)
        return self

    def wait(self, service: Service, timeout: float = LIMIT) -> None:
        """Wait until the service is halted."""
        deadline = time.monotonic() + timeout
        while not self._reached.exists():
            assert service.process.poll() is None, service.log.read_text()[-3000:]
            assert time.monotonic() < deadline, f"not halted: {service.log.read_text()[-3000:]}"
            time.sleep(0.01)
        self._reached.unlink()

    def kill_there(self, service: Service) -> None:
        """Wait until the service is halted, then SIGKILL it and all its children."""
        self.wait(service)
        kill_all(service)


def kill_all(service: Service) -> None:
    """SIGKILL a service and all its children, as far as that can be done at once."""
    children = psutil.Process(service.process.pid).children(recursive=True)
    for pid in [service.process.pid, *(child.pid for child in children)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # it died with its parent
            continue
    service.process.wait()
    psutil.wait_procs(children, LIMIT)
