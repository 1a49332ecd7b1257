"""What each region is doing, gathered from its messages: a table for `demo` and `monitor`."""

from dataclasses import dataclass, field

from rich import box
from rich.table import Table

from fedfog.core.phases import Phase
from fedfog.messages import schemas
from fedfog.messages.catalog import Message


@dataclass
class Region:
    """What is known of one region."""

    phase: str = "starting"
    round: int | None = None
    online: set[str] = field(default_factory=set)
    received: int = 0
    expected: int = 0
    waiting_for: list[str] = field(default_factory=list)
    bridge: bool = False


class Regions:
    """All regions that were heard of.

    Args:
        names: regions that are expected.
        clients: clients that each of them is to have, if that is known.
    """

    def __init__(self, names: tuple[str, ...] = (), clients: int | None = None) -> None:
        self.by_name = {name: Region() for name in names}
        self._clients = clients

    def see(self, message: Message) -> Region | None:
        """Learn from a message; returns its region if there is one."""
        if message.region is None:
            return None
        region = self.by_name.setdefault(message.region, Region())
        match message.meta:
            case schemas.Presence(online=online):
                change = region.online.add if online else region.online.discard
                change(str(message.client))
            case schemas.Bridge(online=online):
                region.bridge = online
            case schemas.Status(online=False):
                region.phase = "offline"
            case schemas.Status(phase=phase, round=round_):
                if phase is Phase.OPEN and round_ != region.round:
                    region.received, region.expected = 0, len(region.online)
                region.phase, region.round = str(phase), round_
                region.waiting_for = []
            case schemas.Progress() as progress:
                region.phase, region.round = str(progress.phase), progress.round
                region.received, region.expected = progress.received, progress.expected
                region.waiting_for = progress.waiting_for
            case schemas.RegionReceipt(members=members):
                region.received, region.expected = len(members), max(len(members), region.expected)
        return region

    def table(self) -> Table:
        """One row per region."""
        table = Table("region", "phase", "round", "clients", "updates", "waits for", box=box.SIMPLE)
        for name, region in sorted(self.by_name.items()):
            of = f" of {self._clients}" if self._clients else ""
            over = region.phase == Phase.FINISHED
            table.add_row(
                name if region.bridge else f"{name} (no bridge)",
                region.phase,
                "" if region.round is None or over else str(region.round),
                f"{len(region.online)}{of} online",
                f"{region.received} of {region.expected}" if region.expected else "",
                ", ".join(region.waiting_for[:3]) + (" ..." if len(region.waiting_for) > 3 else ""),
            )
        return table
