"""The central server as a process, and a region that is played, for tests of the central tier."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paho.mqtt.client as paho
import psutil

from conftest import LIMIT, Peer, Service
from fedfog.cli.broker import LocalBroker, free_port
from fedfog.messages.codec import TensorMessage, decode, digest_of, encode
from fedfog.messages.schemas import (
    ClientMetrics,
    FederatedEvaluation,
    ModelMeta,
    PartialMeta,
    RunState,
)

MODEL = "fl/global_model"


class Region(Peer):
    """Clients and aggregator of a region, played: the partial of round r is model r-1 plus r, and
    is published as soon as round r is `allowed`. Its clients, a and b, have evaluated the model
    as `federated` says."""

    def __init__(
        self,
        port: int,
        name: str = "region_0",
        allowed: int = 10**6,
        federated: FederatedEvaluation | None = None,
    ) -> None:
        self.name, self.allowed, self.federated = name, allowed, federated
        self.models: dict[int, TensorMessage[ModelMeta]] = {}
        self._done: set[tuple[str, int]] = set()
        super().__init__(port, MODEL)

    def _on_message(self, client: Any, data: Any, message: paho.MQTTMessage) -> None:
        if message.payload.startswith(b"garbage"):
            super()._on_message(client, data, message)
            return
        model = decode(bytes(message.payload), ModelMeta)
        # Before those who wait are woken: no other message may come to wake them again.
        self.models[model.meta.round] = model
        super()._on_message(client, data, message)
        self._answer()

    def allow(self, round: int) -> None:
        self.allowed = round
        self._answer()

    def model(self, round: int) -> TensorMessage[ModelMeta]:
        """Wait for model `round`."""
        self.wait_for(lambda _topic, _payload: round in self.models, LIMIT)
        return self.models[round]

    def _answer(self) -> None:
        for base in list(self.models.values()):
            round = base.meta.round + 1
            key = (base.meta.run, round)
            if base.meta.state is RunState.FINISHED or round > self.allowed or key in self._done:
                continue
            self._done.add(key)
            vector = base.vector + np.float32(round)
            meta = PartialMeta(
                run=base.meta.run,
                round=round,
                region=self.name,
                digest=digest_of(vector),
                num_clients=2,
                num_examples=10,
                members={"a": 4, "b": 6},
                metrics=ClientMetrics(train_loss=1.0 / round),
                federated=self.federated,
            )
            payload = encode(meta, base.table, vector)
            self._client.publish(f"fl/partial/{self.name}", payload, qos=1, retain=True)


class Centre:
    """Central server and a bridge; the server can be started again."""

    def __init__(
        self, services: Callable[..., Service], broker: LocalBroker, folder: Path, **settings: Any
    ) -> None:
        self.port, self.runs = free_port(), folder / "runs"
        self._services, self._broker = services, broker
        self._settings = {
            "flower_port": self.port,
            "runs_dir": self.runs,
            "rounds": 3,
            "exit_when_finished": True,
            **settings,
        }

    def bridge(self, region: str = "region_0") -> Service:
        return self._services(
            "fedfog_bridge.main",
            self._broker,
            f"bridge-{region}",
            region=region,
            flower_server=f"127.0.0.1:{self.port}",
        )

    def start(self, **settings: Any) -> Service:
        return self._services(
            "fedfog_central_server.main", self._broker, "central", **self._settings | settings
        )

    @property
    def folder(self) -> Path:
        """Of the newest run."""
        return (self.runs / "latest").resolve()

    def read(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())


def descendants(service: Service) -> list[psutil.Process]:
    children: list[psutil.Process] = psutil.Process(service.process.pid).children(recursive=True)
    return children


def assert_gone(processes: list[psutil.Process], within: float = 15.0) -> None:
    deadline = time.monotonic() + within
    while alive := [process for process in processes if is_alive(process)]:
        assert time.monotonic() < deadline, f"still running: {alive}"
        time.sleep(0.02)


def is_alive(process: psutil.Process) -> bool:
    """Not ended; a zombie has ended, and only waits for init to take note."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def lines(service: Service, event: str) -> list[dict[str, Any]]:
    text = service.log.read_text(errors="replace").splitlines()
    parsed = [json.loads(line) for line in text if line.startswith("{")]
    return [line for line in parsed if line["event"] == event]


def expected(model_0: TensorMessage[ModelMeta], rounds: int) -> bytes:
    vector = model_0.vector
    for round in range(1, rounds + 1):
        vector = vector + np.float32(round)
    return vector.tobytes()
