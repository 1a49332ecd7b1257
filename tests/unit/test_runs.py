"""Which run a start of the central server takes up, and what it knows of it."""

import resource
import signal
from pathlib import Path

import numpy as np
import pytest

from fedfog.messages.codec import TensorTable
from fedfog.messages.schemas import Evaluation, RoundRecord
from fedfog.runs import History, Status, Summary
from fedfog.service import ServiceError
from fedfog.settings import CentralSettings
from fedfog_central_server.checkpoints import Checkpoint
from fedfog_central_server.results import save_summary, summarize
from fedfog_central_server.runs import Run, open_again, open_at_start, open_new

TABLE = TensorTable((("w", (2,)),))


def settings(folder: Path, **values: object) -> CentralSettings:
    return CentralSettings(runs_dir=folder, **values)  # type: ignore[arg-type]


def open_run(settings: CentralSettings) -> Run:
    """What a start works on."""
    run = open_at_start(settings)
    assert run is not None
    return run


def end(run: Run, status: Status, held: bool = False) -> None:
    save_summary(run, summarize(run, status, held=held))


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


def evaluated(run: Run, *accuracies: float | None) -> None:
    """These are those of model 0, 1 and so on; None: it was passed over."""
    for round, accuracy in enumerate(accuracies):
        run.history.add(record(run, round))
        found = evaluation(round).model_copy(update={"accuracy": accuracy})
        run.history.evaluated(round, None if accuracy is None else found, 0.0)


@pytest.mark.parametrize(
    ("accuracies", "last"),
    [
        ([0.5, 0.6, 0.7, 0.7, 0.6, 0.9], 5),  # an equal accuracy is no gain
        ([0.5, 0.4, 0.4], 3),  # model 0 is one to be better than
        ([0.5, 0.6, 0.5, 0.7, 0.6, 0.8], None),
        ([0.5, 0.6, None, None], 4),
        ([None, 0.6, 0.5, 0.5], 4),
    ],
)
def test_a_run_ends_a_round_after_enough_rounds_without_gain(
    tmp_path: Path, accuracies: list[float | None], last: int | None
) -> None:
    run = open_run(settings(tmp_path, rounds=50, early_stop_rounds=2))
    evaluated(run, *accuracies)
    ends = [round for round in range(len(accuracies) + 1) if run.ends_early_with(round)]
    assert ends[:1] == ([] if last is None else [last])


def test_a_run_ends_early_only_if_it_is_told_to(tmp_path: Path) -> None:
    run = open_run(settings(tmp_path, rounds=5))
    evaluated(run, 0.9, 0.1, 0.1, 0.1)
    assert not any(run.ends_early_with(round) for round in range(6))
    patient = open_run(settings(tmp_path, rounds=3, early_stop_rounds=2))
    evaluated(patient, 0.9, 0.1, 0.1)
    assert not patient.ends_early_with(3)  # it was the last one anyway


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
        run.checkpoints.prune(run.history.written)


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


def test_rounds_that_are_faster_than_their_evaluation_are_all_in_the_history(
    tmp_path: Path,
) -> None:
    """A server that dies before PyTorch is loaded, after more rounds than checkpoints are kept."""
    run = open_run(settings(tmp_path, keep_checkpoints=1))
    run.history.load(-1, [])
    make(run, 0)
    for round in (1, 2, 3, 4):
        save(run, round)
        run.history.add(record(run, round))
    run.history.evaluated(1, evaluation(1), 0.1)
    run.history.save(run.seconds)
    run.checkpoints.prune(run.history.written)
    again = reopened(tmp_path)
    again.history.close(again.seconds)
    assert [r.round for r in written(again).rounds] == [1, 2, 3, 4]


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


def test_a_rewind_is_told_in_history_and_summary(tmp_path: Path) -> None:
    run = open_run(settings(tmp_path))
    make(run, 0, 1, 2)
    run.checkpoints.path(2).write_bytes(b"damaged")
    again = reopened(tmp_path)
    end(again, Status.STOPPED)
    [rewind] = written(again).rewinds
    assert (rewind.from_round, rewind.to_round) == (2, 1)
    assert (rewind.before, rewind.after) == (run.id, again.id)
    assert "round 2 is damaged" in rewind.why
    summary = Summary.model_validate_json((run.folder / "summary.json").read_bytes())
    assert summary.rewinds == [rewind]


def test_a_crash_in_a_rewind_does_not_hide_it(tmp_path: Path) -> None:
    """The damaged file is moved away only when the rewind is on record."""
    run = open_run(settings(tmp_path))
    make(run, 0, 1, 2)
    damaged = run.checkpoints.path(2)
    damaged.write_bytes(b"damaged")
    # The crash: nothing can be written from here on.
    (run.folder / ".settings.json.tmp").mkdir()
    with pytest.raises(OSError):
        reopened(tmp_path)
    assert damaged.exists()


def test_the_run_that_was_worked_on_last_keeps_its_id(tmp_path: Path) -> None:
    run = open_run(settings(tmp_path))
    make(run, 0, 1)
    end(run, Status.STOPPED, held=True)
    again = open_again(settings(tmp_path), run.info.run)
    again.recover()
    assert (again.id, again.info.run_started) == (run.id, run.info.run_started)
    assert again.history.rounds == 1


def test_a_run_that_goes_on_after_another_one_is_a_new_one_for_the_other_tiers(
    tmp_path: Path,
) -> None:
    """They ignore what began before the run that they know, and have forgotten the open round."""
    first = open_new(settings(tmp_path), "first", {})
    make(first, 0, 1)
    end(first, Status.STOPPED, held=True)
    second = open_new(settings(tmp_path), "second", {})
    make(second, 0)
    end(second, Status.STOPPED, held=True)
    again = open_again(settings(tmp_path), "first")
    again.recover()
    assert again.id == "first-r1"
    assert again.info.run_started > second.info.run_started
    [rewind] = written(again).rewinds
    assert (rewind.from_round, rewind.to_round, rewind.before) == (1, 1, "first")
    assert (tmp_path / "latest").resolve() == first.folder
    # Now it is the one that was worked on last.
    third = open_again(settings(tmp_path), "first")
    third.recover()
    assert third.id == "first-r1"


def test_a_run_that_was_stopped_by_command_is_left_by_a_restart(tmp_path: Path) -> None:
    run = open_run(settings(tmp_path))
    make(run, 0, 1)
    end(run, Status.STOPPED, held=True)
    assert open_at_start(settings(tmp_path)) is None
    again = open_again(settings(tmp_path), run.info.run)
    # From here on it is like any other run: also a killed server goes on with it.
    assert open_run(settings(tmp_path)).id == again.id


def test_with_exit_when_finished_a_start_goes_on_with_a_stopped_run(tmp_path: Path) -> None:
    """Nobody could order it otherwise."""
    run = open_run(settings(tmp_path))
    end(run, Status.STOPPED, held=True)
    assert open_run(settings(tmp_path, exit_when_finished=True)).id == run.id


def test_a_submitted_run_goes_on_after_a_crash(tmp_path: Path) -> None:
    """Its settings are not those of the environment, but the environment has not changed."""
    environment = settings(tmp_path, run_id="mine")
    end(open_run(environment), Status.COMPLETED)
    submitted = open_new(environment, "other", {"rounds": 7, "learning_rate": 0.5})
    again = open_run(environment)
    assert again.id == submitted.id
    assert (again.settings.rounds, again.settings.learning_rate) == (7, 0.5)


def test_a_run_of_an_older_fedfog_had_the_defaults_of_what_it_did_not_record(
    tmp_path: Path,
) -> None:
    old = open_run(settings(tmp_path))
    for name in ("optimizer", "partition", "tau"):
        del old.info.settings[name], old.info.environment[name]
    old.save_info()
    again = open_run(settings(tmp_path))
    assert again.id == old.id
    assert again.settings.optimizer == "adam"
    assert open_run(settings(tmp_path, optimizer="sgd")).id != old.id


def test_a_resumed_run_goes_on_after_a_crash(tmp_path: Path) -> None:
    """Also if the environment has changed since it was begun."""
    old = open_new(settings(tmp_path), "old", {"seed": 5})
    environment = settings(tmp_path, rounds=9)
    open_run(environment)
    open_again(environment, "old")
    again = open_run(environment)
    assert again.info.run == old.info.run
    assert (again.settings.seed, again.settings.rounds) == (5, old.settings.rounds)


@pytest.mark.parametrize(
    "chosen",
    [
        {"rounds": 0},
        {"task": "ecg5000-5class"},
        {"strategy": 3},
        {"optimizer": "lion"},
        {"tau": "0"},
    ],
)
def test_impossible_settings_of_a_run_are_refused_by_name(
    tmp_path: Path, chosen: dict[str, object]
) -> None:
    with pytest.raises(ServiceError, match=next(iter(chosen)).upper()):
        open_new(settings(tmp_path), "run", chosen)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["Upper", "a/b", "..", "run-r1", "x" * 56])
def test_names_that_no_run_can_have_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ServiceError, match="name"):
        open_new(settings(tmp_path), name, {})


def test_only_a_run_that_can_go_on_is_resumed(tmp_path: Path) -> None:
    run = open_new(settings(tmp_path), "done", {})
    with pytest.raises(ServiceError, match="already"):
        open_new(settings(tmp_path), "done", {})
    end(run, Status.COMPLETED)
    open_new(settings(tmp_path), "open", {})
    for name, reason in (("done", "completed"), ("none", "no run"), ("", "no run")):
        with pytest.raises(ServiceError, match=reason):
            open_again(settings(tmp_path), name)
    with pytest.raises(ServiceError, match="TASK"):
        open_again(settings(tmp_path, task="ecg5000-5class"), "open")
