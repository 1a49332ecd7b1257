"""The measurement of rivals: rounds are counted, models checked, and no process is left behind."""

import sys
from pathlib import Path

import psutil
import pytest
from bench.rivals import Case, run
from bench.rivals.processes import NotMeasuredError, Processes


def test_rounds_of_flat_grpc_are_counted_and_their_models_are_the_mean() -> None:
    rival = run(Case("flower-grpc", clients=2, warm_up=1, rounds=2, limit=60.0))
    assert rival.n == 2, rival.note
    assert rival.median_s and rival.p95_s and rival.p95_s >= rival.median_s > 0
    assert "not the mean" not in rival.note


def test_process_that_fails_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    with (
        pytest.raises(NotMeasuredError, match="pip exits with 3: no such package"),
        Processes(tmp_path, {}) as processes,
    ):
        program = "import sys; print('no such\\npackage'); sys.exit(3)"
        processes.run("pip", [sys.executable, "-c", program], 30.0)


def test_no_process_outlives_an_exception_not_even_one_that_left_its_session(
    tmp_path: Path,
) -> None:
    pid_file = tmp_path / "pid"
    program = f"""
import pathlib, subprocess, sys
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
pathlib.Path({str(pid_file)!r}).write_text(str(child.pid))
print("orphaned", flush=True)
"""
    with pytest.raises(KeyboardInterrupt), Processes(tmp_path, {}) as processes:
        processes.start("parent", [sys.executable, "-c", program])
        processes.wait_for_line("parent", "orphaned", 30.0)
        orphan = psutil.Process(int(pid_file.read_text()))
        raise KeyboardInterrupt
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
