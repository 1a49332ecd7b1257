"""The promises of `docs/guarantees.md`, held while services and network are hurt at random.
`make chaos SECONDS=600 SEED=7` does the same for longer."""

from pathlib import Path

import pytest

from chaos import schedule
from chaos.federation import Federation
from fedfog.cli.broker import installed_mosquitto

SECONDS = 45.0


@pytest.mark.skipif(installed_mosquitto() is None, reason="needs Mosquitto")
@pytest.mark.parametrize("seed", [7, 11])
def test_nothing_is_lost_or_counted_twice_whatever_dies(seed: int, tmp_path: Path) -> None:
    said: list[str] = []
    federation = Federation(tmp_path / "f", say=said.append)
    faults = schedule.draw(seed, SECONDS, federation.targets)
    schedule.save(faults, tmp_path / "schedule.json")
    try:
        federation.start()
        federation.torment(faults, SECONDS)
        federation.stop()
    finally:
        federation.close()
    report = federation.report()
    story = "\n".join([*map(str, faults), *said, str(report["figures"])])
    assert report["breaches"] == [], story
    assert federation.failures == [], story
    assert report["figures"]["faults"] >= 10, story
    assert report["figures"]["accepted"] > 0
