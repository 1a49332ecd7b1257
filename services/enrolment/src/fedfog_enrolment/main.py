"""Entry point of the enrolment service."""

import glob
import queue
import shutil
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog

from fedfog import service
from fedfog.control import Asked, Control, IdentityAnswer, IdentityCommand, identity_command
from fedfog.health import BEAT_SECONDS, Heartbeat
from fedfog.settings import EnrolmentSettings, load
from fedfog_enrolment.ca import CA, load_certificate
from fedfog_enrolment.http import Enrolment, Server, no_clients
from fedfog_enrolment.lists import Lists
from fedfog_enrolment.registry import Registry

log = structlog.get_logger()


class Office:
    """Does what the operator asks for."""

    def __init__(self, registry: Registry, lists: Lists, settings: EnrolmentSettings) -> None:
        self._registry, self._lists, self._settings = registry, lists, settings

    def answer(self, asked: IdentityCommand) -> IdentityAnswer:
        """Raises ServiceError or OSError: it cannot be done, or not wholly."""
        match asked.kind:
            case "create token":
                if asked.subject not in self._settings.region_list:
                    return IdentityAnswer(refused=f"{asked.subject} is not one of REGIONS")
                if asked.subject in self._settings.parents.values():
                    return IdentityAnswer(refused=no_clients(asked.subject))
                until = time.time() + asked.hours * 3600
                token = self._registry.create_token(asked.subject, asked.uses, until)
                log.info("token_created", region=asked.subject, uses=asked.uses)
                return IdentityAnswer(token=token)
            case "revoke token":
                if not self._registry.revoke_token(asked.subject):
                    return IdentityAnswer(refused=f"There is no valid token {asked.subject}.")
                log.info("token_revoked", token=asked.subject)
                return IdentityAnswer(note="Clients that joined with it stay.")
            case "tokens":
                return IdentityAnswer(
                    rows=[
                        [token, region, f"{unused} of {uses}", *_state(until, revoked)]
                        for token, region, unused, uses, until, revoked in self._registry.tokens()
                    ]
                )
            case "revoke client":
                revoke = self._revoke_client if "/" in asked.subject else self._revoke_service
                return revoke(asked.subject)
            case "clients":
                return IdentityAnswer(
                    rows=[
                        [name, token, *_state(until, revoked)]
                        for name, token, until, revoked in self._registry.clients()
                    ]
                )

    def _revoke_client(self, name: str) -> IdentityAnswer:
        began = time.monotonic()
        token = self._registry.revoke_client(name)
        if token is None:
            return IdentityAnswer(refused=f"There is no client {name}: see `fedfog client list`.")
        self._lists.put_in_force([name])
        log.info("client_revoked", name=name, seconds=round(time.monotonic() - began, 3))
        return IdentityAnswer(
            note=f"It joined with token {token}. Whoever has that, too, can join under a new name "
            f"as long as it is valid: `fedfog token revoke {token}`"
        )

    def _revoke_service(self, name: str) -> IdentityAnswer:
        paths = (self._settings.pki_dir / "ca").glob(f"{glob.escape(name)}.*.crt")
        certificates = [load_certificate(path) for path in paths]
        if not certificates:
            return IdentityAnswer(refused=f"There is no service {name}, and no client without a /.")
        self._registry.revoke_service(name, certificates)
        self._lists.put_in_force([name])
        log.info("service_revoked", name=name, certificates=len(certificates))
        return IdentityAnswer(
            note="fedfog-pki makes it a new certificate at its next start, and a bridge a new key, "
            "which the central server admits at its next start."
        )


def _state(until: float, revoked: bool) -> list[str]:
    state = "revoked" if revoked else "valid" if until > time.time() else "expired"
    return [f"{datetime.fromtimestamp(until, UTC):%Y-%m-%d %H:%M:%S}", state]


def serve(settings: EnrolmentSettings) -> int:
    """Enrol devices until SIGTERM; returns the exit code.

    Raises:
        ServiceError: a file of PKI_DIR is missing or damaged.
        OSError: the address is taken, or PKI_DIR cannot be written.
    """
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    service.on_stop(events.put)
    pki = settings.pki_dir
    ca = CA.load(pki / "ca")
    registry = Registry(pki / "ca" / "enrolment.db")
    lists = Lists(settings, ca, registry)
    office = Office(registry, lists, settings)
    enrolment = Enrolment(ca, registry, settings)
    folder = Path(tempfile.mkdtemp(prefix="fedfog-"))  # mode 0700
    address = settings.enrolment_host, settings.enrolment_port
    server = Server(address, pki / "enrolment", pki / "ca" / "ca.crt", enrolment)
    control = Control(folder, pki / "ca", events.put, identity_command)
    threading.Thread(target=server.serve_forever, name="https", daemon=True).start()
    log.info("enrolment_ready", host=address[0], port=address[1], regions=settings.regions)
    heartbeat = Heartbeat()
    try:
        _try_to_put_in_force(lists)
        while True:
            heartbeat.beat("ready")
            try:
                event = events.get(timeout=BEAT_SECONDS)
            except queue.Empty:
                _try_to_put_in_force(lists)
                continue
            if not isinstance(event, Asked):
                return service.EXIT_OK
            try:
                answer = office.answer(event.command)
            except (service.ServiceError, OSError) as error:
                log.error("command_failed", command=event.command.kind, error=str(error))
                answer = IdentityAnswer(refused=f"Not done, or not wholly; ask again: {error}")
            event.answer(answer)
    finally:
        control.close()
        server.server_close()
        registry.close()
        shutil.rmtree(folder, ignore_errors=True)


def _try_to_put_in_force(lists: Lists) -> None:
    try:
        lists.put_in_force()
    except (service.ServiceError, OSError) as error:  # the broker may come later
        log.warning("revocations_not_in_force", reason=str(error))


def main() -> None:
    settings = load(EnrolmentSettings)
    service.run("enrolment", settings, lambda: serve(settings))


if __name__ == "__main__":
    main()
