"""Which run a start of the central server takes up, and what it knows of it."""

from pathlib import Path

import numpy as np
import pytest

from fedfog.messages.codec import TensorTable
from fedfog.messages.schemas import Evaluation, RoundRecord
from fedfog.service import ServiceError
from fedfog.settings import CentralSettings
from fedfog_central_server.checkpoints import Checkpoint
from fedfog_central_server.results import save_summary, summarize
from fedfog_central_server.runs import Run, Status, open_run

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


def test_history_knows_the_records_that_only_a_checkpoint_has(tmp_path: Path) -> None:
    """A server that dies right after a checkpoint has not written its history yet."""
    run = open_run(settings(tmp_path))
    for round in (0, 1, 2):
        save(run, round)
    run.history.add(record(run, 1))
    run.history.replace(record(run, 1).model_copy(update={"evaluation": evaluation(1)}))
    run.save_history()
    again = open_run(settings(tmp_path))
    newest = again.recover()
    assert newest is not None
    assert newest.round == 2
    known = [(r.round, r.evaluation is not None) for r in again.history.rounds]
    assert known == [(1, True), (2, False)]


def test_history_goes_back_with_the_checkpoint(tmp_path: Path) -> None:
    run = open_run(settings(tmp_path))
    for round in (1, 2):
        save(run, round)
        run.history.add(record(run, round))
    run.save_history()
    run.checkpoints.path(2).write_bytes(b"damaged")
    again = open_run(settings(tmp_path))
    again.recover()
    assert [r.round for r in again.history.rounds] == [1]


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


def test_a_damaged_history_is_rebuilt_from_the_checkpoints(tmp_path: Path) -> None:
    run = open_run(settings(tmp_path))
    for round in (0, 1, 2):
        save(run, round)
    (run.folder / "history.json").write_text('{"run": "')
    again = open_run(settings(tmp_path))
    again.recover()
    assert [r.round for r in again.history.rounds] == [1, 2]
