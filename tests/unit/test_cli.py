"""The command line itself."""

import subprocess
import sys

import pytest

from fedfog.cli.broker import free_port


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["demo"],
        ["partition"],
        ["monitor"],
        ["run"],
        ["runs"],
        ["stop"],
        ["resume"],
        ["experiment"],
        ["report"],
        ["export"],
        ["predict"],
        ["token"],
        ["client"],
    ],
)
def test_help_tells_the_options_without_loading_a_framework(command: list[str]) -> None:
    script = f"""
import sys
from fedfog.cli.main import app
try:
    app({[*command, "--help"]!r}, prog_name="fedfog")
finally:
    print("loaded:", *sorted(sys.modules.keys() & {{"torch", "flwr", "numpy", "pydantic", "paho"}}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    assert "Usage: fedfog" in done.stdout
    assert done.stdout.splitlines()[-1].strip() == "loaded:"


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--clients", "0"],
        ["demo", "--broker", "other"],
        ["demo", "--rounds", "many"],
        ["run", "--rounds", "0"],
        ["run", "--set", "optimizer"],
    ],
)
def test_impossible_option_is_named(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "fedfog.cli.main", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert arguments[1] in done.stderr


def test_ports_of_one_process_do_not_meet_before_anybody_listens_on_them() -> None:
    assert len({free_port() for _ in range(1000)}) == 1000
