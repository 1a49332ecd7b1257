"""The raw lower bound of a wide round: Mosquitto, one consumer with paho and NumPy, no protocol.

The consumer publishes as many bytes as a model has, every one of N subscribers sends as many back,
and the consumer adds them into a float64 sum; when it has N it publishes again. The subscribers
are those of `bench.swarm`, in one process of their own as there.

`python -m bench.raw CLIENTS ROUNDS` prints one measurement.
"""

import json
import queue
import sys
import tempfile
import time
from pathlib import Path
from socket import IPPROTO_TCP, TCP_NODELAY
from typing import Any

import numpy as np
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from bench.swarm import Peer, Peers
from fedfog.cli.broker import LocalBroker
from fedfog.service import allow_open_files, spawn
from fedfog.transport.mqtt import RECEIVE_MAXIMUM

ROOT = Path(__file__).parents[1]
PARAMETERS = 68_509  # 274,036 bytes: a model of 68,353 with its header
WARM_UP = 2
LIMIT_SECONDS = 60.0


def measure(clients: int, rounds: int) -> list[float]:
    """Seconds of each round after the warm-up: from one publication to the next.

    Raises:
        queue.Empty: a round does not end.
    """
    allow_open_files(clients, "clients")
    with tempfile.TemporaryDirectory(prefix="fedfog-bench-") as folder:
        broker = LocalBroker(Path(folder)).start()
        swarm = spawn(
            [sys.executable, "-m", "bench.raw", "subscribers", str(broker.port), str(clients)],
            {"PYTHONPATH": str(ROOT)},
        )
        try:
            return _consume(broker.port, clients, rounds)
        finally:
            swarm.kill()
            swarm.wait()
            broker.stop()


def _consume(port: int, clients: int, rounds: int) -> list[float]:
    done: queue.SimpleQueue[str] = queue.SimpleQueue()
    total = np.zeros(PARAMETERS)
    counted = {"up": 0, "ready": 0}

    def on_message(_client: Any, _data: Any, message: paho.MQTTMessage) -> None:
        if message.topic.startswith("up/"):
            total[:] += np.frombuffer(message.payload, np.float32)
        kind = message.topic.split("/")[0]
        counted[kind] += 1
        if counted[kind] % clients == 0:
            done.put(kind)

    consumer = paho.Client(CallbackAPIVersion.VERSION2, "consumer", protocol=paho.MQTTv5)
    consumer.on_message = on_message
    consumer.on_connect = lambda client, *_: client.subscribe([("up/+", 1), ("ready/+", 1)])
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    properties.ReceiveMaximum = RECEIVE_MAXIMUM
    consumer.on_socket_open = _send_at_once
    consumer.connect("127.0.0.1", port, properties=properties)
    consumer.loop_start()
    gaps = []
    model = np.random.default_rng(1).random(PARAMETERS, np.float32)
    done.get(timeout=LIMIT_SECONDS)
    for _ in range(WARM_UP + rounds):
        began = time.monotonic()
        consumer.publish("down", model.tobytes(), qos=1, retain=True)
        done.get(timeout=LIMIT_SECONDS)
        model = (total / clients).astype(np.float32)
        total[:] = 0
        gaps.append(time.monotonic() - began)
    consumer.loop_stop()
    return gaps[WARM_UP:]


def _send_at_once(_client: Any, _data: Any, sock: Any) -> None:
    sock.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)


def subscribe(port: int, clients: int) -> None:
    """The subscribers: each sends back what it is sent."""
    peers = Peers("127.0.0.1", port)
    for number in range(clients):
        _Subscriber(peers, number)
    while True:
        peers.step(LIMIT_SECONDS)


class _Subscriber:
    def __init__(self, peers: Peers, number: int) -> None:
        self._number = number
        self._peer = Peer(peers, f"raw-{number}", ["down"], self._answer, self._ready)

    def _ready(self) -> None:
        self._peer.publish(f"ready/{self._number}", b"")

    def _answer(self, _topic: str, payload: bytes) -> None:
        self._peer.publish(f"up/{self._number}", payload)


if __name__ == "__main__":
    if sys.argv[1] == "subscribers":
        subscribe(int(sys.argv[2]), int(sys.argv[3]))
    gaps = measure(*map(int, sys.argv[1:]))
    median, p95 = np.percentile(gaps, [50, 95])
    print(json.dumps({"median_s": round(median, 4), "p95_s": round(p95, 4), "n": len(gaps)}))
