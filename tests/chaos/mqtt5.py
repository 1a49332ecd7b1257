"""The little of MQTT 5 that a proxy has to understand: where a packet ends, what a PUBLISH says.

Numbers in brackets are sections of the standard
(https://docs.oasis-open.org/mqtt/mqtt/v5.0/os/mqtt-v5.0-os.html).
"""

from dataclasses import dataclass

PUBLISH = 3
_DUP = 0x08


class MqttError(ValueError):
    """The bytes are not MQTT 5."""


@dataclass(frozen=True)
class Publish:
    topic: str
    payload: bytes
    qos: int
    retain: bool
    packet_id: int  # 0 with QoS 0


def variable_byte_integer(data: bytes | bytearray, start: int) -> tuple[int, int] | None:
    """Value of the integer at `start` and the index behind it; None if it is not whole [1.5.5].

    Raises MqttError if it has more than four bytes.
    """
    value = 0
    for index in range(4):
        if start + index >= len(data):
            return None
        byte = data[start + index]
        value |= (byte & 0x7F) << (7 * index)
        if not byte & 0x80:
            return value, start + index + 1
    raise MqttError("a variable byte integer of more than four bytes")


def take_packet(buffer: bytearray) -> bytes | None:
    """Cut the first packet off `buffer`; None if it is not whole yet [2.1]."""
    if not buffer or (length := variable_byte_integer(buffer, 1)) is None:
        return None
    end = length[1] + length[0]
    if len(buffer) < end:
        return None
    packet = bytes(buffer[:end])
    del buffer[:end]
    return packet


def parse_publish(packet: bytes) -> Publish | None:
    """What a PUBLISH says; None if it is another packet [3.3].

    Raises MqttError if it is not whole or has a topic alias, which FedFog does not use.
    """
    if packet[0] >> 4 != PUBLISH:
        return None
    length = variable_byte_integer(packet, 1)
    if length is None or length[0] + length[1] != len(packet):
        raise MqttError("a PUBLISH that is not whole")
    at = length[1] + 2
    size = int.from_bytes(packet[length[1] : at])
    topic = packet[at : at + size].decode()
    at += size
    qos = packet[0] >> 1 & 3
    packet_id = int.from_bytes(packet[at : at + 2]) if qos else 0
    properties = variable_byte_integer(packet, at + (2 if qos else 0))
    if not topic or properties is None or sum(properties) > len(packet):
        raise MqttError("a PUBLISH without topic, or with broken properties")
    payload = packet[sum(properties) :]
    return Publish(topic, payload, qos, bool(packet[0] & 1), packet_id)


def as_duplicate(packet: bytes) -> bytes:
    """The PUBLISH as it is sent again: with its DUP flag [3.3.1.1]."""
    return bytes([packet[0] | _DUP]) + packet[1:]
