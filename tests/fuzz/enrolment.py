"""Mutated requests at a running enrolment service, most of them over TLS."""

import random
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import psutil

from fedfog_enrolment.ca import new_key
from fuzz.live import GROWTH, LiveError, converse
from fuzz.mutator import mutants
from office import Office, request_of

JOIN, RENEW = "/v1/join", "/v1/renew"


def knock(
    folder: Path, count: int, seed: int = 1, told: Callable[[int], None] = lambda _done: None
) -> None:
    """`count` hostile requests, of strangers and of a client; then an honest one joins, and renews.

    Raises:
        LiveError: the service died, grew, or was surprised by a request.
        AssertionError: the honest device does not get in.
    """
    office = Office(folder)
    try:
        # Some mutants are good renewals: they make the one who sends them his successor.
        hostile, honest = office.device(), office.device()
        contexts = [office.client_context(), office.client_context(hostile.folder)]
        requests = Requests(office.token(uses=count), seed)
        chance, sizes = random.Random(seed), []
        process = psutil.Process(office.service.process.pid)
        for done in range(count):
            path, data = next(requests)
            context = contexts[path == RENEW]
            if chance.random() < 0.1:
                converse(office.port, data)
            else:
                _converse_tls(office.port, context, data)
            sizes.append(process.memory_info().rss)
            told(done + 1)
        tenth = max(1, count // 10)
        first, last = max(sizes[:tenth]), max(sizes[-tenth:])
        if last > first + GROWTH:
            raise LiveError(f"enrolment grows: {first} -> {last} bytes")
        office.device()
        honest.renewed()
        if (surprised := "answer_failed") in office.service.log.read_text(errors="replace"):
            raise LiveError(f"{surprised}: see {office.service.log}")
        if code := office.service.stop():
            raise LiveError(f"enrolment ended with code {code}")
    finally:
        if office.service.process.poll() is None:
            office.service.kill()


class Requests:
    """Endless pairs of path and bytes: broken HTTP, and broken JSON in good HTTP."""

    def __init__(self, token: str, seed: int) -> None:
        self._chance = random.Random(seed)
        csr = request_of(new_key())
        join = f'{{"token":"{token}","csr":{_quoted(csr)},"name":"x"}}'.encode()
        renew = f'{{"csr":{_quoted(csr)}}}'.encode()
        self._bodies = {
            path: mutants([body], seed) for path, body in ((JOIN, join), (RENEW, renew))
        }
        whole = [_post(JOIN, join), _post(RENEW, renew), b"GET /v1/health HTTP/1.1\r\n\r\n"]
        self._whole = mutants(whole, seed)

    def __next__(self) -> tuple[str, bytes]:
        path = self._chance.choice((JOIN, RENEW))
        if self._chance.random() < 0.5:
            return path, next(self._whole)
        return path, _post(path, next(self._bodies[path]))


def _quoted(text: str) -> str:
    return '"' + text.replace("\n", "\\n") + '"'


def _post(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _converse_tls(port: int, context: ssl.SSLContext, data: bytes) -> None:
    """Send, half-close, hear it out. Raises OSError: nobody listens."""
    with (
        socket.create_connection(("127.0.0.1", port), 20.0) as sock,
        context.wrap_socket(sock, server_hostname="localhost") as stream,
    ):
        try:
            stream.sendall(data)
            socket.socket.shutdown(stream, socket.SHUT_WR)
            while stream.recv(65536):
                pass
        except TimeoutError:
            raise
        except OSError:
            return
