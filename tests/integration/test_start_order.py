"""The five parts of a federation, started in every possible order, finish a run.

Each part is started when the one before it is up or waits for what is not there yet. The services
are forked from a process that has loaded their libraries: 120 orders would take an hour otherwise.
"""

import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import pytest

from conftest import LIMIT, REPOSITORY
from fedfog.cli.broker import LocalBroker, free_port, installed_mosquitto

PARTS = {
    "broker": "",
    "server": "fedfog_central_server.main",
    "aggregator": "fedfog_aggregator.main",
    "bridge": "fedfog_bridge.main",
    "client": "fedfog_client.main",
}
UP = ("mqtt_connected", "mqtt_waiting_for_broker", "bridge_waiting", "superlink")


def become(module: str, log: str, env: dict[str, str]) -> None:
    """Turn the forked process into the service."""
    os.setsid()
    os.environ.update(env)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    import_module(module).main()


@pytest.fixture(scope="module")
def forks() -> Iterator[ForkServerContext]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*filter(None, PARTS.values()), "torch", "fedfog.flower.fleet"])
    yield context


class Federation:
    """One client in one region, in a folder of its own."""

    def __init__(self, context: ForkServerContext, folder: Path) -> None:
        self._context, self._folder = context, folder
        folder.mkdir()
        self._broker = LocalBroker(folder / "broker", "mosquitto")
        self._processes: dict[str, ForkServerProcess] = {}
        port = str(free_port())
        self._env = {
            "MQTT_BROKER": self._broker.host,
            "MQTT_PORT": str(self._broker.port),
            "FLOWER_PORT": port,
            "FLOWER_SERVER": f"127.0.0.1:{port}",
            "RUNS_DIR": str(folder / "runs"),
            "RUN_ID": "run",
            "ROUNDS": "1",
            "LOCAL_EPOCHS": "1",
            "DATA_DIR": str(REPOSITORY / "data"),
            "CLIENTS_EXPECTED": "1",
            "CLIENT_ID": "a",
            "EXIT_WHEN_FINISHED": "true",
            "LOG_LEVEL": "debug",
            "LOG_FORMAT": "json",
        }

    def start(self, part: str) -> None:
        if part == "broker":
            self._broker.start()
            return
        log = self._folder / f"{part}.log"
        log.touch()
        env = self._env | {
            "STATE_DIR": str(self._folder / part),
            "HEALTH_FILE": str(self._folder / f"{part}.health"),
        }
        process = self._context.Process(target=become, args=(PARTS[part], str(log), env))
        process.start()
        self._processes[part] = process
        deadline = time.monotonic() + LIMIT
        while not any(sign in log.read_text() for sign in UP):
            assert time.monotonic() < deadline, f"{part} does not come up: {log.read_text()}"
            time.sleep(0.02)

    def outcome(self) -> str:
        """What the run's summary says of its end."""
        server = self._processes["server"]
        server.join(2 * LIMIT)
        summary = self._folder / "runs" / "run" / "summary.json"
        if server.exitcode != 0 or not summary.exists():
            return f"exit code {server.exitcode}: {(self._folder / 'server.log').read_text()}"
        return str(json.loads(summary.read_text())["status"])

    def stop(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.join()
        self._broker.stop()


@pytest.mark.skipif(installed_mosquitto() is None, reason="Mosquitto is not installed")
@pytest.mark.parametrize("first", PARTS)
def test_any_order_finishes(
    first: str, forks: ForkServerContext, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp(first)

    def play(order: tuple[str, ...]) -> str:
        federation = Federation(forks, folder / "-".join(order))
        try:
            for part in order:
                federation.start(part)
            return federation.outcome()
        finally:
            federation.stop()

    orders = [order for order in itertools.permutations(PARTS) if order[0] == first]
    run: Callable[[tuple[str, ...]], str] = play
    with ThreadPoolExecutor(2) as two_at_a_time:
        outcomes = dict(zip(orders, two_at_a_time.map(run, orders), strict=True))
    assert len(outcomes) == 24
    assert {" ".join(o): end for o, end in outcomes.items() if end != "completed"} == {}
