"""`fedfog report`: the page has what the run's files say, and nothing in them becomes HTML."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedfog.cli import report

EVIL = "<script>alert(1)</script>\"'&$_$"


class Page(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words += data + "\n"


def record(round: int, text: str) -> dict[str, Any]:
    partial = {
        "num_clients": 2,
        "num_examples": 300 + round,
        "left_out": {f"late-{text}": f"too late {text}"},
        "suspicious": {f"odd-{text}": f"too far {text}"},
    }
    return {
        "round": round,
        "num_clients": 2,
        "num_examples": 300 + round,
        "train_loss": 0.5,
        "regions": {f"region-{text}": partial},
        "left_out": {f"gone-{text}": f"offline {text}"},
        "suspicious": {},
        "evaluation": {
            "round": round,
            "num_examples": 10,
            "accuracy": 0.6 + round / 10,
            "auroc": None,
            "macro_f1": 0.5,
            "loss": 0.4,
            "confusion_matrix": [[4, 1], [2, 3]],
        },
        "seconds": {f"push-{text}": 0.25, "aggregate": 0.75},
    }


def make_run(folder: Path, text: str = "") -> Path:
    folder.mkdir(parents=True)
    info = {
        "run": f"run-{text}",
        "begun": "2026-01-01",
        "settings": {"strategy": text, text: 7},
        "versions": {"torch": text},
    }
    history = {"initial": None, "rounds": [record(1, text), record(2, text)]}
    one = {"accuracy": 0.75, "worst_client": f"worst-{text}"}
    federated = {"overall": one, "regions": {f"region-{text}": one}}
    summary = {"status": "completed", "error": text, "rounds": 2, "federated": federated}
    for name, content in (("settings", info), ("history", history), ("summary", summary)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_page_of_a_run_tells_settings_rounds_and_participation(tmp_path: Path) -> None:
    page = Page(report.write(make_run(tmp_path / "run", "x")))
    for words in (
        *("Run run-x", "completed", "strategy", "0.8000"),
        *("Confusion matrix of model 2", "4 (80.0%)", "3 (60.0%)"),
        *("302", "late-x: too late x", "odd-x: too far x", "the region: offline x"),
        *("push-x", "1.000", "worst-x", "0.7500"),
    ):
        assert words in page.words


def test_page_needs_no_other_file_no_network_and_no_script(tmp_path: Path) -> None:
    page = Page(report.write(make_run(tmp_path / "run")))
    assert [link.partition(",")[0] for link in page.links] == ["data:image/png;base64"]
    assert not {"script", "link", "iframe", "object"} & set(page.tags)


def test_no_text_of_a_run_or_a_sweep_becomes_html(tmp_path: Path) -> None:
    harmless, hostile = (
        Page(report.write(make_run(tmp_path / name, text)))
        for name, text in (("harmless", "x"), ("hostile", EVIL))
    )
    assert hostile.tags == harmless.tags
    assert f"late-{EVIL}: too late {EVIL}" in hostile.words
    pages = []
    for name, text in (("a", "x"), ("b", EVIL)):
        folder = tmp_path / name
        make_run(folder / "one", text)
        plan = {
            "name": text,
            "stack": {text: text},
            "settings": {text: text},
            "axes": [text],
            "runs": {"one": {text: text, "seed": 1}},
        }
        (folder / "sweep.json").write_text(json.dumps(plan))
        pages.append(Page(report.write(folder)))
    assert pages[1].tags == pages[0].tags
    assert EVIL in pages[1].words


@pytest.mark.parametrize("missing", ["settings.json", "history.json"])
def test_folder_without_a_run_is_named(missing: str, tmp_path: Path) -> None:
    (make_run(tmp_path / "run") / missing).unlink()
    with pytest.raises(report.ReportError, match=missing):
        report.write(tmp_path / "run")


def test_damaged_file_is_an_error_not_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (make_run(tmp_path / "run") / "history.json").write_text('{"initial": null, "rounds": [1]}')
    assert report.run([tmp_path / "run"]) == 1
    assert "damaged" in capsys.readouterr().err
