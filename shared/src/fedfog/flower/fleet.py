"""Everything that uses names which Flower does not promise to keep: a node's session with the
SuperLink (Fleet API), and registering nodes, submitting and stopping a run (Control API), both in
process.

`FleetSession` speaks to the SuperLink through Flower's HTTP client itself and not through
`http_request_response`, on which the stock SuperNode is built: that one retries for ever, logs and
swallows what its body raises, and sends SIGINT to its own process when the SuperLink has been
restarted, so that only a supervisor could bring the node back.
"""

import hashlib
import importlib
import ssl
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import httpx
import structlog
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from flwr.app import Message, RecordDict
from flwr.app.message.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
    UnregisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.error import FlowerError
from flwr.supercore.exit import exit_handler
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedfog.files import write_atomically
from fedfog.transport.tls import IdentityError

if TYPE_CHECKING:
    from flwr.supercore.control import ControlHttpClient

log = structlog.get_logger()

# Flower takes a node for gone after two intervals without a heartbeat.
HEARTBEAT_INTERVAL = 30.0
HEARTBEAT_EVERY = 15.0
CALL_TIMEOUT = 20.0

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class SuperLinkLostError(Exception):
    """The SuperLink is gone or does not know this node any more: begin a new session."""


class MessageLostError(Exception):
    """This one message cannot be answered or confirmed any more: go on with the next."""


class ControlError(Exception):
    """The SuperLink refused a command; the text is its reason."""


@dataclass(frozen=True)
class NodeIdentity:
    """Who a node is to a SuperLink that speaks TLS and admits registered keys only.

    Args:
        tls: trusts the SuperLink; its certificate is for a proxy in front of it.
        key: the node's private key; the SuperLink knows the public one.
        node_file: keeps the node id of the latest session. A SuperLink gives a key one node id for
            as long as it lives, and admits it once at a time: who was killed has to sign off by
            this id, or waits a minute until the SuperLink misses its heartbeat.
    """

    tls: ssl.SSLContext
    key: ec.EllipticCurvePrivateKey
    node_file: Path

    @classmethod
    def read(cls, tls: ssl.SSLContext, key_file: Path, node_file: Path) -> Self:
        """The identity whose key, of a NIST curve, is in a file in OpenSSH's format.

        Raises:
            IdentityError: the file is no such key.
            OSError: it cannot be read.
        """
        try:
            key = load_ssh_private_key(key_file.read_bytes(), None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise IdentityError(f"{key_file} is no private key of OpenSSH: {error}") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise IdentityError(f"{key_file} is no private key of a NIST curve")
        return cls(tls, key, node_file)


class FleetSession:
    """A node's session with a SuperLink.

    `next_message` also sends the node's heartbeat, so call it at least every few seconds.

    Args:
        address: host:port of the SuperLink.
        identity: of a registered node; default: plain HTTP, with a key and a node id that are new
            in every session.

    Raises:
        SuperLinkLostError: by every method, when the session has come to its end.
    """

    def __init__(self, address: str, identity: NodeIdentity | None = None) -> None:
        self._address, self._identity = address, identity
        key = generate_key_pairs()[0] if identity is None else identity.key
        public_key = public_key_to_bytes(key.public_key())
        self._client = FleetHttpClient(
            **_way_to(address, identity.tls if identity else None),
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(key, key.public_key()),
            ],
            timeout=CALL_TIMEOUT,
        )
        try:
            if identity is None:
                request = RegisterNodeFleetRequest(public_key=public_key)
                self._call(self._client.RegisterNode, request)
            else:
                self._sign_off_former(identity)
            active = self._call(
                self._client.ActivateNode,
                ActivateNodeRequest(public_key=public_key, heartbeat_interval=HEARTBEAT_INTERVAL),
            )
            if identity is not None:
                write_atomically(identity.node_file, str(active.node_id).encode())
        except (SuperLinkLostError, OSError):
            self._client.close()
            raise
        self._node = Node(node_id=active.node_id)
        self._heartbeat_due = time.monotonic() + HEARTBEAT_EVERY

    def _sign_off_former(self, identity: NodeIdentity) -> None:
        # Without the file there was none, or this one waits until it is missed.
        with suppress(FileNotFoundError, ValueError):
            former = DeactivateNodeRequest(node_id=int(identity.node_file.read_bytes()))
            try:
                self._call(self._client.DeactivateNode, former)
            except SuperLinkLostError as error:
                # It signed off itself, or the SuperLink is another one since.
                log.debug("former_session_not_signed_off", reason=str(error))

    @property
    def node_id(self) -> int:
        return self._node.node_id

    def close(self, sign_off: bool = True) -> None:
        """End the session; with `sign_off`, the SuperLink forgets the node at once."""
        try:
            if sign_off:
                self._call(self._client.DeactivateNode, DeactivateNodeRequest(node_id=self.node_id))
                if self._identity is None:
                    request = UnregisterNodeFleetRequest(node_id=self.node_id)
                    self._call(self._client.UnregisterNode, request)
        except (SuperLinkLostError, MessageLostError) as error:
            log.info("flower_sign_off_failed", error=str(error))
        finally:
            self._client.close()

    def next_message(self) -> Message | None:
        """The next message for this node, without its content, or None. It is delivered once."""
        now = time.monotonic()
        if now >= self._heartbeat_due:
            alive = self._call(
                self._client.SendNodeHeartbeat,
                SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_INTERVAL),
            )
            if not alive.success:
                raise SuperLinkLostError(
                    f"the SuperLink at {self._address} does not know this node"
                )
            self._heartbeat_due = now + HEARTBEAT_EVERY
        answer = self._call(self._client.PullMessages, PullMessagesRequest(node=self._node))
        return message_from_proto(answer.messages_list[0]) if answer.messages_list else None

    def reply(self, message: Message, content: RecordDict) -> None:
        """Answer `message`; when this returns, the server can pull the whole reply.

        Raises:
            MessageLostError: the message expired, was answered before, or its run is over.
        """
        run_id = message.metadata.run_id
        reply = Message(content, reply_to=message)
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            tree = get_object_tree(reply)
            objects = {key: o.deflate() for key, o in get_all_nested_objects(reply).items()}
        # Deflated before it is announced: a server that looks in between backs off for a second.
        answer = self._call(
            self._client.PushMessages,
            PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[tree],
                clientapp_runtime_list=[0.0],
            ),
            forbidden=MessageLostError,
        )
        missing = set(answer.objects_to_push)
        # The handler reports success for a reply that it did not store; then it wants nothing.
        if reply.object_id not in missing:
            raise MessageLostError("the SuperLink does not wait for this reply (any more)")
        for object_id in objects.keys() & missing:
            pushed = self._call(
                self._client.PushObject,
                PushObjectRequest(
                    node=self._node,
                    run_id=run_id,
                    object_id=object_id,
                    object_content=objects[object_id],
                    session_id=answer.session_id,
                ),
                forbidden=MessageLostError,
            )
            if not pushed.stored:
                raise MessageLostError("the SuperLink did not store an object of the reply")

    def confirm(self, message: Message) -> None:
        """Let the SuperLink delete `message`. Not before its successor is in hand: until then
        the server may still be pushing its objects, and a confirm in between ends the run.

        Raises:
            MessageLostError: its run is over.
        """
        self._call(
            self._client.ConfirmMessageReceived,
            ConfirmMessageReceivedRequest(
                node=self._node,
                run_id=message.metadata.run_id,
                message_object_id=message.metadata.message_id,
            ),
            forbidden=MessageLostError,
        )

    def _call(
        self,
        method: Callable[[Request], Answer],
        request: Request,
        forbidden: type[Exception] = SuperLinkLostError,
    ) -> Answer:
        try:
            return method(request)
        except httpx.HTTPStatusError as error:
            status, reason = error.response.status_code, _reason(error)
            if status == httpx.codes.FORBIDDEN:
                raise forbidden(f"SuperLink {self._address} forbids it: {reason}") from error
            if status == httpx.codes.UNAUTHORIZED:
                reason = (
                    "it does not know this node (it was restarted, or this host's clock is more "
                    "than 5 s ahead of it or 5 minutes behind)"
                )
            elif status == httpx.codes.PRECONDITION_FAILED:
                reason += (
                    " The server has not registered this bridge's key (SUPERLINK_TLS_DIR), or "
                    "another bridge with this key is online"
                )
            raise SuperLinkLostError(
                f"SuperLink {self._address} answered {status}: {reason}"
            ) from error
        except (httpx.TransportError, ValueError) as error:
            kind = type(error).__name__
            raise SuperLinkLostError(f"SuperLink {self._address}: {kind}: {error}") from error


def _way_to(address: str, tls: ssl.SSLContext | None) -> dict[str, Any]:
    """Arguments of Flower's HTTP clients."""
    if tls is None:
        return {"base_url": f"http://{address}"}
    return {"base_url": f"https://{address}", "verify": tls}


def _reason(error: httpx.HTTPStatusError) -> str:
    text = error.response.text
    known = FlowerError.from_json(text)
    return f"{known.message} [{known.code}]" if known else text[:200]


# Control API. Imported when used: a bridge needs none of it and starts sooner.


def register_node(
    address: str, name: str, public_key: bytes, tls: ssl.SSLContext | None = None
) -> None:
    """Admit the node that has this key, of a NIST curve, in OpenSSH's format.

    Args:
        tls: trusts the SuperLink; default: it speaks plain HTTP. So in the functions below.

    Raises:
        ControlError: it is no such key, the SuperLink has it already, or cannot be reached.
    """
    from flwr.proto.control_pb2 import RegisterNodeRequest

    try:
        key = load_ssh_public_key(public_key)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ControlError(f"no public key in OpenSSH's format: {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ControlError("no public key of a NIST curve")
    # A node shows its key in PEM, and the SuperLink compares the bytes.
    pem = public_key_to_bytes(key)
    with control(address, tls) as client:
        client.RegisterNode(RegisterNodeRequest(public_key=pem, name=name))


def submit_run(
    address: str,
    app_dir: Path,
    run_config: Mapping[str, str | int | float],
    tls: ssl.SSLContext | None = None,
) -> int:
    """Start the Flower app in `app_dir` (a folder with its pyproject.toml) and return the run id.

    Raises:
        ControlError: the SuperLink refused it or cannot be reached.
    """
    from flwr.cli.build import build_fab_from_disk
    from flwr.common.serde import fab_to_proto, user_config_to_proto
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.supercore.fab import Fab

    bundle = build_fab_from_disk(app_dir)
    fab = Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})
    request = StartRunRequest(
        fab=fab_to_proto(fab), override_config=user_config_to_proto(dict(run_config))
    )
    with control(address, tls) as client:
        return client.StartRun(request).run_id


def stop_run(address: str, run_id: int, tls: ssl.SSLContext | None = None) -> None:
    """Stop a run.

    Raises:
        ControlError: it is over already, or the SuperLink cannot be reached.
    """
    from flwr.proto.control_pb2 import StopRunRequest

    with control(address, tls) as client:
        client.StopRun(StopRunRequest(run_id=run_id))


@contextmanager
def control(address: str, tls: ssl.SSLContext | None) -> Iterator["ControlHttpClient"]:
    """Flower's client of the Control API, whose errors become ControlError."""
    from flwr.supercore.control import ControlHttpClient

    interceptor = RuntimeVersionHttpInterceptor(component_name="flwr CLI")
    client = ControlHttpClient(**_way_to(address, tls), interceptors=[interceptor])
    try:
        yield client
    except httpx.HTTPStatusError as error:
        raise ControlError(f"SuperLink {address} refused: {_reason(error)}") from error
    except httpx.TransportError as error:
        raise ControlError(f"SuperLink {address} cannot be reached: {error}") from error
    finally:
        client.close()


def load_commands() -> dict[str, Callable[[], None]]:
    """Import all that Flower's server side needs, also what it would import late, and our
    ServerApp; return the main functions of its commands, which read `sys.argv`."""
    importlib.import_module("flwr.superlink.main")
    from flwr.supercore.cli import flower_superexec
    from flwr.superlink.cli import flower_superlink, flwr_serverapp

    app = tomllib.loads((files("fedfog.flower") / "app" / "pyproject.toml").read_text())
    server_app, _, _ = app["tool"]["flwr"]["app"]["components"]["serverapp"].partition(":")
    importlib.import_module(server_app)
    return {
        "flower-superlink": flower_superlink,
        "flower-superexec": flower_superexec,
        "flwr-serverapp": flwr_serverapp,
    }


def forget_exit_handlers() -> None:
    """In a forked process: leave to the parent what it wanted to do at its end."""
    exit_handler.registered_exit_handlers.clear()
