"""Every topic with its payload: what `fedfog monitor` decodes and `docs/messages.md` lists."""

import re
from dataclasses import dataclass
from functools import lru_cache

from fedfog.messages import schemas
from fedfog.messages.codec import CodecError, TensorTable, decode, decode_json
from fedfog.messages.topics import NAME_PATTERN, Topics

_NAMES = ("{region}", "{client}")


@dataclass(frozen=True)
class Channel:
    """One kind of topic.

    Args:
        name: of the attribute or method of `Topics`.
        levels: names that follow in the topic: 0, 1 (region) or 2 (region and client).
        payload: schema of the message's own fields.
        tensors: the payload is a `.safetensors` file; otherwise it is JSON.
        will: the broker publishes the owner's death here.
    """

    name: str
    levels: int
    payload: type[schemas.Payload]
    sender: str
    receivers: str
    retained: bool = False
    tensors: bool = False
    will: bool = False

    def template(self, topics: Topics) -> str:
        """The topic, with `{region}` and `{client}` in the place of names."""
        attribute = getattr(topics, self.name)
        return str(attribute(*_NAMES[: self.levels]) if self.levels else attribute)


CHANNELS = (
    Channel(
        "global_model", 0, schemas.ModelMeta, "central-server", "all", retained=True, tensors=True
    ),
    Channel("update", 2, schemas.UpdateMeta, "client", "aggregator", tensors=True),
    Channel("receipts", 2, schemas.Receipt, "aggregator", "client, aggregator at its parent"),
    Channel("receipts", 1, schemas.RegionReceipt, "aggregator", "clients"),
    Channel(
        "partial_of", 1, schemas.PartialMeta, "aggregator", "bridge", retained=True, tensors=True
    ),
    Channel(
        "partial_to",
        2,
        schemas.PartialMeta,
        "aggregator at its parent",
        "its parent",
        tensors=True,
    ),
    Channel(
        "regional_model",
        1,
        schemas.ModelMeta,
        "aggregator",
        "clients",
        retained=True,
        tensors=True,
    ),
    Channel("slot", 2, schemas.Slot, "aggregator", "client"),
    Channel(
        "presence",
        2,
        schemas.Presence,
        "client, aggregator at its parent",
        "aggregator, monitor",
        retained=True,
        will=True,
    ),
    Channel(
        "status", 1, schemas.Status, "aggregator", "clients, monitor", retained=True, will=True
    ),
    Channel("progress", 1, schemas.Progress, "aggregator", "monitor"),
    Channel(
        "bridge", 1, schemas.Bridge, "bridge", "central-server, monitor", retained=True, will=True
    ),
    Channel("cue", 0, schemas.Cue, "central-server", "bridges"),
    Channel("bell", 0, schemas.Bell, "bridge", "central-server"),
    Channel("evaluation", 2, schemas.ClientEvaluation, "client", "central-server", retained=True),
    Channel("history", 0, schemas.RoundRecord, "central-server", "monitor"),
)


@dataclass(frozen=True)
class Message:
    """A message of a known topic.

    Args:
        region, client: named in the topic, where it has them.
        table: of the tensors, where there are any.
    """

    channel: Channel
    region: str | None
    client: str | None
    meta: schemas.Payload
    table: TensorTable | None = None


class UnknownTopicError(CodecError):
    """No message of FedFog has this topic."""


def read(topics: Topics, topic: str, payload: bytes) -> Message:
    """Decode the message of any topic.

    Raises:
        UnknownTopicError: no message of FedFog has this topic.
        CodecError: the payload is not one of this topic.
    """
    for pattern, channel in _patterns(topics):
        if match := pattern.fullmatch(topic):
            names = match.groupdict()
            region, client = names.get("region"), names.get("client")
            if channel.tensors:
                decoded = decode(payload, channel.payload)
                return Message(channel, region, client, decoded.meta, decoded.table)
            return Message(channel, region, client, decode_json(payload, channel.payload))
    raise UnknownTopicError(f"no message of FedFog has the topic {topic}")


@lru_cache
def _patterns(topics: Topics) -> tuple[tuple[re.Pattern[str], Channel], ...]:
    name = NAME_PATTERN.strip("^$")
    return tuple(
        (
            re.compile(
                re.escape(channel.template(topics))
                .replace(re.escape("{region}"), f"(?P<region>{name})")
                .replace(re.escape("{client}"), f"(?P<client>{name})")
            ),
            channel,
        )
        for channel in CHANNELS
    )
