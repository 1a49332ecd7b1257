"""`fedfog predict RUN BEATS.CSV`: class and probabilities of each line."""

import csv
import io
import math
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

from fedfog.cli.saved import SavedModelError, load
from fedfog.files import write_atomically
from fedfog.service import EXIT_FAILED, EXIT_OK

BATCH = 512


class InputError(Exception):
    """The file is not one of examples; the text names the line."""


@torch.inference_mode()
def run(folder: Path, examples: Path, out: Path | None, data_dir: Path) -> int:
    """Predict each line of a file; returns the exit code."""
    try:
        task, model = load(folder, data_dir)
        inputs = read(examples, task.input_shape)
        try:
            outputs = torch.cat([model(batch) for batch in torch.split(inputs, BATCH)])
        except RuntimeError as error:
            raise InputError(
                f"{examples}: the model does not take {inputs[0].numel()} numbers ({error})"
            ) from error
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["example", "class", *task.class_names])
        for number, shares in enumerate(task.logits(outputs).softmax(1).tolist(), 1):
            best = task.class_names[shares.index(max(shares))]
            writer.writerow([number, best, *(f"{share:.6f}" for share in shares)])
        if out is None:
            sys.stdout.write(text.getvalue())
        else:
            write_atomically(out, text.getvalue().encode())
    except (SavedModelError, InputError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_FAILED
    return EXIT_OK


def read(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Examples (n, *shape) float32 of a text file, one in a line: numbers with commas or tabs
    between them, no label and no header. Empty lines are passed over.

    Raises InputError and OSError.
    """
    rows: list[list[float]] = []
    wanted = math.prod(shape)  # negative if the task leaves it open
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text file ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = [_number(cell, f"{path}, line {number}") for cell in re.split("[,\t]", line)]
        if wanted < 0:
            wanted = len(row)
        if len(row) != wanted:
            label = ": leave the label out" if len(row) == wanted + 1 else ""
            raise InputError(f"{path}, line {number}: {len(row)} numbers, not {wanted}{label}")
        rows.append(row)
    if not rows:
        raise InputError(f"{path} holds no example")
    return torch.tensor(rows).reshape(len(rows), *shape)


def _number(cell: str, where: str) -> float:
    try:
        value = float(cell)
    except ValueError as error:
        raise InputError(f"{where}: {cell.strip()[:40]!r} is not a number") from error
    if not math.isfinite(value):
        raise InputError(f"{where}: {cell.strip()} is not a finite number")
    return value
