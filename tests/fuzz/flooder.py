"""`python -m fuzz.flooder PORT REGION [FOLDER]`: an enrolled client, `REGION/flooder`, that sends
on its own topics whatever it likes, as fast as the broker takes it, until it is killed.

FOLDER has its ca.crt, tls.crt and tls.key. Every thousand messages it prints how many it has sent.
"""

import itertools
import queue
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

import wire
from fedfog.messages.codec import decode
from fedfog.messages.schemas import ModelMeta
from fuzz.mutator import mutants

NAME = "flooder"
UNDER_WAY = 200
MODEL = "fl/global_model"


def updates_for(model: bytes, region: str) -> list[bytes]:
    """Good and bad updates of the round that this model opens."""
    base = decode(model, ModelMeta)
    meta, table = base.meta, base.table
    good, nan = base.vector + np.float32(0.01), base.vector.copy()
    nan[-1] = np.nan

    def made(vector: Any, **fields: Any) -> bytes:
        return wire.update(
            base.vector,
            vector,
            NAME,
            round=meta.round + 1,
            run=meta.run,
            region=region,
            table=table,
            **fields,
        )

    greedy = made(good, num_examples=10**12)
    broken = mutants([made(good)], meta.round)
    return [made(good), made(nan), greedy, made(good) + bytes(500_000)] + [
        next(broken) for _ in range(8)
    ]


def flood(models: "queue.SimpleQueue[bytes]", region: str) -> Iterator[tuple[str, bytes, int]]:
    """Topic, payload and QoS of one message after another."""
    presences = mutants([wire.birth(3)], 1)
    updates = updates_for(models.get(), region)
    for number in itertools.count():
        if not models.empty():
            updates = updates_for(models.get(), region)
        yield f"fl/updates/{region}/{NAME}", updates[number % len(updates)], 1
        if number % 5 == 0:
            yield f"fl/presence/{region}/{NAME}", wire.birth(3), 1
            yield f"fl/presence/{region}/{NAME}", next(presences), 1
            yield f"fl/updates/{region}/{NAME}", b"of QoS 0", 0


def main(port: int, region: str, folder: str = "") -> None:
    room, models = threading.Semaphore(UNDER_WAY), queue.SimpleQueue[bytes]()
    many = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    many.UserProperty = [("k", "v")] * 5_000  # 35 kB for each subscriber
    client = paho.Client(CallbackAPIVersion.VERSION2, NAME, protocol=paho.MQTTv5)
    if folder:
        client.tls_set(f"{folder}/ca.crt", f"{folder}/tls.crt", f"{folder}/tls.key")
    client.max_inflight_messages_set(UNDER_WAY)
    client.on_message = lambda _c, _u, message: models.put(bytes(message.payload))
    client.on_publish = lambda *_: room.release()
    client.connect("127.0.0.1", port)
    client.subscribe(MODEL, 1)
    client.loop_start()
    for number, (topic, payload, qos) in enumerate(flood(models, region)):
        room.acquire()
        client.publish(topic, payload, qos, properties=many if number % 10 == 0 else None)
        if number % 1000 == 0:
            sys.stdout.write(f"{number}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
