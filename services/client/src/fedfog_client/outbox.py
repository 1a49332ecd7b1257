"""The update that was trained but is not answered yet, as a file that survives a crash.

The file is the SHA-256 of the update and then the update as it goes over the wire.
"""

from hashlib import sha256
from pathlib import Path

import structlog

from fedfog.files import write_atomically
from fedfog.messages.codec import CodecError, decode
from fedfog.messages.schemas import UpdateMeta

log = structlog.get_logger()

_DIGEST = sha256().digest_size


class Outbox:
    """At most one update; a newer one takes its place.

    Raises:
        OSError: STATE_DIR cannot be made, or the file in it not be read.
    """

    def __init__(self, state_dir: Path) -> None:
        state_dir.mkdir(parents=True, exist_ok=True)
        self.path = state_dir / "outbox"
        self._kept: bytes | None = None
        self._written = False

    @property
    def payload(self) -> bytes | None:
        """The update, from memory or from the file; a damaged file is removed, and the log says
        so."""
        if self._kept is None:
            self.load()
        return self._kept

    def load(self) -> UpdateMeta | None:
        """What an earlier life left here; a damaged file is removed, and the log says so."""
        if not self.path.exists():
            return None
        data = self.path.read_bytes()
        payload = data[_DIGEST:]
        try:
            if sha256(payload).digest() != data[:_DIGEST]:
                raise CodecError("the digest is not that of the update")
            meta = decode(payload, UpdateMeta).meta
        except CodecError as error:
            log.warning("outbox_damaged", path=str(self.path), reason=str(error))
            self.clear()
            return None
        self._kept, self._written = payload, True
        return meta

    def put(self, payload: bytes) -> None:
        """Keep an update. If the disk is full it is kept in memory only, and the log says so: it
        would be lost with this process, but nobody has accepted it yet."""
        self._kept, self._written = payload, False
        try:
            write_atomically(self.path, sha256(payload).digest(), payload)
            self._written = True
        except OSError as error:
            log.error("outbox_not_written", error=str(error), setting="STATE_DIR")

    def release(self) -> None:
        """Keep the update in the file alone: those of all clients of a process may be more than
        its memory."""
        if self._written:
            self._kept = None

    def clear(self) -> None:
        self._kept = None
        self.path.unlink(missing_ok=True)
