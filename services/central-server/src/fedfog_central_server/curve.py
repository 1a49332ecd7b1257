"""`python -m fedfog_central_server.curve`: the learning curve, JSON on stdin to PNG on stdout.

A process of its own: Matplotlib's 35 MB are gone when the curve is drawn.
"""

import json
import sys
from typing import Any, BinaryIO

from matplotlib.figure import Figure


def draw(
    title: str,
    points: list[dict[str, Any]],
    federated: list[tuple[int, float]],
    output: BinaryIO,
) -> None:
    """Metrics and loss over the rounds; `points` are the fields of `Evaluation`, `federated` is the
    accuracy on the clients' own examples, by rounds."""
    rounds = [point["round"] for point in points]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, label in (("accuracy", "accuracy"), ("auroc", "AUROC"), ("macro_f1", "macro-F1")):
        left.plot(rounds, [point[name] for point in points], marker="o", label=label)
    if federated:
        label = "accuracy, clients' own"
        left.plot(*zip(*federated, strict=True), marker=".", linestyle="--", label=label)
    left.set(xlabel="round", ylabel="on held-out examples", title=title)
    left.legend()
    right.plot(rounds, [point["loss"] for point in points], marker="o", color="tab:red")
    right.set(xlabel="round", ylabel="loss (nats)", title="loss")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(output, format="png", dpi=110)


if __name__ == "__main__":
    draw(**json.load(sys.stdin), output=sys.stdout.buffer)
