"""`fedfog partition`: who would train on what, as a table and as a picture."""

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from fedfog.core.partition import deal
from fedfog.ml.task import DataError, TaskError, load_task
from fedfog.service import EXIT_OK
from fedfog.settings import EXIT_BAD_SETTING

Counts = NDArray[np.int64]  # examples of each class, shape (slots, classes)


def run(
    clients: int,
    regions: int,
    partition: str,
    region_partition: str,
    seed: int,
    task_name: str,
    data_dir: Path,
    picture: Path | None,
) -> int:
    """Print the classes that each slot of each region holds, and draw them into `picture` (PNG);
    returns the exit code."""
    try:
        task = load_task(task_name, data_dir=data_dir)
        labels = task.training_labels()
        dealt = deal(
            labels,
            task.training_groups(),
            [clients] * regions,
            seed=seed,
            partition=partition,
            region_partition=region_partition,
        )
    except (ValueError, TaskError, DataError) as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_BAD_SETTING
    classes = len(task.class_names)
    counts = [
        np.array([np.bincount(labels[slot], minlength=classes) for slot in region])
        for region in dealt
    ]
    table = Table("region", "slot", "examples", *task.class_names, box=box.SIMPLE, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for index, region in enumerate(counts):
        for slot, of_class in enumerate(region):
            table.add_row(f"region_{index}", *map(str, (slot, of_class.sum(), *of_class)))
        table.add_section()
    # Into a pipe, a line stays a line.
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table)
    if picture:
        _draw(f"{region_partition} / {partition}, seed {seed}", task.class_names, counts, picture)
        sys.stdout.write(f"{picture}\n")
    return EXIT_OK


def _draw(title: str, class_names: tuple[str, ...], counts: list[Counts], path: Path) -> None:
    """One bar for each slot, its classes on top of each other; a gap between regions."""
    from matplotlib.figure import Figure

    slots = len(counts[0])
    at = np.array([r * (slots + 1) + s for r in range(len(counts)) for s in range(slots)])
    bars = np.concatenate(counts)
    figure = Figure(figsize=(min(6 + 0.3 * len(bars), 24), 4), layout="constrained")
    axes = figure.subplots()
    below = np.zeros(len(bars), np.int64)
    for name, of_class in zip(class_names, bars.T, strict=True):
        axes.bar(at, of_class, bottom=below, label=name, width=0.85)
        below += of_class
    middles = at.reshape(len(counts), slots).mean(axis=1)
    axes.set_xticks(middles, [f"region_{index}" for index in range(len(counts))])
    axes.set(title=title, ylabel="training examples of a slot")
    figure.legend(loc="outside right upper")
    figure.savefig(path, format="png", dpi=110)
