"""What a round costs with many clients: `measure` runs a federation whose clients are swarms.

`python -m bench.width CLIENTS REGIONS ROUNDS` prints one measurement.
"""

import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import psutil

from bench.rounds import IDLE, LIMIT_SECONDS, PROGRAMS, ROOT, WARM_UP
from fedfog import logs
from fedfog.cli.federation import SERVER, Ended, Federation, Options
from fedfog.messages.codec import decode_meta
from fedfog.messages.schemas import ModelMeta, PartialMeta
from fedfog.messages.topics import Topics
from fedfog.transport import mqtt


@dataclass(frozen=True)
class Width:
    """Rounds of many clients, training switched off.

    Args:
        gaps_s: from one published model to the next, after the warm-up.
        cpu_s: of all processes of a kind, per round.
        aggregator_pss_mb: of the largest one, between two rounds.
        aggregator_peak_mb: the largest resident set that one of them had.
        clients_say: what the swarms counted: updates sent, sent again, and verdicts.
    """

    clients: int
    regions: int
    gaps_s: list[float]
    cpu_s: dict[str, float]
    aggregator_pss_mb: float
    aggregator_peak_mb: float
    clients_say: dict[str, int]


@dataclass(frozen=True)
class Published:
    """What passed through the broker in a run, counted by a subscriber.

    Args:
        updates: publications on the topics of updates, and how many different ones.
        accepted: members of all partials.
        other_twice: how many other topics had the same payload twice, by the topic's first part.
        update_bytes: payload of one update.
        arrows: messages and payload bytes a round by the topic's first part; a broker hands a
            model out to every client and aggregator.
    """

    updates: int
    different_updates: int
    accepted: int
    other_twice: dict[str, int]
    update_bytes: int
    arrows: dict[str, tuple[float, float]]


def measure(clients: int, regions: int, rounds: int) -> Width:
    """Time `rounds` rounds of `clients` in all, dealt evenly to `regions`.

    Raises:
        RuntimeError: a process ended that should not, or time is up.
    """
    topics = Topics()
    last = WARM_UP + rounds  # the model that ends the last gap; the round after it is not timed
    models_at: list[float] = []
    cpu: list[Counter[str]] = []
    pss = peak = 0.0
    with _federation(clients, regions, last + 1) as federation:
        for _, payload in _messages(federation, [topics.global_model]):
            now = time.monotonic()
            number = decode_meta(payload, ModelMeta).round
            if number != len(models_at):
                continue
            models_at.append(now)
            if number in (WARM_UP, last):
                cpu.append(_cpu())
            if number == last:
                pss, peak = _memory("aggregators")
        counted: Counter[str] = Counter()
        for region in federation.regions:
            log = (federation.logs / f"{region}-clients.log").read_text()
            counted.update(json.loads(log.splitlines()[-1]))
    before, after = cpu
    return Width(
        clients,
        regions,
        [round(float(gap), 5) for gap in np.diff(models_at)[WARM_UP:last]],
        {kind: round((after[kind] - before[kind]) / rounds, 4) for kind in sorted(after)},
        pss,
        peak,
        dict(counted),
    )


def count(clients: int, regions: int, rounds: int) -> Published:
    """Count what passes through the broker, by a subscriber to all of it."""
    topics = Topics()
    seen: Counter[tuple[str, bytes]] = Counter()
    accepted = update_bytes = 0
    messages: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    with _federation(clients, regions, rounds) as federation:
        for topic, payload in _messages(federation, [topics.prefix + "/#"]):
            seen[topic, sha256(payload).digest()] += 1
            arrow = topic.split("/")[1]
            messages[arrow] += 1
            sizes[arrow] += len(payload)
            if topic.startswith(topics.updates):
                update_bytes = len(payload)
            if topic.startswith(topics.partial):
                accepted += len(decode_meta(payload, PartialMeta).members)
    updates = {key: n for key, n in seen.items() if key[0].startswith(topics.updates)}
    twice = Counter(t.split("/")[1] for (t, _), n in (seen - Counter(updates)).items() if n > 1)
    return Published(
        sum(updates.values()),
        len(updates),
        accepted,
        dict(twice),
        update_bytes,
        {a: (round(n / rounds, 2), round(sizes[a] / rounds, 1)) for a, n in messages.items()},
    )


@contextmanager
def _federation(clients: int, regions: int, rounds: int) -> Iterator[Federation]:
    with tempfile.TemporaryDirectory(prefix="fedfog-bench-") as name:
        folder = Path(name)
        options = Options(
            clients=clients // regions,
            rounds=rounds,
            regions=regions,
            seed=1,
            local_epochs=1,
            task=IDLE,
            broker=None,
            runs_dir=folder / "runs",
            data_dir=ROOT / "data",
            time_limit=LIMIT_SECONDS,
            client_module="bench.swarm",
        )
        federation = Federation(options, "width", folder)
        try:
            federation.start()
            yield federation
        finally:
            federation.stop()


def _messages(federation: Federation, filters: list[str]) -> Iterator[tuple[str, bytes]]:
    """What is published, until the end of the run and of all its clients."""
    broker = federation.broker
    session = mqtt.Session("fedfog-bench", broker.host, broker.port, filters)
    session.start()
    federation.watch(session.events.put)
    running = {SERVER, *(f"{region}-clients" for region in federation.regions)}
    deadline = time.monotonic() + LIMIT_SECONDS
    while running:
        if time.monotonic() > deadline:
            raise RuntimeError(f"no end after {LIMIT_SECONDS} s")
        match session.next(1.0):
            case Ended(name, log, code) as ended:
                if code or name not in running:
                    raise RuntimeError(f"{ended}: {log.read_text()[-2000:]}")
                running.remove(name)
            case mqtt.Received(topic, payload) if payload:
                yield topic, payload
    session.stop()


def _processes() -> Iterator[tuple[str, psutil.Process]]:
    """All descendants of this process, and what kind each is."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            command = " ".join(process.cmdline())
            yield next((PROGRAMS[part] for part in PROGRAMS if part in command), "other"), process


def _cpu() -> Counter[str]:
    """CPU seconds so far, by kind of process."""
    seconds: Counter[str] = Counter()
    for kind, process in _processes():
        used = process.cpu_times()
        seconds[kind] += used.user + used.system
    return seconds


def _memory(kind: str) -> tuple[float, float]:
    """MB of the largest process of a kind: its proportional set, and its largest resident set."""
    pss, peak = [], []
    for found, process in _processes():
        if found == kind:
            pss.append(process.memory_full_info().pss / 1e6)
            status = Path(f"/proc/{process.pid}/status").read_text()
            [high] = re.findall(r"VmHWM:\s+(\d+) kB", status)
            peak.append(int(high) * 1024 / 1e6)
    return round(max(pss), 1), round(max(peak), 1)


def main(clients: int, regions: int, rounds: int) -> None:
    logs.configure("bench", "error")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")]))
    width = measure(clients, regions, rounds)
    median, p95 = np.percentile(width.gaps_s, [50, 95])
    print(json.dumps({**asdict(width), "median_s": round(median, 4), "p95_s": round(p95, 4)}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
