"""Every place where the bytes of others are read, up to what is done with them, in one process.

A reader takes a topic and a payload and returns as its service does; only what the service foresees
(`CodecError` where it is caught, `StoreError` and the like for our own files) may come out of it.
"""

import io
import itertools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from pydantic import ValidationError
from rich.console import Console

import wire
from fedfog.cli import monitor
from fedfog.cli.regions import Regions
from fedfog.control import command
from fedfog.core.partition import slot_indices
from fedfog.core.rounds import Tick
from fedfog.flower.reply import ReplyError, unpack
from fedfog.flower.strategy import FogStrategy, make_strategy
from fedfog.messages.catalog import read
from fedfog.messages.codec import CodecError, decode, decode_meta, encode
from fedfog.messages.schemas import PartialMeta, Slot, UpdateMeta
from fedfog.messages.topics import Topics
from fedfog.runs import History
from fedfog.settings import AggregatorSettings, BridgeSettings, CentralSettings, ClientSettings
from fedfog.transport.mqtt import Received
from fedfog.transport.network import Network
from fedfog_aggregator.main import Aggregator
from fedfog_bridge.client_app import _key
from fedfog_bridge.resident import ResidentBridge
from fedfog_central_server import link
from fedfog_central_server.checkpoints import Checkpoint
from fedfog_central_server.server import CentralServer
from fedfog_client.client import Client, ModelReader
from fedfog_client.outbox import Outbox
from fedfog_client.trainer import Trainer
from fuzz.valid import BASE, PARTIAL, RECORD, REGION, VECTOR, messages

Read = Callable[[str, bytes], None]
FRESH_AFTER = 40  # payloads, so that one that changed the state does not end the search


@dataclass(frozen=True)
class Reader:
    """A reader, and what is to be mutated for it: topic -> valid payloads."""

    name: str
    make: Callable[[Path], Read]
    valid: dict[str, list[bytes]]


def _codec(_folder: Path) -> Read:
    topics = Topics()

    def take(topic: str, payload: bytes) -> None:
        for look in (
            lambda: read(topics, topic, payload).meta.to_json(),
            lambda: decode(payload, UpdateMeta, wire.TABLE).table.unflatten(VECTOR),
            lambda: decode_meta(payload, PartialMeta),
        ):
            try:
                look()
            except CodecError as error:
                assert len(str(error)) < 300

    return take


class _Region:
    """A real aggregator in an open round, with a hostile `m` and an honest `other`."""

    def __init__(self, folder: Path, honest: tuple[str, bytes], **settings: Any) -> None:
        self._folder, self._honest, self._settings = folder, honest, settings
        self._number = itertools.count()
        self._open()

    def take(self, topic: str, payload: bytes) -> None:
        self._aggregator._handle(Received(topic, payload), 2.0)
        self._left -= 1
        machine = self._aggregator._rounds
        over = self._left == 0 or "m" in machine.members
        if over and (machine.run, machine.round) == ("run", 1):
            self._close()
        if over or self._aggregator._exit is not None or machine.phase != "open":
            self._aggregator._store.close()
            self._open()

    def _open(self) -> None:
        self._left = FRESH_AFTER
        self._aggregator = aggregator = Aggregator(
            AggregatorSettings(
                state_dir=self._folder / str(next(self._number)),
                client_quota=10**9,
                cohort_settle=1e-9,
                **self._settings,
            )
        )
        for client in ("m", "other"):
            aggregator._handle(Received(f"fl/presence/{REGION}/{client}", wire.birth()), 0.0)
        aggregator._handle(Received("fl/global_model", wire.model(BASE)), 1.0)
        assert aggregator._rounds.phase == "open"

    def _close(self) -> None:
        """The honest update is counted, whatever has come before it, and the partial is sound."""
        self._aggregator._handle(Received(*self._honest), 3.0)
        self._aggregator._apply(Tick(), 1e6)
        partial = decode(self._aggregator._store.committed("run", 1), PartialMeta)
        assert "other" in partial.meta.members
        assert np.isfinite(partial.vector).all()


def _aggregator(folder: Path, **settings: Any) -> Read:
    honest = wire.update(BASE, VECTOR, "other")
    return _Region(folder, (f"fl/updates/{REGION}/other", honest), **settings).take


def _parent(folder: Path) -> Read:
    meta = PARTIAL.model_copy(update={"region": "other"})
    honest = encode(meta, wire.TABLE, VECTOR)
    topic = f"fl/partial/{REGION}/other"
    return _Region(folder, (topic, honest), child_regions="m,other").take


def _child(folder: Path) -> Read:
    return _aggregator(folder, parent_region="top")


def _client(folder: Path) -> Read:
    number = itertools.count()

    def fresh() -> Client:
        settings = ClientSettings(client_id="m")
        trainer = Trainer(settings, lambda _event: None)  # not started: it keeps the jobs
        return Client(
            settings,
            "m",
            folder / str(next(number)),
            Network(),
            ModelReader(),
            trainer,
            lambda _client, _took_part: None,
            None,
        )

    client, left = fresh(), FRESH_AFTER

    def take(topic: str, payload: bytes) -> None:
        nonlocal client, left
        left -= 1
        if left == 0:
            client, left = fresh(), FRESH_AFTER
        client.handle(Received(topic, payload), 1.0)
        if topic.startswith("fl/slots/"):
            _use_slot(payload)

    return take


def _use_slot(payload: bytes) -> None:
    """What the trainer does with a slot; too few examples for it is foreseen."""
    try:
        slot = Slot.model_validate_json(payload)
        slot_indices(
            np.zeros(500, np.int64),
            None,
            slot=slot.slot,
            slots=slot.slots,
            region_index=slot.region_index,
            regions=slot.regions,
            seed=7,
        )
    except ValidationError:
        pass
    except ValueError as error:
        assert "too few" in str(error)


def _bridge(folder: Path) -> Read:
    bridge = ResidentBridge(BridgeSettings(state_dir=folder))

    def take(topic: str, payload: bytes) -> None:
        event = Received(topic, payload)
        bridge._presence.observe(event)
        bridge._on_partial(event)
        _key(payload)

    return take


def _server(folder: Path) -> Read:
    server = CentralServer(CentralSettings(runs_dir=folder / "runs", run_id="run"))
    return lambda topic, payload: server._handle(Received(topic, payload))


def _server_app(_folder: Path) -> Read:
    strategy = FogStrategy(
        make_strategy("FedAvg", 1, 0.1),
        table=wire.TABLE,
        run="run",
        first_round=1,
        min_fit=1,
        min_available=1,
        regions=[],
        regions_timeout=1,
        round_timeout=1,
        on_model=lambda _model: None,
    )

    def take(_topic: str, payload: bytes) -> None:
        for region, partial in ((REGION, payload), (payload.decode("latin-1"), b""), (5, 5)):
            record = ConfigRecord({"region": region, "partial": partial})
            reply: Any = SimpleNamespace(content=RecordDict({"reply": record}))
            try:
                strategy._check(1, *unpack(reply))
            except (CodecError, ReplyError) as error:
                assert len(str(error)) < 500

    return take


def _monitor(_folder: Path) -> Read:
    console, regions, topics = Console(file=io.StringIO()), Regions(), Topics()

    def take(topic: str, payload: bytes) -> None:
        monitor._show(console, regions, topics, Received(topic, payload))
        regions.table()
        console.file.seek(0)
        console.file.truncate()

    return take


def _files(folder: Path) -> Read:
    """What is read back of our own files, and heard on our own sockets."""
    folder.mkdir(parents=True, exist_ok=True)
    outbox = Outbox(folder)

    def take(topic: str, payload: bytes) -> None:
        if topic == "checkpoint":
            _foreseen(CodecError, Checkpoint.from_bytes, payload)
        elif topic == "outbox":
            outbox.path.write_bytes(payload)
            outbox.load()
        else:
            for parse in (
                link.from_server.validate_json,
                link.from_server_app.validate_json,
                command.validate_json,
                History.model_validate_json,
            ):
                _foreseen(ValidationError, parse, payload)

    return take


def _foreseen(kind: type[Exception], parse: Callable[[bytes], object], payload: bytes) -> None:
    with suppress(kind):
        parse(payload)


def _only(*prefixes: str) -> dict[str, list[bytes]]:
    return {t: p for t, p in messages().items() if t.startswith(tuple(prefixes))}


def _own() -> dict[str, list[bytes]]:
    update = wire.update(BASE, VECTOR, "m")
    return {
        "checkpoint": [Checkpoint(RECORD, wire.TABLE, VECTOR, {"m_t": VECTOR}).to_bytes()],
        "outbox": [bytes(32) + update],
        "json": [
            link.BellHeard(bell={"region": "r", "message_id": "x"}).model_dump_json().encode(),
            link.Start(run="r", folder="/", settings={"a": 1}).model_dump_json().encode(),
            link.Logged(level="info", event="e", fields={}).model_dump_json().encode(),
            b'{"kind":"run","name":"x","settings":{"rounds":3}}',
            b'{"kind":"stop","name":"x"}',
        ],
    }


READERS = (
    Reader("codec", _codec, messages()),
    Reader(
        "aggregator",
        _aggregator,
        _only("fl/updates", "fl/presence", "fl/status", "fl/global_model"),
    ),
    Reader(
        "aggregator above others",
        _parent,
        _only("fl/partial/region_0/", "fl/presence", "fl/status", "fl/global_model"),
    ),
    Reader(
        "aggregator below another",
        _child,
        {
            topic.replace(f"{REGION}/m", f"top/{REGION}").replace(REGION, "top", 1): payloads
            for topic, payloads in _only("fl/receipts", "fl/status").items()
        }
        | _only("fl/presence"),
    ),
    Reader("client", _client, _only("fl/global_model", "fl/receipts", "fl/slots", "fl/status")),
    Reader("bridge", _bridge, _only("fl/partial/region_0", "fl/bridge", "fl/cue")),
    Reader("central server", _server, _only("fl/bridge", "fl/bell", "fl/global_model")),
    Reader("ServerApp", _server_app, {"partial": messages()[f"fl/partial/{REGION}"]}),
    Reader("monitor", _monitor, messages()),
    Reader("files and sockets", _files, _own()),
)
