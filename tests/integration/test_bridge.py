"""The fog bridge between a real broker and a real SuperLink."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import Peer, Service
from fedfog.cli.broker import LocalBroker
from fedfog.flower.fleet import stop_run
from fedfog.messages.codec import decode_json
from fedfog.messages.schemas import Bridge
from flower import SuperLink, partial, publish_partial

MODULE = "fedfog_bridge.main"
BELL, PRESENCE = "fl/bell", "fl/bridge/region_0"


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    """One for all tests that leave it alone."""
    running = SuperLink(tmp_path_factory.mktemp("flower")).start()
    yield running
    running.stop()


@pytest.fixture
def own_superlink(tmp_path: Path) -> Iterator[SuperLink]:
    """Not started; one that the test may kill."""
    made = SuperLink(tmp_path / "flower")
    yield made
    made.stop()


@pytest.fixture
def peer(broker: LocalBroker, peers: Callable[..., Peer]) -> Peer:
    return peers(broker.port, "fl/#")


Start = Callable[..., Service]


@pytest.fixture
def bridge(services: Callable[..., Service], broker: LocalBroker, peer: Peer) -> Start:
    """Starts a bridge and waits until it has announced its node."""

    def start(superlink: SuperLink, region: str = "region_0", **settings: object) -> Service:
        after = len(peer.received)
        service = services(
            MODULE, broker, region, region=region, flower_server=superlink.address, **settings
        )
        wait_online(peer, region, after=after)
        return service

    return start


def seen(payload: bytes) -> Bridge:
    return decode_json(payload, Bridge)


def wait_online(peer: Peer, region: str = "region_0", after: int = 0) -> Bridge:
    def online(topic: str, payload: bytes) -> bool:
        return topic == f"fl/bridge/{region}" and bool(payload) and seen(payload).online

    return seen(peer.wait_for(online, after=after))


def bells(peer: Peer) -> list[str]:
    return [json.loads(p)["message_id"] for topic, p in list(peer.received) if topic == BELL]


def wait_bells(peer: Peer, number: int) -> None:
    peer.wait_for(lambda _topic, _payload: len(bells(peer)) >= number)


def test_partials_reach_the_server_and_models_come_back(
    superlink: SuperLink, any_broker: LocalBroker, services: Start, peers: Callable[..., Peer]
) -> None:
    """On each kind of broker; one partial is there before it is asked for, one comes after."""
    peer = peers(any_broker.port, "fl/#")
    services(MODULE, any_broker, flower_server=superlink.address)
    publish_partial(peer, partial(1.5, 1))
    run = superlink.submit(mqtt_port=any_broker.port)
    peer.wait_for(lambda topic, payload: topic == BELL)
    run.wait_rounds(1)
    cue = b'"round":2'
    peer.wait_for(lambda topic, payload: topic == "fl/cue" and cue in payload)
    publish_partial(peer, partial(3.5, 2))
    assert [r["model"][0] for r in run.wait_rounds(2)] == [1.5, 3.5]
    run.wait_state("finished:completed")


def test_partials_that_are_always_early_do_not_break_the_run(
    superlink: SuperLink, broker: LocalBroker, bridge: Start, peer: Peer
) -> None:
    """The server is still pushing its messages when their answers are ready: a message that is
    confirmed before all of them are pushed would end the run."""
    rounds, regions = 12, ("region_0", "region_1")
    for region in regions:
        bridge(superlink, region)
        publish_partial(peer, partial(1.0, 1, region), region)
    run = superlink.submit(
        mqtt_port=broker.port, num_server_rounds=rounds, regions=",".join(regions), min_fit=2
    )
    for round_ in range(2, rounds + 1):
        wait_bells(peer, 2 * (round_ - 1))
        for region in regions:
            publish_partial(peer, partial(float(round_), round_, region), region)
    models = [r["model"][0] for r in run.wait_rounds(rounds)]
    assert models == [float(r) for r in range(1, rounds + 1)]
    assert all(not r["record"]["left_out"] for r in run.rounds)


def test_only_the_partial_of_this_run_and_round_is_handed_over_and_once(
    superlink: SuperLink, broker: LocalBroker, bridge: Start, peer: Peer
) -> None:
    bridge(superlink)
    publish_partial(peer, partial(9.0, 1, run="old"))
    run = superlink.submit(mqtt_port=broker.port)
    peer.on("fl/cue")
    for other in (
        partial(8.0, 1, run="old"),
        partial(7.0, 5),
        partial(6.0, 1, "region_7"),
        b"garbage",
        b"",
    ):
        publish_partial(peer, other)
    assert bells(peer) == []
    for _ in range(3):
        publish_partial(peer, partial(1.5, 1))
    run.wait_rounds(1)
    publish_partial(peer, partial(1.5, 1))
    publish_partial(peer, partial(3.5, 2))
    assert [r["model"][0] for r in run.wait_rounds(2)] == [1.5, 3.5]
    wait_bells(peer, 2)  # the server may have looked before the second one rang
    assert len(bells(peer)) == len(set(bells(peer))) == 2


def test_bridge_killed_with_the_train_message_in_hand_gets_it_again(
    superlink: SuperLink, broker: LocalBroker, bridge: Start, peer: Peer
) -> None:
    first = bridge(superlink)
    run = superlink.submit(mqtt_port=broker.port)
    first.wait_for_log("train_message")
    first.kill()
    second = bridge(superlink)
    second.wait_for_log("train_message", 25)  # within its grace
    publish_partial(peer, partial(1.5, 1))
    publish_partial(peer, partial(1.5, 1))
    assert run.wait_rounds(1)[0]["model"][0] == 1.5
    publish_partial(peer, partial(3.5, 2))
    assert run.wait_rounds(2)[1]["record"]["left_out"] == {}


def test_resumed_server_is_given_the_partial_of_the_open_round_again(
    superlink: SuperLink, broker: LocalBroker, bridge: Start, peer: Peer
) -> None:
    service = bridge(superlink)
    first = superlink.submit(mqtt_port=broker.port)
    service.wait_for_log("train_message")
    stop_run(superlink.address, first.run_id)
    publish_partial(peer, partial(1.5, 1))
    resumed = superlink.submit(mqtt_port=broker.port)
    resumed.wait_rounds(1)
    stop_run(superlink.address, resumed.run_id)
    again = superlink.submit(mqtt_port=broker.port, num_server_rounds=1)
    assert [r["model"][0] for r in again.wait_rounds(1)] == [1.5]


def test_bridge_killed_after_the_round_began_is_left_out_after_its_grace(
    superlink: SuperLink, broker: LocalBroker, bridge: Start, peer: Peer
) -> None:
    staying, leaving = bridge(superlink, "region_0"), bridge(superlink, "region_1")
    run = superlink.submit(
        mqtt_port=broker.port, regions="region_0,region_1", grace=0.5, num_server_rounds=1
    )
    staying.wait_for_log("train_message")
    leaving.wait_for_log("train_message")
    leaving.kill()
    publish_partial(peer, partial(1.5, 1))
    record = run.wait_rounds(1)[0]["record"]
    assert list(record["regions"]) == ["region_0"]
    assert "BRIDGE_GRACE" in record["left_out"]["region_1"]


def test_bridge_registers_again_by_itself_when_the_superlink_was_restarted(
    own_superlink: SuperLink, broker: LocalBroker, bridge: Start, peer: Peer
) -> None:
    service = bridge(own_superlink.start())
    before = wait_online(peer)
    run = own_superlink.submit(mqtt_port=broker.port)
    service.wait_for_log("train_message")
    own_superlink.stop()
    service.wait_for_log("waiting_for_superlink")
    after = len(peer.received)
    own_superlink.start()
    again = wait_online(peer, after=after)
    assert again.boot == before.boot
    assert again.node_id != before.node_id
    run = own_superlink.submit(mqtt_port=broker.port)
    for round_ in (1, 2):
        publish_partial(peer, partial(round_ + 0.5, round_))
        run.wait_rounds(round_)
    assert service.process.poll() is None


def test_bridge_may_start_before_superlink(
    own_superlink: SuperLink, broker: LocalBroker, services: Start, peer: Peer
) -> None:
    service = services(MODULE, broker, flower_server=own_superlink.address)
    service.wait_for_log("waiting_for_superlink")
    own_superlink.start()
    wait_online(peer)


def test_bridge_gives_up_after_flower_timeout_and_names_it(
    own_superlink: SuperLink, broker: LocalBroker, services: Start
) -> None:
    service = services(MODULE, broker, flower_server=own_superlink.address, flower_timeout=0.5)
    line = service.wait_for_log("service_failed")
    assert "FLOWER_SERVER" in line
    assert "FLOWER_TIMEOUT" in line
    assert service.wait() == 1


def test_stopped_bridge_signs_off_on_both_sides(
    superlink: SuperLink, bridge: Start, peer: Peer
) -> None:
    service = bridge(superlink)
    node_id = wait_online(peer).node_id
    after = len(peer.received)
    assert service.stop() == 0
    peer.wait_for(
        lambda topic, p: topic == PRESENCE and bool(p) and not seen(p).online, after=after
    )
    assert f"Unregistered node_id={node_id}" in superlink.log.read_text()


def test_killed_bridge_is_declared_offline_by_its_will(
    superlink: SuperLink, bridge: Start, peer: Peer
) -> None:
    service = bridge(superlink)
    born = wait_online(peer)
    after = len(peer.received)
    service.kill()
    will = peer.wait_for(lambda topic, _: topic == PRESENCE, after=after)
    assert seen(will) == Bridge(online=False, boot=born.boot)


@pytest.mark.parametrize("older_by", [0, 1], ids=["its own boot", "an earlier boot"])
def test_bridge_speaks_up_against_a_stale_will(
    superlink: SuperLink, bridge: Start, peer: Peer, older_by: int
) -> None:
    service = bridge(superlink)
    born = wait_online(peer)
    after = len(peer.received) + 1
    stale = Bridge(online=False, boot=born.boot - older_by)
    peer.publish(PRESENCE, stale.to_json(), retain=True)
    assert wait_online(peer, after=after) == born
    assert service.process.poll() is None


def test_bridge_makes_way_for_a_higher_boot(
    superlink: SuperLink, bridge: Start, peer: Peer
) -> None:
    """And says nothing more, neither an `offline` nor its will."""
    service = bridge(superlink)
    higher = Bridge(online=True, boot=wait_online(peer).boot + 1, node_id=7)
    peer.publish(PRESENCE, higher.to_json(), retain=True)
    assert service.wait() == 3
    peer.publish("fl/end", b"x")
    peer.on("fl/end")
    last = [payload for topic, payload in peer.received if topic == PRESENCE][-1]
    assert seen(last) == higher


def test_rounds_go_on_after_the_broker_lost_everything(
    superlink: SuperLink, broker: LocalBroker, bridge: Start, peer: Peer
) -> None:
    """The broker keeps nothing: the bridge announces itself again, the aggregator its partial."""
    bridge(superlink)
    run = superlink.submit(mqtt_port=broker.port)
    publish_partial(peer, partial(1.5, 1))
    run.wait_rounds(1)
    broker.stop()
    after = len(peer.received)
    broker.start()
    wait_online(peer, after=after)
    publish_partial(peer, partial(3.5, 2))
    assert run.wait_rounds(2)[1]["model"][0] == 3.5
