"""What the runs of a sweep say, as one table: its rows, files, summary and curves."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from fedfog.files import write_atomically
from fedfog.runs import Status, figures

Row = dict[str, Any]

PLAN = "sweep.json"
METRICS = ("accuracy", "auroc", "macro_f1", "loss")
LABELS = {"auroc": "AUROC", "macro_f1": "macro-F1", "loss": "loss (nats)"}
DIGITS = 10  # the order in which updates come changes the sixteenth


def rows_of(folder: Path) -> Iterator[Row]:
    """A row for each round of the run in `folder`, from model 0 on: every figure of its history.

    Raises:
        OSError, ValueError: there is no history, or it cannot be read.
    """
    history = json.loads((folder / "history.json").read_bytes())
    initial = {"round": 0, "num_examples": None, "evaluation": history["initial"]}
    for record in [initial, *history["rounds"]]:
        yield {
            name: float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
            for name, value in figures(record).items()
        }


def rows_of_sweep(folder: Path) -> list[Row]:
    """The rows of all runs of the sweep in `folder` that are completed.

    Raises:
        OSError, ValueError: a file cannot be read.
    """
    runs = json.loads((folder / PLAN).read_bytes())["runs"]
    return [
        {"run": name, **labels, **row}
        for name, labels in runs.items()
        if completed(folder / name)
        for row in rows_of(folder / name)
    ]


def completed(folder: Path) -> bool:
    """Raises ValueError: its summary is damaged."""
    path = folder / "summary.json"
    return path.exists() and json.loads(path.read_bytes())["status"] == Status.COMPLETED


def columns_of(rows: Iterable[Row]) -> list[str]:
    """All columns, in the order in which they first appear, with seconds last."""
    names = dict.fromkeys(name for row in rows for name in row)
    return sorted(names, key=lambda name: name.startswith("seconds"))


def save(rows: Sequence[Row], folder: Path) -> None:
    """`results.csv` and `results.parquet`. Raises OSError."""
    import pyarrow as pa
    from pyarrow import parquet

    columns = columns_of(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(folder / "results.csv", text.getvalue().encode())
    table = pa.table({name: [row.get(name) for row in rows] for name in columns})
    content = pa.BufferOutputStream()
    parquet.write_table(table, content)
    write_atomically(folder / "results.parquet", content.getvalue().to_pybytes())


def summarize(rows: Iterable[Row], axes: Sequence[str], round: int | None = None) -> list[Row]:
    """A row for each point of the grid: mean, least and largest of each metric over the seeds,
    after `round` rounds (default: after each run's last), as `accuracy`, `accuracy_min` and
    `accuracy_max`; metrics that no run has are left out."""
    points: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if round is None or row["round"] <= round:
            points.setdefault(tuple(row[axis] for axis in axes), {})[row["run"]] = row
    summary = []
    for point, runs in points.items():
        line = {**dict(zip(axes, point, strict=True)), "runs": len(runs)}
        for metric in METRICS:
            if values := [row[metric] for row in runs.values() if metric in row]:
                line[metric] = fmean(values)
                line[f"{metric}_min"], line[f"{metric}_max"] = min(values), max(values)
        summary.append(line)
    return summary


def cell(line: Row, metric: str) -> str:
    """`0.9712 (0.9689-0.9735)` of a line of the summary."""
    if metric not in line:
        return "-"
    spread = f" ({line[f'{metric}_min']:.4f}-{line[f'{metric}_max']:.4f})"
    return f"{line[metric]:.4f}" + (spread if line["runs"] > 1 else "")


def curves(rows: Iterable[Row], axes: Sequence[str]) -> bytes:
    """Each metric over the rounds as a PNG: a line for each point of the grid, the mean of its
    seeds, in the band between the least and the largest."""
    from matplotlib.figure import Figure

    points: dict[str, dict[int, list[Row]]] = {}
    for row in rows:
        label = ", ".join(str(row[axis]) for axis in axes).replace("$", r"\$")  # no formula
        points.setdefault(label, {}).setdefault(row["round"], []).append(row)
    figure = Figure(figsize=(11, 7), layout="constrained")
    for metric, panel in zip(METRICS, figure.subplots(2, 2).flat, strict=True):
        for label, rounds in points.items():
            values = {r: [row[metric] for row in rounds[r] if metric in row] for r in rounds}
            x = sorted(r for r in values if values[r])
            panel.plot(x, [fmean(values[r]) for r in x], marker=".", label=label)
            panel.fill_between(
                x, [min(values[r]) for r in x], [max(values[r]) for r in x], alpha=0.2
            )
        panel.set(xlabel="round", ylabel=LABELS.get(metric, metric))
        panel.grid(alpha=0.3)
        panel.xaxis.get_major_locator().set_params(integer=True)
    if len(points) > 1:
        handles, labels = panel.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    return content.getvalue()
