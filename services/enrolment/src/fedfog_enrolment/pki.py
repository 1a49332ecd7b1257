"""`fedfog-pki`: makes the federation's PKI at the first start, and renews it at later ones.

Each reader has a folder in PKI_DIR, so that it can be given that folder alone:
`<reader>/{ca.crt,tls.crt,tls.key}`; `broker/` also has the lists `acl` and `ca.crl` and the pipe
for its guard's signals; `crl/ca.crl`, for nginx, is enrolment's to renew, and `ca/` keeps a copy of
each service's certificate, to revoke it by; `bridge.<region>/supernode.key` is the bridge's key
at the SuperLink, whose public half is in `superlink/bridge.<region>.pub` (both as OpenSSH writes
them); `ca/` is for enrolment only;
`join/<region>.token`, for enrolment, admits the clients of a region, which start with what
`client.<region>/{ca.crt,token}` holds. What a user brought stays as it is: a CA with its key in
`ca/`, or a certificate of another CA in a reader's folder. To change the CA, empty PKI_DIR.
"""

import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import structlog
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from fedfog import service
from fedfog.files import write_atomically
from fedfog.messages.topics import Topics
from fedfog.settings import LOCAL, EnrolmentSettings, load
from fedfog_enrolment.acl import acl
from fedfog_enrolment.ca import CA, key_pem, load_certificate, names_of, new_key, pem

log = structlog.get_logger()

# Names of the servers in the compose stack: the host part of their addresses.
SERVERS = {
    "broker": "mosquitto",
    "enrolment": "enrolment",
    "superlink": "central-server",
    "nginx": "nginx",
}
REVOKED = "probe-revoked"


def ensure(
    pki_dir: Path,
    regions: Sequence[str],
    *,
    topics: Topics = Topics(),  # noqa: B008 (it is frozen)
    parents: Mapping[str, str] | None = None,
    server_names: Sequence[str] = LOCAL,
    days: float = 365,
    token_hours: float = 720,
    owners: Mapping[str, int] | None = None,
) -> CA:
    """Make what is missing, and renew what has less than a third of its life left.

    Args:
        parents: region -> region of the aggregator that takes its partials.
        server_names: host names and addresses of the servers, beside their names in the stack.
        days: life of a service's certificate.
        token_hours: life of a region's first join token.
        owners: reader, or `*` for all others -> user id that it runs as; default: our own.

    Raises:
        CAError: a file is damaged, or is missing beside another.
        OSError: `pki_dir` cannot be written.
        ValueError: regions, parents or topics make no access list.
    """
    pki = _Pki(pki_dir, owners or {})
    with pki.writing("ca") as folder:
        if not (folder / "ca.crt").exists():
            CA.create(folder, pki.owner("ca"))
        with pki.taken(folder / "ca.key", "ca"):
            ca = CA.load(folder)
    services = ["central-server", "monitor"]
    services += [f"{role}.{region}" for role in ("aggregator", "bridge") for region in regions]
    crl = pki_dir / "broker" / "ca.crl"
    before = ca.revoked(crl) if crl.exists() else frozenset()
    for reader in [*SERVERS, *services, "probe", REVOKED]:
        names = [SERVERS[reader], *server_names] if reader in SERVERS else []
        if reader != REVOKED and _serial(pki_dir / reader) in before:
            with pki.writing(reader) as folder:  # whoever has the one may have the other
                (folder / "supernode.key").unlink(missing_ok=True)
                (folder / "tls.crt").unlink()
        if _is_due(pki_dir / reader, ca, names):
            pki.certify(reader, ca, names, days)
    for reader in services:
        certificate = load_certificate(pki_dir / reader / "tls.crt")
        copy = f"{reader}.{certificate.serial_number:x}.crt"
        if ca.issued(certificate) and not (pki_dir / "ca" / copy).exists():
            pki.write("ca", copy, pem(certificate))
    for bridge in (f"bridge.{region}" for region in regions):
        _admit_bridge(pki, pki_dir / bridge, bridge)
    _write_tokens(pki, regions, token_hours)
    for region in regions:
        pki.write(f"client.{region}", "ca.crt", pem(ca.certificate))
    pki.write("broker", "acl", acl(regions, topics, parents or {}).encode(), secret=True)
    probe = load_certificate(pki_dir / REVOKED / "tls.crt").serial_number
    if probe not in before:
        pki.write("broker", "ca.crl", ca.crl(before | {probe}))
    pki.write("crl", "ca.crl", crl.read_bytes())
    with pki.writing("broker") as folder:
        if not (folder / "signals").exists():
            os.mkfifo(folder / "signals", 0o600)
            os.chown(folder / "signals", pki.owner("broker"), -1)
    return ca


class _Pki:
    """Writes files as the users that read them.

    As root it needs the capability CHOWN and no other: it takes a folder, and gives it back.
    """

    def __init__(self, folder: Path, owners: Mapping[str, int]) -> None:
        self._folder, self._owners = folder, owners

    def owner(self, reader: str) -> int:
        """User id of a reader; -1: our own. `ca`, `crl` and `join` are enrolment's."""
        if reader in ("ca", "crl", "join"):
            reader = "enrolment"
        return self._owners.get(reader, self._owners.get("*", -1))

    @contextmanager
    def writing(self, reader: str) -> Iterator[Path]:
        """The folder of a reader, which we may write meanwhile."""
        folder = self._folder / reader
        folder.mkdir(parents=True, exist_ok=True)
        with self.taken(folder, reader):
            yield folder

    @contextmanager
    def taken(self, path: Path, reader: str) -> Iterator[None]:
        owner = self.owner(reader)
        if owner >= 0:
            os.chown(path, os.getuid(), -1)
        try:
            yield
        finally:
            os.chown(path, owner, -1)

    def write(self, reader: str, name: str, data: bytes, secret: bool = False) -> None:
        with self.writing(reader) as folder:
            mode = 0o600 if secret else 0o644
            write_atomically(folder / name, data, mode=mode, owner=self.owner(reader))

    def certify(self, reader: str, ca: CA, server_names: Sequence[str], days: float) -> None:
        key = new_key()
        certificate = ca.sign(key.public_key(), reader, days * 86400, server_names)
        self.write(reader, "tls.key", key_pem(key), secret=True)
        self.write(reader, "ca.crt", pem(ca.certificate))
        self.write(reader, "tls.crt", pem(certificate))  # last: it says that the others are there
        log.info("certificate_made", name=reader, until=certificate.not_valid_after_utc.isoformat())


def _is_due(folder: Path, ca: CA, server_names: Sequence[str]) -> bool:
    """True if a reader needs a certificate of ours, and has none that will do."""
    if not (folder / "tls.crt").exists():
        return True
    certificate = load_certificate(folder / "tls.crt")
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return ca.issued(certificate) and (  # else it is the user's
        (end - datetime.now(UTC)) * 3 < end - begin
        or names_of(certificate) != set(server_names)
        or not (folder / "tls.key").exists()
    )


def _serial(folder: Path) -> int | None:
    """Of a reader's certificate; None: it has none yet."""
    path = folder / "tls.crt"
    return load_certificate(path).serial_number if path.exists() else None


def _admit_bridge(pki: _Pki, folder: Path, reader: str) -> None:
    """The key by which the SuperLink knows a bridge: Flower wants one besides the certificate."""
    path = folder / "supernode.key"
    if not path.exists():
        key = ec.generate_private_key(ec.SECP384R1())
        text = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        pki.write(reader, path.name, text, secret=True)
    with pki.taken(path, reader):
        public = load_ssh_private_key(path.read_bytes(), None).public_key()
    line = public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    pki.write("superlink", f"{reader}.pub", line)


def _write_tokens(pki: _Pki, regions: Sequence[str], hours: float) -> None:
    """A join token for each region, and a new one in time."""
    for region in regions:
        with pki.writing("join") as folder:
            path = folder / f"{region}.token"
            if path.exists() and time.time() - path.stat().st_mtime < hours * 3600 * 2 / 3:
                continue
        token = secrets.token_urlsafe(32).encode()
        pki.write(f"client.{region}", "token", token, secret=True)
        pki.write("join", path.name, token, secret=True)
        log.info("join_token_made", region=region, path=str(path))


def main() -> None:
    settings = load(EnrolmentSettings)

    def body() -> int:
        try:
            ensure(
                settings.pki_dir,
                settings.region_list,
                topics=settings.topics,
                parents=settings.parents,
                server_names=settings.server_name_list,
                days=settings.service_cert_days,
                token_hours=settings.join_token_hours,
                owners=settings.owners,
            )
        except ValueError as error:
            raise service.ServiceError(str(error)) from error
        return service.EXIT_OK

    service.run("pki", settings, body)


if __name__ == "__main__":
    main()
