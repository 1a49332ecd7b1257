"""A whole federation in processes, each behind links of its own, that is hurt by a schedule and
started again as a restart policy would do it."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from chaos.ledger import TOPICS, Happened, Ledger, RunFolder, recovery
from chaos.proxy import Link, Proxy, Sighting
from chaos.schedule import BROKER, FLOWER, SERVER, Fault
from fedfog.cli.broker import LocalBroker, free_port
from fedfog.messages.codec import decode_meta
from fedfog.messages.schemas import ModelMeta
from fedfog.service import die_with, spawn

TESTS = Path(__file__).parents[1]
START_SECONDS, END_SECONDS, STOP_SECONDS = 120.0, 180.0, 20.0
RESTART_SECONDS = 0.5
COPY_SECONDS = 20.0  # between copies of the broker's memory
SAY_SECONDS = 10.0
# What a run may end with if too many regions were hurt for too long: it says so, and is resumed.
_SAID = ("ROUND_TIMEOUT", "REGIONS_TIMEOUT")
_SIGNALS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "stop": signal.SIGSTOP}


class Nursery:
    """Forks clients, see `chaos.nursery`."""

    def __init__(self, env: dict[str, str], log: Path) -> None:
        parent = os.getpid()
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "chaos.nursery"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env={**os.environ, **env},
                start_new_session=True,
                preexec_fn=lambda: die_with(parent),
            )
        self.codes: dict[int, int] = {}
        self._born: list[int] = []
        self._changed = threading.Condition()
        threading.Thread(target=self._listen, name="nursery", daemon=True).start()
        self._next()

    def fork(self, log: Path, env: dict[str, str]) -> int:
        """Start a client; returns its process id."""
        assert self._process.stdin is not None
        line = json.dumps({"log": str(log), "env": env}) + "\n"
        self._process.stdin.write(line.encode())
        self._process.stdin.flush()
        return self._next()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _next(self) -> int:
        with self._changed:
            if not self._changed.wait_for(lambda: bool(self._born), 60):
                raise TimeoutError("the nursery forks no client; see nursery.log")
            return self._born.pop(0)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            pid, code = json.loads(line)
            with self._changed:
                if code is None:
                    self.codes.pop(pid, None)  # of a former process with this id
                    self._born.append(pid)
                else:
                    self.codes[pid] = code
                self._changed.notify_all()


@dataclass
class Service:
    """A service and its present process."""

    name: str
    start: Callable[[], tuple[int, Callable[[], int | None]]]
    pid: int = 0
    poll: Callable[[], int | None] = lambda: 0
    up: bool = False  # it was started and its end was not noticed yet
    start_at: float = 0.0
    ends: list[int] = field(default_factory=list)  # exit codes that are expected now
    stop_by: float | None = None


@dataclass
class _Open:
    """A fault that is to be healed."""

    fault: Fault
    began: float
    heal_at: float
    heal: Callable[[], None]


class Federation:
    """8 clients in 2 regions by default; all numbers are small so that rounds are short.

    Args:
        folder: takes logs, run folders and the broker's state.
        patches: `TEST_PATCHES` of all services, see `tests/hooks/sitecustomize.py`.
        parent: an aggregator over the first two regions; only it and the regions that are not
            below it have a bridge.
        settings: of all services, over the suite's own.
        say: told each thing that happens, in a line.
    """

    def __init__(
        self,
        folder: Path,
        regions: int = 2,
        clients: int = 4,
        patches: str = "",
        parent: str = "",
        say: Callable[[str], None] = lambda _line: None,
        **settings: object,
    ) -> None:
        self.folder, self._say = folder, say
        (folder / "logs").mkdir(parents=True)
        self._private = Path(tempfile.mkdtemp(prefix="chaos-"))
        self.proxy = Proxy()
        self.broker = LocalBroker(folder / "broker", "mosquitto", persistence=True)
        self._flower_port = free_port()
        path = [str(TESTS), *([str(TESTS / "hooks")] if patches else [])]
        if inherited := os.environ.get("PYTHONPATH"):
            path.append(inherited)
        self.regions = [f"region_{i}" for i in range(regions)]
        children = self.regions[:2] if parent else []
        top = [parent, *self.regions[2:]] if parent else self.regions
        self._base = {
            "MQTT_BROKER": "127.0.0.1",
            "REGIONS": ",".join(self.regions),
            "TASK": "chaos.task:Tiny",
            "ROUNDS": 25,
            "ROUND_DEADLINE": 5,
            "ROUND_TIMEOUT": 60,
            "BRIDGE_GRACE": 8,
            "LOG_FORMAT": "json",
            "LOG_LEVEL": "debug",
            "OMP_NUM_THREADS": 1,
            "PYTHONPATH": os.pathsep.join(path),
            "TEST_PATCHES": patches,
            "TMPDIR": self._private,
            "no_proxy": "127.0.0.1,localhost",
            "NO_PROXY": "127.0.0.1,localhost",
        } | settings
        self.links: dict[str, Link] = {}
        self.services: dict[str, Service] = {}
        self._nursery = Nursery(self._env("nursery"), folder / "logs" / "nursery.log")
        self._add(
            SERVER,
            "fedfog_central_server.main",
            RUNS_DIR=folder / "runs",
            FLOWER_PORT=self._flower_port,
            EXIT_WHEN_FINISHED="true",
            REGIONS=",".join(top),
        )
        for region in self.regions:
            above = parent if region in children else ""
            name = f"{region}-aggregator"
            self._add(name, "fedfog_aggregator.main", REGION=region, PARENT_REGION=above)
            if not above:
                self._add_bridge(region)
            for number in range(clients):
                client = f"c{self.regions.index(region) * clients + number}"
                self._add(f"{region}-{client}", None, REGION=region, CLIENT_ID=client)
        if parent:
            self._add(
                f"{parent}-aggregator",
                "fedfog_aggregator.main",
                REGION=parent,
                CHILD_REGIONS=",".join(children),
                ROUND_DEADLINE=2 * float(str(self._base["ROUND_DEADLINE"])),
            )
            self._add_bridge(parent)
        self.services[BROKER] = Service(BROKER, self._start_broker)
        self.targets = list(self.services)
        self.happened: list[Happened] = []
        self.failures: list[str] = []
        self.finished = 0
        self._open: list[_Open] = []
        self._saved = folder / "broker" / "mosquitto.db"
        self._older = self._saved.with_name("older.db")
        self._copy_at = self._say_at = 0.0
        self._began = time.monotonic()

    # Processes

    def _add(self, name: str, module: str | None, **settings: object) -> None:
        self.links[name] = link = self.proxy.link(name, ("127.0.0.1", self.broker.port))
        env, log = self._env(name, MQTT_PORT=link.port, **settings), self.log_of(name)

        def start() -> tuple[int, Callable[[], int | None]]:
            if module is None:
                pid = self._nursery.fork(log, env)
                return pid, lambda: self._nursery.codes.get(pid)
            process = spawn([sys.executable, "-m", module], env, log)
            return process.pid, process.poll

        self.services[name] = Service(name, start)

    def _add_bridge(self, region: str) -> None:
        name = f"{region}-bridge"
        flower = self.proxy.link(name, ("127.0.0.1", self._flower_port), mqtt=False)
        self.links[name + FLOWER] = flower
        address = f"127.0.0.1:{flower.port}"
        self._add(name, "fedfog_bridge.main", REGION=region, FLOWER_SERVER=address)

    def _start_broker(self) -> tuple[int, Callable[[], int | None]]:
        process = self.broker.start().process
        assert process is not None
        return process.pid, process.poll

    def _env(self, name: str, **settings: object) -> dict[str, str]:
        home = self.folder / "state" / name
        home.mkdir(parents=True)
        env = self._base | {"STATE_DIR": home, "HEALTH_FILE": home / "health"} | settings
        return {key: str(value) for key, value in env.items()}

    def log_of(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def start(self) -> None:
        """Start all services; returns when each region has closed a round.

        Raises TimeoutError.
        """
        self._start(self.services[BROKER])
        for service in self.services.values():
            if service.name != BROKER:
                self._start(service)
        self.until(lambda: self.closed_regions() == set(self.regions), START_SECONDS, "round 1")

    def closed_regions(self) -> set[str]:
        """Regions that have published a partial."""
        topics = {s.topic for s in self.proxy.log if s.up and s.topic.startswith(TOPICS.partial)}
        return {topic.rpartition("/")[2] for topic in topics} & set(self.regions)

    def until(self, condition: Callable[[], object], limit: float, what: str) -> None:
        """Keep the federation going until `condition`. Raises TimeoutError."""
        deadline = time.monotonic() + limit
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {limit:.0f} s: {what} (see {self.folder})")
            self.tick()
            time.sleep(0.02)

    def _start(self, service: Service) -> None:
        service.pid, service.poll = service.start()
        service.up, service.ends, service.stop_by = True, [], None

    def tick(self) -> None:
        """Heal what is due, and start again what has ended."""
        now = time.monotonic()
        for wound in [w for w in self._open if now >= w.heal_at]:
            self._heal(wound)
        if now >= self._copy_at and self._saved.exists():
            self._copy_at = now + COPY_SECONDS
            shutil.copy(self._saved, self._older)
        if now >= self._say_at:
            self._say_at = now + SAY_SECONDS
            self.say(self._progress())
        for service in self.services.values():
            if service.up:
                code = service.poll()
                if code is not None:
                    self._ended(service, code, now)
                elif service.stop_by is not None and now > service.stop_by:
                    self.failures.append(f"{service.name} does not stop within {STOP_SECONDS} s")
                    service.stop_by = None
                    service.ends.append(-signal.SIGKILL)
                    os.kill(service.pid, signal.SIGKILL)
            elif now >= service.start_at:
                self._start(service)

    def _progress(self) -> str:
        topic = TOPICS.global_model
        newest = next((s for s in reversed(self.proxy.log) if s.up and s.topic == topic), None)
        at = "no model yet"
        if newest:
            model = decode_meta(newest.payload, ModelMeta)
            at = f"run {model.run}, round {model.round} of {model.rounds}"
        return f"[{at}; {self.finished} runs completed, {len(self.happened)} faults healed]"

    def _ended(self, service: Service, code: int, now: float) -> None:
        service.up, service.stop_by = False, None
        if code in service.ends:
            return  # the fault says when it is started again
        service.start_at = now + RESTART_SECONDS
        summary = self._summary() if service.name == SERVER else {}
        if summary.get("status") == "completed" and code == 0:
            self.finished += 1
            service.start_at = now
            self.say(f"run {summary['run']} is completed")
        elif code == 1 and any(name in str(summary.get("error")) for name in _SAID):
            self.say(f"the run ended: {summary['error']}")
        else:
            self.failures.append(f"{service.name} ended with exit code {code}")
            self.say(self.failures[-1])

    def _summary(self) -> dict[str, Any]:
        path = self.folder / "runs" / "latest" / "summary.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def say(self, line: str) -> None:
        self._say(f"{time.monotonic() - self._began:6.1f} s  {line}")

    # Faults

    def inject(self, fault: Fault) -> None:
        """Begin a fault; `tick` heals it. One on a process that is down already is left out."""
        now = time.monotonic()
        heal = self._hurt(fault)
        if heal is None:
            return
        self.say(f"{fault.kind} {fault.target} {fault.seconds:g} s")
        self._open.append(_Open(fault, now, now + fault.seconds, heal))

    def when(self, seen: Callable[[Sighting], bool], *faults: Fault) -> threading.Event:
        """Begin faults at the first message that is `seen`, before it goes on."""
        done = threading.Event()

        def look(sighting: Sighting) -> None:
            if not done.is_set() and seen(sighting):
                done.set()
                for fault in faults:
                    self.inject(fault)

        self.proxy.on_publish = look
        return done

    def _hurt(self, fault: Fault) -> Callable[[], None] | None:
        kind, _, what = fault.kind.partition("-")
        if kind in _SIGNALS:
            if what in ("superlink", "serverapp"):
                return self._hurt_child(what, _SIGNALS[kind])
            return self._hurt_process(self.services[fault.target], kind, what, fault)
        link = self.links[fault.target]
        link.fault(fault.kind, fault.seconds, fault.amount)
        return lambda: None

    def _hurt_process(
        self, service: Service, kind: str, what: str, fault: Fault
    ) -> Callable[[], None] | None:
        if not service.up:
            return None
        pid = service.pid
        if kind == "stop":
            os.kill(pid, signal.SIGSTOP)
            return lambda: self._signal(pid, signal.SIGCONT)
        service.start_at = time.monotonic() + fault.seconds
        if kind == "kill":
            service.ends = [*service.ends, -signal.SIGKILL]
            os.kill(pid, signal.SIGKILL)
        else:
            # The latter, if it has not got so far as to handle the signal.
            service.ends = [*service.ends, 0, -signal.SIGTERM]
            service.stop_by = time.monotonic() + STOP_SECONDS + 6  # it may be frozen, too
            os.kill(pid, signal.SIGTERM)
        if service.name == BROKER and what:
            self._change_memory(what, service)
        if fault.damage:
            self._damage_checkpoint(service)
        return lambda: None

    def _hurt_child(self, what: str, number: int) -> Callable[[], None] | None:
        module = {"superlink": "fedfog.flower.superlink", "serverapp": "flwr-serverapp"}[what]
        found: list[int] = []
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.services[SERVER].pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if module in " ".join(child.cmdline()):
                        found.append(child.pid)
        for pid in found:
            self._signal(pid, number)

        def go_on() -> None:
            for pid in found:
                self._signal(pid, signal.SIGCONT)

        return go_on if found else None

    def _change_memory(self, what: str, broker: Service) -> None:
        """The broker comes back `empty`, or with what it had saved before: an `old` copy."""
        self._wait_dead(broker)
        if what == "empty":
            self._saved.unlink(missing_ok=True)
        elif self._older.exists():
            shutil.copy(self._older, self._saved)

    def _damage_checkpoint(self, server: Service) -> None:
        self._wait_dead(server)
        folder = self.folder / "runs" / "latest" / "checkpoints"
        files = sorted(folder.glob("round-*.safetensors"))
        if len(files) > 1:
            os.truncate(files[-1], files[-1].stat().st_size - 5)
            self.say(f"damaged {files[-1].name}")

    @staticmethod
    def _wait_dead(service: Service) -> None:
        deadline = time.monotonic() + 10
        while service.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)

    @staticmethod
    def _signal(pid: int, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    def _heal(self, wound: _Open) -> None:
        self._open.remove(wound)
        wound.heal()
        fault = wound.fault
        self.happened.append(Happened(fault.kind, fault.target, wound.began, time.monotonic()))

    # The whole

    def torment(self, faults: Sequence[Fault], seconds: float, finish: bool = True) -> None:
        """Carry out a schedule, heal all, and have the present run end, or not. Raises
        TimeoutError."""
        began = time.monotonic()
        for fault in faults:
            self.pass_time(began + fault.at)
            self.inject(fault)
        self.pass_time(began + seconds)
        if finish:
            self.finish()

    def pass_time(self, until: float) -> None:
        self.until(lambda: time.monotonic() >= until, math.inf, "time passes")

    def finish(self) -> None:
        """Heal all, and have the present run end. Raises TimeoutError."""
        for wound in list(self._open):
            self._heal(wound)
        for link in self.links.values():
            link.heal()
        runs = self.finished
        self.say("all healed; the present run is to end")
        self.until(lambda: self.finished > runs, END_SECONDS, "the run ends")

    def stop(self) -> None:
        """Stop all services, as a restart policy that is switched off."""
        for service in [s for s in self.services.values() if s.up and s.name != BROKER]:
            self._signal(service.pid, signal.SIGCONT)
            self._signal(service.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        for service in self.services.values():
            while service.up and service.name != BROKER and service.poll() is None:
                if time.monotonic() > deadline:
                    self.failures.append(f"{service.name} does not stop")
                    self._signal(service.pid, signal.SIGKILL)
                    break
                time.sleep(0.02)

    def close(self) -> None:
        """End whatever is left."""
        for service in self.services.values():
            if service.up and service.poll() is None:
                self._signal(service.pid, signal.SIGKILL)
        self.broker.stop()
        self._nursery.close()
        self.proxy.close()
        shutil.rmtree(self._private, ignore_errors=True)

    def ledger(self) -> Ledger:
        folders = sorted(
            path.parent
            for path in (self.folder / "runs").glob("*/settings.json")
            if not path.parent.is_symlink()
        )
        runs = [RunFolder.read(folder) for folder in folders]
        return Ledger(self.proxy.log, runs, self.happened)

    def report(self) -> dict[str, Any]:
        """All that is to be said of the run, as JSON."""
        ledger = self.ledger()
        kinds: dict[str, int] = {}
        for fault in self.happened:
            kinds[fault.kind] = kinds.get(fault.kind, 0) + 1
        waits, pauses = recovery(self.proxy.log, self.happened)
        return {
            "figures": ledger.figures | {"faults": len(self.happened)},
            "faults": dict(sorted(kinds.items())),
            "recovery_s": _spread(waits),
            "pause_s": _spread(pauses),
            "breaches": [str(breach) for breach in ledger.breaches],
            "failures": self.failures,
        }


def _spread(seconds: dict[str, list[float]]) -> dict[str, dict[str, object]]:
    return {
        kind: {"n": len(s), "median": median(s), "max": max(s), "each": s}
        for kind, s in sorted(seconds.items())
    }
