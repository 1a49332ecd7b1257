"""Containers are killed, paused, cut off and restarted while a run goes on.

The same promises as in `tests/chaos`, on the real stack: every update, receipt, partial and model
is taken down by an MQTT peer outside of it, and checked against each other and the run's history.
SEED=7 in the environment replays a schedule.
"""

import json
import os
import random
import ssl
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from paho.mqtt.client import MQTTMessage

from conftest import Peer
from fedfog.cli.broker import free_port
from fedfog.core.aggregation import WeightedSum
from fedfog.messages.codec import decode, decode_json, decode_meta
from fedfog.messages.schemas import (
    ModelMeta,
    PartialMeta,
    Receipt,
    RegionReceipt,
    RoundRecord,
    UpdateMeta,
    Verdict,
)
from fedfog.messages.topics import Topics
from stacks import Project, Stack

pytestmark = pytest.mark.compose

SEED = int(os.environ.get("SEED", "1"))
FAULTS = 12
EVERY = 4  # rounds from one fault to the next
REGIONS = ("region_0", "region_1")
CLIENTS = 2  # in each
SECONDS_A_FAULT = (1.0, 7.0)
PATIENCE = 300.0  # for the next model after a fault, on a busy machine
TOPICS = Topics()
SERVICE = "com.docker.compose.service"

Vector = NDArray[np.float32]


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, f"docker {' '.join(arguments)}: {done.stderr}"
    return done.stdout.strip()


# Faults


@dataclass(frozen=True)
class Fault:
    """What is done to a container, and for how many seconds."""

    kind: str
    container: str
    service: str
    seconds: float

    def __str__(self) -> str:
        lasts = "" if self.kind == "restart" else f" for {self.seconds:.1f} s"
        return f"{self.kind} {self.container}{lasts}"

    @contextmanager
    def on(self) -> Iterator[None]:
        """It is done at the beginning and undone at the end."""
        name = self.container
        if self.kind == "restart":
            docker("restart", name)
            yield
            return
        if self.kind == "cut":
            networks = docker("inspect", "-f", "{{json .NetworkSettings.Networks}}", name)
            (network,) = json.loads(networks)
            do: tuple[str, ...] = ("network", "disconnect", network, name)
            undo: tuple[str, ...] = ("network", "connect", "--alias", self.service, network, name)
        elif self.kind == "pause":
            do, undo = ("pause", name), ("unpause", name)
        else:
            do, undo = ("kill", "--signal", "KILL", name), ("start", name)
        docker(*do)
        yield
        docker(*undo)


def draw(chance: random.Random, containers: dict[str, str]) -> list[Fault]:
    """A schedule in which every kind and every service comes, for containers by their service."""
    kinds = ["kill", "pause", "cut", "restart"] * (FAULTS // 4)
    services = sorted(set(containers.values()))
    targets = (services * FAULTS)[:FAULTS]
    chance.shuffle(kinds)
    chance.shuffle(targets)
    faults = []
    for kind, service in zip(kinds, targets, strict=True):
        container = chance.choice(sorted(c for c, s in containers.items() if s == service))
        if service == "mosquitto" and kind == "cut":  # it is on both networks
            kind = "kill"
        faults.append(Fault(kind, container, service, chance.uniform(*SECONDS_A_FAULT)))
    return faults


# What was seen from outside


@dataclass
class Book:
    """What the peer has seen of a run: by round, region and client; all versions of each."""

    updates: dict[tuple[int, str, str], list[tuple[UpdateMeta, Vector]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    accepted: set[tuple[int, str, str]] = field(default_factory=set)
    partials: dict[tuple[int, str], dict[str, tuple[PartialMeta, Vector]]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    models: dict[int, dict[str, tuple[ModelMeta, Vector]]] = field(
        default_factory=lambda: defaultdict(dict)
    )

    @classmethod
    def of(cls, received: list[tuple[str, bytes]], run: str) -> "Book":
        book = cls()
        for topic, payload in received:
            if payload:
                book._note(topic, payload, run)
        return book

    def _note(self, topic: str, payload: bytes, run: str) -> None:
        kind, *owner = topic.split("/")[1:]
        if kind == "updates":
            update = decode(payload, UpdateMeta)
            key = (update.meta.round, update.meta.region, update.meta.client)
            if update.meta.run == run:
                self.updates[key].append((update.meta, update.vector))
        elif kind == "partial":
            partial = decode(payload, PartialMeta)
            if partial.meta.run == run:
                known = self.partials[partial.meta.round, partial.meta.region]
                known[partial.meta.digest] = (partial.meta, partial.vector)
        elif kind == "global_model":
            model = decode(payload, ModelMeta)
            if model.meta.run == run:
                self.models[model.meta.round][model.meta.digest] = (model.meta, model.vector)
        elif kind == "receipts" and len(owner) == 1:
            closed = decode_json(payload, RegionReceipt)
            if closed.run == run:
                self.accepted |= {(closed.round, owner[0], client) for client in closed.members}
        elif kind == "receipts":
            receipt = decode_json(payload, Receipt)
            if receipt.run == run and receipt.verdict is Verdict.ACCEPTED:
                assert receipt.round is not None
                self.accepted.add((receipt.round, owner[0], owner[1]))


def mean(parts: list[tuple[Vector, int]]) -> Vector:
    total = WeightedSum(parts[0][0].size)
    for vector, examples in parts:
        total.add(vector, examples)
    return total.mean()


def same(one: Vector, other: Vector) -> bool:
    """But for the last bit of float32: the order of a sum in float64 is not known here."""
    return bool(np.allclose(one, other, rtol=2 * np.finfo(np.float32).eps, atol=1e-12))


def check(book: Book, history: list[RoundRecord], rounds: int) -> dict[str, int]:
    """Hold all that was seen against the history; returns how much could be checked."""
    assert [record.round for record in history] == list(range(1, rounds + 1))
    records = {record.round: record for record in history}
    checked = {"accepted": 0, "partials": 0, "models": 0, "left out": 0}
    for record in history:
        named = set(record.regions) | set(record.left_out)
        assert named == set(REGIONS), f"round {record.round} does not say what became of a region"
        assert all(record.left_out.values()), f"round {record.round} does not say why"
        checked["left out"] += len(record.left_out)
    for round_, region, client in book.accepted:
        record = records[round_]
        if region in record.left_out:
            continue
        assert client in record.regions[region].members, f"{round_}/{region}/{client} is lost"
        checked["accepted"] += 1
    for (round_, region), contents in book.partials.items():
        assert len(contents) == 1, f"{round_}/{region} has {len(contents)} partials"
        ((digest, (partial, vector)),) = contents.items()
        if region in records[round_].regions:
            assert records[round_].regions[region].digest == digest
        parts = []
        for client, examples in partial.members.items():
            versions = book.updates.get((round_, region, client))
            if not versions:  # sent while the peer was without a broker
                break
            vectors = [vector for _, vector in versions]
            assert all(np.array_equal(vectors[0], other) for other in vectors), (
                f"{round_}/{region}/{client} was sent with several contents"
            )
            assert versions[0][0].num_examples == examples
            parts.append((vectors[0], examples))
        else:
            assert same(mean(parts), vector), f"{round_}/{region} is not the mean of its updates"
            checked["partials"] += 1
    for round_, record in records.items():
        contents_of_model = book.models.get(round_, {})
        assert len(contents_of_model) <= 1, f"round {round_} has several models"
        seen = [book.partials.get((round_, region)) for region in record.regions]
        if contents_of_model and all(seen):
            ((_, (_, model)),) = contents_of_model.items()
            regions = [next(iter(contents.values())) for contents in seen if contents]
            fed_avg = mean([(vector, meta.num_examples) for meta, vector in regions])
            assert same(fed_avg, model), f"model {round_} is not the mean of its partials"
            checked["models"] += 1
    return checked


# Tests


@pytest.fixture
def port() -> int:
    """Of the host, for the broker. Docker would choose another one at each start."""
    return free_port()


@pytest.fixture
def watch(port: int) -> Iterator[Callable[[Project], "Watcher"]]:
    """Connects a watcher to the stack, in place of the one before: there is one such name."""
    made: list[Watcher] = []

    def connect(project: Project) -> Watcher:
        for watcher in made:
            watcher.close()
        made[:] = [Watcher(port, project.observer())]
        return made[0]

    yield connect
    for watcher in made:
        watcher.close()


class Watcher(Peer):
    """Sees all topics of the stack."""

    def __init__(self, port: int, tls: ssl.SSLContext) -> None:
        self.newest: ModelMeta | None = None
        super().__init__(port, "fl/#", tls=tls)

    def _on_message(self, client: Any, data: Any, message: MQTTMessage) -> None:
        if message.topic == TOPICS.global_model and message.payload:
            model, newest = decode_meta(bytes(message.payload), ModelMeta), self.newest
            if newest is None or model.run != newest.run or model.round > newest.round:
                self.newest = model
        super()._on_message(client, data, message)

    def reaches(self, round_: int, timeout: float = PATIENCE) -> bool:
        """Wait for this model or a later one."""
        with self._changed:
            return self._changed.wait_for(lambda: self.round >= round_, timeout)

    @property
    def round(self) -> int:
        return -1 if self.newest is None else self.newest.round


def services(project: Project) -> dict[str, str]:
    """Names of a project's containers that stand, and their services."""
    return {
        container["Name"].removeprefix("/"): container["Config"]["Labels"][SERVICE]
        for container in project.containers().values()
        if container["State"]["Running"]
    }


def test_a_run_survives_what_docker_can_do_to_its_containers(
    stack: Stack, port: int, watch: Callable[[Project], Watcher]
) -> None:
    rounds = 5 * EVERY * (FAULTS + 1)  # a fault takes some 8, and what Docker needs for it
    both = {
        "REGIONS": ",".join(REGIONS),
        "CLIENTS_EXPECTED": str(CLIENTS),
        "ROUND_DEADLINE": "5",
    }
    first = stack(
        **both,
        MQTT_HOST_PORT=str(port),
        ROUNDS=str(rounds),
        LOCAL_EPOCHS="1",
        EXIT_WHEN_FINISHED="true",
        BRIDGE_GRACE="4",
        ROUND_TIMEOUT="60",
    )
    second = stack(
        "compose.region.yaml", "-1", REGION="region_1", FEDFOG_PROJECT=first.name, **both
    )
    up = ("up", "--detach", "--scale", f"client={CLIENTS}")
    first.ok(*up)
    second.ok(*up)
    watcher = watch(first)
    assert watcher.reaches(1)
    say(f"\nSEED={SEED}, {rounds} rounds")
    for fault in draw(random.Random(SEED), services(first) | services(second)):
        begins = watcher.round
        assert watcher.reaches(begins + EVERY), f"no model after {begins}"
        with fault.on():
            # It lasts its time, or until the run has shown that it goes on without.
            watcher.reaches(watcher.round + EVERY, fault.seconds)
        healed_at, known = time.monotonic(), watcher.round
        assert watcher.reaches(known + 1), f"no model after {known}, {fault}"
        seconds = time.monotonic() - healed_at
        say(f"after model {known:2}: {fault}; the next one {seconds:.1f} s after it was healed")
    assert watcher.reaches(rounds)
    assert watcher.newest is not None
    assert docker("wait", f"{first.name}-central-server-1") == "0"
    history = [RoundRecord(**record) for record in first.result("history.json")["rounds"]]
    checked = check(Book.of(watcher.received, watcher.newest.run), history, rounds)
    say(f"checked: {checked}")
    # Of what the watcher saw: it was away while the broker was.
    assert checked["models"] > rounds / 2
    assert checked["partials"] > rounds
    assert checked["accepted"] > rounds


@pytest.mark.parametrize("how", ["stop", "down"])
def test_a_stack_that_was_stopped_goes_on_with_its_run(
    stack: Stack, port: int, watch: Callable[[Project], Watcher], how: str
) -> None:
    project = stack(MQTT_HOST_PORT=str(port), ROUNDS="1000", LOCAL_EPOCHS="1", CLIENTS_EXPECTED="3")
    up = ("up", "--detach", "--scale", "client=3")
    project.ok(*up)
    watcher = watch(project)
    assert watcher.reaches(3)
    began = time.monotonic()
    project.ok("stop")
    say(f"\nstopped in {time.monotonic() - began:.1f} s")
    codes = {n: c["State"]["ExitCode"] for n, c in project.containers().items()}
    assert set(codes.values()) == {0}, f"137 is a container that had to be killed: {codes}"
    before = watcher.newest
    assert before is not None
    if how == "down":  # the volumes of aggregator, bridge and clients go with their containers
        project.ok("down")
    project.ok(*up)
    assert watcher.reaches(before.round + 2)
    assert watcher.newest is not None
    assert watcher.newest.run == before.run, "another run was begun"
