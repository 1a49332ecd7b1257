"""The identity of a client: a key that never leaves its state folder, and a certificate for it.

The folder `identity` has `tls.crt` and `tls.key`, as TLS_DIR would, and `next.key`, for which a
certificate is being asked for. It is there before anybody is asked, so that an answer that was lost
can be asked for again; it becomes `tls.key` after its certificate has become `tls.crt`.
"""

import heapq
import json
import random
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http import HTTPStatus
from http.client import HTTPException, HTTPSConnection
from pathlib import Path
from ssl import SSLCertVerificationError, SSLContext
from urllib.parse import urlsplit

import structlog
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from fedfog.files import sync_folder, write_atomically
from fedfog.service import ServiceError
from fedfog.settings import ClientSettings
from fedfog.transport import tls
from fedfog.transport.mqtt import reconnect_delays
from fedfog_client.events import Failed, Ready

log = structlog.get_logger()

FOLDER = "identity"
# Share of a certificate's life after which a new one is asked for; random, because the clients of
# a fleet may have started at once.
RENEW_AT = 0.6, 2 / 3
REQUESTS_AT_ONCE = 8
ANSWER_SECONDS, ANSWER_BYTES = 10.0, 1 << 16
LONGEST_WAIT = 10.0


class RefusedError(ServiceError):
    """Enrolment does not admit this client; the text says why and what to do."""


class UnavailableError(Exception):
    """Enrolment does not answer as it should, for now."""


def certified_name(settings: ClientSettings) -> str | None:
    """Name in the certificate that a process's only client has; None: there is none yet.

    Raises:
        ServiceError: it is not the name of a client, or of another REGION or CLIENT_ID.
    """
    if settings.clients_per_process > 1:
        return None
    assert settings.tls_dir
    path = settings.state_dir / FOLDER if settings.enrolment_url else settings.tls_dir
    path /= "tls.crt"
    try:
        name = _name_of(_read_certificate(path), settings.region, str(path))
    except FileNotFoundError:
        return None
    except ValueError as error:
        log.warning("certificate_damaged", path=str(path), reason=str(error))
        return None
    if settings.client_id not in ("", name):
        raise ServiceError(f"{path} is for client {name}, but CLIENT_ID is {settings.client_id}")
    return name


def _name_of(certificate: x509.Certificate, region: str, where: str) -> str:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    common_name = str(names[0].value) if names else ""
    of_region, slash, client = common_name.partition("/")
    if not slash:
        raise ServiceError(f"{where}: {common_name!r} is not a client's name, `region/client`")
    if of_region != region:
        raise ServiceError(
            f"{where} is for a client of region {of_region}, but REGION is {region}: correct it, "
            "or use a JOIN_TOKEN_FILE of that region and an empty STATE_DIR"
        )
    return client


class Identities(threading.Thread):
    """Gets and renews the certificates of all clients of a process.

    Args:
        state_dirs: by the clients' names.
        report: told of each `Ready` and `Failed`.

    A renewed certificate is for the next connect. The broker does not end a session because its
    certificate has expired, and to end it here would cost a client the round: what is on its way
    to a socket that is closed makes the system reset the connection, and the broker, which then
    may not read the DISCONNECT any more, publishes the will.
    """

    def __init__(
        self,
        settings: ClientSettings,
        state_dirs: Mapping[str, Path],
        report: Callable[[Ready | Failed], None],
    ) -> None:
        super().__init__(name="identities", daemon=True)
        self._report = report
        self._holders = {name: _Holder(settings, name, d) for name, d in state_dirs.items()}
        self._due = [(0.0, name) for name in state_dirs]  # by the clock, as certificates are
        self._changed = threading.Condition()

    def run(self) -> None:
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            while True:
                pool.submit(self._keep, self._holders[self._next()])

    def _next(self) -> str:
        """Wait for the client whose time comes first."""
        with self._changed:
            while (wait := self._due[0][0] - time.time() if self._due else LONGEST_WAIT) > 0:
                self._changed.wait(min(wait, LONGEST_WAIT))
            return heapq.heappop(self._due)[1]

    def _keep(self, holder: "_Holder") -> None:
        try:
            ready, due = holder.step()
        except Exception as error:  # noqa: BLE001 (it ends the client, in the main thread)
            if isinstance(error, OSError) and not isinstance(error, tls.IdentityError):
                error = ServiceError(f"{error} (STATE_DIR)")
            self._report(Failed(holder.client, error))
            return
        if ready:
            self._report(ready)
        with self._changed:
            heapq.heappush(self._due, (due, holder.client))
            self._changed.notify()


class _Holder:
    """The identity of one client."""

    def __init__(self, settings: ClientSettings, client: str, state_dir: Path) -> None:
        assert settings.tls_dir
        self.client = client
        self._settings, self._tls = settings, settings.tls_dir
        self._folder = state_dir / FOLDER
        self._certificate, self._key, self._next_key = (
            self._folder / name for name in ("tls.crt", "tls.key", "next.key")
        )
        self._ready = False
        self._first_delay, _ = reconnect_delays()
        self._delay = self._first_delay
        self._waiting_since: float | None = None

    def step(self) -> tuple[Ready | None, float]:
        """Do what is due; returns the identity when it is there for the first time, and when
        something is due again.

        Raises:
            ServiceError: the client is not admitted, or, at its start, enrolment does not answer
                for MQTT_TIMEOUT seconds.
            OSError: a file cannot be read or written.
        """
        present = self._usable()
        if present is None or self._ready:
            try:
                present = self._obtain(present)
            except UnavailableError as error:
                return None, self._wait(error)
        was_ready, self._ready = self._ready, True
        self._waiting_since, self._delay = None, self._first_delay
        return None if was_ready else Ready(self.client, present), self._renew_at()

    def _wait(self, reason: UnavailableError) -> float:
        now = time.monotonic()
        since = self._waiting_since = self._waiting_since or now
        limit, url = self._settings.mqtt_timeout, self._settings.enrolment_url
        if not self._ready and now - since > limit:
            raise ServiceError(
                f"no certificate from {url} (ENROLMENT_URL) for {limit:.0f} s (MQTT_TIMEOUT): "
                f"{reason}"
            ) from reason
        log.warning(
            "enrolment_unavailable",
            client=self.client,
            url=url,
            reason=str(reason),
            seconds=round(now - since, 1),
        )
        delay, self._delay = self._delay, min(2 * self._delay, LONGEST_WAIT)
        return time.time() + delay

    def _usable(self) -> tls.Identity | None:
        """The identity that is there, if it can be shown to anybody."""
        if not self._certificate.exists():
            return None
        try:
            self._adopt_key()
            identity = tls.Identity(self._tls, self._folder)
            fault = identity.fault()
        except (ValueError, tls.IdentityError) as error:
            fault = str(error)
        if not fault:
            return identity
        log.warning("identity_unusable", client=self.client, reason=fault)
        return None

    def _adopt_key(self) -> None:
        """Make `next.key` the key, if the certificate is for it."""
        if self._next_key.exists() and _read_key(self._next_key).public_key() == (
            _read_certificate(self._certificate).public_key()
        ):
            self._next_key.replace(self._key)
            sync_folder(self._folder)

    def _renew_at(self) -> float:
        # Its own start is early, for peers whose clock is slow.
        obtained = self._certificate.stat().st_mtime
        until = _read_certificate(self._certificate).not_valid_after_utc.timestamp()
        due = obtained + random.uniform(*RENEW_AT) * (until - obtained)
        return max(due, time.time() + self._first_delay)

    def _obtain(self, present: tls.Identity | None) -> tls.Identity:
        """Get a certificate: for a new key with the present one, without one by a token.

        Raises:
            RefusedError, UnavailableError, OSError
        """
        certificate = self._renew() if present else self._join()
        write_atomically(self._certificate, certificate.public_bytes(Encoding.PEM))
        self._adopt_key()
        identity = tls.Identity(self._tls, self._folder)
        if fault := identity.fault():
            raise UnavailableError(fault)
        log.info(
            "certificate_renewed" if present else "certificate_obtained",
            client=self.client,
            until=certificate.not_valid_after_utc.isoformat(timespec="seconds"),
        )
        return identity

    def _renew(self) -> x509.Certificate:
        shown = tls.context(self._tls, self._certificate, self._key)
        return self._ask("/v1/renew", self._make_next_key(), shown)

    def _join(self) -> x509.Certificate:
        path = self._settings.join_token_file
        if path is None:
            raise ServiceError("JOIN_TOKEN_FILE is not set, and there is no valid certificate yet")
        try:
            token = path.read_text().strip()
        except OSError as error:
            raise ServiceError(f"{path}: {error.strerror} (JOIN_TOKEN_FILE)") from error
        # A name belongs to the key that it was certified for: of an expired certificate, to the
        # present key or, if the answer to a renewal was lost, to the next one.
        keys = [key for key in (self._key, self._next_key) if key.exists()]
        for key in keys[:-1]:
            with suppress(RefusedError):
                return self._ask("/v1/join", key, tls.context(self._tls), token)
        last = keys[-1] if keys else self._make_next_key()
        return self._ask("/v1/join", last, tls.context(self._tls), token)

    def _make_next_key(self) -> Path:
        if not self._next_key.exists():
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            key = ec.generate_private_key(ec.SECP256R1())
            data = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            write_atomically(self._next_key, data, mode=0o600)
        return self._next_key

    def _ask(
        self, path: str, key_file: Path, shown: SSLContext, token: str = ""
    ) -> x509.Certificate:
        """The certificate that enrolment has for a key."""
        key = _read_key(key_file)
        request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
        csr = request.sign(key, SHA256()).public_bytes(Encoding.PEM).decode()
        question = {"csr": csr} | ({"token": token, "name": self.client} if token else {})
        try:
            answer = _post(self._settings.enrolment_url, path, question, shown)
            certificate = x509.load_pem_x509_certificate(answer.encode())
        except RefusedError as error:
            raise RefusedError(f"client {self.client} gets no certificate: {error}") from error
        except ValueError as error:
            raise UnavailableError(f"no certificate in the answer: {error}") from error
        if certificate.public_key() != key.public_key():
            raise UnavailableError("the certificate in the answer is for another key")
        name = _name_of(certificate, self._settings.region, self._settings.enrolment_url)
        if name != self.client:
            raise ServiceError(f"enrolment calls this client {name} instead of {self.client}")
        return certificate


_REMEDIES: Mapping[int, str] = {
    HTTPStatus.FORBIDDEN: "it needs another token in JOIN_TOKEN_FILE (`fedfog token create`), and "
    "if it was revoked an empty STATE_DIR",
    HTTPStatus.CONFLICT: "set another CLIENT_ID, or revoke the device that has this name (`fedfog "
    "client revoke`)",
}


def _post(url: str, path: str, question: Mapping[str, str], shown: SSLContext) -> str:
    """The field `certificate` of the answer. Nothing is sent to a server of another CA.

    Raises:
        RefusedError: the answer says no.
        UnavailableError: there is none, or it is no answer.
    """
    parts = urlsplit(url)
    assert parts.hostname
    connection = HTTPSConnection(parts.hostname, parts.port, timeout=ANSWER_SECONDS, context=shown)
    try:
        connection.request("POST", path, json.dumps(question))
        response = connection.getresponse()
        status, body = response.status, response.read(ANSWER_BYTES)
    except SSLCertVerificationError as error:
        raise UnavailableError(
            f"its certificate is refused ({error.verify_message}): it has to be of the CA in "
            "TLS_DIR, and for the name in ENROLMENT_URL"
        ) from error
    except (OSError, HTTPException) as error:
        raise UnavailableError(f"{error}: is it running, and is ENROLMENT_URL right?") from error
    finally:
        connection.close()
    try:
        answer = json.loads(body)
        if status == HTTPStatus.OK:
            return str(answer["certificate"])
        said = f"{answer['error']} (HTTP {status})"
    except (ValueError, KeyError, TypeError) as error:
        raise UnavailableError(f"not an answer of enrolment (HTTP {status})") from error
    if 400 <= status < 500 and status != HTTPStatus.TOO_MANY_REQUESTS:
        raise RefusedError(f"{said}: {_REMEDIES[status]}" if status in _REMEDIES else said)
    raise UnavailableError(said)


def _read_certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Raises ServiceError: it is no longer there, or damaged."""
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError) as error:
        raise ServiceError(f"{path}: {error} (STATE_DIR)") from error
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key
