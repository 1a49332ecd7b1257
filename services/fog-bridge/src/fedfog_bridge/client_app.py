"""The fog bridge as a standard Flower ClientApp, for the stock `flower-supernode`.

Flower starts a process for each message. The region's partial comes from the bridge's file, into
which `SuperNodeBridge` writes it: the broker allows one session to each identity, and the bridge
has it. The settings come from the environment, as everywhere.
"""

import time
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedfog.flower.reply import pack, run_and_round
from fedfog.messages.codec import CodecError, decode_meta
from fedfog.messages.schemas import PartialMeta
from fedfog.settings import BridgeSettings, load

LOOK_EVERY = 0.05

app = ClientApp()


@app.train()
def train(message: Message, _context: Context) -> Message:
    """Answer with the region's partial of the message's run and round.

    Raises:
        TimeoutError: the partial did not come before the message expired.
    """
    settings = load(BridgeSettings)
    wanted = run_and_round(message)
    file, seen = partial_file(settings), -1
    metadata = message.metadata
    deadline = time.monotonic() + metadata.created_at + metadata.ttl - time.time()
    while time.monotonic() < deadline:
        if file.exists() and (inode := file.stat().st_ino) != seen:
            seen, payload = inode, file.read_bytes()
            if _key(payload) == wanted:
                return Message(pack(settings.region, payload), reply_to=message)
        time.sleep(LOOK_EVERY)
    raise TimeoutError(f"no partial of round {wanted[1]} from region {settings.region}")


def partial_file(settings: BridgeSettings) -> Path:
    """Where the newest partial of the region lies; it is only ever replaced as a whole."""
    return settings.state_dir / "partial"


def _key(payload: bytes) -> tuple[str, int] | None:
    try:
        meta = decode_meta(payload, PartialMeta)
    except CodecError:
        return None
    return meta.run, meta.round
