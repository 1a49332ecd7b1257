"""A running aggregator and the rest of its region, played."""

import json
from typing import Any

from conftest import LIMIT, Peer, Service
from fedfog.messages.codec import TensorMessage, Vector, decode
from fedfog.messages.schemas import PartialMeta
from wire import birth, constant, model, update

BASE = constant(0.25)


class Region:
    """A running aggregator of `region_0`, and a peer that plays its clients and the server."""

    def __init__(self, service: Service, peer: Peer) -> None:
        self.service, self.peer = service, peer

    def present(self, *clients: str, boot: int = 1) -> None:
        for client in clients:
            self.peer.publish(f"fl/presence/region_0/{client}", birth(boot), retain=True)

    def open(self, *clients: str, round: int = 1, **fields: Any) -> None:
        """Have the cohort present and the round opened."""
        self.present(*clients)
        after = len(self.peer.received)
        self.peer.publish("fl/global_model", model(BASE, round - 1, **fields), retain=True)
        self.wait_phase("open", round, after)

    def wait_phase(self, phase: str, round: int, after: int = 0, timeout: float = LIMIT) -> None:
        def seen(topic: str, payload: bytes) -> bool:
            if topic != "fl/status/region_0":
                return False
            status = json.loads(payload)
            return (status.get("phase"), status.get("round")) == (phase, round)

        self.peer.wait_for(seen, timeout, after)

    def send(self, client: str, value: float, base: Vector = BASE, **fields: Any) -> None:
        payload = update(base, constant(value), client, **fields)
        self.peer.publish(f"fl/updates/region_0/{client}", payload)

    def receipt(self, client: str, verdict: str, after: int = 0) -> dict[str, Any]:
        def seen(topic: str, payload: bytes) -> bool:
            mine = topic == f"fl/receipts/region_0/{client}"
            return mine and json.loads(payload)["verdict"] == verdict

        return dict(json.loads(self.peer.wait_for(seen, after=after)))

    def partial(self, round: int = 1, after: int = 0) -> TensorMessage[PartialMeta]:
        def seen(topic: str, payload: bytes) -> bool:
            if topic != "fl/partial/region_0":
                return False
            return decode(payload, PartialMeta).meta.round == round

        return decode(self.peer.wait_for(seen, after=after), PartialMeta)
