"""`fedfog monitor`: what travels over MQTT, decoded, one line per message; never a wall of weights.

The monitor only listens. Nothing that arrives ends it: a payload that is no message of FedFog is
described like any other.
"""

import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from fedfog import logs, service
from fedfog.cli.regions import Regions
from fedfog.health import BEAT_SECONDS, Heartbeat
from fedfog.messages import schemas
from fedfog.messages.catalog import UnknownTopicError, read
from fedfog.messages.codec import CodecError
from fedfog.messages.topics import Topics
from fedfog.settings import CommonSettings, load
from fedfog.transport import mqtt
from fedfog.transport.tls import Identity

_PREVIEW = 60


def run(filters: Sequence[str]) -> int:
    """Show what arrives until SIGINT or SIGTERM; returns the exit code.

    Args:
        filters: MQTT topic filters; none: all topics of the federation.
    """
    settings = load(CommonSettings)
    topics = settings.topics
    renamed = (topics.global_model, topics.updates, topics.partial)
    within = f"{topics.prefix}/"
    # A filter `x/#` matches `x` too.
    own = [f"{within}#", *(f"{topic}/#" for topic in renamed if not topic.startswith(within))]
    session = mqtt.Session(
        f"fedfog-monitor-{socket.gethostname()}-{os.getpid()}",
        settings.mqtt_broker,
        settings.mqtt_port,
        filters or own,
        timeout=settings.mqtt_timeout,
        tls=Identity.of(settings.tls_dir),
    )
    console = Console(highlight=False)
    regions = Regions()
    heartbeat = Heartbeat()
    service.on_stop(session.events.put)
    live = Live(
        console=console, auto_refresh=False, get_renderable=regions.table, vertical_overflow="crop"
    )
    terminal = console.is_terminal
    form = "console" if terminal and settings.log_format == "auto" else settings.log_format
    with live if terminal else nullcontext():
        logs.configure("monitor", settings.log_level, form)  # to stdout as Live has it
        session.start()
        try:
            while not isinstance(event := session.next(BEAT_SECONDS), service.StopRequested):
                heartbeat.beat("ready" if session.connected else "no MQTT broker")
                if isinstance(event, mqtt.Received):
                    _show(console, regions, topics, event)
                    if terminal:
                        live.refresh()
                elif isinstance(event, mqtt.Disconnected):
                    console.print(f"no connection to the broker: {event.reason}", markup=False)
        except mqtt.TransportError as error:
            sys.stderr.write(f"{error}\n")
            return service.EXIT_FAILED
    session.stop()
    return service.EXIT_OK


def _show(console: Console, regions: Regions, topics: Topics, received: mqtt.Received) -> None:
    topic, payload = received.topic, received.payload
    line = Text(f"{datetime.now():%H:%M:%S.%f}"[:12], "dim")
    line.append(f"  {_printable(topic, 80)}", "cyan").append(
        f"  {describe(topic, payload, topics)}", ""
    )
    try:
        regions.see(read(topics, topic, payload))
    except CodecError:
        line.stylize("yellow")  # `describe` has said why
    if console.is_terminal:
        console.print(line, no_wrap=True, overflow="ellipsis")
    else:
        console.print(line, soft_wrap=True)


def describe(topic: str, payload: bytes, topics: Topics) -> str:
    """What a message says, in one line; `topics` are those of the federation.

    Never raises: a payload that does not fit its topic is described as malformed, with the reason.
    """
    if not payload:
        return "cleared: no retained message here any more"
    try:
        message = read(topics, topic, payload)
    except UnknownTopicError:
        return f"not a topic of FedFog, {_size(payload)}{_preview(payload)}"
    except CodecError as error:
        return f"MALFORMED, {_size(payload)}: {_printable(str(error), 200)}{_preview(payload)}"
    meta, table = message.meta, message.table
    text = _FORMATS[type(meta)](meta)
    if table is not None:
        count = _count(len(table.shapes), "tensor")
        text += f" ({_size(payload)}, {count}, {table.num_parameters:,} float32)"
    for name in ("region", "client"):
        named = getattr(message, name)
        if named and getattr(meta, name, named) != named:
            text += f" [it says {name} {getattr(meta, name)}, its topic does not]"
    return text


# One function per schema


def _model(meta: schemas.ModelMeta) -> str:
    shares = ", ".join(
        f"{region} {_count(share.num_clients, 'client')} {share.num_examples:,} examples"
        for region, share in meta.regions.items()
    )
    regional = f" after {_count(meta.fog_round, 'regional round')}" if meta.fog_round else ""
    parts = [
        f"model {meta.round} of {meta.rounds}{regional}, run {meta.run}, {meta.state}",
        f"made by {shares}" if shares else "",
        _evaluation(meta.evaluation) if meta.evaluation else "",
        f"digest {meta.digest[:12]}",
    ]
    return "; ".join(filter(None, parts))


def _update(meta: schemas.UpdateMeta) -> str:
    return (
        f"update for round {_number(meta)}, run {meta.run}: {meta.num_examples:,} examples, "
        f"{_metrics(meta.metrics)}; trained {meta.train_seconds:.1f} s "
        f"from {meta.base_digest[:12]}"
    )


def _partial(meta: schemas.PartialMeta) -> str:
    parts = [
        f"partial of round {meta.round}, run {meta.run}: {meta.num_examples:,} examples of "
        f"{_count(meta.num_clients, 'client')}: {_list(meta.members)}; {_metrics(meta.metrics)}",
        _federated(meta.federated),
    ]
    named = _named("left out", meta.left_out) + _named("suspicious", meta.suspicious)
    return "; ".join(filter(None, parts)) + named


def _receipt(meta: schemas.Receipt) -> str:
    which = "an update" if meta.round is None else f"the update for round {_number(meta)}"
    return f"{meta.verdict}: {which}" + (f": {_printable(meta.reason)}" if meta.reason else "")


def _region_receipt(meta: schemas.RegionReceipt) -> str:
    return f"accepted: round {_number(meta)}, run {meta.run}: {_list(meta.members)}"


def _slot(meta: schemas.Slot) -> str:
    return (
        f"data slot {meta.slot} of {meta.slots} in part {meta.region_index} of {meta.regions} "
        f"of the training set, run {meta.run}"
    )


def _presence(meta: schemas.Presence) -> str:
    if not meta.online:
        return f"offline (boot {meta.boot})"
    slot = "no slot yet" if meta.slot is None else f"slot {meta.slot}"
    data = "data of its own" if meta.own_data else slot
    return f"online (boot {meta.boot}): {data}, version {_printable(meta.version) or '?'}"


def _status(meta: schemas.Status) -> str:
    if not meta.online:
        return f"offline (boot {meta.boot})"
    where = f", round {_number(meta)} of run {meta.run}" if meta.run else ""
    return f"{meta.phase or 'online'}{where} (boot {meta.boot})"


def _progress(meta: schemas.Progress) -> str:
    waiting = f"; waits for {_list(meta.waiting_for)}" if meta.waiting_for else ""
    return (
        f"{meta.phase}, round {_number(meta)}: {meta.received} of {meta.expected} updates"
        f"{waiting}; {meta.seconds_left:.0f} s to the deadline"
    )


def _bridge(meta: schemas.Bridge) -> str:
    if not meta.online:
        return f"offline (boot {meta.boot})"
    node = "in a stock SuperNode" if meta.node_id is None else f"Flower node {meta.node_id}"
    return f"online (boot {meta.boot}): {node}"


def _cue(meta: schemas.Cue) -> str:
    return f"the train messages of round {meta.round} are in the SuperLink"


def _bell(meta: schemas.Bell) -> str:
    return f"{meta.region}'s reply is in the SuperLink (message {_printable(meta.message_id)[:12]})"


def _client_evaluation(meta: schemas.ClientEvaluation) -> str:
    loss = "not finite" if meta.loss is None else f"{meta.loss:.4f}"
    return (
        f"finished model {meta.round}, run {meta.run}: accuracy {meta.accuracy:.4f}, loss {loss} "
        f"on {_count(meta.num_examples, 'validation example')}"
    )


def _round(meta: schemas.RoundRecord) -> str:
    parts = [
        f"round {meta.round}, run {meta.run}: {_count(len(meta.regions), 'region')}, "
        f"{_count(meta.num_clients, 'client')}, {meta.num_examples:,} examples",
        "" if meta.train_loss is None else f"train loss {meta.train_loss:.4f}",
        _evaluation(meta.evaluation) if meta.evaluation else "not evaluated",
        _federated(meta.federated),
    ]
    named = _named("left out", meta.left_out) + _named("suspicious", meta.suspicious)
    return "; ".join(filter(None, parts)) + named


_FORMATS: Mapping[type[schemas.Payload], Callable[[Any], str]] = {
    schemas.ModelMeta: _model,
    schemas.UpdateMeta: _update,
    schemas.PartialMeta: _partial,
    schemas.Receipt: _receipt,
    schemas.RegionReceipt: _region_receipt,
    schemas.Slot: _slot,
    schemas.Presence: _presence,
    schemas.Status: _status,
    schemas.Progress: _progress,
    schemas.Bridge: _bridge,
    schemas.Cue: _cue,
    schemas.Bell: _bell,
    schemas.ClientEvaluation: _client_evaluation,
    schemas.RoundRecord: _round,
}


def _evaluation(evaluation: schemas.Evaluation) -> str:
    """Metrics of a model on the held-out examples."""
    auroc = "undefined" if evaluation.auroc is None else f"{evaluation.auroc:.4f}"
    loss = "not finite" if evaluation.loss is None else f"{evaluation.loss:.4f}"
    own = (
        f", {name} {'not finite' if value is None else f'{value:.4f}'}"
        for name, value in evaluation.task.items()
    )
    return (
        f"model {evaluation.round}: accuracy {evaluation.accuracy:.4f}, AUROC {auroc}, "
        f"macro-F1 {evaluation.macro_f1:.4f}, loss {loss}" + "".join(own)
    )


def _federated(evaluation: schemas.FederatedEvaluation | None) -> str:
    """Metrics of a model on the clients' own examples."""
    if evaluation is None:
        return ""
    return (
        f"{_count(evaluation.num_clients, 'client')} found its accuracy {evaluation.accuracy:.4f}, "
        f"at worst {evaluation.worst_accuracy:.4f} ({evaluation.worst_client})"
    )


def _metrics(metrics: schemas.ClientMetrics) -> str:
    told = metrics.model_dump(exclude_none=True, exclude={"validation_examples"})
    return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in told.items())


def _named(how: str, reasons: Mapping[str, str]) -> str:
    if not reasons:
        return ""
    return f"; {how}: " + _list([f"{name} ({why})" for name, why in reasons.items()])


def _number(
    meta: schemas.UpdateMeta
    | schemas.Receipt
    | schemas.RegionReceipt
    | schemas.Status
    | schemas.Progress,
) -> str:
    return schemas.numbered(meta.round or 0, meta.fog_round)


def _list(names: Mapping[str, int] | list[str], limit: int = 10) -> str:
    shown = [_printable(name) for name in list(names)[:limit]]
    return ", ".join(shown) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _size(payload: bytes) -> str:
    size = len(payload)
    return f"{size} B" if size < 1000 else f"{size / 1000:.1f} kB"


def _preview(payload: bytes) -> str:
    """The beginning of a payload if it is text."""
    try:
        text = payload[: 4 * _PREVIEW].decode()
    except UnicodeDecodeError:
        return ""
    return f": {_printable(text)}" if text.isprintable() else ""


def _printable(text: str, limit: int = _PREVIEW) -> str:
    """Text of a peer, without what could take over the terminal, and not too long."""
    safe = "".join(character if character.isprintable() else "?" for character in text)
    return safe if len(safe) <= limit else safe[: limit - 3] + "..."
