"""The table of promises in tests/README.md names tests that exist."""

import re

from conftest import REPOSITORY


def test_every_promise_names_a_test() -> None:
    promised = set(re.findall(r"`(test_\w+)`", (REPOSITORY / "tests/README.md").read_text()))
    there = {
        name
        for path in (REPOSITORY / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert len(promised) > 20
    assert promised <= there
