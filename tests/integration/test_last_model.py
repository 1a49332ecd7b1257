"""A run is completed when its last model is published, not before."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from centre import Centre, Region
from chaos.proxy import Proxy
from conftest import LIMIT, Service
from fedfog.cli.broker import LocalBroker
from fedfog.messages.schemas import RunState


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    running = Proxy()
    yield running
    running.close()


@pytest.fixture
def region(broker: LocalBroker) -> Iterator[Region]:
    played = Region(broker.port, allowed=1)
    yield played
    played.close()


def test_last_model_that_was_made_without_a_broker_is_published_before_the_end(
    services: Callable[..., Service],
    broker: LocalBroker,
    proxy: Proxy,
    region: Region,
    tmp_path: Path,
) -> None:
    link = proxy.link("server", (broker.host, broker.port))
    centre = Centre(services, broker, tmp_path, rounds=2, mqtt_port=link.port)
    server = centre.start()
    centre.bridge()
    region.model(1)
    link.fault("refuse", LIMIT)
    server.wait_for_log("mqtt_disconnected", LIMIT)
    region.allow(2)
    server.wait_for_log('"waits_for_broker": true', LIMIT)
    server.wait_for_log('"round": "2/2".*"model_evaluated"', LIMIT)
    assert server.process.poll() is None
    link.heal()
    assert region.model(2).meta.state is RunState.FINISHED
    assert server.wait(LIMIT) == 0
