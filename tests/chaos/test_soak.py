"""Memory and stores stay flat over thousands of rounds (`bench/soak.py` does the work)."""

import json
import os
import subprocess
import sys

import pytest

from conftest import REPOSITORY

FLAT = 0.10
LEAK = 4_000  # bytes a round: less than one record of the history, which must not stay in memory
SMALL = 65_536  # bytes: a page more of a store that has hardly any is no growth
SECONDS = 3000.0

Sizes = dict[str, int]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")


def soak(rounds: int, **env: str) -> tuple[list[str], list[str]]:
    """Run a federation for `rounds`; which services' memory has grown, and which stores, from a
    tenth of the rounds to the last?"""
    done = subprocess.run(
        [sys.executable, "-m", "bench.soak", str(rounds)],
        cwd=REPOSITORY,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    sys.stdout.write(done.stderr)  # the table
    assert done.returncode == 0, done.stderr
    first, *_, last = json.loads(done.stdout)
    assert last["round"] >= rounds
    leaked = LEAK * (last["round"] - first["round"])
    memory = grown(first["memory"], last["memory"], leaked)
    return memory, grown(first["files"], last["files"], leaked)


def grown(first: Sizes, last: Sizes, leaked: int) -> list[str]:
    assert first.keys() == last.keys()
    return [
        name
        for name, size in sorted(last.items())
        if size - first[name] > max(min(FLAT * first[name], leaked), SMALL)
    ]


def test_memory_and_stores_of_every_service_are_flat_over_2000_rounds() -> None:
    assert soak(2000) == ([], [])


def test_the_soak_notices_a_leak() -> None:
    path = os.pathsep.join(filter(None, ["tests/hooks", os.environ.get("PYTHONPATH")]))
    hooks = str(REPOSITORY / path)
    memory, _ = soak(60, PYTHONPATH=hooks, TEST_PATCHES="leaks:keep_what_is_published")
    assert {"aggregators", "bridges", "central-server", "clients"} <= set(memory)
