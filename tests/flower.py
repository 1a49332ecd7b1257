"""Flower for the tests: a real SuperLink with runs on it, and one that is played in memory."""

import json
import os
import queue
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.proto.control_pb2 import ListRunsRequest
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.supercore.task_identity import TaskIdentity

from conftest import LIMIT, Peer
from fedfog.cli.broker import LocalBroker, free_port
from fedfog.flower import FLOWER_ENVIRONMENT
from fedfog.flower.fleet import control, register_node, submit_run
from fedfog.flower.grid import BellRung, BridgeSeen, FogEvent
from fedfog.flower.strategy import to_record, to_vector
from fedfog.messages.codec import TensorTable, Vector, digest_of, encode
from fedfog.messages.schemas import Bell, Bridge, ClientMetrics, PartialMeta
from fedfog.transport import tls

APP = Path(__file__).parent / "integration" / "flower_app"


class TwoDoors(LocalBroker):
    """A broker with a door for certificates, each of which is one session, and one for the test."""

    def __init__(self, folder: Path, pki: Path) -> None:
        super().__init__(folder, "mosquitto")
        self.tls_port, files = free_port(), pki / "broker"
        with self._config.open("a") as config:
            config.write(
                f"listener {self.tls_port} 127.0.0.1\n"
                f"cafile {files}/ca.crt\ncertfile {files}/tls.crt\nkeyfile {files}/tls.key\n"
                "require_certificate true\nuse_identity_as_username true\n"
                "use_username_as_clientid true\n"
            )


class SuperLink:
    """A SuperLink process on loopback, with its state in memory.

    Args:
        pki: a PKI's folder: it speaks TLS, and admits the bridges that have their key there.
    """

    def __init__(self, folder: Path, pki: Path | None = None) -> None:
        self.folder, self.port = folder, free_port()
        self.tls_dir = pki / "superlink" if pki else None
        self.tls = tls.context(self.tls_dir) if self.tls_dir else None
        self.address = f"127.0.0.1:{self.port}"
        self.log = folder / "superlink.log"
        self.process: subprocess.Popen[bytes] | None = None
        (folder / "flwr").mkdir(parents=True)

    def start(self) -> "SuperLink":
        scripts = str(Path(sys.executable).parent)
        env = {
            **os.environ,
            **FLOWER_ENVIRONMENT,
            "FLWR_HOME": str(self.folder / "flwr"),
            "FLWR_LOG_LEVEL": "DEBUG",
            "PATH": os.pathsep.join([scripts, os.environ.get("PATH", "")]),
        }
        arguments = ["--host", "127.0.0.1", "--port", str(self.port)]
        if self.tls_dir is None:
            arguments += ["--insecure"]
        else:
            for option, name in (("ca-cert", "ca.crt"), ("cert", "tls.crt"), ("key", "tls.key")):
                arguments += [f"--ssl-{option}file", str(self.tls_dir / name)]
            arguments += ["--enable-supernode-auth"]
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fedfog.flower.superlink", *arguments],
                stdout=output,
                stderr=output,
                env=env,
                start_new_session=True,
            )
        deadline = time.monotonic() + LIMIT
        while not self._healthy():
            assert self.process.poll() is None and time.monotonic() < deadline, self.tail()
            time.sleep(0.05)
        for key in sorted(self.tls_dir.glob("*.pub")) if self.tls_dir else []:
            register_node(self.address, key.stem, key.read_bytes(), self.tls)
        return self

    def stop(self) -> None:
        """Kill it with its children, as a power loss would."""
        if self.process is not None:
            os.killpg(self.process.pid, 9)
            self.process.wait()
            self.process = None

    def submit(self, **config: Any) -> "FlowerRun":
        """Start the tests' ServerApp; `_` in a name of its configuration stands for `-`."""
        out = self.folder / f"out-{time.monotonic_ns()}.jsonl"
        named = {key.replace("_", "-"): value for key, value in config.items()}
        run_id = submit_run(self.address, APP, {**named, "out": str(out)}, self.tls)
        return FlowerRun(self, run_id, out)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]

    def _healthy(self) -> bool:
        url = f"http{'s' if self.tls else ''}://{self.address}/health"
        try:
            with urllib.request.urlopen(url, timeout=2, context=self.tls) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False


def refuses_old_tls(port: int, ca: Path) -> bool:
    """Whether the server on loopback ends a handshake of TLS 1.1."""
    old = ssl.create_default_context(cafile=ca)
    old.set_ciphers("ALL:@SECLEVEL=0")  # else this side would refuse it
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection(("127.0.0.1", port), 10) as plain:
        try:
            old.wrap_socket(plain, server_hostname="localhost")
        except ssl.SSLError as error:
            # asyncio, in the SuperLink, closes before it has sent its alert.
            return error.reason in ("TLSV1_ALERT_PROTOCOL_VERSION", "UNEXPECTED_EOF_WHILE_READING")
    return False


@dataclass(frozen=True)
class RunStatus:
    """State of a Flower run: pending, starting, running, finished:completed, finished:failed or
    finished:stopped."""

    state: str
    details: str

    @property
    def finished(self) -> bool:
        return self.state.startswith("finished")


def run_status(address: str, run_id: int, tls: ssl.SSLContext | None = None) -> RunStatus:
    """Raises ControlError: the SuperLink does not know the run or cannot be reached."""
    with control(address, tls) as client:
        status = client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict[run_id].status
    state = f"{status.status}:{status.sub_status}" if status.sub_status else status.status
    return RunStatus(state, status.details)


class FlowerRun:
    """A submitted run and the models that it has made."""

    def __init__(self, superlink: SuperLink, run_id: int, out: Path) -> None:
        self.superlink, self.run_id, self.out = superlink, run_id, out

    @property
    def rounds(self) -> list[dict[str, Any]]:
        if not self.out.exists():
            return []
        return [json.loads(line) for line in self.out.read_text().splitlines()]

    def wait_rounds(self, number: int, timeout: float = LIMIT) -> list[dict[str, Any]]:
        deadline = time.monotonic() + timeout
        while len(self.rounds) < number:
            assert time.monotonic() < deadline, self.superlink.tail()
            status = self._status()
            failed = status.finished and status.state != "finished:completed"
            assert not failed, f"{status}\n{self.superlink.tail()}"
            time.sleep(0.1)
        return self.rounds

    def wait_state(self, state: str, timeout: float = LIMIT) -> str:
        """Wait for the run's state; returns its details."""
        deadline = time.monotonic() + timeout
        while (status := self._status()).state != state:
            assert time.monotonic() < deadline, f"{status}\n{self.superlink.tail()}"
            time.sleep(0.1)
        return status.details

    def _status(self) -> RunStatus:
        return run_status(self.superlink.address, self.run_id, self.superlink.tls)


def partial(
    value: float,
    round: int,
    region: str = "region_0",
    run: str = "run",
    num_examples: int = 10,
    parameters: int = 13,
    **fields: Any,
) -> bytes:
    """A partial as the aggregator of `region` publishes it; all its parameters are `value`."""
    vector = np.full(parameters, value, np.float32)
    meta = PartialMeta(
        **{
            "run": run,
            "round": round,
            "region": region,
            "digest": digest_of(vector),
            "num_clients": 1,
            "num_examples": num_examples,
            "members": {"c": num_examples},
            "metrics": ClientMetrics(train_loss=value),
            **fields,
        }
    )
    return encode(meta, TensorTable((("weight", (parameters,)),)), vector)


def publish_partial(peer: Peer, payload: bytes, region: str = "region_0") -> None:
    peer.publish(f"fl/partial/{region}", payload, retain=True)


class PlayedFlower(Grid):
    """Flower's Grid without a SuperLink: messages to known nodes wait for the test's replies."""

    def __init__(self, *nodes: int) -> None:
        self.nodes = set(nodes)
        self.pushed: list[Message] = []
        self.pulls: list[str] = []
        self.on_push: Callable[[Message], None] = lambda message: None
        self._replies: dict[str, Message] = {}
        # A message takes its sender from the process that Flower starts for a ServerApp.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1

    def reply(self, message: Message, content: RecordDict | Error) -> None:
        """Answer as a node does, or with an error as the SuperLink does."""
        self._replies[message.metadata.message_id] = Message(content, reply_to=message)

    def get_node_ids(self) -> list[int]:
        return sorted(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            known = message.metadata.dst_node_id in self.nodes
            ids.append(uuid.uuid4().hex if known else "")
            if known:
                message.metadata.__dict__["_message_id"] = ids[-1]
                self.pushed.append(message)
                self.on_push(message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.pulls += (ids := list(message_ids))
        return [self._replies.pop(i) for i in ids if i in self._replies]

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: Any = None) -> Any:
        raise NotImplementedError


class PlayedFog:
    """The MQTT side of a `FogGrid`: bridges and bells are what the test says."""

    def __init__(self) -> None:
        self.events: queue.Queue[FogEvent] = queue.Queue()
        self.cues: list[tuple[str, int]] = []

    def cue(self, run: str, round_: int) -> None:
        self.cues.append((run, round_))

    def bridge(
        self,
        region: str,
        node_id: int | None,
        boot: int = 1,
        session: int = 1,
        online: bool = True,
    ) -> None:
        bridge = Bridge(online=False, boot=boot)
        if online:
            bridge = Bridge(online=True, boot=boot, node_id=node_id, session=session)
        self.events.put(BridgeSeen(region, bridge))

    def bell(self, region: str, message: Message) -> None:
        self.events.put(BellRung(Bell(region=region, message_id=message.metadata.message_id)))


def round_of(
    strategy: Strategy, number: int, model: Vector, trained: Sequence[tuple[Vector, int]]
) -> Vector:
    """The model that a strategy makes of the regions' models and their numbers of examples."""
    flower = PlayedFlower(*range(1, len(trained) + 1))
    asked = list(strategy.configure_train(number, to_record(model), ConfigRecord(), flower))
    flower.push_messages(asked)
    answers = []
    for message, (vector, examples) in zip(asked, trained, strict=True):
        metrics = MetricRecord({"num-examples": examples, "train-loss": 0.5})
        content = RecordDict({"arrays": to_record(vector), "metrics": metrics})
        answers.append(Message(content, reply_to=message))
    answer, _ = strategy.aggregate_train(number, answers)
    assert answer is not None
    return to_vector(answer)
