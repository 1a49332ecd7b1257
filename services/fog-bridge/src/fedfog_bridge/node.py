"""The bridge's session with the SuperLink, as the settings have it."""

from fedfog.flower.fleet import FleetSession, NodeIdentity
from fedfog.settings import BridgeSettings
from fedfog.transport import tls


def open_session(settings: BridgeSettings) -> FleetSession:
    """Begin a session, with TLS_DIR under the identity that is there: `tls.crt` is shown to a
    proxy in front of the SuperLink, `supernode.key` to the SuperLink itself.

    Raises:
        SuperLinkLostError: no SuperLink, or one that refuses this bridge.
        OSError: a file of TLS_DIR is missing or damaged; the text names it.
    """
    if (folder := settings.tls_dir) is None:
        return FleetSession(settings.flower_server)
    context = tls.context(folder, folder / "tls.crt", folder / "tls.key")
    node_file = settings.state_dir / "node"
    identity = NodeIdentity.read(context, folder / "supernode.key", node_file)
    return FleetSession(settings.flower_server, identity)
