"""`fedfog report RUN_OR_SWEEP`: what a run or a sweep did, as one HTML page that needs no other
file, no network and no script. Every text in it is escaped: names come from clients."""

import base64
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fedfog.cli import results
from fedfog.cli.results import METRICS, PLAN, Row, columns_of
from fedfog.files import write_atomically
from fedfog.service import EXIT_FAILED, EXIT_OK

PAGE = "report.html"
NAMES = 20  # of those who were left out of a round, and why
_COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#9d755d", "#bab0ac")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums }
th, td { padding: .2em .7em; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }
img { max-width: 100% }
.bar { display: flex; width: 40em; height: 1.1em } .bar span { height: 100% }
"""


class ReportError(Exception):
    """There is nothing to report on; the text says where."""


def run(folders: Sequence[Path]) -> int:
    """Write a page into each folder; returns the exit code."""
    try:
        for folder in folders:
            sys.stdout.write(f"{write(folder)}\n")
    except (ReportError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_FAILED
    return EXIT_OK


def write(folder: Path) -> Path:
    """Write the page of the run or the sweep in `folder`; returns its path.

    Raises:
        ReportError: there is none, or a file is damaged.
        OSError: the page cannot be written.
    """
    try:
        page = _sweep(folder) if (folder / PLAN).exists() else _run(folder)
    except FileNotFoundError as error:
        raise ReportError(f"{error.filename} is not there: name the folder of a run") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"{folder}: a file of it is damaged ({error!r})") from error
    write_atomically(folder / PAGE, page.encode())
    return folder / PAGE


def _run(folder: Path) -> str:
    info, history = (
        json.loads((folder / name).read_bytes()) for name in ("settings.json", "history.json")
    )
    path = folder / "summary.json"
    summary: dict[str, Any] = {"status": "not finished"}
    if path.exists():
        summary = json.loads(path.read_bytes())
    rows = [{"run": info["run"], **row} for row in results.rows_of(folder)]
    told = ("status", "error", "rounds", "early_stop", "best_round", "task", "seconds")
    body = [
        _pairs({"begun": info["begun"]} | {k: summary[k] for k in told if summary.get(k)}),
        "<h2>Learning</h2>",
        _curves(rows, []),
        _rows([{k: v for k, v in row.items() if k != "run"} for row in rows], seconds=False),
        _confusion(history["rounds"]),
        _federated(summary.get("federated") or {}),
        _participation(history["rounds"]),
        _waterfall(history["rounds"]),
        "<h2>Settings</h2>",
        _pairs(info["settings"]),
        _pairs(info["versions"]),
    ]
    return _page(f"Run {info['run']}", body)


def _sweep(folder: Path) -> str:
    plan = json.loads((folder / PLAN).read_bytes())
    rows, axes = results.rows_of_sweep(folder), plan["axes"]
    summary = [
        {axis: line[axis] for axis in axes}
        | {"runs": line["runs"]}
        | {metric: results.cell(line, metric) for metric in METRICS}
        for line in results.summarize(rows, axes)
    ]
    last = {row["run"]: row for row in rows}
    body = [
        "<h2>After the last round</h2><p>Mean (least - largest) over the seeds.</p>",
        _rows(summary),
        _curves(rows, axes),
        "<h2>Runs</h2>",
        _rows([last.get(name, {"run": name, **labels}) for name, labels in plan["runs"].items()]),
        "<h2>Federation and settings</h2>",
        _pairs(plan["stack"] | plan["settings"]),
    ]
    return _page(f"Sweep {plan['name']}", body)


def _page(title: str, body: Iterable[str]) -> str:
    title = escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{title}</h1>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _curves(rows: Sequence[Row], axes: Sequence[str]) -> str:
    picture = base64.b64encode(results.curves(rows, axes)).decode()
    return f'<img alt="metrics over the rounds" src="data:image/png;base64,{picture}">'


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of texts that are escaped already."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{c}</td>' for c in row)}</tr>\n" for row in rows)
    return f"<table><tr>{head}</tr>\n{body}</table>"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) >= 0.001 else f"{value:.3g}"
    return "" if value is None else escape(str(value))


def _pairs(values: Mapping[str, Any]) -> str:
    return _table((), ((escape(name), escape(str(value))) for name, value in values.items()))


def _rows(rows: Sequence[Row], seconds: bool = True) -> str:
    names = [n for n in columns_of(rows) if seconds or not n.startswith("seconds")]
    return _table(map(escape, names), ([_text(row.get(n)) for n in names] for row in rows))


def _confusion(rounds: Sequence[Any]) -> str:
    evaluated = [r["evaluation"] for r in rounds if r["evaluation"]]
    if not evaluated:
        return ""
    matrix = evaluated[-1]["confusion_matrix"]
    rows = [
        (f"<b>{true}</b>", *(f"{n} ({n / max(1, sum(line)):.1%})" for n in line))
        for true, line in enumerate(matrix)
    ]
    return (
        f"<h2>Confusion matrix of model {evaluated[-1]['round']:d}</h2>"
        "<p>Rows: true class; columns: predicted one; shares of the row.</p>"
        + _table(["", *map(str, range(len(matrix)))], rows)
    )


def _federated(final: Mapping[str, Any]) -> str:
    """How the finished model does at the clients, in all and by region."""
    if not final.get("overall"):
        return ""
    parts = {"all": final["overall"], **final["regions"]}
    return "<h2>On the clients' own validation examples</h2>" + _rows(
        [{"region": name, **part} for name, part in parts.items()]
    )


def _participation(rounds: Sequence[Any]) -> str:
    rows = []
    for record in rounds:
        for region, partial in record["regions"].items():
            out = {**partial["left_out"], **partial["suspicious"]}
            rows.append(
                (record["round"], region, partial["num_clients"], partial["num_examples"], out)
            )
        for region, why in {**record["left_out"], **record["suspicious"]}.items():
            rows.append((record["round"], region, None, None, {"the region": why}))
    return "<h2>Participation</h2>" + _table(
        ("round", "region", "clients", "examples", "left out or suspicious"),
        ([*map(_text, row), _named(out)] for *row, out in rows),
    )


def _named(out: Mapping[str, str]) -> str:
    told = [f"{escape(name)}: {escape(str(why))}" for name, why in [*out.items()][:NAMES]]
    return "<br>".join(told + [f"and {len(out) - NAMES} more"] * (len(out) > NAMES))


def _waterfall(rounds: Sequence[Any]) -> str:
    """A bar for each round: the server's seconds, step by step."""
    steps = list(dict.fromkeys(step for record in rounds for step in record["seconds"]))
    if not steps:
        return ""
    colour = {step: _COLOURS[i % len(_COLOURS)] for i, step in enumerate(steps)}
    longest = max(sum(record["seconds"].values()) for record in rounds) or 1.0
    rows = []
    for record in rounds:
        spans = "".join(
            f'<span style="background:{colour[step]};width:{100 * value / longest:.2f}%" '
            f'title="{escape(step)} {value:.4f} s"></span>'
            for step, value in record["seconds"].items()
        )
        total = f"{sum(record['seconds'].values()):.3f}"
        rows.append((_text(record["round"]), f'<div class="bar">{spans}</div>', total))
    key = " ".join(f'<span style="color:{colour[s]}">&#9632;</span> {escape(s)}' for s in steps)
    return f"<h2>Seconds of the server</h2><p>{key}</p>" + _table(("round", "", "seconds"), rows)
