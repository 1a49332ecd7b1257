"""The demo's progress: lines that tell what happened, on a terminal with a live table below."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedfog.cli.regions import Regions
from fedfog.messages import schemas
from fedfog.messages.catalog import Message
from fedfog.runs import History

if TYPE_CHECKING:
    from fedfog.cli.federation import Options

REFRESH_SECONDS = 0.2


class Story:
    """Shows what the messages of a run say; `live` is the table, which is seen on a terminal only.

    Args:
        regions: all regions, and how many clients or regions below them each is to have.
        began: when the demo was started, on the monotonic clock.
    """

    def __init__(
        self, console: Console, regions: Mapping[str, int], options: "Options", began: float
    ) -> None:
        self._console, self._options, self._began = console, options, began
        self._regions = Regions(regions)
        self._model_came: dict[int, float] = {}
        self._evaluation: schemas.Evaluation | None = None
        self._refreshed = 0.0
        self.live = Live(
            console=console,
            auto_refresh=False,
            transient=True,
            get_renderable=self._render,
            vertical_overflow="crop",
        )

    def say(self, text: str) -> None:
        """A line with the seconds since the start."""
        line = Text(f"{time.monotonic() - self._began:7.1f} s  ", "dim").append(text, "default")
        self._console.print(line, soft_wrap=True)

    def refresh(self) -> None:
        """Draw the live table anew; not for each message of a thousand clients."""
        now = time.monotonic()
        if now - self._refreshed >= REFRESH_SECONDS / 2:
            self._refreshed = now
            self.live.refresh()

    def see(self, message: Message, now: float) -> None:
        """Learn from a message that came at `now`, and tell what is new in it."""
        region = message.region and self._regions.by_name.get(message.region)
        before = len(region.online) if region else 0
        self._regions.see(message)
        match message.meta:
            case schemas.ModelMeta(fog_round=0) as model:
                self._model(model, now)
            case schemas.RoundRecord() as record:
                self._record(record)
            case schemas.Presence() as presence if region:
                online, of = len(region.online), self._regions.expected.get(message.region or "")
                if before < online == of:
                    what = "clients" if presence.deadline is None else "regions"
                    self.say(f"{message.region}: {online} of {of} {what} online")
            case schemas.RegionReceipt(members=members) as closed:
                below = any(r.parent == message.region for r in self._regions.by_name.values())
                updates = ("partial" if below else "update") + "s" * (len(members) != 1)
                number = schemas.numbered(closed.round, closed.fog_round)
                self.say(f"{message.region}: round {number} closed with {len(members)} {updates}")

    def state(self) -> str:
        """Where the run is and whom each region waits for."""
        regions = [
            f"{name} {region.phase}"
            + (f", waits for {', '.join(region.waiting_for)}" if region.waiting_for else "")
            for name, region in self._regions.by_name.items()
        ]
        return "; ".join([f"{self._rounds_done} of {self._options.rounds} rounds done", *regions])

    @property
    def _rounds_done(self) -> int:
        return max(self._model_came, default=0)

    def _model(self, model: schemas.ModelMeta, now: float) -> None:
        if model.round in self._model_came:  # published again after a reconnect
            return
        self._model_came[model.round] = now
        self._newest(model.evaluation)
        what = "published" if model.state is schemas.RunState.TRAINING else "final"
        self.say(f"model {model.round} of {model.rounds} {what}")

    def _record(self, record: schemas.RoundRecord) -> None:
        self._newest(record.evaluation)
        if record.evaluation:
            self.say(_metrics(record.evaluation))
        for name, why in record.left_out.items():
            self.say(f"round {record.round} was done without {name}: {why}")

    def _newest(self, evaluation: schemas.Evaluation | None) -> None:
        known = self._evaluation
        if evaluation and (known is None or evaluation.round > known.round):
            self._evaluation = evaluation

    def _render(self) -> RenderableType:
        done, rounds = self._rounds_done, self._options.rounds
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            f"round {min(done + 1, rounds)} of {rounds}",
            ProgressBar(rounds, done, width=40),
            f"{time.monotonic() - self._began:.1f} s",
        )
        evaluation = _metrics(self._evaluation) if self._evaluation else "no model evaluated yet"
        return Group(self._regions.table(), bar, Text(evaluation))

    def summarize(self, folder: Path) -> None:
        """Print what the run's folder and the clock say of all rounds."""
        history = History.model_validate_json((folder / "history.json").read_bytes())
        table = Table(
            *("round", "clients", "examples", "train loss"),
            *("accuracy", "AUROC", "macro-F1", "seconds"),
            box=box.SIMPLE,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        for column in table.columns:
            column.justify = "right"
        for record in history.rounds:
            e = record.evaluation
            cells = [record.train_loss, e and e.accuracy, e and e.auroc, e and e.macro_f1]
            seconds = self._seconds(record.round)
            table.add_row(
                str(record.round),
                str(record.num_clients),
                f"{record.num_examples:,}",
                *("-" if value is None else f"{value:.4f}" for value in cells),
                "-" if seconds is None else f"{seconds:.2f}",
            )
        self._console.print(table)
        line = f"{len(history.rounds)} rounds in {time.monotonic() - self._began:.1f} s"
        first, last = history.initial, history.rounds[-1].evaluation if history.rounds else None
        if first and last:
            line += f"; accuracy {_change(first.accuracy, last.accuracy)}"
            if first.loss is not None and last.loss is not None:
                line += f", loss {_change(first.loss, last.loss)}"
        self._console.print(line, soft_wrap=True)
        if history.federated and (own := history.federated.overall):
            self._console.print(
                f"{own.num_clients} clients on {own.num_examples} validation examples of their "
                f"own: accuracy {own.accuracy:.4f}, at worst {own.worst_accuracy:.4f} "
                f"({own.worst_client})",
                soft_wrap=True,
            )
        self._console.print(
            f"Results: {folder}/ (README.md is the model's card, logs/ has what each tier did)",
            soft_wrap=True,
        )

    def _seconds(self, round_: int) -> float | None:
        """From having model `round_ - 1` to having model `round_`."""
        came = self._model_came
        return came[round_] - came[round_ - 1] if {round_, round_ - 1} <= came.keys() else None


def _metrics(evaluation: schemas.Evaluation) -> str:
    named = {
        "accuracy": evaluation.accuracy,
        "AUROC": evaluation.auroc,
        "macro-F1": evaluation.macro_f1,
        "loss": evaluation.loss,
    }
    told = ", ".join(f"{name} {value:.4f}" for name, value in named.items() if value is not None)
    return f"model {evaluation.round}: {told}"


def _change(before: float, after: float) -> str:
    return f"{before:.4f} -> {after:.4f} ({after - before:+.4f})"
