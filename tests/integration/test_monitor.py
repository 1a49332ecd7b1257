"""`fedfog monitor` as a user starts it, against a real broker."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import wire
from conftest import LIMIT, Peer
from fedfog.cli.broker import LocalBroker

Peers = Callable[..., Peer]
FEDFOG = [sys.executable, "-m", "fedfog.cli.main"]


class Monitor:
    """The monitor; its lines can be waited for."""

    def __init__(self, broker: LocalBroker, folder: Path, *arguments: str) -> None:
        environment = {
            "MQTT_BROKER": broker.host,
            "MQTT_PORT": str(broker.port),
            "HEALTH_FILE": str(folder / "health"),
        }
        self.seen: list[str] = []
        self.process = subprocess.Popen(
            [*FEDFOG, "monitor", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | environment,
        )

    def line(self, words: str, timeout: float = LIMIT) -> str:
        """The next line with these words."""
        assert self.process.stdout is not None
        limit = threading.Timer(timeout, self.process.kill)
        limit.start()
        for line in self.process.stdout:
            self.seen.append(line.rstrip())
            if words in line:
                limit.cancel()
                return self.seen[-1]
        raise AssertionError(f"no line with {words!r}: {self.seen}")


@pytest.fixture
def monitor(broker: LocalBroker, tmp_path: Path) -> Iterator[Callable[..., Monitor]]:
    started: list[Monitor] = []

    def start(*arguments: str) -> Monitor:
        started.append(Monitor(broker, tmp_path, *arguments))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()


def test_garbage_on_any_topic_does_not_end_the_monitor(
    broker: LocalBroker, peers: Peers, monitor: Callable[..., Monitor]
) -> None:
    peer = peers(broker.port)
    peer.publish("fl/presence/region_0/client-1", wire.birth(), retain=True)
    shown = monitor()
    shown.line("online")  # the retained message: it is subscribed
    for topic in ("fl/updates/region_0/client-1", "fl/global_model", "fl/status/region_0", "fl/x"):
        peer.publish(topic, b"\xff\xfe")
    peer.publish("fl/global_model", wire.model(wire.constant(1.0)))
    assert "2 tensors" in shown.line("model 0 of 3")
    assert sum("MALFORMED" in line for line in shown.seen) == 3
    shown.process.send_signal(signal.SIGINT)
    assert shown.process.wait(LIMIT) == 0


def test_topic_filter_shows_nothing_else(
    broker: LocalBroker, peers: Peers, monitor: Callable[..., Monitor]
) -> None:
    peer = peers(broker.port)
    peer.publish("fl/presence/region_0/client-1", wire.birth(), retain=True)
    peer.publish("fl/presence/region_1/client-2", wire.birth(), retain=True)
    shown = monitor("--topic-filter", "fl/presence/region_1/#")
    shown.line("client-2")
    peer.publish("fl/global_model", wire.model(wire.constant(1.0)))
    peer.publish("fl/presence/region_1/client-3", wire.birth())
    shown.line("client-3")
    assert len(shown.seen) == 2


def test_impossible_topic_filter_is_refused() -> None:
    done = subprocess.run(
        [*FEDFOG, "monitor", "--topic-filter", "fl/#/x"],
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 2
    assert "fl/#/x" in done.stderr
