"""The proxy's view of MQTT is that of the broker and of paho."""

from typing import Any, cast

import paho.mqtt.client as paho
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from chaos import mqtt5


def packet_of(topic: str, payload: bytes, qos: int, retain: bool, content_type: str) -> bytes:
    """A PUBLISH as paho writes it to its socket."""
    client: Any = paho.Client(CallbackAPIVersion.VERSION2, "x", protocol=paho.MQTTv5)
    written: list[bytes] = []
    client._packet_queue = lambda _command, packet, *_: written.append(bytes(packet))
    client._sock = cast(Any, object())
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    if content_type:
        properties.ContentType = content_type
    client._send_publish(7, topic.encode(), payload, qos, retain, False, None, properties)
    client._sock = None
    return written[0]


@given(
    topic=st.text("abc/_é", min_size=1, max_size=40),
    payload=st.binary(max_size=20_000),
    qos=st.sampled_from([0, 1]),
    retain=st.booleans(),
    content_type=st.sampled_from(["", "x" * 200]),
    cuts=st.lists(st.integers(0, 20_000), max_size=3),
)
def test_publish_is_read_whatever_way_it_is_cut(
    topic: str, payload: bytes, qos: int, retain: bool, content_type: str, cuts: list[int]
) -> None:
    packet = packet_of(topic, payload, qos, retain, content_type)
    stream, buffer, found = packet + packet, bytearray(), []
    ends = sorted({min(cut, len(stream)) for cut in cuts} | {len(stream)})
    for start, end in zip([0, *ends], ends, strict=False):
        buffer += stream[start:end]
        while (one := mqtt5.take_packet(buffer)) is not None:
            found.append(mqtt5.parse_publish(one))
    assert found == 2 * [mqtt5.Publish(topic, payload, qos, retain, 7 if qos else 0)]
    again = mqtt5.as_duplicate(packet)
    assert again[0] & 0x08
    assert mqtt5.parse_publish(again) == found[0]


def test_what_is_not_mqtt_is_said() -> None:
    with pytest.raises(mqtt5.MqttError):
        mqtt5.take_packet(bytearray(b"\x30\xff\xff\xff\xff\x01"))
    with pytest.raises(mqtt5.MqttError):
        mqtt5.parse_publish(b"\x30\x05\x00\x01a\x00")
