"""Real parts for the tests: brokers, service processes, and an MQTT peer that only watches."""

import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from hypothesis import HealthCheck, settings
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.subscribeoptions import SubscribeOptions

from fedfog.cli.broker import LocalBroker, installed_mosquitto

REPOSITORY = Path(__file__).parents[1]
# Of every wait for what takes a second or ten on an idle machine: only what hangs meets it.
LIMIT = 90.0

pytest_plugins = ["stacks"]  # fixtures of tests/compose

# How long an example takes is a matter of the machine, and of what else runs on it.
settings.register_profile("fedfog", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fedfog")


class Peer:
    """An MQTT peer: publishes, and remembers all that it receives.

    Args:
        tls: for a broker that wants a certificate.
    """

    def __init__(
        self, port: int, *filters: str, client_id: str = "", tls: ssl.SSLContext | None = None
    ) -> None:
        self.received: list[tuple[str, bytes]] = []
        self._changed = threading.Condition()
        self._subscribed = threading.Event()
        self._filters = filters
        self._client = client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id, protocol=paho.MQTTv5
        )
        if tls:
            client.tls_set_context(tls)
        client.reconnect_delay_set(1, 1)
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message
        client.on_socket_open = self._on_socket_open
        client.connect_async("127.0.0.1", port, 30)
        client.loop_start()
        assert self._subscribed.wait(LIMIT), "the test's MQTT peer does not get through"

    def _on_socket_open(self, _client: Any, _data: Any, sock: Any) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _on_connect(self, client: paho.Client, *_: Any) -> None:
        if self._filters:
            client.subscribe([(f, SubscribeOptions(qos=1)) for f in self._filters])
        else:
            self._subscribed.set()

    def _on_subscribe(self, *_: Any) -> None:
        self._subscribed.set()

    def _on_message(self, _client: Any, _data: Any, message: paho.MQTTMessage) -> None:
        with self._changed:
            self.received.append((message.topic, bytes(message.payload)))
            self._changed.notify_all()

    def publish(self, topic: str, payload: bytes | str, retain: bool = False) -> None:
        """Publish with QoS 1 and wait until the broker has it."""
        info = self._client.publish(topic, payload, qos=1, retain=retain)
        info.wait_for_publish(LIMIT)
        assert info.is_published(), f"the broker does not take a message for {topic}"

    def publish_unconfirmed(self, topic: str, payload: bytes) -> None:
        """Publish with QoS 1 and do not wait."""
        self._client.publish(topic, payload, qos=1)

    def wait_for(
        self, wanted: Callable[[str, bytes], bool], timeout: float = LIMIT, after: int = 0
    ) -> bytes:
        """Payload of the first message, from number `after` on, that is `wanted`."""
        found: list[bytes] = []

        def look() -> bool:
            found[:] = [p for t, p in self.received[after:] if wanted(t, p)][:1]
            return bool(found)

        with self._changed:
            if not self._changed.wait_for(look, timeout):
                seen = [(t, len(p)) for t, p in self.received[after:]][-20:]
                raise AssertionError(f"not received within {timeout} s; last seen: {seen}")
        return found[0]

    def on(self, topic: str, timeout: float = LIMIT, after: int = 0) -> bytes:
        """First payload, not empty, on this topic."""
        return self.wait_for(lambda t, p: t == topic and bool(p), timeout, after)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


class Service:
    """A service as its own process, its log in a file that tests can wait on."""

    def __init__(self, module: str, folder: Path, env: dict[str, str]) -> None:
        self.log = folder / f"{module}-{time.monotonic_ns()}.log"
        folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "LOG_FORMAT": "json", "LOG_LEVEL": "debug", **env},
                cwd=folder,
                start_new_session=True,
            )

    def wait_for_log(self, pattern: str, timeout: float = LIMIT) -> str:
        """The first line of the log that matches; fails at once if the process has ended."""
        deadline = time.monotonic() + timeout
        while True:
            ended = self.process.poll() is not None
            text = self.log.read_text(errors="replace")
            if found := re.search(f".*{pattern}.*", text):
                return found.group()
            if ended or time.monotonic() > deadline:
                raise AssertionError(f"no line {pattern!r} in {self.log}:\n{text[-3000:]}")
            time.sleep(0.02)

    def wait(self, timeout: float = LIMIT) -> int:
        return self.process.wait(timeout)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self, timeout: float = LIMIT) -> int:
        """SIGTERM; returns the exit code."""
        self.process.terminate()
        return self.process.wait(timeout)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[LocalBroker]:
    """A Mosquitto of the test's own."""
    if installed_mosquitto() is None:
        pytest.skip("Mosquitto is not installed (apt install mosquitto)")
    running = LocalBroker(tmp_path / "broker", "mosquitto").start()
    yield running
    running.stop()


@pytest.fixture(params=["mosquitto", "embedded"])
def any_broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LocalBroker]:
    """Each kind of broker that FedFog runs on."""
    if request.param == "mosquitto" and installed_mosquitto() is None:
        pytest.skip("Mosquitto is not installed (apt install mosquitto)")
    running = LocalBroker(tmp_path / "broker", request.param).start()
    yield running
    running.stop()


@pytest.fixture
def peers() -> Iterator[Callable[..., Peer]]:
    """Makes `Peer`s that are closed after the test."""
    made: list[Peer] = []

    def make(*args: Any, **kwargs: Any) -> Peer:
        made.append(Peer(*args, **kwargs))
        return made[-1]

    yield make
    for peer in made:
        peer.close()


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Starts services as processes, with settings as keyword arguments; kills what is left."""
    started: list[Service] = []

    def start(module: str, broker: LocalBroker, name: str = "", **settings: object) -> Service:
        folder = tmp_path / (name or module)
        env = {
            "MQTT_BROKER": broker.host,
            "MQTT_PORT": str(broker.port),
            "STATE_DIR": str(folder / "state"),
            "DATA_DIR": str(REPOSITORY / "data"),
            "HEALTH_FILE": str(folder / "health"),
            **{name.upper(): str(value) for name, value in settings.items()},
        }
        started.append(Service(module, folder, env))
        return started[-1]

    yield start
    for service in started:
        if service.process.poll() is None:
            service.kill()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch adds in the order in which the services add."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
