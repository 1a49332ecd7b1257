"""How a train message and its reply look: the message is empty and carries run and round in its
group id; the reply carries the region's partial as one value, so that three Flower objects are
transferred instead of six."""

import re

from flwr.app import ConfigRecord, Message, RecordDict

_RECORD, _REGION, _PARTIAL = "reply", "region", "partial"
_GROUP = re.compile(r"^([a-z0-9][a-z0-9_-]{0,62})/(\d{1,9})$")


class ReplyError(ValueError):
    """A message or a reply is not one of FedFog's; the text says why."""


def group_id(run: str, round_: int) -> str:
    return f"{run}/{round_}"


def run_and_round(message: Message) -> tuple[str, int]:
    """Which partial a train message asks for.

    Raises:
        ReplyError: its group id is not `run/round`.
    """
    match = _GROUP.match(message.metadata.group_id)
    if match is None:
        raise ReplyError(f"group id {message.metadata.group_id!r} is not run/round")
    return match[1], int(match[2])


def pack(region: str, partial: bytes) -> RecordDict:
    """Content of the reply of `region`."""
    return RecordDict({_RECORD: ConfigRecord({_REGION: region, _PARTIAL: bytes(partial)})})


def unpack(reply: Message) -> tuple[str, bytes]:
    """Region and partial of a reply.

    Raises:
        ReplyError: the reply carries anything else.
    """
    record = reply.content.config_records.get(_RECORD)
    region = record and record.get(_REGION)
    partial = record and record.get(_PARTIAL)
    if not isinstance(region, str) or not isinstance(partial, bytes):
        raise ReplyError("the reply carries no region and partial")
    return region, partial
