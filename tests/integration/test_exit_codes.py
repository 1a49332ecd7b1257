"""How services end, as docs/exit-codes.md tells an orchestrator."""

from collections.abc import Callable

import pytest

from conftest import REPOSITORY, Service
from fedfog import service, settings
from fedfog.cli.broker import LocalBroker, free_port

Services = Callable[..., Service]
MODULES = ("fedfog_aggregator.main", "fedfog_bridge.main", "fedfog_client.main")
SERVER = "fedfog_central_server.main"


def absent(broker: LocalBroker) -> LocalBroker:
    """The address of a broker that nobody started."""
    broker.port = free_port()
    return broker


@pytest.mark.parametrize("module", [*MODULES, SERVER])
def test_impossible_setting_is_code_2(services: Services, broker: LocalBroker, module: str) -> None:
    ended = services(module, broker, mqtt_timeout=0)
    assert ended.wait() == 2
    assert "MQTT_TIMEOUT='0'" in ended.log.read_text()


@pytest.mark.parametrize("module", [*MODULES, SERVER])
def test_limit_of_a_wait_is_code_1_and_names_the_setting(
    services: Services, broker: LocalBroker, module: str
) -> None:
    ended = services(module, absent(broker), mqtt_timeout=1, flower_port=free_port())
    assert ended.wait() == 1
    ended.wait_for_log('(?:"service_failed".*MQTT_TIMEOUT|MQTT_TIMEOUT.*"service_failed")')


@pytest.mark.parametrize("module", [*MODULES, SERVER])
def test_terminated_while_it_waits_for_the_broker_it_is_code_0(
    services: Services, broker: LocalBroker, module: str
) -> None:
    running = services(module, absent(broker), flower_port=free_port())
    running.wait_for_log("mqtt_waiting_for_broker")
    assert running.stop() == 0


def test_page_has_the_codes_of_the_code() -> None:
    page = (REPOSITORY / "docs" / "exit-codes.md").read_text()
    for code, name in (
        (service.EXIT_OK, "done"),
        (service.EXIT_FAILED, "failed"),
        (settings.EXIT_BAD_SETTING, "bad setting"),
        (service.EXIT_SUCCEEDED_BY_ANOTHER, "succeeded"),
    ):
        assert f"| {code} | {name} |" in page
