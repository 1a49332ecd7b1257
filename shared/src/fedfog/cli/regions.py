"""What each region is doing, gathered from its messages: a table for `demo` and `monitor`."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from rich import box
from rich.table import Table

from fedfog.core.phases import Phase
from fedfog.core.rounds import MAX_CLIENTS
from fedfog.messages import schemas
from fedfog.messages.catalog import Message

MAX_REGIONS = 1_000


@dataclass
class Region:
    """What is known of one region."""

    phase: str = "starting"
    round: str | None = None
    online: set[str] = field(default_factory=set)
    received: int = 0
    expected: int = 0
    waiting_for: list[str] = field(default_factory=list)
    bridge: bool = False
    parent: str = ""


class Regions:
    """All regions that were heard of.

    Args:
        expected: regions, and how many clients or regions below them each is to have, if that is
            known.
    """

    def __init__(self, expected: Mapping[str, int] | None = None) -> None:
        self.expected = expected or {}
        self.by_name = {name: Region() for name in self.expected}

    def see(self, message: Message) -> Region | None:
        """Learn from a message; returns its region if there is one."""
        if message.region is None:
            return None
        region = self._region(message.region)
        match message.meta:
            case schemas.Presence(online=online):
                if not online:
                    region.online.discard(str(message.client))
                elif len(region.online) < MAX_CLIENTS:
                    region.online.add(str(message.client))
                if message.meta.deadline is not None:  # it is an aggregator below this one
                    child = self._region(str(message.client))
                    child.parent = message.region
                    child.phase = child.phase if online else "offline"
            case schemas.Bridge(online=online):
                region.bridge = online
            case schemas.Status(online=False):
                region.phase = "offline"
            case schemas.Status(phase=phase, round=round_, fog_round=fog_round):
                number = None if round_ is None else schemas.numbered(round_, fog_round)
                if phase is Phase.OPEN and number != region.round:
                    region.received, region.expected = 0, len(region.online)
                region.phase, region.round = str(phase), number
                region.waiting_for = []
            case schemas.Progress() as progress:
                region.phase = str(progress.phase)
                region.round = schemas.numbered(progress.round, progress.fog_round)
                region.received, region.expected = progress.received, progress.expected
                region.waiting_for = progress.waiting_for
            case schemas.RegionReceipt(members=members):
                region.received, region.expected = len(members), max(len(members), region.expected)
        return region

    def _region(self, name: str) -> Region:
        """The region of this name; of too many, one that is not shown."""
        if name in self.by_name or len(self.by_name) >= MAX_REGIONS:
            return self.by_name.get(name, Region())
        return self.by_name.setdefault(name, Region())

    def table(self) -> Table:
        """One row per region."""
        table = Table("region", "phase", "round", "clients", "updates", "waits for", box=box.SIMPLE)
        for name, region in sorted(self.by_name.items()):
            of = f" of {self.expected[name]}" if name in self.expected else ""
            over = region.phase == Phase.FINISHED
            above = f" under {region.parent}" if region.parent else " (no bridge)"
            table.add_row(
                name if region.bridge else name + above,
                region.phase,
                "" if region.round is None or over else region.round,
                f"{len(region.online)}{of} online",
                f"{region.received} of {region.expected}" if region.expected else "",
                ", ".join(region.waiting_for[:3]) + (" ..." if len(region.waiting_for) > 3 else ""),
            )
        return table
