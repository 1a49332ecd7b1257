"""`python -m bench.robustness --minutes N`: the rules of `fedfog.core.robust` against poisoned
updates, in one process, without a network.

15 clients share 450 beats of ECG5000 and train for 20 rounds, one epoch of batches of 32; all
clients of a round are trained at once. Which of them are attackers is drawn at random for each seed
and skew, and SEEDS were fixed, with everything else here, before any of them was run. A cell is one
run: optimiser, skew, share of attackers, rule, attack and seed. Those that
bench/results/robustness.json has are not run again, so N minutes may be given as often as one
likes. Each goes into docs/robustness.md at once; `--write` puts them there without a run.
"""

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, fmean
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F  # noqa: N812  (PyTorch's own abbreviation)

from bench import page
from fedfog.core.aggregation import WeightedSum, all_finite
from fedfog.core.robust import Rule, Updates
from fedfog.files import write_atomically
from fedfog.ml.ecg5000 import Ecg5000
from fedfog.ml.evaluation import evaluate
from fedfog.ml.training import load_arrays

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "robustness.json"
PAGE = ROOT / "docs" / "robustness.md"

CLIENTS, BEATS, ROUNDS, BATCH = 15, 450, 20, 32
SEEDS = (101, 102, 103)
MORE_SEEDS = tuple(range(104, 111))  # for what the recommended rule costs without an attack
PLACEMENT = 1000  # from here on, streams of random numbers of their own
DRAWS = 3  # of the attackers, for the recommended rule where they matter; all else is of the first
RECOMMENDED = "geometric_median"
RULES = ("fedavg", *get_args(Rule))
NO_ATTACK = "no attack"
ATTACKS = {
    "sign flip": "the negative of what it should send",
    "scaled": "ten times that",
    "gaussian": "noise, ten times as long as the median update",
    "label flip": "trained on the opposite labels",
    "alie": "mean of the honest - z times their deviation, with the z of Baruch et al. 2019",
    "ipm": "-0.8 times the mean of the honest (inner product, Xie et al. 2020)",
}
# Of the recommended rule and FedAvg, with 20 % attackers.
FURTHER = {
    "claims": "scaled, and it claims 1,000,000 examples",
    "largest": "sign flip, but the attackers are the clients with the most beats",
    "alie 1.5": "alie with z = 1.5",
}
SKEWED = "Dirichlet 0.5"
SKEWS = {"near-IID": 100.0, SKEWED: 0.5}
RATES = {"Adam": 1e-3, "SGD": 0.1}

Vector = NDArray[np.float32]
Stack = NDArray[np.float32]


@dataclass(frozen=True)
class Cell:
    optimizer: str
    skew: str
    percent: int  # attackers
    rule: str
    attack: str
    seed: int
    draw: int = 0

    @property
    def key(self) -> str:
        fields = (self.optimizer, self.skew, self.percent, self.rule, self.attack, self.seed)
        return "/".join(map(str, fields)) + (f"/{self.draw}" if self.draw else "")


def cells() -> Iterator[Cell]:
    """All of them, those that matter most first."""
    first = (RECOMMENDED, "fedavg")
    others = tuple(rule for rule in RULES if rule not in first)
    for draw, optimizer, attack, seed in itertools.product(range(DRAWS), RATES, ATTACKS, SEEDS):
        yield Cell(optimizer, SKEWED, 20, RECOMMENDED, attack, seed, draw)
    for optimizer, skew, rule, seed in itertools.product(RATES, SKEWS, first, MORE_SEEDS):
        yield Cell(optimizer, skew, 0, rule, NO_ATTACK, seed)
    for rules, percent, attacks in (
        (first, 0, (NO_ATTACK,)),
        (first, 20, (*ATTACKS, *FURTHER)),
        (others, 0, (NO_ATTACK,)),
        (others, 20, ATTACKS),
        (first, 40, ATTACKS),
        (others, 40, ATTACKS),
    ):
        for optimizer, skew, rule, attack, seed in itertools.product(
            RATES, SKEWS, rules, attacks, SEEDS
        ):
            yield Cell(optimizer, skew, percent, rule, attack, seed)


class Federation:
    """The clients of one seed and skew, and how they train."""

    def __init__(self, task: Ecg5000, skew: str, seed: int) -> None:
        self._which = [seed, list(SKEWS).index(skew)]
        generator = np.random.default_rng(self._which)
        labels = task.training_labels()
        self.parts = _partition(generator, labels, SKEWS[skew])
        self.examples = [len(part) for part in self.parts]
        self.task, self.seed = task, seed
        self.module = task.build_model(seed)
        data = task.training_data(np.arange(len(labels)))
        self._beats, self._labels = data.tensors[0], data.tensors[1].float()
        self.shapes = {name: p.shape for name, p in sorted(self.module.state_dict().items())}
        state = self.module.state_dict()
        self.start: Vector = np.concatenate([state[name].numpy().ravel() for name in self.shapes])
        self._gradients = vmap(grad(self._loss))

    def attackers(self, percent: int, attack: str, draw: int) -> list[int]:
        """Numbers of the clients that attack; those of 20 % do so at 40 %, too."""
        f = CLIENTS * percent // 100
        if attack == "largest":
            return [*range(CLIENTS - f, CLIENTS)]
        placement = np.random.default_rng([*self._which, PLACEMENT + draw])
        drawn: list[int] = placement.permutation(CLIENTS).tolist()
        return drawn[:f]

    def train(
        self, base: Vector, clients: list[int], flipped: set[int], round: int, optimizer: str
    ) -> Stack:
        """Models of these clients after one epoch from `base`, shape (clients, parameters)."""
        orders = [
            np.random.default_rng([self.seed, round, c]).permutation(self.parts[c]) for c in clients
        ]
        models = torch.from_numpy(np.repeat(base[None], len(clients), axis=0))
        means, squares = torch.zeros_like(models), torch.zeros_like(models)
        signs = torch.tensor([[float(c in flipped)] for c in clients])
        for step in range(math.ceil(max(map(len, orders)) / BATCH)):
            batches = [order[step * BATCH : (step + 1) * BATCH] for order in orders]
            active = torch.tensor([i for i, batch in enumerate(batches) if len(batch)])
            longest = max(map(len, batches))
            index = torch.zeros(len(active), longest, dtype=torch.int64)
            weights = torch.zeros(len(active), longest)
            for row, i in enumerate(active.tolist()):
                length = len(batches[i])
                index[row, :length] = torch.from_numpy(batches[i])
                weights[row, :length] = 1 / length
            targets = (self._labels[index] - signs[active]).abs()
            gradients = self._gradients(models[active], self._beats[index], targets, weights)
            if optimizer == "SGD":
                models[active] -= RATES["SGD"] * gradients
                continue
            means[active] = mean = means[active].lerp_(gradients, 0.1)
            squares[active] = square = squares[active].lerp_(gradients.square(), 0.001)
            root = (square / (1 - 0.999 ** (step + 1))).sqrt_().add_(1e-8)
            rate = RATES["Adam"] / (1 - 0.9 ** (step + 1))
            models[active] = models[active].addcdiv_(mean, root, value=-rate)
        return models.numpy()

    def accuracy(self, model: Vector) -> float:
        """Percent of the 4,500 test beats."""
        load_arrays(self.module, {k: v.numpy() for k, v in self._tensors(model).items()})
        return 100 * evaluate(self.task, self.module, self.task.test_data()).accuracy

    def _tensors(self, model: Vector | Tensor) -> dict[str, Tensor]:
        parts = torch.split(torch.as_tensor(model), [s.numel() for s in self.shapes.values()])
        return {
            name: part.reshape(shape)
            for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)
        }

    def _loss(self, model: Tensor, beats: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        outputs = functional_call(self.module, self._tensors(model), (beats,))
        losses = F.binary_cross_entropy_with_logits(outputs[:, 0], targets, reduction="none")
        return (losses * weights).sum()


def _partition(
    generator: np.random.Generator, labels: NDArray[np.int64], alpha: float
) -> list[NDArray[np.int64]]:
    """Deal 450 beats; each class by shares from a Dirichlet distribution, drawn again until
    everybody has two beats. In order of their numbers."""
    beats = generator.permutation(len(labels))[:BEATS]
    while True:
        parts: list[list[int]] = [[] for _ in range(CLIENTS)]
        for label in np.unique(labels):
            of_class = beats[labels[beats] == label]
            shares = generator.dirichlet(np.full(CLIENTS, alpha)).cumsum()[:-1]
            for part, dealt in zip(
                parts, np.split(of_class, (shares * len(of_class)).astype(int)), strict=True
            ):
                part.extend(dealt)
        if min(map(len, parts)) >= 2:
            return [np.array(part) for part in sorted(parts, key=len)]


def poison(
    attack: str, own: Stack, honest: Stack, generator: np.random.Generator, attackers: int
) -> Stack:
    """What the attackers send, as differences to the base model; `own` is what they trained."""
    mean = honest.mean(axis=0)
    match attack:
        case "sign flip" | "largest":
            return -own
        case "scaled" | "claims":
            return -10 * own
        case "label flip":
            return own
        case "gaussian":
            noise = generator.standard_normal((attackers, honest.shape[1]), np.float32)
            length = 10 * np.median(np.linalg.norm(honest, axis=1))
            noise *= length / np.linalg.norm(noise, axis=1, keepdims=True)
            return noise
        case "ipm":
            return np.repeat(-0.8 * mean[None], attackers, axis=0)
        case _:
            supporters = CLIENTS // 2 + 1 - attackers
            z = 1.5
            if attack == "alie":
                z = NormalDist().inv_cdf(1 - supporters / (CLIENTS - attackers))
            return np.repeat((mean - z * honest.std(axis=0))[None], attackers, axis=0)


def run(federation: Federation, cell: Cell) -> dict[str, float]:
    """Accuracy of the last model (percent; 0 if it diverged), the attackers' share of the beats,
    and the share of attackers and of honest clients that the rule put on record."""
    bad = federation.attackers(cell.percent, cell.attack, cell.draw)
    f = len(bad)
    good = [client for client in range(CLIENTS) if client not in bad]
    examples = [federation.examples[client] for client in (*bad, *good)]
    if cell.attack == "claims":
        examples[:f] = [1_000_000] * f
    trains = cell.attack in ("sign flip", "scaled", "claims", "largest", "label flip")
    clients = [*bad, *good] if trains else good
    flipped = set(bad) if cell.attack == "label flip" else set()
    model, named = federation.start, np.zeros(CLIENTS)
    for number in range(1, ROUNDS + 1):
        trained = federation.train(model, clients, flipped, number, cell.optimizer) - model
        honest = trained[-len(good) :]
        sent = honest
        if f:
            generator = np.random.default_rng([cell.seed, number])
            sent = np.concatenate([poison(cell.attack, trained[:f], honest, generator, f), honest])
        models = (model + sent).astype(np.float32)
        if not all_finite(models.ravel()):
            return {"accuracy": 0.0}
        total: WeightedSum | Updates = WeightedSum(model.size)
        if cell.rule != "fedavg":
            total = Updates(cell.rule, (cell.percent or 20) / 100, model)  # type: ignore[arg-type]
        for update, count in zip(models, examples, strict=True):
            total.add(update, count)
        model = total.mean()
        if isinstance(total, Updates):
            named[list(total.aggregate().suspicious)] += 1 / ROUNDS
    found = {"accuracy": round(federation.accuracy(model), 2)}
    if f:
        found["beats"] = round(sum(federation.examples[client] for client in bad) / BEATS, 3)
    if cell.rule != "fedavg":
        found["honest_named"] = round(float(named[f:].mean()), 3)
        if f:
            found["attackers_named"] = round(float(named[:f].mean()), 3)
    return found


# Figures

Results = Mapping[str, Mapping[str, float]]


def load() -> dict[str, dict[str, float]]:
    known: dict[str, dict[str, float]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return known


def save(results: Results) -> None:
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(results[key])}" for key in sorted(results))
    write_atomically(RESULTS, f"{{\n{lines}\n}}\n".encode())


def measure(minutes: float) -> int:
    """Run cells that are missing until the time is over; returns how many are missing then."""
    torch.set_num_threads(1)
    task, results, end = Ecg5000(ROOT / "data"), load(), time.monotonic() + 60 * minutes
    missing = [cell for cell in cells() if cell.key not in results]
    federations: dict[tuple[str, int], Federation] = {}
    while missing and time.monotonic() < end:
        cell = missing.pop(0)
        which = (cell.skew, cell.seed)
        if which not in federations:
            federations[which] = Federation(task, *which)
        results[cell.key] = run(federations[which], cell)
        print(cell.key, results[cell.key], flush=True)
        save(results)
        write_page(results)
    return len(missing)


def accuracies(
    results: Results, optimizer: str, skew: str, percent: int, rule: str, attack: str
) -> list[float]:
    """Of all seeds; empty if one is missing."""
    keys = [Cell(optimizer, skew, percent, rule, attack, seed).key for seed in SEEDS]
    return [results[key]["accuracy"] for key in keys] if all(k in results for k in keys) else []


def blocks(results: Results) -> dict[str, str]:
    """The generated parts of the page, by their names."""
    every = ATTACKS | FURTHER
    made = {"attacks": "\n".join(f"- **{name}**: {what}" for name, what in every.items())}
    for optimizer, skew, percent in itertools.product(RATES, SKEWS, (20, 40)):
        made[f"{optimizer}, {skew}, {percent} %"] = _table(results, optimizer, skew, percent)
    made["cost"] = _cost(results)
    made["further"] = _further(results)
    made["placement"] = _placement(results)
    made["named"] = _named(results)
    return made


def _rows(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = list(heads)
    lines = ["| " + " | ".join(line) + " |" for line in (heads, ["---"] * len(heads), *rows)]
    return "\n".join(lines)


def _table(results: Results, optimizer: str, skew: str, percent: int) -> str:
    rows = []
    for rule in RULES:
        clean = accuracies(results, optimizer, skew, 0, rule, NO_ATTACK)
        under = [accuracies(results, optimizer, skew, percent, rule, a) for a in ATTACKS]
        known = [fmean(values) for values in under if values]
        worst = f"{fmean(clean) - min(known):.1f}" if clean and known else ""
        worst += " (of the cells run)" if worst and len(known) < len(ATTACKS) else ""
        rows.append([f"`{rule}`", *map(_cell, [clean, *under]), worst])
    return _rows(["rule", NO_ATTACK, *ATTACKS, "worst loss"], rows)


def _cost(results: Results) -> str:
    """Of the recommended rule without an attack, beside FedAvg with the same seed."""
    rows = []
    for optimizer, skew in itertools.product(RATES, SKEWS):
        row = [f"{optimizer}, {skew}"]
        for seeds in (SEEDS, SEEDS + MORE_SEEDS):
            pairs = [
                [Cell(optimizer, skew, 0, rule, NO_ATTACK, seed).key for seed in seeds]
                for rule in ("fedavg", RECOMMENDED)
            ]
            if not all(key in results for keys in pairs for key in keys):
                row.append("not run")
                continue
            costs = [
                results[a]["accuracy"] - results[b]["accuracy"] for a, b in zip(*pairs, strict=True)
            ]
            row.append(f"{fmean(costs):.2f} ({min(costs):.1f} to {max(costs):.1f})")
        rows.append(row)
    return _rows(["setting", "cost, the three seeds", "cost, ten seeds"], rows)


def _further(results: Results) -> str:
    rows = []
    for optimizer, skew, rule in itertools.product(RATES, SKEWS, (RECOMMENDED, "fedavg")):
        clean = accuracies(results, optimizer, skew, 0, rule, NO_ATTACK)
        under = [accuracies(results, optimizer, skew, 20, rule, attack) for attack in FURTHER]
        rows.append([f"{optimizer}, {skew}", f"`{rule}`", *map(_cell, [clean, *under])])
    return _rows(["setting", "rule", NO_ATTACK, *FURTHER], rows)


def _placement(results: Results) -> str:
    """Of each draw that was run whole, by the attackers' share of the beats: the worst loss."""
    rows = []
    for seed, draw in itertools.product(SEEDS, range(DRAWS)):
        share, losses = 0.0, []
        for optimizer in RATES:
            clean = Cell(optimizer, SKEWED, 0, RECOMMENDED, NO_ATTACK, seed).key
            keys = [Cell(optimizer, SKEWED, 20, RECOMMENDED, a, seed, draw).key for a in ATTACKS]
            if not all(key in results for key in (clean, *keys)):
                losses.append("not run")
                continue
            share = results[keys[0]]["beats"]
            loss = {
                a: results[clean]["accuracy"] - results[k]["accuracy"]
                for a, k in zip(ATTACKS, keys, strict=True)
            }
            worst = max(ATTACKS, key=loss.__getitem__)
            losses.append(f"{loss[worst]:.1f} ({worst})")
        rows.append((share, [f"{share:.0%}" if share else "", f"{seed}", *losses]))
    heads = ["attackers' share of the beats", "seed", *(f"worst loss, {o}" for o in RATES)]
    return _rows(heads, [row for _, row in sorted(rows)])


def _cell(values: list[float]) -> str:
    return f"{fmean(values):.1f} ({min(values):.0f})" if values else "not run"


def _named(results: Results) -> str:
    attacks, rows = (NO_ATTACK, *ATTACKS, *FURTHER), []
    for optimizer, skew in itertools.product(RATES, SKEWS):
        row = [f"{optimizer}, {skew}"]
        for attack in attacks:
            percent = 0 if attack == NO_ATTACK else 20
            keys = [Cell(optimizer, skew, percent, RECOMMENDED, attack, s).key for s in SEEDS]
            if not all(key in results for key in keys):
                row.append("not run")
                continue
            honest = fmean(results[key]["honest_named"] for key in keys)
            caught = fmean(results[key].get("attackers_named", 0) for key in keys)
            row.append(f"{caught:.0%} / {honest:.0%}" if percent else f"{honest:.0%}")
        rows.append(row)
    return _rows(["setting, attackers / honest clients named", *attacks], rows)


def write_page(results: Results, path: Path = PAGE) -> None:
    """Put the figures into the page. Raises ValueError: one has no place there."""
    page.write(path, blocks(results))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=math.inf, help="of measuring")
    parser.add_argument("--write", action="store_true", help="only write docs/robustness.md")
    arguments = parser.parse_args()
    if arguments.write:
        write_page(load())
        return 0
    print(f"{measure(arguments.minutes)} cells are missing")
    return 0


if __name__ == "__main__":
    sys.exit(main())
