"""What goes wrong when: drawn from a seed, printed, and replayed from the seed or from the file."""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

FLOWER = ":flower"  # suffix of a bridge's link to the SuperLink
BROKER, SERVER = "broker", "server"
CALM_SECONDS = 6.0  # at the end
GAP_SECONDS = (0.5, 4.5)  # from one fault to the next: 40 in 120 s, and several at once
LASTS_SECONDS = (0.3, 6.0)
# One by one: how long each lasts, and the time to the next; nothing but the keep-alive (15 s) tells
# of a half-open connection.
ALONE_SECONDS, ALONE_GAP, HALF_OPEN_GAP = 2.0, 9.0, 30.0

_PROCESS = {"kill": 4, "stop": 2, "terminate": 2}
_NETWORK = {
    "cut": 2,
    "close": 1,
    "freeze": 2,
    "half-open": 1,
    "refuse": 1,
    "delay": 1,
    "throttle": 1,
}
_MQTT = _NETWORK | {"duplicate": 2, "reorder": 2}
_SERVER = {"kill-superlink": 1, "kill-serverapp": 1, "stop-superlink": 1, "stop-serverapp": 1}
_BROKER = {"kill": 2, "kill-empty": 2, "kill-old": 2, "stop": 1}

# Neither heals by our doing: the parties have to notice it.
INSTANT = frozenset({"cut", "close", "half-open", "duplicate", "reorder"})


@dataclass(frozen=True)
class Fault:
    """`at`, `seconds`: of the schedule. Killed and terminated processes are started again after
    `seconds`. `damage`: the newest checkpoint is damaged meanwhile."""

    at: float
    kind: str
    target: str
    seconds: float = 0.0
    amount: float = 0.0
    damage: bool = False

    def __str__(self) -> str:
        amount = f" ({self.amount:g})" if self.amount else ""
        damage = ", newest checkpoint damaged" if self.damage else ""
        return f"{self.at:6.1f} s  {self.kind}{amount} {self.target}, {self.seconds:.1f} s{damage}"


def draw(seed: int, seconds: float, targets: Sequence[str]) -> list[Fault]:
    """Faults of `seconds`; `targets` are the services, among them `broker` and `server`."""
    chance = random.Random(seed)
    bridges = [name for name in targets if name.endswith("-bridge")]
    weights = [
        5 if name in (BROKER, SERVER) else 1 if role(name) == "client" else 4 for name in targets
    ]
    faults, at = [], chance.uniform(*GAP_SECONDS)
    while at < seconds - CALM_SECONDS:
        target = chance.choices(targets, weights)[0]
        if target in bridges and chance.random() < 0.3:
            target += FLOWER
        kinds = _kinds(target)
        kind = chance.choices(list(kinds), list(kinds.values()))[0]
        lasts = round(chance.uniform(*LASTS_SECONDS), 2)
        amount = _amount(chance, kind)
        damage = target == SERVER and kind == "kill" and chance.random() < 0.4
        lasts = 0.0 if kind in INSTANT else lasts
        faults.append(Fault(round(at, 2), kind, target, lasts, amount, damage))
        at += chance.uniform(*GAP_SECONDS)
    return faults


def one_by_one(seed: int, targets: Sequence[str]) -> list[Fault]:
    """Each kind of fault on each kind of service once, so far apart that each is over before the
    next one begins: for recovery times."""
    chance = random.Random(seed)
    names = [*targets, *(name + FLOWER for name in targets if name.endswith("-bridge"))]
    chosen = {role(name): name for name in chance.sample(names, len(names))}
    cases = [(target, kind) for target in chosen.values() for kind in _kinds(target)]
    faults, at = [], 1.0
    for target, kind in chance.sample(cases, len(cases)):
        lasts = 0.0 if kind in INSTANT else ALONE_SECONDS
        faults.append(Fault(round(at, 2), kind, target, lasts, _amount(chance, kind)))
        at += lasts + (HALF_OPEN_GAP if kind == "half-open" else ALONE_GAP)
    return faults


def _kinds(target: str) -> dict[str, int]:
    if target == BROKER:
        return _BROKER
    if target.endswith(FLOWER):
        return _NETWORK
    return _PROCESS | _MQTT | (_SERVER if target == SERVER else {})


def _amount(chance: random.Random, kind: str) -> float:
    match kind:
        case "delay":
            return round(chance.uniform(0.05, 0.8), 2)
        case "throttle":
            return chance.choice([500.0, 2_000.0, 10_000.0])
        case "duplicate" | "reorder":
            return float(chance.randint(1, 12))
    return 0.0


def role(target: str) -> str:
    """`client`, `aggregator`, `bridge`, `bridge:flower`, `server` or `broker`."""
    last = target.rpartition("-")[2]
    return "client" if last.startswith("c") else last


def save(faults: Sequence[Fault], path: Path) -> None:
    path.write_text(json.dumps([asdict(fault) for fault in faults], indent=1) + "\n")


def load(path: Path) -> list[Fault]:
    return [Fault(**fields) for fields in json.loads(path.read_text())]
