"""A running enrolment service, and devices that have joined at it."""

import copy
import json
import ssl
from collections.abc import Sequence
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from conftest import Service
from fedfog.cli.broker import free_port
from fedfog.control import IdentityAnswer, IdentityCommand, ask_enrolment
from fedfog_enrolment import pki
from fedfog_enrolment.ca import key_pem, new_key, pem
from secured import context, keep

REGIONS = ["r0", "r1"]


def request_of(key: Any, subject: str = "", extensions: Sequence[x509.ExtensionType] = ()) -> str:
    """A certificate request as PEM."""
    names = [x509.NameAttribute(NameOID.COMMON_NAME, subject)] if subject else []
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(names))
    for extension in extensions:
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(key, SHA256()).public_bytes(Encoding.PEM).decode()


class Office:
    """A running enrolment service with a PKI of its own."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.folder, self.pki = folder, folder / "pki"
        self.ca = pki.ensure(self.pki, REGIONS)
        self.port = free_port()
        self._settings: dict[str, object] = {
            "PKI_DIR": self.pki,
            "REGIONS": ",".join(REGIONS),
            "ENROLMENT_PORT": self.port,
            "HEALTH_FILE": folder / "health",
            **settings,
        }
        self.service = self.start()
        self.service.wait_for_log("enrolment_ready")

    def start(self, **more: object) -> Service:
        env = {name.upper(): str(value) for name, value in (self._settings | more).items()}
        self.service = Service("fedfog_enrolment.main", self.folder / "enrolment", env)
        return self.service

    def ask(self, kind: Any, subject: str = "", **more: Any) -> IdentityAnswer:
        return ask_enrolment(self.pki, IdentityCommand(kind=kind, subject=subject, **more))

    def token(self, region: str = "r0", uses: int = 1, hours: float = 1) -> str:
        return self.ask("create token", region, uses=uses, hours=hours).token

    def unused(self) -> list[str]:
        """Of each token, `n of m` uses that are left."""
        return [row[2] for row in self.ask("tokens").rows]

    def client_context(self, identity: Path | None = None) -> ssl.SSLContext:
        ca = self.pki / f"client.{REGIONS[0]}" / "ca.crt"
        return context(identity, ca) if identity else ssl.create_default_context(cafile=ca)

    def post(
        self, path: str, body: bytes | dict[str, str], identity: Path | None = None
    ) -> tuple[int, dict[str, str]]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        client = self.client_context(identity)
        connection = HTTPSConnection("localhost", self.port, timeout=30, context=client)
        try:
            connection.request("POST", path, data)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def join(self, token: str, key: Any, name: str = "") -> tuple[int, dict[str, str]]:
        return self.post("/v1/join", {"token": token, "csr": request_of(key), "name": name})

    def device(self, name: str = "", token: str = "") -> "Device":
        return Device(self, name, token or self.token())


class Device:
    """A client that has joined."""

    def __init__(self, office: Office, name: str, token: str) -> None:
        self._office, self.token = office, token
        key = new_key()
        self._take(key, office.join(token, key, name))

    def _take(self, key: ec.EllipticCurvePrivateKey, answer: tuple[int, dict[str, str]]) -> None:
        assert answer[0] == 200, answer
        self.key, self.name, self.pem = key, answer[1]["name"], answer[1]["certificate"]
        self.certificate = x509.load_pem_x509_certificate(self.pem.encode())
        self.folder = self._office.folder / f"{self.certificate.serial_number:x}"
        keep(self.folder, key_pem(key), self.pem.encode(), pem(self._office.ca.certificate))

    def renew(self, key: ec.EllipticCurvePrivateKey) -> tuple[int, dict[str, str]]:
        return self._office.post("/v1/renew", {"csr": request_of(key)}, self.folder)

    def renewed(self) -> "Device":
        """The same client with its next certificate."""
        new, key = copy.copy(self), new_key()
        new._take(key, self.renew(key))
        return new
