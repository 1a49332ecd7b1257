"""`fedfog demo` as `make demo` starts it: what it leaves behind, and what it does not."""

import errno
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from conftest import LIMIT, REPOSITORY
from fedfog.cli.broker import installed_mosquitto

MARK = "FEDFOG_TEST_DEMO"
# A round is done; of the first ones the demo does not hear, if all tiers are up before it listens.
TRAINED = r"model [1-9]\d* of 50"


COMMAND = [sys.executable, "-m", "fedfog.cli.main", "demo"]


class Processes:
    """What a demo starts: each process has the mark of its test in its environment."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex

    def running(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if self._is_marked(process)]

    def find(self, words: str) -> psutil.Process:
        """One whose command line has these words."""
        return next(p for p in self.running() if words in " ".join(p.cmdline()))

    def left(self) -> list[str]:
        """Those that are still there although the kernel had time to end them."""
        _, alive = psutil.wait_procs(self.running(), timeout=5)
        return [" ".join(process.cmdline()) for process in alive]

    def _is_marked(self, process: psutil.Process) -> bool:
        try:
            alive = process.status() != psutil.STATUS_ZOMBIE
            return bool(alive and process.environ().get(MARK) == self.mark)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False


class Demo:
    """A demo, its output in a pipe."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        self.runs = folder / "runs"
        self.lines: list[str] = []
        self.processes = Processes()
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env_of(self.runs, self.processes) | environment,
        )

    def line(self, pattern: str, timeout: float = LIMIT) -> str:
        """The next line with this pattern; empty if the demo ends before it."""
        assert self.process.stdout is not None
        limit = threading.Timer(timeout, self.process.kill)
        limit.start()
        try:
            for line in self.process.stdout:
                self.lines.append(line.rstrip())
                if re.search(pattern, line):
                    return self.lines[-1]
        finally:
            limit.cancel()
        return ""

    def end(self, timeout: float = LIMIT) -> tuple[int, str]:
        """Wait for its end; exit code and all output."""
        self.line("\0", timeout)
        return self.process.wait(LIMIT), "\n".join(self.lines)


def env_of(runs: Path, processes: Processes) -> dict[str, str]:
    own = {"DATA_DIR": str(REPOSITORY / "data"), "RUNS_DIR": str(runs), MARK: processes.mark}
    return {**os.environ, **own}


def summary_of(runs: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((runs / "latest" / "summary.json").read_text())
    return summary


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Callable[..., Demo]]:
    started: list[Demo] = []

    def start(*arguments: str, **environment: str) -> Demo:
        started.append(Demo(tmp_path, *arguments, **environment))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()


def assert_complete(demo: Demo, output: str, clients: int = 3, rounds: int = 3) -> None:
    summary = summary_of(demo.runs)
    assert summary["status"] == "completed"
    assert summary["rounds"] == rounds
    assert summary["clients"] == [clients] * rounds
    assert summary["test_accuracy"] > summary["initial_accuracy"]
    assert 0.5 < summary["test_auroc"] <= 1
    assert f"{summary['test_accuracy']:.4f}" in output
    assert (demo.runs / "latest" / "model.safetensors").exists()
    federated = summary["federated"]
    assert (federated["overall"]["num_clients"], federated["missing"]) == (clients, 0)
    assert f"{clients} clients on {federated['overall']['num_examples']} validation" in output


@pytest.mark.skipif(installed_mosquitto() is None, reason="Mosquitto is not installed")
def test_demo_ends_by_itself_with_all_rounds_clients_and_metrics(demo: Callable[..., Demo]) -> None:
    run = demo("--broker", "mosquitto")
    code, output = run.end()
    assert code == 0, output
    assert run.processes.running() == []
    assert_complete(run, output)
    assert str(run.runs) in output


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["--broker", "embedded"], {"http_proxy": "http://127.0.0.1:9"}),
        ([], {"PATH": "/nowhere"}),
    ],
    ids=["chosen, behind a proxy", "Mosquitto is not installed"],
)
def test_demo_runs_on_the_embedded_broker(
    demo: Callable[..., Demo], arguments: list[str], environment: dict[str, str]
) -> None:
    run = demo("--rounds", "2", "--clients", "2", *arguments, **environment)
    code, output = run.end()
    assert code == 0, output
    assert "embedded" in output
    assert run.processes.left() == []
    assert_complete(run, output, clients=2, rounds=2)


def test_demo_of_four_tiers_counts_every_client(demo: Callable[..., Demo]) -> None:
    run = demo("--tiers", "4", "--regions", "3", "--clients", "1", "--rounds", "10")
    code, output = run.end(2 * LIMIT)
    assert code == 0, output
    assert_complete(run, output, clients=3, rounds=10)
    assert "fog-2-0: 2 of 2 regions online" in output
    assert "fog-3-0: round 10 closed with 2 partials" in output
    history = json.loads((run.runs / "latest" / "history.json").read_text())
    assert [r["regions"]["fog-3-0"]["num_clients"] for r in history["rounds"]] == [3] * 10
    assert run.processes.left() == []


def test_ctrl_c_on_a_terminal_stops_the_demo_and_leaves_no_process(tmp_path: Path) -> None:
    processes = Processes()
    environment = env_of(tmp_path, processes) | {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(COMMAND[0], [*COMMAND, "--rounds", "50"], environment)
    limit = threading.Timer(2 * LIMIT, os.kill, (pid, signal.SIGKILL))
    limit.start()
    seen = b""
    typed = False
    while chunk := read_terminal(terminal):
        seen += chunk
        if not typed and re.search(TRAINED.encode(), seen):
            assert len(processes.running()) > 6
            os.write(terminal, b"\x03")
            typed = True
    _, status = os.waitpid(pid, 0)
    limit.cancel()
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 130, seen
    assert b"SIGINT" in seen
    assert b"3 of 3 online" in seen  # the live table
    assert processes.running() == []
    assert summary_of(tmp_path)["status"] == "stopped"


def read_terminal(terminal: int) -> bytes:
    """What a program writes there; empty when it has ended."""
    try:
        return os.read(terminal, 65536)
    except OSError as error:
        assert error.errno == errno.EIO
        return b""


def test_demo_that_is_terminated_while_it_starts_leaves_no_process(
    demo: Callable[..., Demo],
) -> None:
    run = demo()
    assert run.line("run demo-"), run.lines
    run.process.terminate()
    code, output = run.end()
    assert code == 128 + signal.SIGTERM
    assert "SIGTERM" in output
    assert run.processes.running() == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills the children of the dead")
def test_killed_demo_leaves_no_process(demo: Callable[..., Demo]) -> None:
    run = demo("--rounds", "50")
    assert run.line(TRAINED), run.lines
    run.process.kill()
    assert run.processes.left() == []


@pytest.mark.parametrize(
    ("command", "name"),
    [("fedfog_bridge", "region_0-bridge"), ("fedfog.cli.clients", "region_0-client-")],
)
def test_tier_that_dies_is_named_and_its_log_is_shown(
    demo: Callable[..., Demo], command: str, name: str
) -> None:
    run = demo("--rounds", "50", "--clients", "2")
    assert run.line(TRAINED), run.lines
    victim = run.processes.find(command)
    # A client is a child of the process that has loaded PyTorch for all of them.
    (victim.children() or [victim])[0].kill()
    code, output = run.end()
    assert code == 1
    assert f"{name}" in output
    assert "was killed by SIGKILL" in output
    assert "step_" in output  # the end of its log
    assert run.processes.running() == []


@pytest.mark.parametrize("setting", ["LEARNING_RATE", "K", "VALIDATION_FRACTION", "TOPIC_PREFIX"])
def test_impossible_setting_of_any_tier_is_named(demo: Callable[..., Demo], setting: str) -> None:
    run = demo(**{setting: "#0"})
    code, output = run.end()
    assert code == 2
    assert setting in output
    assert run.processes.running() == []


def test_demo_gives_up_at_the_time_limit_and_says_whom_it_waits_for(
    demo: Callable[..., Demo],
) -> None:
    """K=3 with two clients: no round can ever close."""
    run = demo("--clients", "2", "--time-limit", "5", K="3", ROUND_DEADLINE="600")
    code, output = run.end()
    assert code == 1
    assert "--time-limit" in output
    assert "region_0" in output
    assert run.processes.running() == []


def test_missing_data_is_named(demo: Callable[..., Demo], tmp_path: Path) -> None:
    run = demo(DATA_DIR=str(tmp_path / "nothing"))
    code, output = run.end()
    assert code == 1
    assert "nothing/ECG5000" in output
    assert run.processes.running() == []
