"""TLS with a certificate on both sides, out of the files of TLS_DIR."""

import ssl
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

OWN = "tls.crt", "tls.key"


class IdentityError(OSError):
    """A file of an identity is missing or damaged; the text names it."""


def context(tls: Path, certificate: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
    """TLS 1.2 or newer towards servers of the CA in `tls`/ca.crt, whose name is checked.

    Args:
        tls: the folder TLS_DIR.
        certificate, key: shown to the server; default: none is.

    Raises:
        IdentityError: a file is missing or damaged, or the key is not the certificate's.
    """
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    ca = tls / "ca.crt"
    try:
        made.load_verify_locations(ca)
    except OSError as error:
        raise IdentityError(f"{ca}: {_damage(error)} (TLS_DIR)") from error
    if certificate and key:
        _load(made, certificate, key)
    return made


class Identity:
    """The certificate by which a peer is known, and the CA by which it knows others.

    Args:
        tls: the folder TLS_DIR.
        own: folder of tls.crt and tls.key; default: TLS_DIR.

    Raises:
        IdentityError: as `context`.
    """

    def __init__(self, tls: Path, own: Path | None = None) -> None:
        self._ca = tls / "ca.crt"
        self._certificate, self._key = ((own or tls) / name for name in OWN)
        self._loaded = self._versions()
        self.context = context(tls, self._certificate, self._key)

    @classmethod
    def of(cls, tls: Path | None) -> Self | None:
        """The identity in TLS_DIR, if that is set."""
        return cls(tls) if tls else None

    def refresh(self) -> None:
        """Have the next handshake show what was renewed on disk. Raises IdentityError."""
        if (versions := self._versions()) != self._loaded:
            _load(self.context, self._certificate, self._key)
            self._loaded = versions

    def _versions(self) -> list[tuple[int, int]]:
        try:
            stats = [path.stat() for path in (self._certificate, self._key)]
        except OSError as error:
            raise IdentityError(f"{error.filename}: {error.strerror} (TLS_DIR)") from error
        return [(stat.st_ino, stat.st_mtime_ns) for stat in stats]

    def fault(self) -> str:
        """What is wrong with the own certificate, as far as can be told from here. The broker may
        not tell: with TLS 1.3 the handshake has succeeded on this side before it looks."""
        from cryptography import x509
        from cryptography.exceptions import InvalidSignature

        path, now = self._certificate, datetime.now(UTC)
        try:
            own, *chain = x509.load_pem_x509_certificates(path.read_bytes())
            issuers = [*chain, *x509.load_pem_x509_certificates(self._ca.read_bytes())]
        except (OSError, ValueError) as error:
            return str(error)
        if now > own.not_valid_after_utc:
            return f"{path} expired at {own.not_valid_after_utc:%Y-%m-%d %H:%M:%S} UTC"
        if now < own.not_valid_before_utc:
            return (
                f"{path} is not valid before {own.not_valid_before_utc:%Y-%m-%d %H:%M:%S} UTC: "
                "is this clock right?"
            )
        for issuer in issuers:
            try:
                own.verify_directly_issued_by(issuer)
            except (ValueError, TypeError, InvalidSignature):
                continue
            return ""
        return f"{path} is not of the CA in {self._ca}"


def _load(made: ssl.SSLContext, certificate: Path, key: Path) -> None:
    try:
        made.load_cert_chain(certificate, key, password="")  # rather an error than a prompt
    except OSError as error:
        raise IdentityError(f"{certificate}, {key}: {_damage(error)} (TLS_DIR)") from error


def _damage(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "damaged, or locked by a password").replace("_", " ").lower()
    return str(error.strerror)
