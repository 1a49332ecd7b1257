"""Who may join, who has joined, and who is out: the tables of enrolment (SQLite).

An answer may get lost after its commit. So each question can be asked again: the same key gets the
same certificate, and nothing is counted twice. A name belongs to the key that joined with it, until
it is revoked; a token is kept as its SHA-256.
"""

import hashlib
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from cryptography import x509

from fedfog.control import PLACE
from fedfog.service import ServiceError
from fedfog_enrolment.ca import pem

# Valid certificates that one client may have. Each renewal makes one, so they are few; without a
# limit, a hostile client could fill the disk.
MAX_VALID = 20

_SCHEMA = """
pragma journal_mode = truncate;
pragma synchronous = full;
create table if not exists token
    (hash text primary key, region text not null, expires real not null, uses int not null,
     unused int not null check (unused >= 0), revoked int not null default 0);
create table if not exists certificate
    (serial text primary key, name text not null, key text not null, token text not null,
     until real not null, pem blob not null, successor text, revoked int not null default 0);
create index if not exists key on certificate (key);
create unique index if not exists present on certificate (name)
    where successor is null and not revoked;
"""

Sign = Callable[[str], x509.Certificate]


class RegistryError(ServiceError):
    """The tables cannot be read or written; the text names the file."""


class RefusedError(Exception):
    """The question gets no certificate; the text says why."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Issued:
    """A client's certificate as PEM, and its name `region/client`."""

    name: str
    pem: bytes


@dataclass(frozen=True)
class _Token:
    hash: str
    region: str
    expires: float
    uses: int
    unused: int
    revoked: int


@dataclass(frozen=True)
class _Certificate:
    serial: str
    name: str
    key: str
    token: str
    until: float
    pem: bytes
    successor: str | None
    revoked: int

    @property
    def issued(self) -> Issued:
        return Issued(self.name, self.pem)


class Registry:
    """The tables in `path`; any thread may use them.

    Raises:
        RegistryError: at once if the file cannot be opened or is damaged, later from each method.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        # SQLite takes a file of one byte, too, for a new database.
        empty = not path.exists() or path.stat().st_size < 2
        if empty and (path.parent / PLACE).exists():
            raise self._damaged("it is empty or gone, and PKI_DIR is not new")
        with self._errors():
            path.touch(0o600)
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.executescript(_SCHEMA)
            [[found]] = self._db.execute("pragma quick_check(1)")
        if found != "ok":
            raise self._damaged(found)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    # Questions of devices

    def join(self, token: str, key: str, name: str, sign: Sign) -> Issued:
        """Certify a device that shows a token.

        Args:
            token: as the device sent it.
            key: hash of the device's public key, of which it has proved to have the private one.
            name: that the device wants; empty: one made of its key.
            sign: makes the certificate of a name `region/client`.

        Raises:
            RefusedError: it does not get one.
        """
        with self._transaction():
            shown = self._token(_hash(token))
            if shown is None or shown.revoked:
                raise RefusedError(HTTPStatus.FORBIDDEN, "the token is unknown or revoked")
            full = f"{shown.region}/{name or f'c-{key[:12]}'}"
            known = self._certificate("key = ? order by rowid desc limit 1", key)
            if known is None:
                self._use(shown)
                if self._present(full):
                    raise RefusedError(HTTPStatus.CONFLICT, f"{full} is taken by another device")
                return self._issue(full, key, shown.hash, sign)
            if known.revoked or known.name != (full if name else known.name):
                raise RefusedError(HTTPStatus.FORBIDDEN, "the key is revoked or has another name")
            present = self._present(known.name)
            assert present is not None  # a name is free only when it is revoked
            if present.until > time.time():
                if (present.key, present.token) != (key, shown.hash):
                    raise RefusedError(
                        HTTPStatus.FORBIDDEN, "the key has joined with another token, or is renewed"
                    )
                return present.issued
            if not known.name.startswith(f"{shown.region}/"):
                raise RefusedError(HTTPStatus.FORBIDDEN, "the token is for another region")
            self._use(shown, again=known.token == shown.hash)
            return self._issue(known.name, key, shown.hash, sign)

    def renew(self, serial: int, key: str, sign: Sign) -> Issued:
        """Certify a new key of the device that holds a valid certificate.

        Args:
            serial: of that certificate.

        Raises:
            RefusedError: it does not get one.
        """
        with self._transaction():
            shown = self._certificate("serial = ?", _text(serial))
            if shown is None or shown.revoked:
                raise RefusedError(HTTPStatus.FORBIDDEN, "the certificate is revoked or unknown")
            if shown.successor is not None:
                successor = self._certificate("serial = ?", shown.successor)
                if successor is None or successor.key != key or successor.successor is not None:
                    raise RefusedError(HTTPStatus.FORBIDDEN, "the certificate is superseded")
                return successor.issued
            known = self._certificate("key = ? order by rowid desc limit 1", key)
            if known and (known.revoked or known.name != shown.name):
                raise RefusedError(HTTPStatus.FORBIDDEN, "the key is revoked or has another name")
            return self._issue(shown.name, key, shown.token, sign)

    # Commands of the operator

    def learn_token(self, token: str, region: str, uses: int, expires: float) -> None:
        """Admit the devices that show a token, if it is not known yet."""
        insert = "insert or ignore into token values (?, ?, ?, ?, ?, 0)"
        with self._transaction():
            self._db.execute(insert, (_hash(token), region, expires, uses, uses))

    def create_token(self, region: str, uses: int, expires: float) -> str:
        token = secrets.token_urlsafe(32)
        self.learn_token(token, region, uses, expires)
        return token

    def revoke_token(self, token_id: str) -> bool:
        """False if there is none that is not revoked."""
        update = "update token set revoked = 1 where substr(hash, 1, 12) = ? and not revoked"
        with self._transaction():
            return self._db.execute(update, (token_id,)).rowcount > 0

    def tokens(self) -> list[tuple[str, str, int, int, float, bool]]:
        """Id, region, unused and all uses, end, revoked."""
        select = "select substr(hash, 1, 12), region, unused, uses, expires, revoked from token"
        with self._transaction():
            return self._db.execute(f"{select} order by rowid").fetchall()

    def revoke_client(self, name: str) -> str | None:
        """Revoke all certificates of a client, and free its name.

        Returns:
            Id of the token that it has joined with; None: no such client.
        """
        with self._transaction():
            newest = self._certificate("name = ? order by rowid desc limit 1", name)
            self._db.execute("update certificate set revoked = 1 where name = ?", (name,))
        return newest.token[:12] if newest else None

    def revoke_service(self, name: str, certificates: Iterable[x509.Certificate]) -> None:
        """Revoke certificates of a service, which were not given out here."""
        insert = "insert or ignore into certificate values (?, ?, '', '', ?, ?, null, 1)"
        with self._transaction():
            for one in certificates:
                until = one.not_valid_after_utc.timestamp()
                self._db.execute(insert, (_text(one.serial_number), name, until, pem(one)))

    def clients(self) -> list[tuple[str, str, float, bool]]:
        """Name, id of the token, end of the certificate, revoked."""
        select = "select name, substr(token, 1, 12), until, revoked from certificate"
        with self._transaction():
            return self._db.execute(
                f"{select} where successor is null order by name, rowid"
            ).fetchall()

    def revoked(self) -> frozenset[int]:
        """Serial numbers that are revoked and not expired."""
        select = "select serial from certificate where revoked and until > ?"
        with self._transaction():
            return frozenset(int(row[0], 16) for row in self._db.execute(select, (time.time(),)))

    def shut_out(self) -> set[str]:
        """Clients that are revoked but not expired, and whose name is nobody else's now."""
        select = (
            "select name from certificate where revoked and until > ? and name like '%/%' except "
            "select name from certificate where successor is null and not revoked"
        )
        with self._transaction():
            return {row[0] for row in self._db.execute(select, (time.time(),))}

    # Rows

    def _token(self, hashed: str) -> _Token | None:
        row = self._db.execute("select * from token where hash = ?", (hashed,)).fetchone()
        return _Token(*row) if row else None

    def _certificate(self, where: str, value: str) -> _Certificate | None:
        row = self._db.execute(f"select * from certificate where {where}", (value,)).fetchone()
        return _Certificate(*row) if row else None

    def _present(self, name: str) -> _Certificate | None:
        return self._certificate("name = ? and successor is null and not revoked", name)

    def _use(self, token: _Token, again: bool = False) -> None:
        """Raises RefusedError: the token is expired or used up.

        Args:
            again: by a device that has been counted.
        """
        if token.expires <= time.time():
            raise RefusedError(HTTPStatus.FORBIDDEN, "the token is expired")
        if again:
            return
        if token.unused < 1:
            raise RefusedError(HTTPStatus.FORBIDDEN, "the token is used up")
        self._db.execute("update token set unused = unused - 1 where hash = ?", (token.hash,))

    def _issue(self, name: str, key: str, token: str, sign: Sign) -> Issued:
        now = time.time()
        self._db.execute(
            "delete from certificate where name = ? and successor is not null and until <= ?",
            (name, now),
        )
        count = "select count(*) from certificate where name = ? and until > ?"
        if self._db.execute(count, (name, now)).fetchone()[0] >= MAX_VALID:
            raise RefusedError(
                HTTPStatus.TOO_MANY_REQUESTS, f"{name} has {MAX_VALID} valid certificates"
            )
        certificate = sign(name)
        serial = _text(certificate.serial_number)
        self._db.execute(
            "update certificate set successor = ? "
            "where name = ? and successor is null and not revoked",
            (serial, name),
        )
        until = certificate.not_valid_after_utc.timestamp()
        made = _Certificate(serial, name, key, token, until, pem(certificate), None, 0)
        insert = "insert into certificate values (?, ?, ?, ?, ?, ?, ?, ?)"
        self._db.execute(insert, tuple(vars(made).values()))
        return made.issued

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """One at a time; a refusal undoes all of it."""
        with self._lock, self._errors(), self._db:
            self._db.execute("begin immediate")
            yield

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            # SQLITE_ERROR: a table is not as made here.
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR):
                raise self._damaged(str(error)) from error
            raise RegistryError(f"{self._path}: {error} (PKI_DIR: is the disk full?)") from error

    def _damaged(self, what: str) -> RegistryError:
        return RegistryError(
            f"{self._path} is damaged ({what}). Bring PKI_DIR back from a backup; or empty it, "
            "start fedfog-pki, and have all clients join again: without this file, revoked tokens "
            "would be good again and names of devices free"
        )


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _text(serial: int) -> str:
    """SQLite's integers have 64 bits."""
    return f"{serial:x}"
