"""`make results`: what is learned on ECG5000 over the real stack, beside the same in one process.

Writes docs/results.md and docs/results.png. The runs are sweeps (docs/experiments.md) in
`runs/results/`: what is completed there is not done again.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from rich.console import Console

from bench import page
from bench.__main__ import machine
from fedfog.cli.experiment import Stack, Sweep, run_sweep
from fedfog.cli.results import Row
from fedfog.core.partition import deal
from fedfog.messages.codec import decode
from fedfog.messages.schemas import Hyperparameters, ModelMeta
from fedfog.ml import training
from fedfog.ml.evaluation import evaluate_full
from fedfog.ml.reference import fedavg
from fedfog.ml.task import load_task

ROOT = Path(__file__).parent.parent
RUNS, PAGE, PLOT = ROOT / "runs" / "results", ROOT / "docs" / "results.md", "results.png"
SEEDS = [1, 2, 3]
ROUNDS = 20
SHOWN = (3, 10, 20)

Settings = Mapping[str, str | int | float]

ADAM: Settings = {"optimizer": "adam", "learning_rate": 0.001}
SGD: Settings = {"optimizer": "sgd", "learning_rate": 0.1}


def dirichlet(alpha: float, regions: int = 3) -> Settings:
    """Labels of each client, flat over all clients of `regions` regions with as many each."""
    return {
        "region_partition": f"dirichlet:{regions * alpha:g}",
        "partition": f"dirichlet:{alpha:g}",
    }


BY_REGION: Settings = {"region_partition": "dirichlet:0.3", "partition": "iid"}


@dataclass(frozen=True)
class Case:
    """A line of a table: on the stack of `sweep`, with these settings."""

    sweep: str
    name: str
    settings: Settings


def stack(clients: int, regions: int, task: str = "ecg5000") -> Stack:
    # The whole training set is trained on, as in the publications that use the official split.
    return Stack(clients=clients, regions=regions, task=task, validation_fraction=0.0)


STACKS = {
    "iid": stack(3, 1),
    "iid-3-regions": stack(1, 3),
    "skew": stack(3, 3),
    "five": stack(3, 1, "ecg5000-5class"),
    "five-skew": stack(3, 3, "ecg5000-5class"),
}

IID = [
    Case("iid", "3 clients, 1 region, Adam", ADAM),
    Case("iid-3-regions", "3 clients, 3 regions, Adam", ADAM),
    Case("iid", "3 clients, 1 region, SGD", SGD),
]
SKEW = [
    Case("skew", "Dirichlet 0.3, Adam", {**ADAM, **dirichlet(0.3)}),
    Case("skew", "Dirichlet 0.3, SGD", {**SGD, **dirichlet(0.3)}),
    Case("skew", "Dirichlet 0.1, Adam", {**ADAM, **dirichlet(0.1)}),
    Case("skew", "Dirichlet 0.1, SGD", {**SGD, **dirichlet(0.1)}),
]
STRATEGIES = [
    SKEW[0],
    Case(
        "skew",
        "FedProx, mu 0.1",
        {**ADAM, **dirichlet(0.3), "strategy": "FedProx", "proximal_mu": 0.1},
    ),
    Case(
        "skew",
        "FedAvgM, momentum 0.5",
        {**ADAM, **dirichlet(0.3), "strategy": "FedAvgM", "server_momentum": 0.5},
    ),
    Case(
        "skew",
        "FedAdam, rate 0.01",
        {**ADAM, **dirichlet(0.3), "strategy": "FedAdam", "server_learning_rate": 0.01},
    ),
]
FOG_ROUNDS = [
    SKEW[0],
    *(
        Case(
            "skew",
            f"Dirichlet 0.3, FOG_ROUNDS={n}",
            {**ADAM, **dirichlet(0.3), "fog_rounds": n},
        )
        for n in (2, 5)
    ),
    Case("skew", "labels by region, FOG_ROUNDS=1", {**ADAM, **BY_REGION}),
    *(
        Case("skew", f"labels by region, FOG_ROUNDS={n}", {**ADAM, **BY_REGION, "fog_rounds": n})
        for n in (2, 5)
    ),
]
FIVE = [
    Case("five", "3 clients, 1 region, IID", ADAM),
    Case("five-skew", "9 clients, 3 regions, Dirichlet 0.3", {**ADAM, **dirichlet(0.3)}),
]


@dataclass(frozen=True)
class Wanted:
    """A level that the mean of the seeds has to reach."""

    case: str
    round: int
    accuracy: float


WANTED = [
    Wanted(IID[0].name, 10, 0.980),
    Wanted(IID[0].name, 20, 0.982),
    Wanted(SKEW[0].name, 20, 0.965),
    Wanted(FOG_ROUNDS[2].name, 3, 0.93),
    Wanted(SKEW[3].name, 20, 0.965),
    Wanted(FIVE[0].name, 20, 0.928),
]


def sweeps() -> Iterator[Sweep]:
    """One for each stack."""
    known = {case.name: case for case in [*IID, *SKEW, *STRATEGIES, *FOG_ROUNDS, *FIVE]}
    for name, of in STACKS.items():
        grid = [{"name": c.name, **c.settings} for c in known.values() if c.sweep == name]
        yield Sweep(
            name=name,
            stack=of,
            settings={"rounds": ROUNDS, "local_epochs": 1},
            grid={"case": grid},
            seeds=SEEDS,
        )


def in_one_process(
    label: str, task_name: str, clients: int, regions: int, of: Settings
) -> list[Row]:
    """Rows like those of a sweep, of FedAvg without a network; with one client of one region it
    is centralised training, with a new optimizer in each epoch."""
    task = load_task(task_name, data_dir=ROOT / "data")
    labels, rows = task.training_labels(), []
    model = task.build_model(0)
    for seed in SEEDS:
        parameters = Hyperparameters(seed=seed, local_epochs=1, **of)  # type: ignore[arg-type]
        dealt = deal(
            labels,
            task.training_groups(),
            slots=[clients] * regions,
            seed=seed,
            partition=parameters.partition,
            region_partition=parameters.region_partition,
        )
        models = fedavg(task, dealt, parameters, rounds=ROUNDS, validation_fraction=0.0)
        for round, arrays in enumerate(models):
            training.load_arrays(model, arrays)
            metrics = evaluate_full(task, model, task.test_data())
            rows.append(
                {
                    "case": label,
                    "seed": seed,
                    "round": round,
                    "accuracy": metrics.accuracy,
                    "auroc": metrics.auroc,
                    "macro_f1": metrics.macro_f1,
                    "arrays": arrays if round == ROUNDS else None,
                }
            )
    return rows


def values(rows: Sequence[Row], case: str, round: int, metric: str) -> list[float]:
    return [r[metric] for r in rows if r["case"] == case and r["round"] == round]


def cell(rows: Sequence[Row], case: str, round: int, metric: str) -> str:
    found = values(rows, case, round, metric)
    return f"{fmean(found):.4f} ({min(found):.4f}-{max(found):.4f})"


def table(rows: Sequence[Row], cases: Sequence[str]) -> str:
    heads = [f"accuracy, round {n}" for n in SHOWN]
    lines = [
        f"| | {' | '.join(heads)} | AUROC, round {ROUNDS} | macro-F1, round {ROUNDS} |",
        "| --- |" + " --- |" * (len(SHOWN) + 2),
    ]
    for case in cases:
        cells = [cell(rows, case, n, "accuracy") for n in SHOWN]
        cells += [cell(rows, case, ROUNDS, metric) for metric in ("auroc", "macro_f1")]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def checks(rows: Sequence[Row]) -> tuple[str, bool]:
    """The levels that are wanted, as a table, and whether all are reached."""
    lines, all_hold = ["| | round | wanted | mean | |", "| --- | --- | --- | --- | --- |"], True
    for want in WANTED:
        mean = fmean(values(rows, want.case, want.round, "accuracy"))
        holds = mean >= want.accuracy
        all_hold &= holds
        said = "reached" if holds else "**missed**"
        lines.append(f"| {want.case} | {want.round} | {want.accuracy:.3f} | {mean:.4f} | {said} |")
    return "\n".join(lines), all_hold


def differences(rows: Sequence[Row], pairs: Mapping[str, tuple[str, str]]) -> str:
    """Largest difference of any weight after the last round, stack against one process."""
    lines = ["| | largest difference of a weight |", "| --- | --- |"]
    for reference, (sweep, case) in pairs.items():
        worst = 0.0
        for row in rows:
            if row["case"] != case or row["round"] != ROUNDS:
                continue
            other = next(
                r["arrays"]
                for r in rows
                if (r["case"], r["seed"], r["round"]) == (reference, row["seed"], ROUNDS)
            )
            saved = (RUNS / sweep / row["run"] / "model.safetensors").read_bytes()
            arrays = decode(saved, ModelMeta)
            own = arrays.table.unflatten(arrays.vector)
            worst = max(worst, *(float(np.abs(own[n] - other[n]).max()) for n in own))
        lines.append(f"| {case} | {worst:.1e} |")
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = {
        "IID": [case.name for case in IID],
        "labels skewed, 9 clients": [case.name for case in SKEW],
        "server strategies, Dirichlet 0.3": [case.name for case in STRATEGIES],
        "regional rounds": [case.name for case in FOG_ROUNDS],
    }
    for panel, (title, cases) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for case in cases:
            by_round = [values(rows, case, n, "accuracy") for n in range(ROUNDS + 1)]
            line = panel.plot([fmean(v) for v in by_round], label=case)[0]
            low, high = [min(v) for v in by_round], [max(v) for v in by_round]
            panel.fill_between(range(ROUNDS + 1), low, high, alpha=0.15, color=line.get_color())
        panel.set(title=title, xlabel="global round", ylabel="accuracy", ylim=(0.4, 1.0))
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small", loc="lower right")
    figure.savefig(path, dpi=90)


def main() -> int:
    console = Console(highlight=False, soft_wrap=True)
    rows: list[Row] = []
    for sweep in sweeps():
        rows += run_sweep(sweep, RUNS, console)
    references: dict[str, tuple[str, Any]] = {}
    torch.set_num_threads(1)  # as the clients have it
    console.print("the same in one process")
    for label, clients, regions, case in (
        ("one process, 3 clients IID, Adam", 3, 1, IID[0]),
        ("one process, 9 clients, Dirichlet 0.3, Adam", 3, 3, SKEW[0]),
    ):
        rows += in_one_process(label, "ecg5000", clients, regions, case.settings)
        references[label] = (case.sweep, case.name)
    one, nine = references
    rows += in_one_process("centralised, Adam", "ecg5000", 1, 1, ADAM)
    rows += in_one_process("centralised, SGD", "ecg5000", 1, 1, SGD)
    rows += in_one_process("centralised", "ecg5000-5class", 1, 1, ADAM)
    plot(rows, PAGE.parent / PLOT)
    held, all_hold = checks(rows)
    page.write(
        PAGE,
        {
            "machine": f"{machine()['cpu']}, {machine()['cores']} cores, {date.today()}.",
            "iid": table(
                rows, ["centralised, Adam", "centralised, SGD", one, *(c.name for c in IID)]
            ),
            "skew": table(rows, [nine, *(case.name for case in SKEW)]),
            "strategies": table(rows, [case.name for case in STRATEGIES]),
            "fog rounds": table(rows, [case.name for case in FOG_ROUNDS]),
            "five": table(rows, ["centralised", *(case.name for case in FIVE)]),
            "differences": differences(rows, references),
            "wanted": held,
        },
    )
    console.print(held)
    return 0 if all_hold else 1


if __name__ == "__main__":
    sys.exit(main())
