"""`fedfog experiment`: a sweep that is killed goes on where it was, and its table is that of an
undisturbed one. What comes after it: page, ONNX and predictions. All processes are real."""

import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from conftest import REPOSITORY
from fedfog.cli import export, predict, saved
from fedfog.cli.results import PLAN, cell, rows_of, rows_of_sweep, summarize

SWEEP = """\
seeds = [1, 2]

[stack]
clients = 2

[settings]
rounds = 8

[grid]
local = [{ name = "Adam" }, { name = "SGD", optimizer = "sgd", learning_rate = 0.1 }]
"""
RUNS = ("adam_s1", "adam_s2", "sgd_s1", "sgd_s2")
SEED, KILLS = 1, 2  # in one of the first two rounds, long before the run is done
LIMIT = 120.0  # seconds for what takes about ten on an idle machine


class Command:
    """`fedfog experiment` in a process group of its own."""

    def __init__(self, folder: Path, private: Path, sweep: str = SWEEP) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "sweep.toml").write_text(sweep)
        self.results, self.private = folder / "runs" / "sweep", private
        self._arguments = ["experiment", str(folder / "sweep.toml"), "--runs-dir"]
        self._arguments.append(str(folder / "runs"))

    def start(self) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "fedfog.cli.main", *self._arguments],
            env=os.environ | {"DATA_DIR": str(REPOSITORY / "data"), "TMPDIR": str(self.private)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def to_end(self, code: int = 0) -> str:
        process = self.start()
        try:
            said, _ = process.communicate(timeout=LIMIT)
        finally:
            process.kill()
        assert process.returncode == code, said
        return said

    def end_at(self, how: signal.Signals, place: str, run: str, round: int) -> tuple[int, str]:
        """Send a signal to the whole process group in the middle of a round of a run, or after it;
        returns exit code and output when no process is left."""
        process = self.start()
        deadline = time.monotonic() + LIMIT
        while not self._reached(place, run, round):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, f"{run} does not come to round {round}"
            time.sleep(0.005)
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, how)
        said, _ = process.communicate(timeout=LIMIT)
        assert len(family) > 5
        assert psutil.wait_procs(family, timeout=LIMIT)[1] == []
        return process.returncode, said

    def _reached(self, place: str, run: str, round: int) -> bool:
        if place == "model made":
            return (self.results / run / "checkpoints" / f"round-{round:06}.safetensors").exists()
        log, words = {
            "clients train": ("region_0-client-1", f'"run": "{run}", "round": "{round - 1}/8"'),
            "partial made": ("region_0-aggregator", f'"partial": "{run}/{round}/region_0"'),
        }[place]
        logs = self.results.glob(f"stack-*/logs/{log}.log")
        return any(words in path.read_text(errors="replace") for path in logs)

    def learned(self) -> list[dict[str, str]]:
        """The table without its times."""
        with (self.results / "results.csv").open() as file:
            rows = list(csv.DictReader(file))
        return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


@pytest.fixture
def private() -> Iterator[Path]:
    """A folder for temporary files with a short path: sockets have no long ones."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    with tempfile.TemporaryDirectory() as private:
        command = Command(tmp_path_factory.mktemp("undisturbed"), Path(private))
        command.to_end()
        yield command


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills the children of the dead")
def test_killed_sweep_goes_on_where_it_was_and_gives_the_table_of_an_undisturbed_one(
    undisturbed: Command, tmp_path: Path, private: Path
) -> None:
    rng = random.Random(SEED)
    command = Command(tmp_path, private)
    places = rng.sample(["clients train", "partial made", "model made"], KILLS)
    runs = sorted(rng.sample(RUNS, KILLS))
    kills = [(place, run, rng.randint(1, 2)) for place, run in zip(places, runs, strict=True)]
    code, told = command.end_at(signal.SIGTERM, "model made", RUNS[0], 0)
    assert (code, "the same command goes on" in told) == (128 + signal.SIGTERM, True)
    for place, run, round in kills:
        command.end_at(signal.SIGKILL, place, run, round)
    done = {run: (command.results / run / "summary.json").exists() for run in RUNS}
    assert [run for run, completed in done.items() if completed] == [*RUNS[: RUNS.index(runs[-1])]]
    histories = {
        run: (command.results / run / "history.json").read_bytes() for run in RUNS if done[run]
    }

    said = command.to_end()

    assert f"4 runs in {command.results}/, {list(done.values()).count(False)} to do" in said
    assert command.learned() == undisturbed.learned(), kills
    assert [row["run"] for row in command.learned()] == [run for run in RUNS for _ in range(9)]
    for run, history in histories.items():
        assert (command.results / run / "history.json").read_bytes() == history
    assert list(private.glob("fedfog-sweep-*")) == []


def test_table_has_the_figures_of_each_run_and_files_that_others_read(
    undisturbed: Command,
) -> None:
    from pyarrow import parquet

    table = parquet.read_table(undisturbed.results / "results.parquet").to_pylist()
    assert [row["local"] for row in table] == ["Adam"] * 18 + ["SGD"] * 18
    assert [row["seed"] for row in table] == ([1] * 9 + [2] * 9) * 2
    last = rows_of(undisturbed.results / "sgd_s2")
    wanted = [row for row in table if row["run"] == "sgd_s2"]
    assert [row["accuracy"] for row in wanted] == [row["accuracy"] for row in last]
    assert [(row["num_clients"], row["num_examples"]) for row in wanted[1:]] == [(2, 450)] * 8
    with (undisturbed.results / "results.csv").open() as file:
        assert [row["accuracy"] for row in csv.DictReader(file)] == [
            str(row["accuracy"]) for row in table
        ]
    assert (undisturbed.results / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_changed_settings_are_not_mixed_with_the_runs_that_are_there(undisturbed: Command) -> None:
    folder = undisturbed.results.parents[1]
    for before, after, told in (
        ("rounds = 8", "rounds = 2", "rounds = 8, and now it is 2"),
        ("clients = 2", "clients = 3", "sweep was begun with clients = 2, and now it is 3"),
        ("0.1", "0.2", "learning_rate = 0.1, and now it is 0.2"),
    ):
        changed = Command(folder, undisturbed.private, SWEEP.replace(before, after))
        said = changed.to_end(code=1)
        assert told in said
        assert "another name" in said
    assert "0 to do" in Command(folder, undisturbed.private).to_end()
    assert (undisturbed.results / PLAN).exists()


def test_sweep_has_a_page_with_its_summary_and_all_runs(undisturbed: Command) -> None:
    page = (undisturbed.results / "report.html").read_text()
    assert all(run in page for run in RUNS)
    for line in summarize(rows_of_sweep(undisturbed.results), ["local"]):
        assert cell(line, "accuracy") in page


def test_exported_model_is_the_one_of_pytorch_for_any_number_of_examples(
    undisturbed: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    file = tmp_path / "model.onnx"
    assert export.run(undisturbed.results / "adam_s1", file, REPOSITORY / "data") == 0
    assert "over 4,500 test examples" in capsys.readouterr().out
    task, model = saved.load(undisturbed.results / "adam_s1", REPOSITORY / "data")
    session = onnxruntime.InferenceSession(file.read_bytes())
    for count in (1, 7):
        inputs = task.test_data().tensors[0][:count]
        [outputs] = session.run(None, {"input": inputs.numpy()})
        assert abs(outputs - model(inputs).detach().numpy()).max() < 1e-5
    other = saved.load(undisturbed.results / "adam_s2", REPOSITORY / "data")[1]
    assert export.largest_difference(file.read_bytes(), other, inputs) > 1e-5


def test_model_that_differs_from_pytorch_is_not_written(
    undisturbed: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(export, "TOLERANCE", 1e-12)
    file = tmp_path / "model.onnx"
    assert export.run(undisturbed.results / "adam_s1", file, REPOSITORY / "data") == 1
    assert "is not written: largest difference" in capsys.readouterr().err
    assert not file.exists()


def test_prediction_has_a_line_for_each_beat(
    undisturbed: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, data = undisturbed.results / "adam_s1", REPOSITORY / "data"
    test_set = [
        line.split("\t")
        for line in (data / "ECG5000" / "ECG5000_TEST.tsv").read_text().splitlines()
    ]
    beats = tmp_path / "beats.csv"
    beats.write_text("\n".join(",".join(line[1:]) for line in test_set))
    assert predict.run(folder, beats, tmp_path / "out.csv", data) == 0
    assert predict.run(folder, beats, None, data) == 0
    assert capsys.readouterr().out == (tmp_path / "out.csv").read_text()
    with (tmp_path / "out.csv").open() as file:
        told = list(csv.DictReader(file))
    assert [row["example"] for row in told] == [str(n) for n in range(1, 4501)]
    assert all(0.999 < float(row["normal"]) + float(row["abnormal"]) < 1.001 for row in told)
    right = [
        (row["class"] == "normal") == (float(line[0]) == 1)
        for row, line in zip(told, test_set, strict=True)
    ]
    [*_, last] = rows_of(folder)
    assert sum(right) / len(right) == pytest.approx(last["accuracy"], abs=1e-6)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "holds no example"),
        ("1,2,3\n", "line 1: 3 numbers, not 140"),
        ("\n" + ",".join(["1"] * 141), "line 2: 141 numbers, not 140: leave the label out"),
        (",".join(["0.5"] * 139 + ["x"]), "line 1: 'x' is not a number"),
        ("\t".join(["0.5"] * 139 + [""]), "line 1: '' is not a number"),
        (",".join(["0.5"] * 139 + ["nan"]), "line 1: nan is not a finite number"),
    ],
)
def test_file_that_is_none_of_beats_is_refused_with_the_line(
    text: str,
    told: str,
    undisturbed: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    beats = tmp_path / "beats.csv"
    beats.write_text(text)
    folder = undisturbed.results / "adam_s1"
    assert predict.run(folder, beats, None, REPOSITORY / "data") == 1
    said = capsys.readouterr()
    assert told in said.err
    assert not said.out


def test_model_of_another_task_or_a_damaged_one_is_refused(
    undisturbed: Command, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed.results / "adam_s1", folder)
    model = folder / "model.safetensors"
    whole = model.read_bytes()
    model.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(saved.SavedModelError, match="digest"):
        saved.load(folder, REPOSITORY / "data")
    model.write_bytes(whole)
    path = folder / "settings.json"
    path.write_text(path.read_text().replace('"ecg5000"', '"ecg5000-5class"'))
    with pytest.raises(saved.SavedModelError, match="size mismatch"):
        saved.load(folder, REPOSITORY / "data")
    model.unlink()
    with pytest.raises(saved.SavedModelError, match="run that has ended"):
        saved.load(folder, REPOSITORY / "data")
