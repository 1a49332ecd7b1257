"""Sessions with a real SuperLink, and runs on it."""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from flwr.app import Message

from conftest import Peer
from fedfog.cli.broker import LocalBroker, free_port
from fedfog.flower import fleet
from fedfog.flower.fleet import (
    ControlError,
    FleetSession,
    MessageLostError,
    SuperLinkLostError,
    stop_run,
    submit_run,
)
from fedfog.flower.reply import pack
from fedfog.messages.schemas import Bridge
from flower import APP, FlowerRun, SuperLink, partial, run_status


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    running = SuperLink(tmp_path_factory.mktemp("flower")).start()
    yield running
    running.stop()


@pytest.fixture
def session(superlink: SuperLink) -> Iterator[FleetSession]:
    with closing(FleetSession(superlink.address)) as opened:
        yield opened


Ask = Callable[[], tuple[FlowerRun, Message]]


@pytest.fixture
def ask(
    superlink: SuperLink,
    broker: LocalBroker,
    peers: Callable[..., Peer],
    session: FleetSession,
) -> Ask:
    """Has a run ask the session's node for its partial; returns the train message."""

    def asked() -> tuple[FlowerRun, Message]:
        peer = peers(broker.port, "fl/cue")
        birth = Bridge(online=True, boot=1, node_id=session.node_id)
        peer.publish("fl/bridge/region_0", birth.to_json(), retain=True)
        run = superlink.submit(mqtt_port=broker.port, num_server_rounds=1)
        peer.on("fl/cue")
        message = session.next_message()
        assert message is not None
        return run, message

    return asked


def test_message_is_delivered_once_and_answered_once(session: FleetSession, ask: Ask) -> None:
    run, message = ask()
    assert message.metadata.group_id == "run/1"
    assert session.next_message() is None
    content = pack("region_0", partial(1.5, 1))
    session.reply(message, content)
    with pytest.raises(MessageLostError):
        session.reply(message, content)
    assert run.wait_rounds(1)[0]["model"][0] == 1.5
    run.wait_state("finished:completed")
    with pytest.raises(MessageLostError):
        session.confirm(message)


def test_message_of_a_stopped_run_is_lost_and_the_session_lives(
    superlink: SuperLink, session: FleetSession, ask: Ask
) -> None:
    run, message = ask()
    stop_run(superlink.address, run.run_id)
    run.wait_state("finished:stopped")
    with pytest.raises(MessageLostError):
        session.reply(message, pack("region_0", partial(1.5, 1)))
    assert session.next_message() is None


def test_heartbeat_is_sent_when_it_is_due(
    superlink: SuperLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "HEARTBEAT_EVERY", 0.0)
    with closing(FleetSession(superlink.address)) as session:
        before = len(superlink.log.read_text())
        session.next_message()
        assert "/v1/fleet/send-node-heartbeat" in superlink.log.read_text()[before:]


def test_session_ends_with_a_clear_error_when_the_superlink_was_restarted(tmp_path: Path) -> None:
    """Flower's own connection would send SIGINT to this process."""
    superlink = SuperLink(tmp_path / "flower").start()
    session = FleetSession(superlink.address)
    try:
        superlink.stop()
        with pytest.raises(SuperLinkLostError, match="ConnectError"):
            session.next_message()
        superlink.start()
        with pytest.raises(SuperLinkLostError, match="does not know this node"):
            session.next_message()
        with closing(FleetSession(superlink.address)) as again:
            assert again.next_message() is None
    finally:
        session.close(sign_off=False)
        superlink.stop()


def test_absent_superlink_is_reported() -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(SuperLinkLostError, match=address):
        FleetSession(address)
    with pytest.raises(ControlError, match=address):
        submit_run(address, APP, {})


def test_another_service_at_the_address_is_reported(broker: LocalBroker) -> None:
    address = f"127.0.0.1:{broker.port}"
    with pytest.raises(SuperLinkLostError, match=address):
        FleetSession(address)


def test_failed_run_tells_why(superlink: SuperLink, broker: LocalBroker) -> None:
    run = superlink.submit(mqtt_port=broker.port, strategy="FedNothing")
    assert "STRATEGY" in run.wait_state("finished:failed")


def test_commands_for_unknown_runs_are_refused(superlink: SuperLink) -> None:
    with pytest.raises(ControlError, match="refused"):
        run_status(superlink.address, 7)
    with pytest.raises(ControlError, match="refused"):
        stop_run(superlink.address, 7)


def test_app_of_the_product_can_be_submitted(superlink: SuperLink) -> None:
    app = Path(fleet.__file__).parent / "app"
    run_id = submit_run(superlink.address, app, {"run": "r", "num-server-rounds": 1})
    assert run_status(superlink.address, run_id).state in {"pending", "starting", "running"}
    stop_run(superlink.address, run_id)
