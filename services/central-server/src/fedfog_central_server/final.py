"""How a run's finished model does on its clients' own validation examples.

In each round the clients evaluate the model that they train from. The finished one comes after the
last round, so they say it to the server directly: a few numbers each, once in a run, no weights.
Regions between them would each have to wait for their own, to merge what is merged here in a line.
"""

from fedfog.core.metrics import Federated, merge
from fedfog.messages.schemas import ClientEvaluation, FederatedEvaluation, RoundRecord
from fedfog.runs import FinalEvaluation

NAMES_TOLD = 10


class Collection:
    """What the clients of the last round say, each counted once.

    Args:
        last: record of that round. It knows how many of them have validation examples and, in a
            fog of one tier, their names.
    """

    def __init__(self, last: RoundRecord) -> None:
        self._last = last
        self._told: dict[str, Federated] = {}

    @property
    def complete(self) -> bool:
        """All that evaluated the model of the last round have evaluated the finished one."""
        return not self._missing

    @property
    def _missing(self) -> int:
        told = self._last.federated
        return told.num_clients - len(self._told) if told else 0

    def hear(self, region: str, client: str, said: ClientEvaluation) -> None:
        """Take a client's first word, if it is of the last round and does not claim more examples
        than all had in that."""
        told = self._last.federated
        if told is None or self.complete or said.num_examples > told.num_examples:
            return
        if self._took_part(region, client):
            name = f"{region}/{client}"
            one = Federated.of(name, said.num_examples, said.loss, said.accuracy)
            self._told.setdefault(name, one)

    def _took_part(self, region: str, client: str) -> bool:
        """Also if the region may be below one that has regions for members, whose clients are not
        known by name."""
        partials = self._last.regions
        if region in partials:
            return client in partials[region].members
        return any(region in p.members or len(p.members) < p.num_clients for p in partials.values())

    def result(self) -> FinalEvaluation | None:
        """None if nobody has validation examples."""
        if self._last.federated is None:
            return None
        regions: dict[str, Federated] = {}
        for name, one in sorted(self._told.items()):
            region = name.partition("/")[0]
            regions[region] = regions[region] + one if region in regions else one
        silent = [
            f"{region}/{client}"
            for region, partial in sorted(self._last.regions.items())
            if len(partial.members) == partial.num_clients  # else its members are regions
            for client in sorted(partial.members)
            if f"{region}/{client}" not in self._told
        ]
        return FinalEvaluation(
            overall=FederatedEvaluation.of(merge(*regions.values())),
            regions={region: FederatedEvaluation(**vars(all_)) for region, all_ in regions.items()},
            missing=self._missing,
            missing_clients=silent[:NAMES_TOLD] if self._missing else [],
        )
