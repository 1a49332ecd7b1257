"""Health of a service as a file that its worker keeps fresh. Standard library only, because
`python -m fedfog.health` runs in every container every few seconds.

*Live*: the worker's loop runs; if not, only a restart helps. *Ready*: it also has all that it needs
from others (broker, SuperLink); if not, it is waiting, and a restart would change nothing.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

STALE_SECONDS = 30.0
BEAT_SECONDS = 5.0


def health_file() -> Path:
    """Where the service's health is (environment variable HEALTH_FILE)."""
    return Path(os.environ.get("HEALTH_FILE", Path(tempfile.gettempdir()) / "fedfog.health"))


class Heartbeat:
    """Called by the worker's loop; writes at most every few seconds."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path or health_file()
        self._last = ("", -BEAT_SECONDS)

    def beat(self, state: str) -> None:
        """The worker is alive; `state` is `ready` or says what it waits for. A full disk makes it
        look dead in the end, but does not end it."""
        now = time.monotonic()
        if state == self._last[0] and now - self._last[1] < BEAT_SECONDS:
            return
        self._last = (state, now)
        try:
            self._path.write_text(state)
        except OSError as error:
            import structlog

            structlog.get_logger().warning(
                "health_not_written", path=str(self._path), setting="HEALTH_FILE", error=str(error)
            )


def main(question: str = "ready") -> int:
    """Exit code 0 if the service is `live` or `ready`, 1 with the reason otherwise."""
    if question not in ("live", "ready"):
        sys.stderr.write("usage: python -m fedfog.health [live|ready]\n")
        return 2
    path = health_file()
    try:
        age = time.time() - path.stat().st_mtime
        state = path.read_text(errors="replace")
    except FileNotFoundError:
        sys.stderr.write("not started yet\n")
        return 1
    if age > STALE_SECONDS:
        sys.stderr.write(f"no sign of life for {age:.0f} s\n")
        return 1
    sys.stdout.write(f"{state}\n")
    return 0 if state == "ready" or question == "live" else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
