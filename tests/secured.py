"""The broker as the compose stack has it, and holders of certificates who come to it."""

import socket
import ssl
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from conftest import LIMIT, REPOSITORY
from fedfog.cli.broker import LocalBroker
from fedfog_enrolment.ca import CA, key_pem, new_key, pem

NOT_AUTHORIZED = 0x87
SHIPPED = REPOSITORY / "mosquitto" / "mosquitto.conf"


def shipped_broker(folder: Path, tls_dir: Path) -> LocalBroker:
    """Mosquitto with the configuration of the compose stack, on a port of its own; not started."""
    broker = LocalBroker(folder, "mosquitto", tls_dir=tls_dir)
    text = SHIPPED.read_text()
    for one, other in (
        # Started by root it would change to a user who may not read the test's files.
        ("\nlistener 8883\n", f"\nuser root\nlistener {broker.port} 127.0.0.1\n"),
        (" /pki/", f" {tls_dir}/"),
        (" /mosquitto/data/", f" {folder}/"),
    ):
        assert one in text
        text = text.replace(one, other)
    (folder / "broker.conf").write_text(text)
    return broker


def certify(
    ca: CA, folder: Path, name: str, seconds: float = 3600, server_names: Iterable[str] = ()
) -> Path:
    """A folder with a new key and the CA's certificate for it."""
    key = new_key()
    certificate = ca.sign(key.public_key(), name, seconds, tuple(server_names))
    return keep(folder, key_pem(key), pem(certificate), pem(ca.certificate))


def keep(folder: Path, key: bytes, certificate: bytes, ca: bytes) -> Path:
    folder.mkdir(parents=True)
    (folder / "tls.key").write_bytes(key)
    (folder / "tls.crt").write_bytes(certificate)
    (folder / "ca.crt").write_bytes(ca)
    return folder


def context(folder: Path, ca: Path | None = None) -> ssl.SSLContext:
    """What the holder of a certificate comes with; `ca`: that of the broker, if another one."""
    made = ssl.create_default_context(cafile=ca or folder / "ca.crt")
    made.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    return made


class Holder:
    """The session of a certificate's holder, moved by the calls of the test alone.

    Args:
        port: of the broker on loopback.
        folder: with `ca.crt`, `tls.crt` and `tls.key`.
        expiry: seconds for which the broker is to keep the session.
    """

    def __init__(
        self,
        port: int,
        folder: Path,
        client_id: str = "",
        username: str = "",
        will: tuple[str, bytes, bool] | None = None,
        clean: bool = True,
        expiry: int = 0,
    ) -> None:
        self.received: list[paho.MQTTMessage] = []
        self.connack = -1
        self.session_present = False
        self.disconnected = False
        self._codes: dict[int, int] = {}
        self._client = client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id, protocol=paho.MQTTv5
        )
        client.tls_set_context(context(folder))
        if username:
            client.username_pw_set(username)
        if will:
            client.will_set(will[0], will[1], qos=1, retain=will[2])
        client.max_inflight_messages_set(200)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_publish = self._on_answer
        client.on_subscribe = self._on_subscribe
        client.on_message = lambda _c, _u, message: self.received.append(message)
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = expiry
        # As long as the broker admits: a test moves this session now and then only.
        client.connect("localhost", port, 120, clean_start=clean, properties=properties)
        self.until(lambda: self.connack >= 0)

    def _on_connect(self, _c: Any, _u: Any, flags: Any, reason: Any, _p: Any) -> None:
        self.connack, self.session_present = reason.value, flags.session_present

    def _on_disconnect(self, *_: Any) -> None:
        self.disconnected = True

    def _on_answer(self, _c: Any, _u: Any, mid: int, reason: Any, _p: Any) -> None:
        self._codes[mid] = reason.value

    def _on_subscribe(self, _c: Any, _u: Any, mid: int, reasons: Any, _p: Any) -> None:
        self._codes[mid] = reasons[0].value

    def until(self, done: Callable[[], bool]) -> None:
        """Move the session until something is so."""
        deadline = time.monotonic() + LIMIT
        while not done():
            assert time.monotonic() < deadline, "the broker does not answer"
            if self._client.loop(0.1) != paho.MQTT_ERR_SUCCESS and not done():
                raise ConnectionError("the broker cut the session")

    def publish(
        self, topics: Iterable[str], payload: bytes = b"x", retain: bool = False
    ) -> dict[str, int]:
        """Publish to each topic with QoS 1; the reason code of each PUBACK."""
        mids = {t: self._client.publish(t, payload, qos=1, retain=retain).mid for t in topics}
        self.until(lambda: self._codes.keys() >= set(mids.values()))
        return {topic: self._codes[mid] for topic, mid in mids.items()}

    def subscribe(self, *filters: str) -> None:
        """Returns when all that the broker had for this session before is received, too."""
        options = SubscribeOptions(qos=1, retainAsPublished=True)
        _, mid = self._client.subscribe([(one, options) for one in filters])
        assert mid is not None
        self.until(lambda: mid in self._codes)

    def catch_up(self) -> None:
        """Receive all that the broker has for this session."""
        self.subscribe("nothing/comes/here")

    def cut(self) -> None:
        """End the connection without a word, so that the broker publishes the will."""
        sock = self._client.socket()
        assert isinstance(sock, socket.socket)
        sock.shutdown(socket.SHUT_RDWR)
        sock.close()

    def close(self) -> None:
        self._client.disconnect()
