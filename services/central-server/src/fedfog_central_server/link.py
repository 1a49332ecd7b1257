"""What the central server and the ServerApp say to each other over a Unix socket.

JSON of the schemas below, one message per frame; never a pickle. The weights do not travel here:
the ServerApp writes a checkpoint and says so, and the server publishes what it reads from that
file. The end of the stream tells each side at once that the other one died.
"""

from multiprocessing.connection import Connection
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, TypeAdapter

from fedfog.messages.schemas import Bell, Bridge, Cue, Name, Round, RunId

# Environment of the ServerApp: where it reports. Its run's settings come by `Start`.
SOCKET_VARIABLE = "FEDFOG_SERVER_SOCKET"


class Hello(BaseModel):
    """The ServerApp's first word."""

    kind: Literal["hello"] = "hello"
    flower_run: int
    pid: int


class Checkpointed(BaseModel):
    """The checkpoint of this round is on disk: publish its model."""

    kind: Literal["checkpointed"] = "checkpointed"
    round: Round


class CueWanted(BaseModel):
    """The train messages are pushed: let the bridges know."""

    kind: Literal["cue"] = "cue"
    cue: Cue


class Failed(BaseModel):
    """The run cannot go on; another try would end the same way."""

    kind: Literal["failed"] = "failed"
    error: str


class Logged(BaseModel):
    """A line for the log: SuperExec discards what a ServerApp prints."""

    kind: Literal["log"] = "log"
    level: str
    event: str
    fields: dict[str, Any]


class Start(BaseModel):
    """The checkpoint to start from is there."""

    kind: Literal["start"] = "start"
    run: RunId
    folder: str
    settings: dict[str, Any]


class BridgeHeard(BaseModel):
    kind: Literal["bridge"] = "bridge"
    region: Name
    bridge: Bridge


class BellHeard(BaseModel):
    kind: Literal["bell"] = "bell"
    bell: Bell


FromServerApp = Annotated[
    Hello | Checkpointed | CueWanted | Failed | Logged, Field(discriminator="kind")
]
FromServer = Annotated[Start | BridgeHeard | BellHeard, Field(discriminator="kind")]
from_server_app: TypeAdapter[FromServerApp] = TypeAdapter(FromServerApp)
from_server: TypeAdapter[FromServer] = TypeAdapter(FromServer)


def say(connection: Connection, message: BaseModel) -> None:
    """Raises OSError if the other side is gone."""
    connection.send_bytes(message.model_dump_json().encode())
