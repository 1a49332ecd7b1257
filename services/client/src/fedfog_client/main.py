"""The process of one or many clients: one loop, one queue of events, one trainer."""

import heapq
import re
import time
import uuid
from pathlib import Path
from typing import Any

import structlog

from fedfog import logs, service
from fedfog.files import write_atomically
from fedfog.health import BEAT_SECONDS, Heartbeat
from fedfog.messages.topics import is_name
from fedfog.settings import ClientSettings, load
from fedfog.transport.mqtt import TransportError
from fedfog.transport.network import Network, SessionFailed, SharedSession
from fedfog.transport.tls import Identity
from fedfog_client.client import Client, ModelReader
from fedfog_client.events import Failed, Ready
from fedfog_client.outbox import Outbox
from fedfog_client.trainer import Evaluated, Trained, Trainer, TrainingFailed

log = structlog.get_logger()


class Process:
    """Hosts the clients named in `state_dirs`, each with its own folder.

    A client that cannot go on ends alone; with the last one the process ends.
    """

    def __init__(self, settings: ClientSettings, state_dirs: dict[str, Path]) -> None:
        self._settings, self._state_dirs = settings, state_dirs
        self._network = Network()
        self._trainer = Trainer(settings, self._network.put)
        self._reader = ModelReader()
        self._joining = set(state_dirs)  # clients that have no identity yet
        self._clients: dict[str, Client] = {}
        self._by_session: dict[SharedSession | None, Client] = {}
        self._due: list[tuple[float, str]] = []
        self._finished: dict[str, bool] = {}  # clients that saw the end of a run: they took part
        self._failed = False

    def run(self) -> int:
        """Take part until SIGTERM or, with EXIT_WHEN_FINISHED, the end of a run; returns the exit
        code.

        Raises:
            ServiceError, TransportError: no client is left that could go on.
        """
        heartbeat = Heartbeat()
        service.on_stop(self._network.put)
        self._network.start()
        self._trainer.start()
        if self._settings.enrolment_url:
            from fedfog_client.identity import Identities

            Identities(self._settings, self._state_dirs, self._network.put).start()
        else:
            for name in self._state_dirs:
                self._admit(name, Identity.of(self._settings.tls_dir))
        while not self._over():
            now = time.monotonic()
            wait = min(BEAT_SECONDS, self._due[0][0] - now) if self._due else BEAT_SECONDS
            item = self._network.next(wait)
            now = time.monotonic()
            waits_for = "MQTT broker" if self._clients else "certificate"
            heartbeat.beat("ready" if self._network.connected else f"no {waits_for}")
            if item is not None:
                session, event = item
                if isinstance(event, service.StopRequested):
                    break
                self._handle(session, event, now)
                del item, event  # a large one makes room for the next
            self._tick(now)
        for client in self._clients.values():
            client.stop()
        self._network.stop()
        return service.EXIT_FAILED if self._failed else service.EXIT_OK

    def _admit(self, name: str, identity: Identity | None) -> None:
        client = Client(
            self._settings,
            name,
            self._state_dirs[name],
            self._network,
            self._reader,
            self._trainer,
            self._run_finished,
            identity,
        )
        self._joining.discard(name)
        self._clients[name] = self._by_session[client.session] = client
        client.start()

    def _handle(self, session: SharedSession | None, event: Any, now: float) -> None:
        match event:
            case SessionFailed(error):
                self._end(self._by_session.get(session), error)
                return
            case TrainingFailed(error, name):
                reason = service.ServiceError(f"training failed: {error}")
                if name is None:
                    raise reason from error
                self._end(self._clients.get(name), reason)
                return
            case Ready(name, identity):
                self._admit(name, identity)
                return
            case Failed(name, error):
                if name in self._joining:
                    self._joining.remove(name)
                    self._lose(name, error)
                self._end(self._clients.get(name), error)
                return
            case Trained(job) | Evaluated(job):
                client = self._clients.get(job.client)
            case _:
                client = self._by_session.get(session)
        if client is not None:
            self._act(client, now, event)

    def _tick(self, now: float) -> None:
        while self._due and self._due[0][0] <= now:
            due, name = heapq.heappop(self._due)
            client = self._clients.get(name)
            if client is not None and client.wake_at() == due:
                self._act(client, now, None)

    def _act(self, client: Client, now: float, event: Any | None) -> None:
        """Hand an event to a client; none: its time has come."""
        before = client.wake_at()
        try:
            if event is None:
                client.tick(now)
            else:
                client.handle(event, now)
        except TransportError as error:
            self._end(client, error)
            return
        due = client.wake_at()
        if due is not None and due != before:
            heapq.heappush(self._due, (due, client.id))

    def _end(self, client: Client | None, error: Exception) -> None:
        if client is None:  # it has ended for another reason
            return
        del self._clients[client.id], self._by_session[client.session]
        self._lose(client.id, error)
        self._finished.pop(client.id, None)
        self._trainer.cancel(client.id)
        client.stop()
        client.session.stop()

    def _lose(self, name: str, error: Exception) -> None:
        others = len(self._clients) + len(self._joining)
        if not others:
            raise error
        self._failed = True
        log.error("client_failed", client=name, error=str(error), others=others)

    def _run_finished(self, client: Client, took_part: bool) -> None:
        self._finished[client.id] = took_part

    def _over(self) -> bool:
        return (
            self._settings.exit_when_finished
            and not self._joining
            and len(self._finished) == len(self._clients)
            and any(self._finished.values())
        )


def client_id_of(settings: ClientSettings) -> str:
    """The name in the client's certificate, CLIENT_ID or, without them, the name that this client's
    state folder was given at first.

    If that is lost or damaged, the name is the one on the update in the outbox; without an update
    nobody waits for the old name, and the client takes a new one.

    Raises:
        OSError: STATE_DIR is full, or cannot be read or written.
        ServiceError: the certificate has another CLIENT_ID or REGION.
    """
    if settings.tls_dir:
        from fedfog_client.identity import certified_name

        if certified := certified_name(settings):
            return certified
    if settings.client_id:
        return settings.client_id
    path = settings.state_dir / "client_id"
    name = path.read_text(errors="replace") if path.exists() else ""
    if not re.fullmatch("c-[0-9a-f]{12}", name):
        left = Outbox(settings.state_dir).load()
        name = left.client if left else f"c-{uuid.uuid4().hex[:12]}"
        if path.exists():
            log.warning("client_id_damaged", path=str(path), new_name=name)
        write_atomically(path, name.encode())
    return name


def state_dirs(settings: ClientSettings, client_id: str) -> dict[str, Path]:
    """Names of the process's clients, and the folder of each.

    Raises:
        ServiceError: CLIENT_ID is too long for a number behind it.
    """
    count = settings.clients_per_process
    if count == 1:
        return {client_id: settings.state_dir}
    names = [f"{client_id}-{number:04d}" for number in range(count)]
    if not is_name(names[-1]):
        raise service.ServiceError(f"CLIENT_ID={client_id}: {names[-1]} is too long for a name")
    return {name: settings.state_dir / name for name in names}


def main() -> None:
    settings = load(ClientSettings)

    def body() -> int:
        try:
            client_id = client_id_of(settings)
        except OSError as error:
            raise service.ServiceError(f"{error} (STATE_DIR)") from error
        context = {"region": settings.region}
        if settings.clients_per_process == 1:
            context["client"] = client_id
        logs.configure("client", settings.log_level, settings.log_format, **context)
        service.allow_open_files(settings.clients_per_process, "CLIENTS_PER_PROCESS")
        return Process(settings, state_dirs(settings, client_id)).run()

    service.run("client", settings, body, region=settings.region)


if __name__ == "__main__":
    main()
