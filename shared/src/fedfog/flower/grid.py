"""Flower's Grid for a fog: it addresses the nodes that bridges announce over MQTT, and is told
over MQTT when a reply can be pulled, instead of asking the SuperLink many times a second.

One exchange: push the train messages, send the cue, pull each reply when its bell rings, and look
every `LOOK_EVERY` seconds for replies whose bell was lost. A region is waited for until it has
answered, its bridge has been offline for longer than the grace, or the time is up; a bridge that
comes back under a new boot or node id gets the train message again. Why a region was left out is
recorded.

A bridge that runs under the stock `flower-supernode` does not know its node id and rings no bell.
All nodes of the SuperLink that no bridge announces get a message for it; its reply names the
region.
"""

import queue
import threading
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import structlog
from flwr.app import Error, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedfog.flower.reply import ReplyError, run_and_round, unpack
from fedfog.messages.schemas import Bell, Bridge

log = structlog.get_logger()

LOOK_EVERY = 2.0
SAY_EVERY = 5.0
# A message lives a little longer than its round, so that time-outs are ours and have our reasons.
TTL_SLACK = 30.0

# Of what a peer gives as reason: it goes into the record of the round.
REASON_CHARACTERS = 300

# Flower's error codes for "this message will not be answered"; the others: the app failed.
UNAVAILABLE = frozenset({0, 3, 4, 5})


@dataclass(frozen=True)
class BridgeSeen:
    """A bridge announced itself, or its will was published."""

    region: str
    bridge: Bridge


@dataclass(frozen=True)
class BellRung:
    bell: Bell


@dataclass(frozen=True)
class Looked:
    """What a look for a reply without a bell has found; the grid's own event."""

    message_id: str
    found: list[Message] | Exception


FogEvent = BridgeSeen | BellRung | Looked


class Fog(Protocol):
    """The MQTT side of the grid."""

    events: "queue.Queue[FogEvent]"

    def cue(self, run: str, round_: int) -> None:
        """Tell the bridges that the train messages of this round are pushed."""


class RegionsError(Exception):
    """Too few regions; the text names those that are missing and the settings."""


def train_message(node_id: int, group: str, timeout: float) -> Message:
    """An empty train message of the round in `group`, which is waited for `timeout` seconds."""
    return Message(
        content=RecordDict(),
        dst_node_id=node_id,
        message_type=MessageType.TRAIN,
        ttl=max(timeout, 0.0) + TTL_SLACK,
        group_id=group,
    )


class Bridges:
    """What is known of the regions' bridges, from the events of a fog."""

    def __init__(self, fog: Fog, grace: float) -> None:
        self.fog, self.grace = fog, grace
        self.known: dict[str, Bridge] = {}
        self._offline_since: dict[str, float] = {}

    @property
    def online(self) -> list[str]:
        """Regions whose bridge is online, in order of their names."""
        return sorted(region for region, bridge in self.known.items() if bridge.online)

    def region_of(self, node_id: int) -> str | None:
        """The region whose bridge announces this node, if any."""
        return next((r for r in self.online if self.known[r].node_id == node_id), None)

    def is_stock(self, region: str) -> bool:
        """Whether the region's bridge runs under the stock SuperNode."""
        return self.known[region].node_id is None

    def seconds_away(self, region: str) -> float:
        """How long the bridge has been offline; 0 if it is online."""
        since = self._offline_since.get(region)
        return 0.0 if since is None else time.monotonic() - since

    def next_event(self, until: float) -> FogEvent | None:
        """The next event, or None at `until`; what it says of a bridge is noted."""
        try:
            event = self.fog.events.get(timeout=max(until - time.monotonic(), 0.0))
        except queue.Empty:
            return None
        if isinstance(event, BridgeSeen):
            self._note(event.region, event.bridge)
        return event

    def catch_up(self) -> None:
        """Note all that has happened until now; bells of earlier rounds are worth nothing."""
        while self.next_event(0.0) is not None:
            pass

    def _note(self, region: str, bridge: Bridge) -> None:
        known = self.known.get(region)
        if known and bridge.boot < known.boot:
            if bridge.online:  # the will of an earlier boot may come late, a birth should not
                log.warning("older_boot_ignored", region=region, boot=bridge.boot, of=known.boot)
            return
        self.known[region] = bridge
        if bridge.online:
            self._offline_since.pop(region, None)
        else:
            self._offline_since.setdefault(region, time.monotonic())


class FogGrid(Grid):
    """Wraps the Grid of a ServerApp.

    Args:
        inner: Flower's Grid.
        fog: events of bridges and bells, and the cue.
        grace: seconds a bridge may be offline before a round goes on without it.

    After `send_and_receive`, `left_out` has the regions without a reply and why, and `seconds`
    the time of each step: push; reply (from the push to the last bell); pull.
    """

    def __init__(self, inner: Grid, fog: Fog, grace: float) -> None:
        self.inner = inner
        self.bridges = Bridges(fog, grace)
        self.left_out: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self._given_up: set[str] = set()
        self._expected: frozenset[str] = frozenset()

    def get_node_ids(self) -> list[int]:
        """Nodes of the bridges that are online; with a stock SuperNode among them, also the
        nodes that nobody announces."""
        announced = [self.bridges.known[region].node_id for region in self.bridges.online]
        nodes = [node_id for node_id in announced if node_id is not None]
        if None in announced:
            nodes += sorted(set(self.inner.get_node_ids()) - set(nodes))
        return nodes

    def wait_for_regions(
        self, minimum: int, expected: Collection[str], timeout: float
    ) -> list[str]:
        """Wait until `minimum` regions are online and none is missing that may still come: one
        of `expected` that was never seen (until the timeout, once), or one seen before that has
        been offline for less than the grace. Returns the regions that are online.

        Raises:
            RegionsError: fewer than `minimum` after `timeout` seconds.
        """
        self._expected = frozenset(expected)
        bridges, start = self.bridges, time.monotonic()
        deadline, say = start + timeout, start + SAY_EVERY
        while (now := time.monotonic()) < deadline:
            bridges.catch_up()
            missing = self._may_come()
            if not missing and self._reachable() >= minimum:
                return bridges.online
            if now >= say:
                say = now + SAY_EVERY
                log.info(
                    "waiting_for_regions",
                    online=bridges.online,
                    minimum=minimum,
                    missing=missing or "any",
                    seconds=round(now - start, 1),
                    limit=timeout,
                )
            bridges.next_event(min(deadline, say, now + 1.0))
        absent = sorted(self._expected - set(bridges.online))
        if (reachable := self._reachable()) < minimum:
            raise RegionsError(
                f"{reachable} of at least {minimum} regions (MIN_AVAILABLE_CLIENTS) are "
                f"online after {timeout:.0f} s (REGIONS_TIMEOUT); online: "
                f"{', '.join(bridges.online) or 'none'}; missing: {', '.join(absent) or 'any'}. "
                "Is a fog bridge running in each region, and does it reach the SuperLink?"
            )
        self._given_up.update(absent)
        log.warning("going_on_without_regions", missing=absent, online=bridges.online)
        return bridges.online

    def _reachable(self) -> int:
        """Number of regions that a message can be sent to: under a stock SuperNode, the bridge
        may be online before its node is."""
        return min(len(self.bridges.online), len(self.get_node_ids()))

    def _may_come(self) -> list[str]:
        bridges = self.bridges
        unseen = self._expected - bridges.known.keys() - self._given_up
        away = {r for r in bridges.known if 0.0 < bridges.seconds_away(r) < bridges.grace}
        return sorted(unseen | away)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Replies of the regions in order of their names, at most one of each.

        Args:
            messages: train messages of one round, made by `train_message`.
            timeout: seconds until the round ends with the replies it has.
        """
        batch = list(messages)
        absent = (self._expected | self.bridges.known.keys()) - set(self.bridges.online)
        self.left_out = dict.fromkeys(sorted(absent), "no bridge online when the round began")
        self.seconds = {}
        if not batch:
            return []
        exchange = _Exchange(self, batch, 3600.0 if timeout is None else timeout)
        return exchange.run()

    # The rest of Flower's Grid, as it is.

    def set_run(self, run: Any) -> None:
        self.inner.set_run(run)

    @property
    def run(self) -> Any:
        return self.inner.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        return self.inner.create_message(*args, **kwargs)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self.inner.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self.inner.pull_messages(message_ids)


@dataclass
class _Sent:
    """A train message that was pushed; without a region, to a node that nobody announces."""

    node_id: int
    region: str | None
    lost: bool = False


class _Exchange:
    """Train messages and replies of one round."""

    def __init__(self, grid: FogGrid, batch: list[Message], timeout: float) -> None:
        self._grid, self._bridges = grid, grid.bridges
        self._batch, self._timeout = batch, timeout
        self._deadline = time.monotonic() + timeout
        self._group = batch[0].metadata.group_id
        self._sent: dict[str, _Sent] = {}
        self._served: dict[str, Bridge] = {}
        self._replies: dict[str, Message] = {}
        self._looking: set[str] = set()
        self._stock_failures: list[str] = []
        regions = {self._bridges.region_of(m.metadata.dst_node_id) for m in batch}
        self._awaited = {region for region in regions if region is not None}
        if None in regions:
            stock = {r: b for r, b in self._bridges.known.items() if b.online and not b.node_id}
            self._awaited |= stock.keys()
            self._served.update(stock)

    def run(self) -> list[Message]:
        seconds = self._grid.seconds
        start = time.monotonic()
        self._push(self._batch)
        pushed = time.monotonic()
        seconds.update(push=pushed - start, reply=0.0, pull=0.0)
        look = pushed + LOOK_EVERY
        while self._awaited and (now := time.monotonic()) < self._deadline:
            if now >= look:
                look = now + LOOK_EVERY
                self._look()
            event = self._bridges.next_event(min(self._deadline, look))
            came = time.monotonic()
            if isinstance(event, BridgeSeen):
                self._push_again(event.region)
                self._restart_stock(event.region)
            elif isinstance(event, BellRung):
                # Who looks for it already will bring it: to be pulled once more, it is gone.
                message_id = event.bell.message_id
                if self._is_open(message_id) and message_id not in self._looking:
                    self._take(self._grid.pull_messages([message_id]))
                    seconds["reply"] = came - pushed
                    seconds["pull"] += time.monotonic() - came
            elif isinstance(event, Looked):
                self._looking.discard(event.message_id)
                if isinstance(event.found, Exception):
                    raise event.found
                self._take(event.found)
                seconds["reply"] = came - pushed
            self._give_up()
        for region in sorted(self._awaited):
            self._leave_out(region, f"no partial within {self._timeout:.0f} s (ROUND_TIMEOUT)")
        return [self._replies[region] for region in sorted(self._replies)]

    def _push(self, messages: list[Message]) -> None:
        """Push, and only then send the cue: a bridge that looks earlier would find nothing."""
        ids = list(self._grid.push_messages(messages))
        for message_id, message in zip(ids, messages, strict=True):
            node_id = message.metadata.dst_node_id
            region = self._bridges.region_of(node_id)
            if not message_id:  # of a SuperLink that is gone; the bridge will announce another
                log.warning("node_unknown_to_superlink", region=region, node_id=node_id)
                continue
            self._sent[message_id] = _Sent(node_id, region)
            if region is not None:
                self._served[region] = self._bridges.known[region]
        self._bridges.fog.cue(*run_and_round(messages[0]))

    def _push_again(self, region: str) -> None:
        """Push the train message to a bridge that does not have it, or lost it."""
        bridge = self._bridges.known[region]
        if region not in self._awaited or not bridge.online or bridge.node_id is None:
            return
        if self._served.get(region) != bridge:
            log.info("train_message_pushed_again", region=region, round=self._group)
            self._push([self._message(bridge.node_id)])

    def _restart_stock(self, region: str) -> None:
        """A stock SuperNode that is started again has lost its train message, and with a key it
        is the same node. Which of the nodes it is, is not known: all get the next look's."""
        bridge, served = self._bridges.known[region], self._served.get(region)
        if region not in self._awaited or (served or bridge).node_id is not None:
            return
        if not bridge.online:
            self._served.pop(region, None)
        elif served != bridge:
            self._served[region] = bridge
            for sent in self._sent.values():
                sent.lost = sent.lost or sent.region is None

    def _message(self, node_id: int) -> Message:
        return train_message(node_id, self._group, self._deadline - time.monotonic())

    def _look(self) -> None:
        """The net below bells and announcements."""
        for region in sorted(self._awaited):
            self._push_again(region)
        if any(self._bridges.is_stock(region) for region in self._awaited):
            reached = {sent.node_id for sent in self._sent.values() if not sent.lost}
            announced = {bridge.node_id for bridge in self._bridges.known.values()}
            if new := set(self._grid.get_node_ids()) - reached - announced:
                self._push([self._message(node_id) for node_id in sorted(new)])
        for message_id in [i for i in self._sent if self._is_open(i) and i not in self._looking]:
            # In a thread of its own: Flower waits up to 180 s for a reply whose sender died
            # while it was uploading.
            self._looking.add(message_id)
            threading.Thread(target=self._look_for, args=(message_id,), daemon=True).start()

    def _look_for(self, message_id: str) -> None:
        try:
            found: list[Message] | Exception = list(self._grid.pull_messages([message_id]))
        except Exception as error:  # noqa: BLE001 - raised again by the round's own thread
            found = error
        self._bridges.fog.events.put(Looked(message_id, found))

    def _is_open(self, message_id: str) -> bool:
        sent = self._sent.get(message_id)
        if sent is None or sent.lost:
            return False
        return sent.region is None or sent.region in self._awaited

    def _take(self, replies: Iterable[Message]) -> None:
        for reply in replies:
            sent = self._sent.get(reply.metadata.reply_to_message_id)
            if sent is None:
                continue
            if reply.has_error():
                self._on_error(sent, reply.error)
                continue
            try:
                region = unpack(reply)[0]
            except ReplyError as error:
                self._on_failure(sent, str(error))
                continue
            if sent.region is not None and region != sent.region:
                reason = f"its bridge answered for region {region}"[:REASON_CHARACTERS]
                self._on_failure(sent, reason)
            elif region in self._awaited:
                self._awaited.discard(region)
                self._replies[region] = reply

    def _on_error(self, sent: _Sent, error: Error) -> None:
        reason = f"Flower error {error.code}: {error.reason}"[:REASON_CHARACTERS]
        if error.code not in UNAVAILABLE:
            self._on_failure(sent, reason)
            return
        sent.lost = True
        if sent.region in self._awaited:
            log.warning("train_message_lost", region=sent.region, reason=reason)
            self._served.pop(sent.region, None)

    def _on_failure(self, sent: _Sent, reason: str) -> None:
        sent.lost = True
        if sent.region is None:
            self._stock_failures.append(reason)
        elif sent.region in self._awaited:
            self._leave_out(sent.region, reason)

    def _give_up(self) -> None:
        """Leave out who cannot answer any more."""
        for region in sorted(self._awaited):
            away = self._bridges.seconds_away(region)
            if away > self._bridges.grace:
                self._leave_out(region, f"bridge offline for {away:.0f} s (BRIDGE_GRACE)")
        stock = [r for r in self._awaited if self._bridges.is_stock(r)]
        # Which of the nodes failed is not known; that all who are left have failed, is.
        if stock and len(self._stock_failures) >= len(stock):
            for region in sorted(stock):
                self._leave_out(region, "; ".join(self._stock_failures))

    def _leave_out(self, region: str, reason: str) -> None:
        log.warning("region_left_out", region=region, round=self._group, reason=reason)
        self._awaited.discard(region)
        self._grid.left_out[region] = reason
