"""Models of many megabytes: bounded memory, nothing sent twice, and limits that are named."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conftest import Peer, Service
from fedfog.cli import broker as brokers
from fedfog.cli.broker import LocalBroker, free_port, installed_mosquitto
from fedfog.messages.codec import TensorTable
from region import Region
from wire import constant, model, update

PARAMETERS = 5_000_000
MODEL_BYTES = 4 * PARAMETERS
TABLE = TensorTable((("bias", (1_000_000,)), ("weight", (2000, 2000))))


def memory(service: Service, field: str) -> int:
    """A field of the process's status, in bytes."""
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def test_aggregator_needs_no_more_than_four_times_the_model(
    services: Callable[..., Service], broker: LocalBroker, peers: Callable[..., Peer]
) -> None:
    """Two rounds of two clients, who send at the same time."""
    peer = peers(broker.port, "fl/partial/#", "fl/receipts/#", "fl/status/#")
    service = services("fedfog_aggregator.main", broker, clients_expected=2)
    region = Region(service, peer)
    region.present("a", "b")
    service.wait_for_log("aggregator_started")
    idle = memory(service, "VmRSS")
    for round in (1, 2):
        base = constant(round, PARAMETERS)
        after = len(peer.received)
        peer.publish("fl/global_model", model(base, round - 1, table=TABLE), retain=True)
        region.wait_phase("open", round, after)
        messages = {
            client: update(base, base + np.float32(value), client, round, table=TABLE)
            for client, value in (("a", 1), ("b", 3))
        }
        for client, message in messages.items():
            peer.publish_unconfirmed(f"fl/updates/region_0/{client}", message)
        partial = region.partial(round, after)
        assert partial.vector.tobytes() == constant(round + 2, PARAMETERS).tobytes()
    assert memory(service, "VmHWM") - idle <= 4 * MODEL_BYTES


@pytest.mark.skipif(installed_mosquitto() is None, reason="Mosquitto is not installed")
def test_model_that_the_broker_does_not_take_ends_the_run_and_names_the_limit(
    services: Callable[..., Service], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(brokers, "MAX_PACKET_BYTES", 200_000)
    broker = LocalBroker(tmp_path / "broker", "mosquitto").start()
    try:
        service = services(
            "fedfog_central_server.main",
            broker,
            flower_port=free_port(),
            runs_dir=tmp_path / "runs",
            exit_when_finished=True,
        )
        assert service.wait() == 1
    finally:
        broker.stop()
    log = service.log.read_text()
    assert "run_failed" in log
    assert "takes (200000): raise max_packet_size in its mosquitto.conf" in log
