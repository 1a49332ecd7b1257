"""The certificate authority of one federation.

A certificate says who its holder is and nothing else: the CA takes a public key from whoever asks,
and sets name, purpose, dates and all extensions itself (RFC 5280).
"""

import ipaddress
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256, Hash
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedfog.files import write_atomically
from fedfog.service import ServiceError

NAME = "FedFog CA"
LIFE = timedelta(days=20 * 365)
# For peers whose clock is slow.
EARLY = timedelta(minutes=5)


class CAError(ServiceError):
    """A file of the CA is missing or damaged; the text names it and says what to do."""


class CA:
    """A certificate authority with its key in memory."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self.certificate = certificate
        self._key = key
        self._key_identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())

    @classmethod
    def create(cls, folder: Path, owner: int = -1) -> Self:
        """Make a CA and keep it in `folder`: `ca.crt`, and `ca.key` for its owner only.

        Raises:
            OSError: the folder cannot be written.
        """
        key = new_key()
        name = _name(NAME)
        builder = _builder(key.public_key(), name, name, datetime.now(UTC) + LIFE)
        ca = x509.BasicConstraints(ca=True, path_length=0)
        certificate = (
            builder.add_extension(ca, critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .sign(key, SHA256())
        )
        # The certificate last: where it is, the key is.
        write_atomically(folder / "ca.key", key_pem(key), mode=0o600, owner=owner)
        write_atomically(folder / "ca.crt", pem(certificate), mode=0o644, owner=owner)
        return cls(certificate, key)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The CA in `folder`, made here or brought by the user (a P-256 key without a password).

        Raises:
            CAError: one of its files is missing, damaged, or not of the other.
        """
        certificate = load_certificate(folder / "ca.crt")
        path = folder / "ca.key"
        try:
            key = load_pem_private_key(path.read_bytes(), None)
        except (OSError, TypeError, ValueError) as error:
            raise _unreadable(path, error) from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise CAError(f"{path}: the CA's key has to be an elliptic curve's, such as P-256")
        if key.public_key() != certificate.public_key():
            raise CAError(f"{path} is not the key of ca.crt beside it")
        return cls(certificate, key)

    def sign(
        self,
        public_key: ec.EllipticCurvePublicKey,
        common_name: str,
        seconds: float,
        server_names: Sequence[str] = (),
    ) -> x509.Certificate:
        """Certify that `common_name` holds the key, from five minutes ago until in `seconds`.

        Args:
            server_names: host names and addresses of a server, whose certificate then identifies
                no client; without any, it is a client's and identifies no server.
        """
        until = min(
            datetime.now(UTC) + timedelta(seconds=seconds), self.certificate.not_valid_after_utc
        )
        purpose = (
            ExtendedKeyUsageOID.SERVER_AUTH if server_names else ExtendedKeyUsageOID.CLIENT_AUTH
        )
        builder = (
            _builder(public_key, _name(common_name), self.certificate.subject, until)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=True)
            .add_extension(self._key_identifier, critical=False)
        )
        if server_names:
            names = x509.SubjectAlternativeName([_general_name(name) for name in server_names])
            builder = builder.add_extension(names, critical=False)
        return builder.sign(self._key, SHA256())

    def crl(self, revoked: Iterable[int]) -> bytes:
        """The list of revoked serial numbers as PEM. It is valid as long as the CA: past its
        `nextUpdate`, nobody could connect."""
        now = datetime.now(UTC)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(now - EARLY)
            .next_update(self.certificate.not_valid_after_utc)
            .add_extension(self._key_identifier, critical=False)
            .add_extension(x509.CRLNumber(int(now.timestamp() * 1000)), critical=False)
        )
        for serial in sorted(revoked):
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now)
            builder = builder.add_revoked_certificate(entry.build())
        return builder.sign(self._key, SHA256()).public_bytes(Encoding.PEM)

    def revoked(self, path: Path) -> frozenset[int]:
        """Serial numbers in the list at `path`.

        Raises:
            CAError: the file is missing or damaged, or the list is another CA's.
        """
        try:
            crl = x509.load_pem_x509_crl(path.read_bytes())
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from error
        if not crl.is_signature_valid(self._key.public_key()):
            raise CAError(f"{path} is not of this CA")
        return frozenset(entry.serial_number for entry in crl)

    def issued(self, certificate: x509.Certificate) -> bool:
        """True if this CA signed it; its dates are not looked at."""
        try:
            certificate.verify_directly_issued_by(self.certificate)
        except (ValueError, TypeError, InvalidSignature):
            return False
        return True


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def key_hash(public_key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of the key (its SubjectPublicKeyInfo), in hex."""
    digest = Hash(SHA256())
    digest.update(public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
    return digest.finalize().hex()


def load_certificate(path: Path) -> x509.Certificate:
    """Raises CAError: the file is missing or damaged."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def common_name(certificate: x509.Certificate) -> str:
    """Its holder's name; empty if it has none or several."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if len(names) == 1 else ""


def names_of(certificate: x509.Certificate) -> frozenset[str]:
    """Host names and addresses of a server's certificate."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return frozenset()
    return frozenset(str(name.value) for name in names)


def _unreadable(path: Path, error: Exception) -> CAError:
    what = error.strerror if isinstance(error, OSError) else f"damaged: {error}"
    return CAError(f"{path} cannot be used ({what}). Bring PKI_DIR back from a backup")


def _builder(
    public_key: ec.EllipticCurvePublicKey, subject: x509.Name, issuer: x509.Name, until: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - EARLY)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)
