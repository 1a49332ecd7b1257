"""Live and ready, as an orchestrator asks for them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedfog.health import STALE_SECONDS, Heartbeat


def ask(path: Path, question: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "fedfog.health", question]
    environment = {**os.environ, "HEALTH_FILE": str(path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("state", "live", "ready"),
    [("ready", 0, 0), ("no MQTT broker", 0, 1), ("making model 0", 0, 1)],
)
def test_a_service_that_waits_is_live_but_not_ready(
    tmp_path: Path, state: str, live: int, ready: int
) -> None:
    path = tmp_path / "health"
    Heartbeat(path).beat(state)
    assert ask(path, "live") == (live, f"{state}\n")
    assert ask(path, "ready") == (ready, f"{state}\n")


def test_a_worker_that_hangs_is_neither(tmp_path: Path) -> None:
    path = tmp_path / "health"
    Heartbeat(path).beat("ready")
    past = time.time() - STALE_SECONDS - 5
    os.utime(path, (past, past))
    for question in ("live", "ready"):
        code, text = ask(path, question)
        assert code == 1
        assert "no sign of life" in text


def test_an_unknown_question_is_refused(tmp_path: Path) -> None:
    assert ask(tmp_path / "health", "alive")[0] == 2
