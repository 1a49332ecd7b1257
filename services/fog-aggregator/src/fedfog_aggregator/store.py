"""What an aggregator must not lose: its partials, and the aggregates of the regional rounds before
them, with their members; cohorts and slots (SQLite).

All of it is in one file after each commit: a write-ahead log could lose its end unnoticed, and with
it partials whose clients were told that they are accepted. A commit that finds the disk full is
undone as a whole. The space of deleted rounds is used again, so the file stays as large as
KEEP_ROUNDS and the largest model make it.
"""

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedfog.core.rounds import Newest, Stored
from fedfog.core.slots import SlotTable
from fedfog.messages.codec import CodecError, TensorMessage, decode, decode_json, digest_of
from fedfog.messages.schemas import PartialMeta

_SCHEMA = """
pragma journal_mode = truncate;
pragma synchronous = full;
create table if not exists cohort
    (run text, round int, clients text not null, primary key (run, round));
create table if not exists partial
    (run text, round int, members text not null, payload blob not null, primary key (run, round));
create table if not exists regional
    (run text, round int, fog_round int, meta text not null, payload blob not null,
    primary key (run, round, fog_round));
create table if not exists newest (run text, run_started int, round int);
create table if not exists slots (run text primary key, slots int not null, holders text not null);
"""


class StoreError(Exception):
    """The store cannot be read or written; the text names the file."""


class AnotherOwnerError(Exception):
    """The partial of this round is already there: another process writes for this region."""


class PartialStore:
    """The store of one region, in `<state_dir>/aggregator.db`.

    Raises:
        StoreError: at once if the file cannot be opened or is damaged, later from each method.
    """

    def __init__(self, state_dir: Path) -> None:
        state_dir.mkdir(parents=True, exist_ok=True)
        self.path = state_dir / "aggregator.db"
        # SQLite takes a file of one byte, too, for a new database.
        empty = not self.path.exists() or self.path.stat().st_size < 2
        if empty and (state_dir / "boot").exists():
            raise self._damaged("it is empty or gone, and STATE_DIR is not new")
        with self._errors():
            self._db = sqlite3.connect(self.path)
            self._db.executescript(_SCHEMA)
            [[found]] = self._db.execute("pragma quick_check(1)")
        if found != "ok":
            raise self._damaged(found)

    def close(self) -> None:
        self._db.close()

    def newest(self) -> Newest | None:
        """The newest round whose cohort was saved."""
        with self._errors():
            row = self._db.execute("select run, run_started, round from newest").fetchone()
        return Newest(*row) if row else None

    def stored(self, run: str, round_: int) -> Stored | None:
        """What there is of a round; of a closed one the members (client -> examples)."""
        select = "select clients from cohort where run = ? and round = ?"
        with self._errors():
            row = self._db.execute(select, (run, round_)).fetchone()
            cohort = frozenset(json.loads(row[0])) if row else frozenset()
        closed, before = self._read(run, round_), self.regional(run, round_)
        if row is None and closed is None and not before:
            return None
        members = closed[1] if closed else None
        regional = tuple(frozenset(aggregate.members) for aggregate in before)
        if closed or not before:
            return Stored(cohort, members, regional)
        newest = self.regional_aggregate(run, round_, len(before))
        return Stored(cohort, members, regional, newest.meta.digest, newest.vector)

    def regional(self, run: str, round_: int) -> list[PartialMeta]:
        """What the aggregates of the regional rounds before the partial say, in order."""
        select = "select meta from regional where run = ? and round = ? order by fog_round"
        with self._errors():
            rows = self._db.execute(select, (run, round_))
            return [decode_json(text.encode(), PartialMeta) for (text,) in rows]

    def regional_aggregate(
        self, run: str, round_: int, fog_round: int
    ) -> TensorMessage[PartialMeta]:
        """The aggregate of the newest regional round. Raises StoreError: it is gone."""
        select = "select rowid from regional where run = ? and round = ? and fog_round = ?"
        with self._errors():
            [rowid] = self._db.execute(select, (run, round_, fog_round)).fetchone()
            return self._aggregate("regional", rowid)[1]

    def partial(self, run: str, round_: int) -> bytes | None:
        """The committed partial as it goes over the wire."""
        closed = self._read(run, round_)
        return closed[0] if closed else None

    def committed(self, run: str, round_: int) -> bytes:
        """The same of a round that is known to be closed. Raises StoreError: it is gone."""
        payload = self.partial(run, round_)
        if payload is None:
            raise StoreError(f"{self.path}: the partial of round {round_} is gone")
        return payload

    def _read(self, run: str, round_: int) -> tuple[bytes, dict[str, int]] | None:
        """Payload and members of a partial, if they are what was committed."""
        select = "select rowid, members from partial where run = ? and round = ?"
        with self._errors():
            row = self._db.execute(select, (run, round_)).fetchone()
            if row is None:
                return None
            members = json.loads(row[1])
            payload, partial = self._aggregate("partial", row[0])
        meta = partial.meta
        if (meta.run, meta.round, meta.members) != (run, round_, members):
            raise self._damaged(f"the partial of round {round_} is not the one of its members")
        return payload, members

    def _aggregate(self, table: str, rowid: int) -> tuple[bytes, TensorMessage[PartialMeta]]:
        with self._db.blobopen(table, "payload", rowid, readonly=True) as blob:
            payload = blob.read()
        aggregate = decode(payload, PartialMeta)
        if digest_of(aggregate.vector) != aggregate.meta.digest:
            raise self._damaged(
                f"the digest of the {table} of round {aggregate.meta.round} is wrong"
            )
        return payload, aggregate

    def slots(self, run: str) -> SlotTable | None:
        with self._errors():
            select = "select slots, holders from slots where run = ?"
            row = self._db.execute(select, (run,)).fetchone()
            return SlotTable(run, row[0], json.loads(row[1])) if row else None

    def save_slots(self, slots: SlotTable) -> None:
        with self._errors(), self._db:
            self._put_slots(slots)

    def save_cohort(
        self, newest: Newest, cohort: frozenset[str], slots: SlotTable, keep: int
    ) -> None:
        """Keep the cohort of a round that opens; forget other runs and rounds before the `keep`
        newest closed ones."""
        run, round_ = newest.run, newest.round
        insert = "insert or replace into cohort values (?, ?, ?)"
        with self._errors(), self._db:
            self._db.execute("delete from newest")
            row = (run, newest.run_started, round_)
            self._db.execute("insert into newest values (?, ?, ?)", row)
            self._db.execute(insert, (run, round_, json.dumps(sorted(cohort))))
            self._put_slots(slots)
            for table in ("cohort", "partial"):
                delete = f"delete from {table} where run != ? or round < ?"
                self._db.execute(delete, (run, round_ - keep))
            self._db.execute("delete from regional where run != ? or round != ?", (run, round_))
            self._db.execute("delete from slots where run != ?", (run,))

    def commit(
        self,
        run: str,
        round_: int,
        payload: Sequence[bytes | memoryview],
        members: Mapping[str, int],
    ) -> None:
        """Store a partial, given in parts, together with its members: from here on they are
        accepted.

        Raises:
            AnotherOwnerError: the round has a partial already.
        """
        with self._committing(f"a partial of round {round_}"):
            self._insert("partial", (run, round_, json.dumps(dict(members))), payload)

    def commit_regional(
        self, fog_round: int, meta: PartialMeta, payload: Sequence[bytes | memoryview]
    ) -> None:
        """The same for the aggregate of a regional round before the partial.

        Raises:
            AnotherOwnerError: the regional round has one already.
        """
        at = (meta.run, meta.round, fog_round)
        # What those before it weigh is needed no more; what they say is.
        forget = "update regional set payload = '' where run = ? and round = ? and fog_round < ?"
        with self._committing(f"an aggregate of regional round {fog_round} of {meta.round}"):
            self._insert("regional", (*at, meta.to_json().decode()), payload)
            self._db.execute(forget, at)

    @contextmanager
    def _committing(self, what: str) -> Iterator[None]:
        try:
            with self._errors(), self._db:
                yield
        except sqlite3.IntegrityError as error:
            raise AnotherOwnerError(
                f"{self.path} already has {what}: another aggregator "
                "writes for this region; stop one of them"
            ) from error

    def _insert(
        self, table: str, row: Sequence[str | int], payload: Sequence[bytes | memoryview]
    ) -> None:
        # Room first, and then the parts into it: as a value, SQLite would copy them twice.
        insert = f"insert into {table} values ({'?, ' * len(row)}zeroblob(?))"
        rowid = self._db.execute(insert, (*row, sum(len(part) for part in payload))).lastrowid
        assert rowid is not None
        with self._db.blobopen(table, "payload", rowid) as blob:
            for part in payload:
                blob.write(part)

    def _put_slots(self, slots: SlotTable) -> None:
        insert = "insert or replace into slots values (?, ?, ?)"
        self._db.execute(insert, (slots.run, slots.slots, json.dumps(slots.holders)))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.IntegrityError:
            raise
        except (CodecError, ValueError, TypeError) as error:
            raise self._damaged(str(error)) from error
        except sqlite3.Error as error:
            # Without a code: a text that is no UTF-8. SQLITE_ERROR: a table is not as made here.
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR):
                raise self._damaged(str(error)) from error
            raise StoreError(f"{self.path}: {error} (STATE_DIR: is the disk full?)") from error

    def _damaged(self, what: str) -> StoreError:
        return StoreError(
            f"{self.path} is damaged ({what}). Bring STATE_DIR back from a backup; or stop the "
            "run, empty STATE_DIR and begin a new run: with an empty one, updates of this run that "
            "were accepted could be lost or counted twice"
        )
