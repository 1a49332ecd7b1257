"""Names of the MQTT topics. `docs/messages.md` shows who writes and who reads each."""

import re
from dataclasses import dataclass

# One topic level, one file name and one certificate name: no wildcard, slash, dot or upper case.
NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,30}$"


def is_name(text: str) -> bool:
    """True if `text` may name a region or a client."""
    return re.fullmatch(NAME_PATTERN, text) is not None


@dataclass(frozen=True)
class Topics:
    """Topics of one federation; the three of the weights can be renamed one by one."""

    prefix: str = "fl"
    updates: str = "fl/updates"
    partial: str = "fl/partial"
    global_model: str = "fl/global_model"

    @property
    def cue(self) -> str:
        return f"{self.prefix}/cue"

    @property
    def bell(self) -> str:
        return f"{self.prefix}/bell"

    @property
    def history(self) -> str:
        return f"{self.prefix}/history"

    def update(self, region: str, client: str) -> str:
        return f"{self.updates}/{region}/{client}"

    def partial_of(self, region: str) -> str:
        return f"{self.partial}/{region}"

    def partial_to(self, parent: str, region: str) -> str:
        """Of a region whose parent is another aggregator."""
        return f"{self.partial}/{parent}/{region}"

    def regional_model(self, region: str) -> str:
        return f"{self.prefix}/regional_model/{region}"

    def receipts(self, region: str, client: str | None = None) -> str:
        """A client's own receipts or, without a client, those for a whole region."""
        return f"{self.prefix}/receipts/{region}" + (f"/{client}" if client else "")

    def evaluation(self, region: str, client: str) -> str:
        return f"{self.prefix}/evaluations/{region}/{client}"

    def slot(self, region: str, client: str) -> str:
        return f"{self.prefix}/slots/{region}/{client}"

    def presence(self, region: str, client: str) -> str:
        return f"{self.prefix}/presence/{region}/{client}"

    def status(self, region: str) -> str:
        return f"{self.prefix}/status/{region}"

    def progress(self, region: str) -> str:
        return f"{self.prefix}/progress/{region}"

    def bridge(self, region: str) -> str:
        return f"{self.prefix}/bridge/{region}"
