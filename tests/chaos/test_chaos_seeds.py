"""The promises of `docs/guarantees.md`, held while services and network are hurt at random.
`make chaos SECONDS=600 SEED=7` does the same for longer."""

from pathlib import Path
from typing import Any

import pytest

from chaos import schedule
from chaos.federation import Federation
from fedfog.cli.broker import installed_mosquitto

SECONDS = 45.0


def endure(folder: Path, seed: int, seconds: float, **layout: Any) -> tuple[dict[str, int], str]:
    """Hurt a federation after the schedule of a seed; no promise may be broken, no service fail.

    Returns:
        The ledger's figures, and what happened, for an assertion that fails.
    """
    said: list[str] = []
    federation = Federation(folder / "f", say=said.append, **layout)
    faults = schedule.draw(seed, seconds, federation.targets)
    schedule.save(faults, folder / "schedule.json")
    try:
        federation.start()
        federation.torment(faults, seconds)
        federation.stop()
    finally:
        federation.close()
    report = federation.report()
    story = "\n".join([*map(str, faults), *said, str(report)])
    assert report["breaches"] == [], story
    assert federation.failures == [], story
    assert any("aggregator" in fault.target for fault in faults), story
    return report["figures"], story


@pytest.mark.skipif(installed_mosquitto() is None, reason="needs Mosquitto")
@pytest.mark.parametrize("seed", [7, 11])
def test_nothing_is_lost_or_counted_twice_whatever_dies(seed: int, tmp_path: Path) -> None:
    figures, story = endure(tmp_path, seed, SECONDS)
    assert figures["faults"] >= 10, story
    assert figures["accepted"] > 0, story
