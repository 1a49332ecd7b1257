"""The promises in tests/README.md and docs/guarantees.md name tests that exist."""

import re
from pathlib import Path

import pytest

from conftest import REPOSITORY

TESTS = REPOSITORY / "tests"


@pytest.mark.parametrize("page", ["tests/README.md", "docs/guarantees.md", "docs/security.md"])
def test_every_promise_names_a_test(page: str) -> None:
    text = (REPOSITORY / page).read_text()
    promised = set(re.findall(r"`(test_\w+)`", text))
    there = {
        name
        for path in TESTS.rglob("test_*.py")
        for name in re.findall(r"^ *def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert len(promised) > 5
    assert promised <= there


def test_guarantees_name_files_of_tests_that_exist() -> None:
    text = (REPOSITORY / "docs/guarantees.md").read_text()
    named = set(re.findall(r"`(?:tests/\w+/)?(test_\w+\.py)`", text))
    assert len(named) > 5
    assert named <= {Path(path).name for path in TESTS.rglob("test_*.py")}
