"""A shorter `make fuzz`, and that it finds what it looks for."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import REPOSITORY
from fedfog.cli.broker import installed_mosquitto
from fuzz.mutator import mutants
from fuzz.pure import FuzzError, run
from fuzz.readers import Read, Reader
from fuzz.valid import messages

VALID = {"fl/cue": messages()["fl/cue"]}


@pytest.mark.skipif(installed_mosquitto() is None, reason="Mosquitto is not installed")
def test_hostile_bytes_kill_nobody_grow_nothing_and_cost_no_honest_update() -> None:
    """At every reader in process, at running services, at the broker and at the enrolment."""
    sizes = {"--pure": 10_000, "--live": 2_000, "--raw": 1_000, "--http": 200}
    arguments = [str(part) for pair in sizes.items() for part in pair]
    done = subprocess.run(
        [sys.executable, "-m", "fuzz", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "tests"), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_the_same_seed_gives_the_same_bytes_and_another_one_others() -> None:
    first, same, other = (mutants(VALID["fl/cue"], seed) for seed in (1, 1, 2))
    drawn = [next(first) for _ in range(500)]
    assert drawn == [next(same) for _ in range(500)]
    assert drawn != [next(other) for _ in range(500)]
    assert len(set(drawn)) > 400


def crashes(_folder: Path) -> Read:
    """Trusts that a cue is an object with a round."""
    return lambda _topic, payload: json.loads(payload)["round"]


def hoards(_folder: Path) -> Read:
    """Believes a number that it is told."""

    def take(_topic: str, payload: bytes) -> None:
        bytearray(100 * len(payload) if len(payload) > 10_000 else 8 << 20)

    return take


@pytest.mark.parametrize(("reader", "word"), [(crashes, "Error"), (hoards, "bytes for a payload")])
def test_a_reader_that_crashes_or_hoards_is_found(
    reader: Callable[[Path], Read], word: str, tmp_path: Path
) -> None:
    with pytest.raises(FuzzError, match=word):
        run(tmp_path, 5_000, readers=[Reader("bad", reader, VALID)])
