"""What a run leaves behind for its user: summary, weights, model card and learning curve."""

import errno
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping

from fedfog.files import write_atomically
from fedfog.messages.schemas import Evaluation
from fedfog.runs import FinalEvaluation, Status, Summary
from fedfog_central_server.checkpoints import Checkpoint
from fedfog_central_server.history import HistoryFile
from fedfog_central_server.runs import Run

CURVE_SECONDS = 60.0  # until it is given up

_CARD = """\
# Model of run {run}

{description} ({task}), trained by federated learning with FedFog: the clients' data never left
them; they sent weights.

| | |
| --- | --- |
| run | {status}, {rounds} rounds{stopped}, strategy {strategy}, seed {seed} |
| regions | {regions} |
| clients per round | {clients} |
| local training | {local_work} per round, batch {batch_size}, {optimizer} {learning_rate} |
| partition | {region_partition} over regions, {partition} over the clients of one |
| parameters | {parameters} float32 in {tensors} tensors |
| SHA-256 of the tensors | `{digest}` |

## Metrics

On {examples} held-out examples that no client trains on:

| | model 0 | final model |
| --- | --- | --- |
| accuracy | {initial_accuracy} | {test_accuracy} |
| AUROC | {initial_auroc} | {test_auroc} |
| macro-F1 | {initial_macro_f1} | {test_macro_f1} |
| loss (nats) | {initial_loss} | {test_loss} |
| expected calibration error | {initial_ece} | {test_ece} |

Confusion matrix (rows: true class, columns: predicted): `{confusion_matrix}`

![Learning curve](learning-curve.png)

`best.safetensors` is the model with the highest accuracy on these same examples ({best}), so its
own figure is an optimistic one.

{federated}

## Data

{data_statement}

## Intended use

Research and teaching of federated learning. `model.safetensors` is read by `safetensors` in any
framework; its metadata names the run and the round. `fedfog predict` applies it to a file, and
`fedfog export` writes it as ONNX.

## Limits

{limits}
"""


def summarize(run: Run, status: Status, error: str = "", held: bool = False) -> Summary:
    """The summary of what the history has."""
    settings, history = run.info.settings, run.history
    initial, last, best = history.initial, _newest(history), history.best()
    completed = status is Status.COMPLETED
    return Summary(
        run=run.info.run,
        status=status,
        held=held,
        error=error,
        rounds=history.rounds,
        regions=sorted(history.regions),
        clients=[history.clients[number] for number in sorted(history.clients)],
        rewinds=run.info.rewound,
        test_accuracy=last and last.accuracy,
        test_auroc=last and last.auroc,
        test_macro_f1=last and last.macro_f1,
        test_loss=last and last.loss,
        test_ece=last and last.ece,
        best_round=best and best.round,
        best_accuracy=best and best.accuracy,
        federated=history.federated,
        early_stop=run.ends_early_with(history.rounds) if completed else "",
        initial_accuracy=initial and initial.accuracy,
        initial_loss=initial and initial.loss,
        seconds=round(run.seconds, 3),
        task=settings["task"],
        strategy=settings["strategy"],
        seed=settings["seed"],
        versions=run.info.versions,
    )


def _newest(history: HistoryFile) -> Evaluation | None:
    """That of the newest model, if it was evaluated."""
    found = history.evaluations[-1:]
    return found[0] if found and found[0].round == history.rounds else None


def save_summary(run: Run, summary: Summary) -> None:
    """Raises OSError."""
    data = summary.model_dump_json(indent=1).encode()
    write_atomically(run.folder / "summary.json", data)


def save_card(
    run: Run, summary: Summary, checkpoint: Checkpoint, of_task: Mapping[str, str]
) -> None:
    """`README.md`, the model card. Raises OSError."""
    final, best = _newest(run.history), run.history.best()
    settings = run.settings
    fields = settings.model_dump() | summary.model_dump() | _cells("initial", run.history.initial)
    fields |= _cells("test", final)
    fields |= {
        "regions": ", ".join(summary.regions) or "none",
        "clients": ", ".join(map(str, summary.clients)) or "none",
        "parameters": f"{checkpoint.table.num_parameters:,}",
        "tensors": len(checkpoint.table.shapes),
        "digest": checkpoint.digest,
        "examples": f"{final.num_examples:,}" if final else "?",
        "confusion_matrix": final.confusion_matrix if final else "unknown",
        "stopped": summary.early_stop and f" ({summary.early_stop})",
        "local_work": f"{settings.local_steps} batches"
        if settings.local_steps
        else f"{settings.local_epochs} epochs",
        "best": f"{best.accuracy:.4f}, model {best.round}" if best else "unknown",
        "federated": "\n".join(_federated(summary.federated)),
    }
    text = _CARD.format(**fields, **of_task)
    write_atomically(run.folder / "README.md", text.encode())


def _federated(told: FinalEvaluation | None) -> Iterator[str]:
    """The model card's lines on the clients' own examples."""
    if told is None or told.overall is None:
        yield "The clients have not evaluated the final model on examples of their own."
        return
    yield "On the clients' own validation examples, as these say, the final model:"
    yield ""
    yield "| | clients | examples | accuracy | between clients | worst client |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, found in {"all": told.overall, **told.regions}.items():
        yield (
            f"| {name} | {found.num_clients} | {found.num_examples:,} | {found.accuracy:.4f} "
            f"| {found.mean_accuracy:.4f} ± {found.std_accuracy:.4f} "
            f"| {found.worst_accuracy:.4f} ({found.worst_client}) |"
        )
    if told.missing:
        names = ", ".join(told.missing_clients)
        yield f"\nThe word of {told.missing} more did not come in time{names and ': '}{names}."


def _cells(prefix: str, evaluation: Evaluation | None) -> dict[str, str]:
    cells = {}
    for name in ("accuracy", "auroc", "macro_f1", "loss", "ece"):
        value = getattr(evaluation, name) if evaluation else None
        cells[f"{prefix}_{name}"] = "unknown" if value is None else f"{value:.4f}"
    return cells


def save_curve(run: Run) -> None:
    """`learning-curve.png`: metrics and loss over the rounds. Raises OSError."""
    path = run.folder / "learning-curve.png"
    history = run.history
    federated = sorted(history.federated_accuracy.items())
    if history.federated and history.federated.overall:
        federated.append((history.rounds, history.federated.overall.accuracy))
    curve = {
        "title": run.info.run,
        "points": [evaluation.model_dump() for evaluation in history.evaluations],
        "federated": federated,
    }
    try:
        drawn = subprocess.run(
            [sys.executable, "-m", "fedfog_central_server.curve"],
            input=json.dumps(curve).encode(),
            stdout=subprocess.PIPE,
            timeout=CURVE_SECONDS,
            check=True,
        )
    except subprocess.SubprocessError as error:
        raise OSError(errno.EIO, f"not drawn, {error}", str(path)) from error
    write_atomically(path, drawn.stdout)
