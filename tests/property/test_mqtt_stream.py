"""A broker's stream is cut by the network wherever it likes."""

import socket

from hypothesis import example, given, settings
from hypothesis import strategies as st
from paho.mqtt.enums import MQTTErrorCode

from fedfog.transport.mqtt import LARGE_BYTES, READ_BYTES, _Client

SIZES = [
    0,
    1,
    100,
    READ_BYTES - 20,
    READ_BYTES,
    READ_BYTES + 1,
    LARGE_BYTES - 20,
    LARGE_BYTES,
    99_999,
]
PINGRESP = b"\xd0\0"


def publication(topic: str, payload: bytes, mid: int, properties: bytes) -> bytes:
    head = len(topic).to_bytes(2) + topic.encode() + (mid.to_bytes(2) if mid else b"")
    body = head + len(properties).to_bytes(1) + properties + payload
    length, left = b"", len(body)
    while left > 127:
        length, left = length + bytes([left & 127 | 128]), left >> 7
    return bytes([0x32 if mid else 0x30]) + length + bytes([left]) + body


messages = st.tuples(
    st.sampled_from(["a", "fl/updates/r/c"]),
    st.sampled_from(SIZES).map(lambda size: bytes(i % 251 for i in range(size))),
    st.integers(0, 65_535),
    st.sampled_from([b"", b"\x01\x01", b"\x26\0\1k\0\1v"]),
)


@settings(max_examples=50)
@given(
    st.lists(messages, max_size=5),
    st.lists(st.sampled_from([1, 2, 500, READ_BYTES, 5 * READ_BYTES]), min_size=1).filter(
        lambda cuts: sum(cuts) > READ_BYTES
    ),
)
@example([("a", b"x" * LARGE_BYTES, 1, b""), ("b", b"y", 2, b"")], [1 << 20])
@example([("a", b"x" * (READ_BYTES + 1), 1, b""), ("b", b"y", 2, b"")], [1])
def test_every_message_arrives_whole_and_once(
    sent: list[tuple[str, bytes, int, bytes]], cuts: list[int]
) -> None:
    received: list[tuple[str, bytes, int, int]] = []
    client = _Client("x", None, lambda _size: True, lambda *message: received.append(message))
    stream = b"".join(publication(*message) + PINGRESP for message in sent)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        client._sock = ours
        at = i = 0
        while at < len(stream):
            at += theirs.send(stream[at : at + cuts[i % len(cuts)]])
            i += 1
            while client._packet_read() == 0:
                pass
    assert received == [(topic, payload, mid, int(mid > 0)) for topic, payload, mid, _ in sent]


def test_what_a_lost_connection_left_is_no_part_of_the_next_one() -> None:
    """The last one ended within a large message."""
    received: list[bytes] = []
    client = _Client(
        "x", None, lambda _size: True, lambda _t, payload, *_: received.append(payload)
    )
    large = publication("a", b"x" * LARGE_BYTES, 1, b"")
    small = publication("a", b"y", 2, b"") + publication("a", b"z", 3, b"")
    with socket.create_server(("127.0.0.1", 0)) as broker:
        client.connect_async("127.0.0.1", broker.getsockname()[1])
        for stream in (large[: LARGE_BYTES // 2], small):
            with client._create_socket() as ours, broker.accept()[0] as theirs:
                ours.setblocking(False)
                client._sock = ours
                theirs.sendall(stream)
                theirs.shutdown(socket.SHUT_WR)
                while client._packet_read() != MQTTErrorCode.MQTT_ERR_CONN_LOST:
                    pass
    assert received == [b"y", b"z"]
