"""The retained global model: published, published again to a broker that has lost it, and put back
when somebody else has written over it."""

from collections import deque

import structlog

from fedfog.messages.codec import CodecError, decode, digest_of
from fedfog.messages.schemas import ModelMeta
from fedfog.transport.mqtt import Session

log = structlog.get_logger()


class RetainedModel:
    """The model that everybody is to work with. `sent`: it was given to a broker."""

    def __init__(self, session: Session, topic: str) -> None:
        self._session, self._topic = session, topic
        self._meta: ModelMeta | None = None
        self._payload = b""
        self.sent = False
        self._echoes: deque[bytes] = deque()

    def set(self, meta: ModelMeta, payload: bytes) -> bool:
        """Publish another model; False if that has to wait for the broker."""
        self._meta, self._payload, self.sent = meta, payload, False
        return self._publish()

    def connected(self) -> None:
        self._echoes.clear()
        self._publish()

    def heard(self, payload: bytes) -> None:
        """Own messages come back once each, in order; to know them by their bytes costs less than
        a second connection without them."""
        if payload in self._echoes:
            while self._echoes.popleft() != payload:
                pass
        elif self._meta is not None and not self._is_present(payload, self._meta):
            log.info("retained_model_replaced", topic=self._topic)
            self._publish()

    def _publish(self) -> bool:
        if self._meta is None:
            return False
        if not self._session.publish(self._topic, self._payload, retain=True):
            return False
        self._echoes.append(self._payload)
        self.sent = True
        return True

    @staticmethod
    def _is_present(payload: bytes, ours: ModelMeta) -> bool:
        """As a former start of the server published it, perhaps with an older evaluation."""
        try:
            model = decode(payload, ModelMeta)
        except CodecError:
            return False
        meta = model.meta.model_copy(update={"evaluation": ours.evaluation})
        return meta == ours and digest_of(model.vector) == ours.digest
