"""What a peer may do with MQTT itself to who listens to it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from conftest import LIMIT, Peer
from fedfog.cli.broker import LocalBroker
from fedfog.transport.mqtt import LARGE_BYTES, RECEIVE_MAXIMUM, Connected, Received, Session

PAYLOADS = [b"", b"small", bytes(LARGE_BYTES), b"\x26" * LARGE_BYTES]


class HostilePeer(Peer):
    def publish_with(self, payload: bytes, qos: int, properties: Properties | None = None) -> None:
        sent = self._client.publish("t/x", payload, qos, properties=properties)
        sent.wait_for_publish(LIMIT)


@pytest.fixture
def session(broker: LocalBroker) -> Iterator[Session]:
    made = Session("victim", broker.host, broker.port, ["t/#"])
    made.start()
    assert made.next(LIMIT) == Connected()
    yield made
    made.stop()


@pytest.fixture
def peer(broker: LocalBroker) -> Iterator[HostilePeer]:
    made = HostilePeer(broker.port, "t/#")  # so that it is subscribed when the victim is
    yield made
    made.close()


def received(session: Session, last: bytes) -> list[bytes]:
    """All payloads until `last`."""
    found: list[bytes] = []
    while last not in found:
        event = session.next(LIMIT)
        assert isinstance(event, Received), event
        found.append(bytes(event.payload))
    return found


@pytest.mark.parametrize("number", [0, 1, 17, 3_000])
@pytest.mark.parametrize("qos", [0, 1])
def test_properties_of_a_message_are_passed_by_unread(
    session: Session,
    peer: HostilePeer,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    qos: int,
) -> None:
    """paho would need seconds for some thousands, in which no keep-alive is sent."""
    read: list[Any] = []
    original: Callable[..., Any] = Properties.readProperty

    def counted(self: Properties, *arguments: Any) -> Any:
        read.append(arguments)
        return original(self, *arguments)

    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    if number:
        properties.UserProperty = [("key", "value")] * number
        properties.CorrelationData = b"x" * number
    monkeypatch.setattr(Properties, "readProperty", counted)
    peer.close()  # it would read them
    sender = HostilePeer(session._port)
    read.clear()
    for payload in PAYLOADS:
        sender.publish_with(payload, qos, properties)
    sender.publish_with(b"last", 1)
    assert received(session, b"last") == [*PAYLOADS, b"last"]
    assert read == []
    sender.close()


def test_of_qos_0_no_more_waits_than_of_qos_1(session: Session, peer: HostilePeer) -> None:
    """Of QoS 1 the broker holds the rest back; of QoS 0 it sends all, and it would be kept."""
    for number in range(10 * RECEIVE_MAXIMUM):
        peer.publish_with(f"{number}".encode(), 0)
    for number in range(2 * RECEIVE_MAXIMUM):
        peer.publish_with(f"kept {number}".encode(), 1)
    peer.publish_with(b"last", 1)
    found = received(session, b"last")
    kept = [payload for payload in found if payload.startswith(b"kept")]
    assert len(kept) == 2 * RECEIVE_MAXIMUM
    assert len(found) - len(kept) - 1 <= RECEIVE_MAXIMUM
