"""`fedfog-guard`: changes what the broker's certificates may do, while it runs.

Mosquitto reads its access list and its list of revoked certificates again at SIGHUP, and if one of
them is missing or damaged it goes on without it: everybody may do everything. So only the guard
writes these files and sends the signal. It checks both before, and then tries whether the broker
does what they say: if not, it ends the broker, because none is better than an open one.

It runs beside the broker, as the same user. The enrolment service hands it lists through a Unix
socket (`install`); whoever reaches that can lock everybody out, so its folder is for these two.
"""

import errno
import os
import queue
import secrets
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import structlog
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.reasoncodes import ReasonCode
from pydantic import BaseModel, ConfigDict, ValidationError

from fedfog import service
from fedfog.files import write_atomically
from fedfog.health import BEAT_SECONDS, Heartbeat
from fedfog.settings import GuardSettings, load
from fedfog.transport.tls import context
from fedfog_enrolment import acl
from fedfog_enrolment.ca import CAError, load_certificate

log = structlog.get_logger()

REVOKED = "probe-revoked"
NOT_AUTHORIZED = 0x87
MAX_BYTES = 1 << 24
ASK_SECONDS, ANSWER_SECONDS, PAUSE_SECONDS = 5.0, 5.0, 0.02
# For a broker to start, to read its lists again, and to end.
START_SECONDS, PROBE_SECONDS, END_SECONDS = 60.0, 10.0, 5.0


class GuardError(service.ServiceError):
    """A list is not in force; the text says why, and whether the broker is as it was."""


class BrokerEndedError(GuardError):
    """The broker did not do what its lists say, and was ended."""


class _Lists(BaseModel):
    model_config = ConfigDict(extra="forbid")

    crl: str | None = None
    acl: str | None = None


class _Answer(BaseModel):
    error: str = ""


def install(place: Path, crl: bytes | None = None, access: str | None = None) -> None:
    """Have the guard whose socket is `place` put lists into force. When this returns, they are.

    Args:
        crl: PEM of the CA's whole list of revoked certificates; None: as it is.
        access: text of the access list (`acl.acl`); None: as it is.

    Raises:
        GuardError: they are not in force.
    """
    asked = _Lists(crl=None if crl is None else crl.decode(), acl=access)
    try:
        with Client(str(place), "AF_UNIX") as connection:
            connection.send_bytes(asked.model_dump_json().encode())
            if not connection.poll(START_SECONDS):
                raise GuardError(f"the guard at {place} has not answered for {START_SECONDS:.0f} s")
            answer = _Answer.model_validate_json(connection.recv_bytes(MAX_BYTES))
    except (OSError, EOFError, ValidationError) as error:
        raise GuardError(
            f"no guard answers at {place} ({error!r}): is fedfog-guard running beside the broker, "
            "and what does its log say?"
        ) from error
    if answer.error:
        raise GuardError(answer.error)


class Guard:
    """The two lists of one broker."""

    def __init__(self, settings: GuardSettings) -> None:
        self._pki = settings.pki_dir
        self._revoked: frozenset[int] = frozenset()
        self._broker = _Broker(settings)

    def start(self) -> None:
        """Wait for the broker, and put the lists that it has into force again.

        Raises:
            GuardError: they are not to be used, or there is no broker.
            BrokerEndedError: see `install`.
        """
        self._broker.wait(START_SECONDS)
        self.install()

    def install(self, crl: bytes | None = None, access: str | None = None) -> None:
        """Check the lists, write them, and see that the broker does what they say. None: what
        the file has.

        Raises:
            GuardError: a list is not to be used; the files and the broker are as they were.
            BrokerEndedError: the broker does not do what they say, and was ended.
        """
        began = time.monotonic()
        crl_file, acl_file = (self._pki / "broker" / name for name in ("ca.crl", "acl"))
        # Nobody could write there before the broker has read this list.
        token = secrets.token_hex(8)
        try:
            self._broker.wait(PROBE_SECONDS)  # what keeps the probes out should not end it
            checked = self._checked(crl_file.read_bytes() if crl is None else crl)
            text = acl_file.read_text() if access is None else access
            acl.check(text)
            write_atomically(crl_file, checked.public_bytes(Encoding.PEM), mode=0o644)
            write_atomically(
                acl_file, acl.with_probe(text, self._broker.own(token)).encode(), mode=0o600
            )
            self._broker.reload()
        except (OSError, ValueError, CAError, GuardError) as error:
            log.error("lists_refused", reason=str(error))
            raise GuardError(f"not installed, the broker is as it was: {error}") from error
        self._revoked = frozenset(entry.serial_number for entry in checked)
        try:
            self._broker.check(token)
        except GuardError as error:
            log.critical("broker_ended", reason=str(error))
            self._broker.end()
            raise BrokerEndedError(f"the broker was ended: {error}") from error
        log.info(
            "lists_in_force",
            revoked=len(self._revoked),
            seconds=round(time.monotonic() - began, 3),
        )

    def _checked(self, pem: bytes) -> x509.CertificateRevocationList:
        """Raises ValueError: the list would lock everybody out, or let somebody in again."""
        try:
            crl = x509.load_pem_x509_crl(pem)
        except ValueError as error:
            raise ValueError("the list of revoked certificates is damaged") from error
        ca = load_certificate(self._pki / "broker" / "ca.crt")
        key = ca.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        if crl.issuer != ca.subject or not crl.is_signature_valid(key):
            raise ValueError("the list of revoked certificates is not of our CA")
        now = datetime.now(UTC)
        if crl.last_update_utc > now or crl.next_update_utc is None or crl.next_update_utc <= now:
            raise ValueError("the list of revoked certificates is out of date")
        probe = load_certificate(self._pki / REVOKED / "tls.crt")
        if probe.not_valid_after_utc <= now:
            raise ValueError(f"the certificate of {REVOKED} has expired: fedfog-pki renews it")
        before = self._revoked | {probe.serial_number}
        if missing := before - {entry.serial_number for entry in crl}:
            raise ValueError(
                f"the list of revoked certificates lacks {len(missing)} that were revoked before"
            )
        return crl


class _Broker:
    """The process, and the view that a client has of it."""

    def __init__(self, settings: GuardSettings) -> None:
        self._pid, self._signals = settings.broker_pid, settings.broker_signals
        self._host, self._port = settings.mqtt_broker, settings.mqtt_port
        self._pki, self._topics = settings.pki_dir, settings.topics

    def own(self, token: str) -> str:
        """The one topic that the probe may write."""
        return f"{self._topics.prefix}/{acl.PROBE}/{token}"

    def wait(self, seconds: float) -> None:
        """Return when it takes the probe: before it has started, SIGHUP would end it.

        Raises:
            GuardError: it does not.
        """
        self._try_for(seconds, [])

    def reload(self) -> None:
        """Have it read its lists.

        Raises:
            OSError: there is no broker of this user, or `probe-revoked` lacks a file.
        """
        self._revoked = self._context(REVOKED)
        # In TLS 1.3 the reason comes after the handshake, and may be lost.
        self._revoked.maximum_version = ssl.TLSVersion.TLSv1_2
        self._send(signal.SIGHUP)

    def check(self, token: str) -> None:
        """Try whether it follows the lists of which the access list has this token.

        Raises:
            GuardError: it does not.
        """
        # Of two kinds: one that everybody reads, and one that is not for clients at all.
        forbidden = [self._topics.global_model, self._topics.cue]
        codes = self._try_for(PROBE_SECONDS, [self.own(token), *forbidden])
        for topic, code in zip(forbidden, codes[1:], strict=True):
            if code != NOT_AUTHORIZED:
                raise GuardError(f"it does not follow the access list: anybody may write {topic}")
        deadline = time.monotonic() + PROBE_SECONDS
        while True:
            try:
                self._visit(REVOKED, self._revoked, [])
            except ssl.SSLError as error:
                if (error.reason or "").endswith("CERTIFICATE_REVOKED"):
                    return
                raise GuardError(
                    f"it refuses a revoked certificate as another one: {error}"
                ) from error
            except OSError as error:
                if isinstance(error, TimeoutError) and time.monotonic() < deadline:
                    continue  # it is slow
                raise GuardError(
                    f"it does not say what is wrong with a revoked one: {error}"
                ) from error
            raise GuardError("it takes revoked certificates")

    def end(self) -> None:
        """Terminate it, and kill it if it still listens END_SECONDS later."""
        for number in signal.SIGTERM, signal.SIGKILL:
            with suppress(ProcessLookupError):
                self._send(number)
            deadline = time.monotonic() + END_SECONDS
            while time.monotonic() < deadline:
                try:
                    socket.create_connection((self._host, self._port), PAUSE_SECONDS).close()
                except TimeoutError:
                    continue
                except OSError:  # refused, or its container and so its name is gone
                    return
                time.sleep(PAUSE_SECONDS)
        log.critical("broker_not_ended", pid=self._pid, signals=str(self._signals))

    def _send(self, number: signal.Signals) -> None:
        """Raises ProcessLookupError: there is no broker; other OSErrors: it is not ours."""
        if self._pid is not None:
            os.kill(self._pid, number)
            return
        try:
            pipe = os.open(self._signals, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno == errno.ENXIO:
                raise ProcessLookupError(f"nobody reads {self._signals}") from error
            raise
        try:
            os.write(pipe, f"{number.name.removeprefix('SIG')}\n".encode())
        finally:
            os.close(pipe)

    def _try_for(self, seconds: float, topics: Sequence[str]) -> list[int]:
        """The codes of a visit of the probe, as soon as it gets in and may write the first topic.

        Raises:
            GuardError: it may not for so long.
        """
        deadline = time.monotonic() + seconds
        while True:
            try:
                codes = self._visit(acl.PROBE, self._context(acl.PROBE), topics)
                if not topics or codes[0] < NOT_AUTHORIZED:
                    return codes
                reason = f"it has not read the new access list: {topics[0]} is refused"
            except OSError as error:  # also when the health check has taken the session over
                reason = f"{self._host}:{self._port} does not take the probe's certificate: {error}"
            if time.monotonic() > deadline:
                raise GuardError(reason)
            time.sleep(PAUSE_SECONDS)

    def _context(self, reader: str) -> ssl.SSLContext:
        """Raises OSError: a file of the reader is missing or damaged."""
        folder = self._pki / reader
        return context(folder, folder / "tls.crt", folder / "tls.key")

    def _visit(self, name: str, tls: ssl.SSLContext, topics: Sequence[str]) -> list[int]:
        """Connect, and publish an empty message to each topic.

        Returns:
            The broker's reason code for each.

        Raises:
            OSError: the certificate is refused, the connection was cut, or there is no answer.
        """
        client = paho.Client(CallbackAPIVersion.VERSION2, name, protocol=paho.MQTTv5)
        client.tls_set_context(tls)
        connected = False
        codes: list[int] = []

        def on_connect(_c: Any, _u: Any, _f: Any, reason: ReasonCode, _p: Any) -> None:
            nonlocal connected
            connected = not reason.is_failure
            for topic in topics:
                client.publish(topic, qos=1)

        def on_publish(_c: Any, _u: Any, _mid: int, reason: ReasonCode, _p: Any) -> None:
            codes.append(reason.value)

        client.on_connect, client.on_publish = on_connect, on_publish
        deadline = time.monotonic() + ANSWER_SECONDS
        client.connect(self._host, self._port)
        try:
            while not connected or len(codes) < len(topics):
                if time.monotonic() > deadline:
                    raise TimeoutError("no answer")
                if (rc := client.loop(PAUSE_SECONDS)) != MQTTErrorCode.MQTT_ERR_SUCCESS:
                    raise ConnectionError(paho.error_string(rc))
        finally:
            client.disconnect()
        return codes


def serve(settings: GuardSettings) -> int:
    """Guard a broker until SIGTERM; returns the exit code.

    Raises:
        GuardError: the lists that it has are not to be used, or there is no broker.
        BrokerEndedError: it does not do what they say.
    """
    asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
    service.on_stop(asked.put)
    guard = Guard(settings)
    guard.start()
    place = settings.guard_socket
    place.unlink(missing_ok=True)
    listener = Listener(str(place), "AF_UNIX")
    place.chmod(0o666)  # enrolment is another user
    log.info("guard_listens", socket=str(place))
    threading.Thread(target=_listen, args=(listener, asked.put), daemon=True).start()
    heartbeat = Heartbeat()
    while True:
        heartbeat.beat("ready")
        try:
            event = asked.get(timeout=BEAT_SECONDS)
        except queue.Empty:
            continue
        if isinstance(event, service.StopRequested):
            return service.EXIT_OK
        lists, connection = event
        with connection:
            try:
                guard.install(None if lists.crl is None else lists.crl.encode(), lists.acl)
            except GuardError as error:
                _answer(connection, _Answer(error=str(error)))
                if isinstance(error, BrokerEndedError):
                    raise
            else:
                _answer(connection, _Answer())


def _listen(listener: Listener, put: Callable[[Any], None]) -> None:
    """One at a time: there is one enrolment service."""
    while True:
        connection = listener.accept()
        try:
            if not connection.poll(ASK_SECONDS):
                raise TimeoutError(f"nothing for {ASK_SECONDS:.0f} s")
            put((_Lists.model_validate_json(connection.recv_bytes(MAX_BYTES)), connection))
        except (OSError, EOFError, ValidationError) as error:
            log.warning("lists_not_understood", reason=str(error))
            connection.close()


def _answer(connection: Connection, answer: _Answer) -> None:
    try:
        connection.send_bytes(answer.model_dump_json().encode())
    except OSError as error:  # who asked has gone
        log.info("answer_not_taken", reason=str(error))


def main() -> None:
    settings = load(GuardSettings)
    service.run("guard", settings, lambda: serve(settings))


if __name__ == "__main__":
    main()
