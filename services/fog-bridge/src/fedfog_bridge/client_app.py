"""The fog bridge as a standard Flower ClientApp, for the stock `flower-supernode`.

Flower starts a process for each message, so each opens an MQTT session of its own, takes the
region's retained partial, or waits for it as long as the message lives, and answers with it. The
settings come from the environment, as everywhere.
"""

import time

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedfog.flower.reply import pack, run_and_round
from fedfog.messages.codec import CodecError, decode_meta
from fedfog.messages.schemas import PartialMeta
from fedfog.settings import BridgeSettings, load
from fedfog.transport import mqtt

app = ClientApp()


@app.train()
def train(message: Message, _context: Context) -> Message:
    """Answer with the region's partial of the message's run and round.

    Raises:
        TimeoutError: the partial did not come before the message expired.
        TransportError: the MQTT broker cannot be reached.
    """
    settings = load(BridgeSettings)
    wanted = run_and_round(message)
    metadata = message.metadata
    deadline = time.monotonic() + metadata.created_at + metadata.ttl - time.time()
    session = mqtt.Session(
        f"fedfog-bridge-{settings.region}-{metadata.message_id[:12]}",
        settings.mqtt_broker,
        settings.mqtt_port,
        [settings.topics.partial_of(settings.region)],
        timeout=settings.mqtt_timeout,
    )
    session.start()
    try:
        while (left := deadline - time.monotonic()) > 0:
            event = session.next(left)
            if isinstance(event, mqtt.Received) and _key(event.payload) == wanted:
                return Message(pack(settings.region, event.payload), reply_to=message)
    finally:
        session.stop()
    raise TimeoutError(f"no partial of round {wanted[1]} from region {settings.region}")


def _key(payload: bytes) -> tuple[str, int] | None:
    try:
        meta = decode_meta(payload, PartialMeta)
    except CodecError:
        return None
    return meta.run, meta.round
