"""Every file that a service starts from, cut off or filled with zeros at any byte, as a power loss
may leave it: what is read then is what was written, or it is refused and the log says what to do.

Files are replaced atomically and synced, so this takes a disk that does not keep its word."""

import json
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from centre import lines
from conftest import Service
from fedfog import health
from fedfog.cli.broker import LocalBroker
from fedfog.core.rounds import Newest
from fedfog.core.slots import SlotTable
from fedfog.files import next_boot
from fedfog.messages.schemas import Evaluation, PartialMeta, RoundRecord
from fedfog.runs import Status
from fedfog.service import ServiceError
from fedfog.settings import CentralSettings, ClientSettings
from fedfog_aggregator.store import PartialStore, StoreError
from fedfog_central_server.checkpoints import Checkpoint, CheckpointError, Checkpoints
from fedfog_central_server.results import save_summary, summarize
from fedfog_central_server.runs import Run, open_at_start
from fedfog_client.main import client_id_of
from fedfog_client.outbox import Outbox
from flower import partial
from wire import TABLE, constant, update

Services = Callable[..., Service]


def damaged(data: bytes, *boundaries: int) -> Iterator[bytes]:
    """`data` without its end, or with zeros there: from each byte of a short file, of a long one
    from each of the boundaries and a hundred others."""
    cuts = set(range(len(data)))
    if len(data) > 500:
        random = Random(len(data)).sample(range(len(data)), 100)
        cuts &= {0, 1, 2, len(data) - 1, *boundaries, *random}
    for cut in sorted(cuts):
        yield data[:cut]
        zeroed = data[:cut] + bytes(len(data) - cut)
        if zeroed != data:
            yield zeroed


def test_boot_ids_rise_whatever_has_become_of_their_file(tmp_path: Path) -> None:
    before = int(time.time())
    file = tmp_path / "boot"
    for data in damaged(str(before).encode()):
        file.write_bytes(data)
        boot = next_boot(tmp_path)
        assert boot >= before  # the clock has not been put back meanwhile
        assert next_boot(tmp_path) > boot
    file.write_text("not a number")
    assert next_boot(tmp_path) >= before


def test_client_keeps_one_name_and_has_its_own_while_it_owes_an_update(tmp_path: Path) -> None:
    settings = ClientSettings(state_dir=tmp_path)
    file, name = tmp_path / "client_id", client_id_of(settings)
    whole = file.read_bytes()
    for data in damaged(whole):
        file.write_bytes(data)
        now = client_id_of(settings)
        assert now != name
        assert len(now) == len(name)
        assert client_id_of(settings) == now
    Outbox(tmp_path).put(update(constant(1), constant(2), name))
    for data in damaged(whole):
        file.write_bytes(data)
        assert client_id_of(settings) == name
    file.unlink()
    assert client_id_of(settings) == name


def test_outbox_gives_back_what_was_put_in_or_nothing(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    payload = update(constant(1), constant(2), "c1")
    outbox.put(payload)
    again = Outbox(tmp_path)
    meta = again.load()
    assert meta is not None
    assert (meta.client, again.payload) == ("c1", payload)
    header = 32 + 8 + int.from_bytes(payload[:8], "little")
    for data in damaged(outbox.path.read_bytes(), 31, 32, 33, 39, 40, 41, header - 1, header):
        outbox.path.write_bytes(data)
        again = Outbox(tmp_path)
        assert again.load() is None
        assert again.payload is None
        assert not outbox.path.exists()


# The aggregator's store

SLOTS = {"a": 0, "c": 1}


def round_of(store: PartialStore, round: int) -> None:
    slots = SlotTable("run", 2, dict(SLOTS))
    store.save_cohort(Newest("run", 1, round), frozenset(SLOTS), slots, keep=2)
    store.commit("run", round, [partial(round, round, parameters=3000)], {"c": 10})


def read(folder: Path) -> tuple[object, ...]:
    """All that an aggregator reads at its start. Raises StoreError."""
    store = PartialStore(folder)
    try:
        rounds = [(store.partial("run", r), store.stored("run", r)) for r in range(1, 5)]
        return rounds, store.slots("run")
    finally:
        store.close()


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """STATE_DIR of an aggregator that was killed after three rounds."""
    folder = tmp_path / "state"
    store = PartialStore(folder)
    next_boot(folder)
    for round in (1, 2, 3):
        round_of(store, round)
    store.close()
    return folder


def outcomes(state: Path, file: str, *boundaries: int) -> tuple[list[tuple[object, ...]], int]:
    """What is read after each damage of a file of the store, and how often it was refused."""
    answers, refused = [], 0
    copy = state.with_name("copy")
    for data in damaged((state / file).read_bytes(), *boundaries):
        shutil.copytree(state, copy)
        (copy / file).write_bytes(data)
        try:
            answers.append(read(copy))
        except StoreError as error:
            refused += 1
            assert str(copy / "aggregator.db") in str(error)
            assert "from a backup" in str(error)
        shutil.rmtree(copy)
    return answers, refused


def test_damaged_store_is_refused_or_whole(state: Path) -> None:
    """A page in which nothing is may well be cut off."""
    whole = read(state)
    answers, refused = outcomes(state, "aggregator.db", 16, 99, 100, 101, 4095, 4096, 4097, 8192)
    assert refused > 200
    assert all(answer == whole for answer in answers)


def test_zeros_within_a_stored_partial_are_noticed(state: Path) -> None:
    """SQLite has no checksum of its own: to it the file is sound."""
    database = state / "aggregator.db"
    data = database.read_bytes()
    weights = constant(3, 16).tobytes()
    assert weights in data
    database.write_bytes(data.replace(weights, bytes(len(weights)), 1))
    with pytest.raises(StoreError, match="digest of the partial of round 3 is wrong"):
        read(state)


def test_store_that_is_gone_is_not_begun_anew(state: Path) -> None:
    (state / "aggregator.db").unlink()
    with pytest.raises(StoreError, match=r"aggregator\.db .* empty or gone"):
        PartialStore(state)


def test_power_loss_in_a_commit_leaves_the_rounds_before(state: Path) -> None:
    """With SQLite's journal, which a power loss leaves behind, it is as if the commit had not
    begun. With a journal that is damaged, too, the store is refused or as it was."""
    before = read(state)
    live = state.with_name("live")
    database = sqlite3.connect(state / "aggregator.db")
    database.execute("pragma journal_mode = truncate")
    database.execute("pragma cache_size = 1")  # pages go to the disk long before the commit
    database.execute("delete from partial where round < 3")
    values = ("run", 4, partial(4, 4, parameters=30_000), json.dumps({"c": 10}))
    database.execute("insert into partial values (?, ?, ?, ?)", values)
    shutil.copytree(state, live)
    database.rollback()
    database.close()
    assert (live / "aggregator.db").read_bytes() != (state / "aggregator.db").read_bytes()
    journal = (live / "aggregator.db-journal").read_bytes()
    assert read(shutil.copytree(live, state.with_name("recovered"))) == before
    answers, refused = outcomes(live, "aggregator.db-journal", 8, 12, 27, 28, 511, 512, 513)
    assert len(journal) > 4096
    assert refused > 0
    assert all(answer == before for answer in answers)


def test_aggregator_with_a_damaged_store_says_what_to_do(
    state: Path, services: Services, broker: LocalBroker
) -> None:
    database = state / "aggregator.db"
    database.write_bytes(database.read_bytes()[:5000])
    service = services("fedfog_aggregator.main", broker, state_dir=state)
    assert service.wait() == 1
    [failed] = lines(service, "service_failed")
    assert str(database) in failed["error"]
    assert "Traceback" not in service.log.read_text()


@pytest.mark.parametrize("module", ["fedfog_aggregator.main", "fedfog_bridge.main"])
def test_service_goes_on_with_a_damaged_boot_file(
    services: Services, broker: LocalBroker, tmp_path: Path, module: str
) -> None:
    first = services(module, broker)
    first.wait_for_log("mqtt_connected")
    first.kill()
    (tmp_path / module / "state" / "boot").write_bytes(bytes(10))
    again = services(module, broker)
    again.wait_for_log("mqtt_connected")
    [damage] = lines(again, "boot_file_damaged")
    assert damage["path"].endswith("state/boot")
    assert again.stop() == 0


# The central server's runs


def checkpoint(round: int) -> Checkpoint:
    meta = PartialMeta.model_validate(
        {
            "run": "run",
            "round": round,
            "region": "region_0",
            "digest": "0" * 64,
            "num_clients": 1,
            "num_examples": 7,
            "members": {"c": 7},
            "metrics": {"train_loss": 0.5},
        }
    )
    regions = {"region_0": meta} if round else {}
    record = RoundRecord(
        run="run", round=round, regions=regions, num_clients=len(regions), num_examples=7 * round
    )
    return Checkpoint(record, TABLE, constant(round), {"m_t/bias": constant(0.5, 3)})


def test_damaged_checkpoint_is_never_loaded(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(checkpoint(2))
    path = checkpoints.path(2)
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for bad in damaged(data, 7, 8, 9, header - 1, header, header + 1):
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match="round-000002"):
            checkpoints.load(2)


@pytest.fixture
def runs(tmp_path: Path) -> CentralSettings:
    """RUNS_DIR of a central server that ended its run with an error after three rounds."""
    settings = CentralSettings(runs_dir=tmp_path / "runs", run_id="run")
    run = open_at_start(settings)
    assert run is not None
    run.recover()
    for round in range(4):
        saved = checkpoint(round)
        run.checkpoints.save(saved)
        run.history.add(saved.record)
        run.history.evaluated(round, evaluation(round), 0.0)
        run.history.save(1.0)
    save_summary(run, summarize(run, Status.FAILED, "the disk is full"))
    return settings


def evaluation(round: int) -> Evaluation:
    return Evaluation(
        round=round,
        num_examples=8,
        loss=0.5,
        accuracy=0.5 + round / 100,
        auroc=0.5,
        macro_f1=0.5,
        confusion_matrix=[[4, 0], [0, 4]],
    )


def taken_up(settings: CentralSettings) -> tuple[Run, Checkpoint]:
    """The run of a start and the checkpoint that it goes on from. Raises ServiceError."""
    run = open_at_start(settings)
    assert run is not None
    found = run.recover()
    assert found is not None
    return run, found


def each_damage(settings: CentralSettings, file: str) -> Iterator[CentralSettings]:
    """Copies of RUNS_DIR, with each damage of one file of its run."""
    copy = settings.runs_dir.with_name("copy")
    for data in damaged((settings.runs_dir / "run" / file).read_bytes()):
        shutil.copytree(settings.runs_dir, copy, symlinks=True)
        (copy / "run" / file).write_bytes(data)
        yield settings.model_copy(update={"runs_dir": copy})
        shutil.rmtree(copy)


@pytest.mark.parametrize("file", ["history.json", "summary.json"])
def test_run_goes_on_whatever_has_become_of_its_results(runs: CentralSettings, file: str) -> None:
    """The records of the newest rounds are in the checkpoints, too. What is known of evaluations
    is right, and no round stands twice."""
    for settings in each_damage(runs, file):
        run, found = taken_up(settings)
        assert (run.id, found.round) == ("run", 3)
        assert found.vector.tobytes() == constant(3).tobytes()
        assert set(run.history.clients) >= {1, 2, 3}
        known = run.history.evaluations
        assert known == [evaluation(e.round) for e in known]
        assert len({e.round for e in known}) == len(known)
        json.loads((run.folder / "history.json").read_text())


def test_damaged_newest_checkpoint_is_gone_back_behind_under_a_new_id(
    runs: CentralSettings,
) -> None:
    for settings in each_damage(runs, "checkpoints/round-000003.safetensors"):
        run, found = taken_up(settings)
        assert (run.id, found.round) == ("run-r1", 2)
        assert found.vector.tobytes() == constant(2).tobytes()
        assert run.history.rounds == 2


@pytest.mark.parametrize("run_id", ["run", ""])
def test_damaged_settings_of_a_run_are_refused(runs: CentralSettings, run_id: str) -> None:
    """A new run is not begun by itself: it would look as if the old one had been lost."""
    for damaged in each_damage(runs, "settings.json"):
        settings = damaged.model_copy(update={"run_id": run_id})
        with pytest.raises(ServiceError, match=r"settings\.json is damaged: .*RUN_ID"):
            taken_up(settings)


def test_without_the_link_to_the_newest_run_it_is_found_by_its_name(runs: CentralSettings) -> None:
    (runs.runs_dir / "latest").unlink()
    run, found = taken_up(runs)
    assert (run.id, found.round) == ("run", 3)
    assert (runs.runs_dir / "latest").resolve() == run.folder


# Health


def test_damaged_health_file_is_an_answer_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "health"
    monkeypatch.setenv("HEALTH_FILE", str(file))
    for data in (*damaged(b"ready"), b"\xff\xfe"):
        file.write_bytes(data)
        assert health.main("ready") == 1
        assert health.main("live") == 0
