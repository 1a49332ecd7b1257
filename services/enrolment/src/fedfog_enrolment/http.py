"""Enrolment as an HTTPS server that bears strangers: whoever is not known yet has to reach it.

    POST /v1/join    {"token", "csr", "name"}: a certificate for a token
    POST /v1/renew   {"csr"}: a new one for the one that the TLS client shows
    GET  /v1/health

An answer is {"certificate", "name"} or {"error"}. Of a certificate request (PKCS #10), only the
public key is taken, after its signature has shown that the sender has the private one.
"""

import json
import socket
import socketserver
import ssl
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, TypeVar, cast

import structlog
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedfog.messages.topics import NAME_PATTERN
from fedfog.settings import EnrolmentSettings
from fedfog_enrolment.ca import CA, CAError, key_hash
from fedfog_enrolment.registry import Issued, RefusedError, Registry, RegistryError

log = structlog.get_logger()

MAX_BODY = 8192
MAX_CONNECTIONS = 256
# For one read or write, and for all of a connection.
SILENCE_SECONDS, WHOLE_SECONDS = 5.0, 10.0
POLL_SECONDS = 0.5

Q = TypeVar("Q", bound=BaseModel)


class _Question(BaseModel):
    model_config = ConfigDict(extra="forbid")

    csr: str


class _Join(_Question):
    token: str = Field(min_length=1)
    name: str = Field("", pattern=f"{NAME_PATTERN}|^$")


class Enrolment:
    """What the server answers.

    Raises:
        RegistryError, OSError: the first join tokens cannot be kept or read.
    """

    def __init__(self, ca: CA, registry: Registry, settings: EnrolmentSettings) -> None:
        self._ca, self._registry, self._settings = ca, registry, settings
        self._tokens_of = 0
        self._learn_tokens()

    def join(self, body: bytes) -> Issued:
        """Raises RefusedError or RegistryError."""
        asked = _parsed(_Join, body)
        key = _key_of(asked.csr)
        self._learn_tokens()
        return self._registry.join(asked.token, key_hash(key), asked.name, self._signer(key))

    def renew(self, body: bytes, certificate: bytes | None) -> Issued:
        """Raises RefusedError or RegistryError.

        Args:
            certificate: that the client has shown (DER), verified by TLS.
        """
        if certificate is None:
            raise RefusedError(HTTPStatus.UNAUTHORIZED, "the request has no client certificate")
        key = _key_of(_parsed(_Question, body).csr)
        serial = x509.load_der_x509_certificate(certificate).serial_number
        return self._registry.renew(serial, key_hash(key), self._signer(key))

    def _signer(self, key: ec.EllipticCurvePublicKey) -> Callable[[str], x509.Certificate]:
        def sign(name: str) -> x509.Certificate:
            region = name.partition("/")[0]
            if region in self._settings.parents.values():
                raise RefusedError(HTTPStatus.FORBIDDEN, no_clients(region))
            return self._ca.sign(key, name, self._settings.cert_seconds)

        return sign

    def _learn_tokens(self) -> None:
        """Take in what fedfog-pki has made, which may be while we run."""
        folder = self._settings.pki_dir / "join"
        if (changed := folder.stat().st_mtime_ns) == self._tokens_of:
            return
        uses, seconds = self._settings.join_token_uses, self._settings.join_token_hours * 3600
        for path in folder.glob("*.token"):
            expires = path.stat().st_mtime + seconds
            self._registry.learn_token(path.read_text().strip(), path.stem, uses, expires)
        self._tokens_of = changed


def no_clients(region: str) -> str:
    return f"{region} has regions below it (REGION_PARENTS), and clients join those"


def _parsed(kind: type[Q], body: bytes) -> Q:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        # Only names of ours: what was sent may be a secret in a wrong place, and this is logged.
        detail = error.errors(include_url=False, include_input=False)[0]
        fields = [name for name in detail["loc"] if name in kind.model_fields]
        reason = f"{fields[0] if fields else 'body'}: {detail['msg']}"
        raise RefusedError(HTTPStatus.BAD_REQUEST, reason) from error


def _key_of(csr: str) -> ec.EllipticCurvePublicKey:
    """The public key of a certificate request. Raises RefusedError: it is none with a P-256 key."""
    try:
        request = x509.load_pem_x509_csr(csr.encode())
        key, valid = request.public_key(), request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise RefusedError(HTTPStatus.BAD_REQUEST, "csr: not a certificate request") from error
    if not (isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)):
        raise RefusedError(HTTPStatus.BAD_REQUEST, "csr: its key has to be of the curve P-256")
    if not valid:
        raise RefusedError(HTTPStatus.BAD_REQUEST, "csr: its signature is wrong")
    return key


class Server(socketserver.ThreadingTCPServer):
    """Answers each connection in a thread of its own, from the TLS handshake on.

    Args:
        folder: of the server's tls.crt and tls.key.
        ca: file of the CA whose client certificates are looked at.

    Raises:
        CAError: one of these files is missing or damaged.
        OSError: the address cannot be had.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], folder: Path, ca: Path, enrolment: Enrolment):
        self.enrolment = enrolment
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._context.verify_mode = ssl.CERT_OPTIONAL
        try:
            self._context.load_cert_chain(folder / "tls.crt", folder / "tls.key", password="")
            self._context.load_verify_locations(ca)
        except OSError as error:
            raise CAError(
                f"{folder}/tls.crt and tls.key, {ca}: cannot be used ({error})"
            ) from error
        self._free = threading.Semaphore(MAX_CONNECTIONS)
        self._open: dict[socket.socket, float] = {}
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        while not self._free.acquire(timeout=POLL_SECONDS):
            self.service_actions()
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread to be had
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def finish_request(self, request: Any, client_address: Any) -> None:
        request.settimeout(SILENCE_SECONDS)
        with self._context.wrap_socket(
            request, server_side=True, do_handshake_on_connect=False
        ) as connection:
            self._open[connection] = time.monotonic()
            try:
                connection.do_handshake()
                _Handler(connection, client_address, self)
            finally:
                del self._open[connection]

    def service_actions(self) -> None:
        """End what lasts too long, such as one byte every few seconds."""
        for connection, since in list(self._open.items()):
            if time.monotonic() - since > WHOLE_SECONDS:
                with suppress(OSError):  # it has just ended
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if isinstance(error, OSError):  # no TLS, another CA's certificate, silence, gone
            log.info("connection_failed", peer=client_address[0], reason=str(error))
        else:
            log.error("answer_failed", peer=client_address[0], exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    """One request (HTTP/1.0: the connection ends after it)."""

    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        # At an end without a farewell, TLS forgets whom it has verified.
        self._shown = cast(ssl.SSLSocket, self.connection).getpeercert(binary_form=True)

    def do_GET(self) -> None:
        found = self.path == "/v1/health"
        self._answer(HTTPStatus.OK if found else HTTPStatus.NOT_FOUND, {})

    def do_POST(self) -> None:
        enrolment = cast(Server, self.server).enrolment
        try:
            body = self._body()
            if self.path == "/v1/join":
                issued = enrolment.join(body)
            elif self.path == "/v1/renew":
                issued = enrolment.renew(body, self._shown)
            else:
                raise RefusedError(HTTPStatus.NOT_FOUND, "no such path")
        except RefusedError as error:
            log.info("refused", peer=self.client_address[0], status=error.status, reason=str(error))
            self._answer(error.status, {"error": str(error)})
            if error.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
                self._let_it_finish()
        except RegistryError as error:
            log.error("registry_failed", error=str(error))
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": "see the log of enrolment"})
        else:
            log.info("certified", peer=self.client_address[0], name=issued.name)
            self._answer(HTTPStatus.OK, {"certificate": issued.pem.decode(), "name": issued.name})

    def _body(self) -> bytes:
        """Raises RefusedError: it is too long, which is known before it is read, or cut off."""
        try:
            length = int(self.headers["Content-Length"])
        except (TypeError, ValueError) as error:
            raise RefusedError(HTTPStatus.LENGTH_REQUIRED, "Content-Length is missing") from error
        if not 0 <= length <= MAX_BODY:
            reason = f"the body is longer than {MAX_BODY} bytes"
            raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, reason)
        return self.rfile.read(length)

    def _answer(self, status: HTTPStatus, answer: dict[str, str]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _let_it_finish(self) -> None:
        """Closed with something unread, TCP would reset the connection and the answer be lost."""
        socket.socket.shutdown(self.connection, socket.SHUT_WR)
        while socket.socket.recv(self.connection, MAX_BODY):
            pass

    def log_message(self, format: str, *args: Any) -> None:
        """Not http.server's own lines."""
