"""A central server that stands: runs are begun, stopped and resumed by commands, and what hangs is
noticed. Real broker, SuperLink and bridge; clients and aggregator are played."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from centre import Centre, Region, assert_gone, descendants, expected, lines
from conftest import LIMIT, REPOSITORY, Service
from fedfog.cli.broker import LocalBroker
from fedfog.messages.codec import TensorMessage, decode
from fedfog.messages.schemas import Hyperparameters, ModelMeta

HOOKS = {"pythonpath": REPOSITORY / "tests" / "hooks", "test_patches": "limits:short"}


class ManyRuns(Region):
    """A region that remembers the models of all runs, and like a real one ignores a run that began
    before the one it knows."""

    def __init__(self, port: int, allowed: int) -> None:
        self.of_run: dict[tuple[str, int], TensorMessage[ModelMeta]] = {}
        self.ignored: list[str] = []
        self._newest = 0
        super().__init__(port, allowed=allowed)

    def _on_message(self, client: Any, data: Any, message: Any) -> None:
        model = decode(bytes(message.payload), ModelMeta)
        if model.meta.run_started < self._newest:
            self.ignored.append(model.meta.run)
            return
        self._newest = model.meta.run_started
        self.of_run[model.meta.run, model.meta.round] = model
        super()._on_message(client, data, message)

    def model_of(self, run: str, round: int) -> TensorMessage[ModelMeta]:
        self.wait_for(lambda _topic, _payload: (run, round) in self.of_run, LIMIT)
        return self.of_run[run, round]


class Stack:
    """Server, bridge and region of a test, and `fedfog` on them."""

    def __init__(self, centre: Centre, region: ManyRuns) -> None:
        self.centre, self.region = centre, region
        centre.bridge()

    def fedfog(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "fedfog.cli.main", *arguments, "--runs-dir", self.centre.runs],
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )

    def ok(self, *arguments: str) -> str:
        done = self.fedfog(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def runs(self) -> dict[str, list[str]]:
        """The words of each line that `fedfog runs` shows, by the run's name."""
        rows = [line.split() for line in self.ok("runs").splitlines()]
        return {row[0]: row[1:] for row in rows if len(row) > 4 and row[0] != "run"}


@pytest.fixture
def stack(
    services: Callable[..., Service], broker: LocalBroker, tmp_path: Path
) -> Iterator[Callable[..., Stack]]:
    regions: list[ManyRuns] = []

    def make(allowed: int, **settings: Any) -> Stack:
        defaults = {"exit_when_finished": False, "rounds": 2}
        regions.append(ManyRuns(broker.port, allowed))
        centre = Centre(services, broker, tmp_path, **(defaults | settings))
        return Stack(centre, regions[-1])

    yield make
    for region in regions:
        region.close()


def test_a_second_run_with_other_settings_follows_on_the_same_processes(
    stack: Callable[..., Stack],
) -> None:
    here = stack(allowed=9)
    server = here.centre.start()
    server.wait_for_log("run_completed", LIMIT)
    [first] = here.runs()
    [superlink] = psutil.Process(server.process.pid).children()

    options = ["--rounds", "3", "--seed", "7", "--local-epochs", "2", "--batch-size", "8"]
    options += ["--learning-rate", "0.01", "--strategy", "FedAvgM", "--name", "second"]
    options += ["--set", "optimizer=sgd", "--set", "PARTITION=dirichlet:0.3"]
    said = here.ok("run", *options, "--follow")
    assert "Run second begun" in said
    assert "Run second completed, 3 of 3 rounds done, accuracy" in said

    assert superlink.is_running()
    model = here.region.model_of("second", 3)
    start = here.region.model_of("second", 0)
    assert start.meta.hyperparameters == Hyperparameters(
        local_epochs=2,
        batch_size=8,
        learning_rate=0.01,
        seed=7,
        optimizer="sgd",
        partition="dirichlet:0.3",
    )
    assert start.meta.run_started > here.region.model_of(first, 2).meta.run_started
    assert start.vector.tobytes() != here.region.model_of(first, 0).vector.tobytes()
    # FedAvgM without momentum and with server learning rate 1 is FedAvg, but for rounding.
    wanted = here.region.model_of("second", 0).vector + 6
    assert abs(model.vector - wanted).max() < 1e-4
    summary = here.centre.read("summary.json")
    assert (summary["run"], summary["strategy"], summary["seed"]) == ("second", "FedAvgM", 7)
    assert summary["clients"] == [2, 2, 2]
    assert here.runs()[first][:4] == ["completed", "2", "of", "2"]
    assert here.runs()["second"][:4] == ["completed", "3", "of", "3"]
    assert server.stop() == 0
    # The list needs no server; the other commands say what they need.
    assert here.runs()["second"][0] == "completed"
    refused = here.fedfog("run")
    assert refused.returncode == 1
    assert "No central server answers" in refused.stderr
    assert "docker compose exec" in refused.stderr


def test_a_run_is_refused_while_another_one_is_in_progress(stack: Callable[..., Stack]) -> None:
    here = stack(allowed=1, run_id="first")
    here.centre.start()
    here.region.model_of("first", 1)
    for command in (["run"], ["resume", "first"]):
        refused = here.fedfog(*command)
        assert refused.returncode == 1
        assert "Run first is in progress (1 of 2 rounds done)" in refused.stderr
        assert "fedfog stop" in refused.stderr
    assert here.runs()["first"][:4] == ["running", "1", "of", "2"]
    assert list(here.runs()) == ["first"]
    wrong = here.fedfog("stop", "other")
    assert wrong.returncode == 1
    assert "first is" in wrong.stderr
    here.region.allow(2)
    assert here.region.model_of("first", 2).meta.state == "finished"


def test_a_run_stopped_in_an_open_round_goes_on_when_resumed(stack: Callable[..., Stack]) -> None:
    here = stack(allowed=1, run_id="mine", rounds=3)
    server = here.centre.start()
    here.region.model_of("mine", 1)
    server_app = psutil.Process(lines(server, "serverapp_ready")[-1]["pid"])
    assert "Run mine stopped, 1 of 3 rounds done" in here.ok("stop")
    assert_gone([server_app])
    assert here.centre.read("summary.json")["status"] == "stopped"
    assert here.fedfog("stop").returncode == 1
    # The region closes its round; nobody asks for it.
    here.region.allow(3)
    assert server.stop() == 0

    again = here.centre.start()
    standing = again.wait_for_log("standing_by", LIMIT)
    assert "fedfog resume mine" in standing
    assert not lines(again, "run_resumed")
    assert here.runs()["mine"][:4] == ["stopped", "1", "of", "3"]
    said = here.ok("resume", "mine", "--follow")
    assert "Run mine completed, 3 of 3" in said
    final = here.region.model_of("mine", 3)
    assert final.vector.tobytes() == expected(here.region.of_run["mine", 0], 3)
    assert {run for run, _ in here.region.of_run} == {"mine"}
    assert here.centre.read("history.json")["rewinds"] == []


def test_a_run_resumed_after_another_one_is_new_for_the_regions(
    stack: Callable[..., Stack],
) -> None:
    """They have forgotten its open round, and ignore what began before the run that they know."""
    here = stack(allowed=1, run_id="older", rounds=3, strategy="FedAdam")
    server = here.centre.start()
    here.region.model_of("older", 1)
    here.ok("stop")
    here.region.allow(9)
    here.ok("run", "--name", "between", "--rounds", "1", "--strategy", "FedAvg", "--follow")
    assert here.region.model_of("between", 1).vector.tobytes() == expected(
        here.region.of_run["between", 0], 1
    )
    here.ok("resume", "older", "--follow")
    # From the same model, under a new id, and with the moments of the strategy.
    back, old = here.region.of_run["older-r1", 1], here.region.of_run["older", 1]
    assert back.vector.tobytes() == old.vector.tobytes()
    assert not here.region.ignored
    [rewind] = here.centre.read("summary.json")["rewinds"]
    assert (rewind["from_round"], rewind["to_round"]) == (1, 1)
    assert (rewind["before"], rewind["after"]) == ("older", "older-r1")
    assert "another run" in rewind["why"]
    assert lines(server, "run_goes_back")
    assert here.centre.read("history.json")["rewinds"] == [rewind]
    assert here.centre.read("summary.json")["rounds"] == 3

    # An undisturbed run gives the same model, to the last bit.
    here.ok("run", "--name", "undisturbed", "--follow")
    final, undisturbed = here.region.of_run["older-r1", 3], here.region.of_run["undisturbed", 3]
    assert final.vector.tobytes() == undisturbed.vector.tobytes()


def test_frozen_flower_processes_hold_up_neither_stop_nor_the_next_run(
    stack: Callable[..., Stack],
) -> None:
    here = stack(allowed=1, run_id="mine", **HOOKS)
    server = here.centre.start()
    here.region.model_of("mine", 1)
    [superlink] = psutil.Process(server.process.pid).children()
    server_app = psutil.Process(lines(server, "serverapp_ready")[-1]["pid"])
    for process in (server_app, superlink):
        process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    here.ok("stop")
    assert time.monotonic() - began < 30.0
    assert_gone([server_app])
    here.region.allow(2)
    assert "completed" in here.ok("resume", "mine", "--follow")
    assert here.region.model_of("mine", 2).vector.tobytes() == expected(
        here.region.of_run["mine", 0], 2
    )


def test_sigterm_ends_the_server_and_its_frozen_processes(stack: Callable[..., Stack]) -> None:
    here = stack(allowed=1, run_id="mine")
    server = here.centre.start()
    here.region.model_of("mine", 1)
    children = descendants(server)
    for process in children:
        process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert server.stop(LIMIT) == 0
    assert time.monotonic() - began < 10.0
    assert_gone(children)


def test_a_server_app_that_is_silent_for_too_long_is_replaced(stack: Callable[..., Stack]) -> None:
    here = stack(allowed=1, run_id="mine", regions_timeout=10, round_timeout=10, **HOOKS)
    server = here.centre.start()
    here.region.model_of("mine", 1)
    server_app = psutil.Process(lines(server, "serverapp_ready")[-1]["pid"])
    server_app.send_signal(signal.SIGSTOP)
    here.region.allow(2)
    server.wait_for_log("run_completed", LIMIT)
    [silent] = lines(server, "flower_silent")
    assert silent["settings"] == "REGIONS_TIMEOUT + ROUND_TIMEOUT"
    assert silent["missing"] == "the checkpoint of round 2"
    assert silent["seconds"] == 21
    assert_gone([server_app])
    assert here.region.model_of("mine", 2).vector.tobytes() == expected(
        here.region.of_run["mine", 0], 2
    )


def test_model_0_waits_for_room_on_the_disk(stack: Callable[..., Stack]) -> None:
    """Its file cannot be written, as on a full disk; the run goes on when it can."""
    here = stack(allowed=9, run_id="mine")
    path = here.centre.runs / "mine" / "checkpoints" / "round-000000.safetensors"
    (obstacle := path.with_name(f".{path.name}.tmp")).mkdir(parents=True)
    server = here.centre.start()
    assert str(path) in server.wait_for_log("checkpoint_not_written", LIMIT)
    assert not here.region.of_run
    obstacle.rmdir()
    server.wait_for_log("run_completed", LIMIT)
    assert here.region.model_of("mine", 2).vector.tobytes() == expected(
        here.region.of_run["mine", 0], 2
    )


def test_a_failed_run_says_why_and_can_be_resumed(stack: Callable[..., Stack]) -> None:
    here = stack(allowed=9, run_id="mine")
    here.centre.start().wait_for_log("run_completed", LIMIT)
    done = here.fedfog("run", "--name", "other", "--strategy", "FedNothing", "--follow")
    assert done.returncode == 1
    assert "STRATEGY='FedNothing'" in done.stdout
    assert here.runs()["other"][0] == "failed"
    assert "Run next completed" in here.ok("run", "--name", "next", "--follow")


def test_only_the_owner_can_reach_the_socket(stack: Callable[..., Stack]) -> None:
    here = stack(allowed=0, run_id="mine")
    here.centre.start().wait_for_log("run_begins", LIMIT)
    here.region.model_of("mine", 0)
    socket = Path((here.centre.runs / ".control").read_text())
    assert len(str(socket)) < 100
    assert socket.parent.stat().st_mode & 0o077 == 0


def test_real_clients_and_aggregator_go_from_run_to_run_and_back(
    services: Callable[..., Service], broker: LocalBroker, tmp_path: Path
) -> None:
    """No update of one run is counted in another: each partial has the members of its own round."""
    centre = Centre(services, broker, tmp_path, rounds=3, run_id="older", exit_when_finished=False)
    here = Stack(centre, ManyRuns(broker.port, allowed=-1))
    services("fedfog_aggregator.main", broker, "aggregator", clients_expected=2)
    a, _ = (services("fedfog_client.main", broker, name, client_id=name) for name in ("a", "b"))
    server = centre.start(local_epochs=40)
    here.region.model_of("older", 1)
    a.process.send_signal(signal.SIGSTOP)  # else the run may be over before the command is there
    here.ok("stop")
    a.process.send_signal(signal.SIGCONT)
    stopped = max(round for run, round in here.region.of_run if run == "older")
    here.ok("run", "--name", "between", "--rounds", "2", "--local-epochs", "1", "--follow")
    assert "Run older completed, 3 of 3" in here.ok("resume", "older", "--follow")
    for name, rounds in (("older", 3), ("between", 2)):
        history = json.loads((centre.runs / name / "history.json").read_text())
        partials = [record["regions"]["region_0"] for record in history["rounds"]]
        assert [partial["round"] for partial in partials] == list(range(1, rounds + 1))
        for partial in partials:
            assert sorted(partial["members"]) == ["a", "b"]
            assert partial["run"].startswith(name)
    back = here.region.of_run["older-r1", stopped]
    assert back.meta.digest == here.region.of_run["older", stopped].meta.digest
    assert back.meta.hyperparameters.local_epochs == 40
    assert server.stop() == 0
    here.region.close()
