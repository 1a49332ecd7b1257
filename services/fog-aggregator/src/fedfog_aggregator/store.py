"""What an aggregator must not lose: its partials with their members, cohorts and slots (SQLite)."""

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fedfog.core.rounds import Stored
from fedfog.core.slots import SlotTable

_SCHEMA = """
pragma journal_mode = wal;
pragma synchronous = full;
create table if not exists cohort
    (run text, round int, clients text not null, primary key (run, round));
create table if not exists partial
    (run text, round int, payload blob not null, members text not null, primary key (run, round));
create table if not exists slots (run text primary key, slots int not null, holders text not null);
"""


class StoreError(Exception):
    """The store cannot be read or written; the text names the file."""


class AnotherOwnerError(Exception):
    """The partial of this round is already there: another process writes for this region."""


class PartialStore:
    """The store of one region, in `<state_dir>/aggregator.db`.

    Raises:
        StoreError: at once if the file cannot be opened, later from each method.
    """

    def __init__(self, state_dir: Path) -> None:
        state_dir.mkdir(parents=True, exist_ok=True)
        self.path = state_dir / "aggregator.db"
        with self._errors():
            self._db = sqlite3.connect(self.path)
            self._db.executescript(_SCHEMA)

    def close(self) -> None:
        self._db.close()

    def stored(self, run: str, round_: int) -> Stored | None:
        """Cohort and, if the round is closed, members (client -> examples) of a round."""
        key = (run, round_)
        with self._errors():
            select = "select clients from cohort where run = ? and round = ?"
            cohort = self._db.execute(select, key).fetchone()
            select = "select members from partial where run = ? and round = ?"
            members = self._db.execute(select, key).fetchone()
        if cohort is None and members is None:
            return None
        return Stored(
            frozenset(json.loads(cohort[0])) if cohort else frozenset(),
            json.loads(members[0]) if members else None,
        )

    def partial(self, run: str, round_: int) -> bytes | None:
        """The committed partial as it goes over the wire."""
        with self._errors():
            select = "select payload from partial where run = ? and round = ?"
            row = self._db.execute(select, (run, round_)).fetchone()
        return bytes(row[0]) if row else None

    def slots(self, run: str) -> SlotTable | None:
        with self._errors():
            select = "select slots, holders from slots where run = ?"
            row = self._db.execute(select, (run,)).fetchone()
        return SlotTable(run, row[0], json.loads(row[1])) if row else None

    def save_slots(self, slots: SlotTable) -> None:
        with self._errors(), self._db:
            self._put_slots(slots)

    def save_cohort(
        self, run: str, round_: int, cohort: frozenset[str], slots: SlotTable, keep: int
    ) -> None:
        """Keep the cohort of a round that opens; forget other runs and rounds before the `keep`
        newest closed ones."""
        insert = "insert or replace into cohort values (?, ?, ?)"
        with self._errors(), self._db:
            self._db.execute(insert, (run, round_, json.dumps(sorted(cohort))))
            self._put_slots(slots)
            for table in ("cohort", "partial"):
                delete = f"delete from {table} where run != ? or round < ?"
                self._db.execute(delete, (run, round_ - keep))
            self._db.execute("delete from slots where run != ?", (run,))

    def commit(self, run: str, round_: int, payload: bytes, members: Mapping[str, int]) -> None:
        """Store a partial together with its members: from here on they are accepted.

        Raises:
            AnotherOwnerError: the round has a partial already.
        """
        insert = "insert into partial values (?, ?, ?, ?)"
        try:
            with self._errors(), self._db:
                self._db.execute(insert, (run, round_, payload, json.dumps(dict(members))))
        except sqlite3.IntegrityError as error:
            raise AnotherOwnerError(
                f"{self.path} already has a partial of round {round_}: another aggregator "
                "writes for this region; stop one of them"
            ) from error

    def _put_slots(self, slots: SlotTable) -> None:
        insert = "insert or replace into slots values (?, ?, ?)"
        self._db.execute(insert, (slots.run, slots.slots, json.dumps(slots.holders)))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            raise StoreError(f"{self.path}: {error} (STATE_DIR: is the disk full?)") from error
