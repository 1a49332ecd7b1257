"""Which run a start of the central server takes up, and what it knows of it."""

import resource
import signal
from pathlib import Path

import numpy as np
import pytest

from fedfog.messages.codec import TensorTable
from fedfog.messages.schemas import Evaluation, RoundRecord
from fedfog.runs import History, Status
from fedfog.service import ServiceError
from fedfog.settings import CentralSettings
from fedfog_central_server.checkpoints import Checkpoint
from fedfog_central_server.results import save_summary, summarize
from fedfog_central_server.runs import Run, open_run

TABLE = TensorTable((("w", (2,)),))


def settings(folder: Path, **values: object) -> CentralSettings:
    return CentralSettings(runs_dir=folder, **values)  # type: ignore[arg-type]


def end(run: Run, status: Status) -> None:
    save_summary(run, summarize(run, status))


def record(run: Run, round: int) -> RoundRecord:
    return RoundRecord(run=run.id, round=round, regions={}, num_clients=1, num_examples=1)


def save(run: Run, round: int) -> None:
    vector = np.full(2, round, np.float32)
    run.checkpoints.save(Checkpoint(record(run, round), TABLE, vector))


def evaluation(round: int) -> Evaluation:
    return Evaluation(
        round=round,
        num_examples=1,
        loss=0.5,
        accuracy=0.5,
        auroc=0.5,
        macro_f1=0.5,
        confusion_matrix=[[1]],
    )


@pytest.mark.parametrize("status", [None, Status.STOPPED, Status.FAILED])
def test_a_run_that_is_not_completed_is_taken_up(tmp_path: Path, status: Status | None) -> None:
    first = open_run(settings(tmp_path))
    if status is not None:
        end(first, status)
    again = open_run(settings(tmp_path))
    assert (again.id, again.info.run_started) == (first.id, first.info.run_started)


def test_after_a_completed_run_a_start_begins_the_next_one(tmp_path: Path) -> None:
    first = open_run(settings(tmp_path))
    end(first, Status.COMPLETED)
    following = open_run(settings(tmp_path))
    assert following.id != first.id
    assert (tmp_path / "latest").resolve() == following.folder


def test_other_settings_begin_a_new_run(tmp_path: Path) -> None:
    """Rounds trained in two ways would be one run with a wrong description."""
    first = open_run(settings(tmp_path, learning_rate=0.1))
    assert open_run(settings(tmp_path, learning_rate=0.2)).id != first.id


def test_settings_that_do_not_define_the_run_may_change(tmp_path: Path) -> None:
    first = open_run(settings(tmp_path, regions_timeout=1.0))
    assert open_run(settings(tmp_path, regions_timeout=900.0)).id == first.id


def test_run_id_names_the_run(tmp_path: Path) -> None:
    assert open_run(settings(tmp_path, run_id="mine")).id == "mine"
    open_run(settings(tmp_path, run_id="other"))
    assert open_run(settings(tmp_path, run_id="mine")).folder == tmp_path / "mine"


def test_run_id_of_a_completed_run_is_refused(tmp_path: Path) -> None:
    end(open_run(settings(tmp_path, run_id="mine")), Status.COMPLETED)
    with pytest.raises(ServiceError, match=r"RUN_ID=mine.*completed"):
        open_run(settings(tmp_path, run_id="mine"))


def test_run_id_of_a_run_with_other_settings_is_refused(tmp_path: Path) -> None:
    open_run(settings(tmp_path, run_id="mine", seed=1))
    with pytest.raises(ServiceError, match=r"RUN_ID=mine.*SEED=1, not 2"):
        open_run(settings(tmp_path, run_id="mine", seed=2))


def test_a_new_run_is_newer_than_the_one_before_even_if_the_clock_goes_back(
    tmp_path: Path,
) -> None:
    """Everybody ignores models of a run that began earlier than the one they know."""
    first = open_run(settings(tmp_path, run_id="first"))
    path = first.folder / "settings.json"
    path.write_text(
        path.read_text().replace(str(first.info.run_started), str(first.info.run_started + 10**6))
    )
    assert (
        open_run(settings(tmp_path, run_id="second")).info.run_started
        > first.info.run_started + 10**6
    )


def make(run: Run, *rounds: int) -> None:
    """Have models made and evaluated."""
    for round in rounds:
        save(run, round)
        run.history.add(record(run, round))
        run.history.evaluated(round, evaluation(round), 0.1)
        run.history.save(run.seconds)


def written(run: Run) -> History:
    return History.model_validate_json((run.folder / "history.json").read_bytes())


def reopened(folder: Path) -> Run:
    run = open_run(settings(folder))
    run.recover()
    return run


def test_history_is_whole_after_every_round(tmp_path: Path) -> None:
    run = open_run(settings(tmp_path))
    run.history.load(-1, [])
    for round in (0, 1, 2, 3):
        make(run, round)
        history = written(run)
        assert history.initial is not None
        assert [r.round for r in history.rounds] == list(range(1, round + 1))
        assert [r.evaluation and r.evaluation.round for r in history.rounds] == [
            r.round for r in history.rounds
        ]


def test_a_round_costs_the_same_whether_it_is_the_tenth_or_the_thousandth(tmp_path: Path) -> None:
    run = open_run(settings(tmp_path))
    path = run.folder / "history.json"
    run.history.load(-1, [])

    def inode_and_growth(round: int) -> tuple[int, int]:
        before = path.stat().st_size
        run.history.add(record(run, round))
        run.history.evaluated(round, evaluation(round), 0.1)
        run.history.save(run.seconds)
        return path.stat().st_ino, path.stat().st_size - before

    first = [inode_and_growth(round) for round in range(1, 1001)]
    assert len({inode for inode, _ in first}) == 1, "the file was written anew"
    assert max(growth for _, growth in first) < 1000


def test_a_full_disk_leaves_the_history_whole_and_loses_nothing(tmp_path: Path) -> None:
    run = open_run(settings(tmp_path))
    make(run, 0, 1)
    path, size = run.folder / "history.json", (run.folder / "history.json").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))
    try:
        run.history.add(record(run, 2))
        run.history.evaluated(2, evaluation(2), 0.1)
        with pytest.raises(OSError, match="too large"):
            run.history.save(run.seconds)
        assert path.stat().st_size == size
        assert [r.round for r in written(run).rounds] == [1]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    make(run, 3)
    assert [r.round for r in written(run).rounds] == [1, 2, 3]


def test_history_knows_the_records_that_only_a_checkpoint_has(tmp_path: Path) -> None:
    """A server that dies right after a checkpoint has not written its history yet."""
    run = open_run(settings(tmp_path))
    make(run, 0, 1)
    for round in (2, 3):
        save(run, round)
    again = reopened(tmp_path)
    assert again.history.rounds == 3
    assert again.history.lacks_evaluation(3)
    again.history.close(again.seconds)
    known = [(r.round, r.evaluation is not None) for r in written(again).rounds]
    assert known == [(1, True), (2, False), (3, False)]
    # Once more, with the evaluation that was missing.
    third = reopened(tmp_path)
    third.history.evaluated(3, evaluation(3), 0.1)
    third.history.close(third.seconds)
    known = [(r.round, r.evaluation is not None) for r in written(third).rounds]
    assert known == [(1, True), (2, False), (3, True)]


def test_history_goes_back_with_the_checkpoint(tmp_path: Path) -> None:
    run = open_run(settings(tmp_path))
    make(run, 0, 1, 2)
    run.checkpoints.path(2).write_bytes(b"damaged")
    again = reopened(tmp_path)
    assert [r.round for r in written(again).rounds] == [1]
    assert [e.round for e in again.history.evaluations] == [0, 1]


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_a_torn_history_is_repaired_from_the_checkpoints(tmp_path: Path, kept: float) -> None:
    run = open_run(settings(tmp_path))
    make(run, 0, 1, 2)
    path = run.folder / "history.json"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    again = reopened(tmp_path)
    make(again, 2, 3)
    again.history.close(again.seconds)
    assert [r.round for r in written(again).rounds] == [1, 2, 3]


def test_rounds_that_a_damaged_history_has_lost_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_run(settings(tmp_path, keep_checkpoints=1))
    make(run, 0, 1, 2, 3)
    (run.folder / "history.json").write_text('{"run": "')
    reopened(tmp_path)
    assert "history_incomplete" in (said := capsys.readouterr().out)
    assert "[1, 2]" in said


def test_a_run_that_goes_back_is_another_one_for_the_other_tiers(tmp_path: Path) -> None:
    """They ignore a lower round of a run that they know. Its folder stays, and so does the new
    id at the next start."""
    run = open_run(settings(tmp_path))
    for round in (1, 2):
        save(run, round)
    run.checkpoints.path(2).write_bytes(b"damaged")
    before = (run.id, run.info.run_started)
    again = open_run(settings(tmp_path))
    again.recover()
    after = (again.id, again.info.run_started)
    assert after[0] != before[0]
    assert after[1] > before[1]
    third = open_run(settings(tmp_path))
    third.recover()
    assert (third.id, third.info.run_started) == after
    assert third.folder == run.folder
