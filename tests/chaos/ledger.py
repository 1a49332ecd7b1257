"""The ledger: from what passed on the wire, and from nothing that FedFog says about itself but its
run folders, it works out whether the promises were kept.

A promise that was broken is a `Breach` of one of these kinds:

- `two versions`: an update, partial or model was published with two contents under one id;
- `wrong sum`, `wrong model`: a partial is not the mean of its members' updates, a model not that
  of its partials, bit for bit in float64 (McMahan et al. 2017), or not of the model before;
- `double-counted`: an update is in a sum more than once, or in two partials;
- `lost`: an accepted update is in no partial; a partial is in none of its parent, whose `left_out`
  does not name it; one that was received is not in the partial, though
  nothing happened to its owner or to the region; a partial is in no model and nobody says why;
- `contradicted`: an update of the round at hand was answered with `late`, and is in the partial;
- `forgotten`: a client does not repeat what it owes to a new boot of its aggregator;
- `went back`: the server, or a region, published an older model under the same id of the run;
- `rejected`: an update of our own clients was refused.

With FOG_ROUNDS a region's model between two global ones is held to the same as a partial, and each
is what the next regional round trained from. Its members are those who were told `accepted`.
"""

from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from chaos.proxy import Sighting
from chaos.schedule import BROKER, FLOWER, SERVER, role
from fedfog.messages.codec import (
    TensorMessage,
    Vector,
    decode,
    decode_json,
    decode_meta,
    digest_of,
)
from fedfog.messages.schemas import (
    ModelMeta,
    PartialMeta,
    Receipt,
    RegionReceipt,
    RoundRecord,
    Status,
    UpdateMeta,
    Verdict,
    numbered,
)
from fedfog.messages.topics import Topics
from fedfog.runs import History, Rewind, RunInfo, Summary
from fedfog.runs import Status as RunStatus

TOPICS = Topics()
# How long a fault has effects after it was healed: a process boots again, and nothing tells of a
# half-open connection but the keep-alive (15 s, noticed at most 1.5 times later).
AFTERMATH, HALF_OPEN_SECONDS = 8.0, 25.0
REPEAT_SECONDS = 6.0


class UpdateId(NamedTuple):
    run: str
    round: int
    region: str
    client: str
    fog_round: int = 1

    def __str__(self) -> str:
        number = numbered(self.round, self.fog_round)
        return f"{self.run}/{number}/{self.region}/{self.client}"


class PartialId(NamedTuple):
    run: str
    round: int
    region: str

    def __str__(self) -> str:
        return f"{self.run}/{self.round}/{self.region}"


class RegionalId(NamedTuple):
    """Of what a region makes in one regional round."""

    run: str
    round: int
    region: str
    fog_round: int

    def __str__(self) -> str:
        return f"{self.run}/{self.round}.{self.fog_round}/{self.region}"


@dataclass(frozen=True)
class Breach:
    kind: str
    id: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.id}: {self.what}"


@dataclass(frozen=True)
class Happened:
    """A fault as it was carried out; monotonic seconds."""

    kind: str
    target: str
    began: float
    healed: float

    @property
    def over(self) -> float:
        """When it certainly has no effect any more."""
        return self.healed + (HALF_OPEN_SECONDS if self.kind == "half-open" else AFTERMATH)


@dataclass(frozen=True)
class RunFolder:
    """What the server wrote of one run."""

    run: str
    completed: bool
    records: tuple[RoundRecord, ...]
    rewinds: tuple[Rewind, ...] = ()
    final: str | None = None  # digest of its `model.safetensors`

    @classmethod
    def read(cls, folder: Path) -> "RunFolder":
        info = RunInfo.model_validate_json((folder / "settings.json").read_bytes())
        completed, final, history = False, None, History(run=info.run)
        if (path := folder / "summary.json").exists():
            summary = Summary.model_validate_json(path.read_bytes())
            completed = summary.status is RunStatus.COMPLETED
        if (path := folder / "history.json").exists():
            history = History.model_validate_json(path.read_bytes())
        if (path := folder / "model.safetensors").exists():
            final = digest_of(decode(path.read_bytes(), ModelMeta).vector)
        return cls(info.run, completed, tuple(history.rounds), tuple(history.rewinds), final)

    @property
    def wire_id(self) -> str:
        """The run's present id on the wire: a new one after each step back to an older model."""
        return self.rewinds[-1].after if self.rewinds else self.run

    def voids(self, run: str, round_: int) -> bool:
        """The run says that a round is void because it went back, or it is the last open one of a
        run that is not completed."""
        if any(run == rewind.before and round_ > rewind.to_round for rewind in self.rewinds):
            return True
        return not self.completed and (run, round_) == (self.wire_id, len(self.records) + 1)


def weighted_mean(vectors: Iterable[tuple[Vector, int]]) -> NDArray[np.float32]:
    """FedAvg: sum(n * w) / sum(n), in float64, in the given order, rounded once."""
    total, weight = np.float64(0) * np.zeros(1), 0
    for vector, n in vectors:
        total = total + vector.astype(np.float64) * float(n)
        weight += n
    return (total / weight).astype(np.float32)


@dataclass
class _Update:
    message: TensorMessage[UpdateMeta]
    sent: list[float] = field(default_factory=list)
    received: list[tuple[float, int]] = field(default_factory=list)  # (when, boot) of the receipts


@dataclass
class _Partial:
    message: TensorMessage[PartialMeta]
    payload: bytes
    at: float
    boot: int | None

    @property
    def members(self) -> Collection[str]:
        return self.message.meta.members


@dataclass
class _Model:
    digest: str
    at: float


@dataclass
class _Regional(_Model):
    """A region's model, and who was told `accepted` for it."""

    vector: Vector
    share: tuple[int, int]  # clients and examples
    boot: int | None
    members: Collection[str] = ()


class Ledger:
    """Reads the wire log once and keeps what the checks need."""

    def __init__(
        self, log: Sequence[Sighting], runs: Sequence[RunFolder], faults: Sequence[Happened]
    ) -> None:
        self.breaches: list[Breach] = []
        self.updates: dict[UpdateId, _Update] = {}
        self.partials: dict[PartialId, _Partial] = {}
        self.regionals: dict[RegionalId, _Regional] = {}
        self.models: dict[tuple[str, int], _Model] = {}
        self.accepted: set[UpdateId] = set()
        self.late: set[UpdateId] = set()  # of the round that was the region's newest then
        self.parents: dict[str, str] = {}  # of regions under another aggregator
        self._faults = faults
        self._end = log[-1].at if log else 0.0
        self._boots: dict[str, int] = {}
        self._newest: dict[str, tuple[int, int, int]] = {}  # model of each topic
        self._opened: dict[str, tuple[int, int, str]] = {}  # newest round that each region knows
        self._fog_rounds: dict[str, int] = {}  # of each run
        self._members: dict[RegionalId, list[str]] = {}  # that were told `accepted` together
        self._counted: dict[tuple[str, int, int, str], str] = {}  # region that has an update
        self._down: dict[str, list[Sighting]] = defaultdict(list)  # of each client
        self._runs = runs
        self._records: dict[tuple[str, int], RoundRecord] = {}  # of the runs' folders
        self._told: dict[tuple[str, int], RoundRecord] = {}  # and on the wire
        for sighting in log:
            self._read(sighting)
        self._check_regionals()
        self._check_partials()
        for run in runs:
            self._check_run(run)
        self._check_models()
        self._check_places()
        self._check_accepted()
        self._check_late()
        self._check_received()
        self._check_debts()

    @property
    def figures(self) -> dict[str, int]:
        kinds = Counter(breach.kind for breach in self.breaches)
        return {
            "runs": sum(run.completed for run in self._runs),
            "rounds": len(self._records),
            "updates": len(self.updates),
            "accepted": len(self.accepted),
            "regional_models": len(self.regionals),
            "partials": len(self.partials),
            "regions_left_out": sum(len(r.left_out) for r in self._records.values())
            + sum(
                len(partial.message.meta.left_out)
                for key, partial in self.partials.items()
                if key.region in self.parents.values()
            ),
            "rewinds": sum(len(run.rewinds) for run in self._runs),
            "lost": kinds["lost"] + kinds["forgotten"],
            "double_counted": kinds["double-counted"],
            "wrong_sums": kinds["wrong sum"] + kinds["wrong model"] + kinds["two versions"],
            "other_breaches": kinds["went back"] + kinds["contradicted"] + kinds["rejected"],
        }

    # Reading

    def _breach(self, kind: str, id_: object, what: str) -> None:
        name = "/".join(map(str, id_)) if type(id_) is tuple else str(id_)
        self.breaches.append(Breach(kind, name, what))

    def _read(self, s: Sighting) -> None:
        if not s.payload:
            return
        topic = s.topic
        if topic.startswith(TOPICS.updates) and s.up:
            self._read_update(s)
        elif topic.startswith(TOPICS.partial) and s.up:
            self._read_partial(s)
        elif topic.startswith((TOPICS.global_model, TOPICS.regional_model(""))) and s.up:
            self._read_model(s)
        elif topic == TOPICS.global_model and role(s.service) == "aggregator":
            model = decode_meta(s.payload, ModelMeta)
            opened = (model.run_started, model.round + 1, model.run)
            region = s.service.removesuffix("-aggregator")
            self._opened[region] = max(opened, self._opened.get(region, opened))
        elif topic == TOPICS.history and s.up:
            record = decode_json(s.payload, RoundRecord)
            self._told[record.run, record.round] = record
        elif topic.startswith(TOPICS.status("")) and s.up:
            self._boots[topic.split("/")[2]] = decode_json(s.payload, Status).boot
        elif topic.startswith(TOPICS.receipts("")) and s.up:
            self._read_receipt(s, topic.split("/"))
        if not s.up and role(s.service) == "client":
            self._down[s.service].append(s)

    def _read_update(self, s: Sighting) -> None:
        message = decode(s.payload, UpdateMeta)
        meta = message.meta
        key = UpdateId(meta.run, meta.round, meta.region, meta.client, meta.fog_round)
        known = self.updates.setdefault(key, _Update(message))
        known.sent.append(s.at)
        then = known.message
        fields = ("base_digest", "num_examples")
        same = all(getattr(then.meta, name) == getattr(meta, name) for name in fields)
        if not same or not np.array_equal(then.vector, message.vector):
            self._breach("two versions", key, "the update was sent with another content")

    def _read_partial(self, s: Sighting) -> None:
        message = decode(s.payload, PartialMeta)
        key = PartialId(message.meta.run, message.meta.round, message.meta.region)
        *_, above, region = s.topic.split("/")
        if s.topic == TOPICS.partial_to(above, region):
            self.parents[region] = above
        partial = _Partial(message, s.payload, s.at, self._boots.get(key.region))
        if self.partials.setdefault(key, partial).payload != s.payload:
            old = sorted(self.partials[key].message.meta.members)
            self._breach(
                "two versions", key, f"published again: {old}, {sorted(message.meta.members)}"
            )

    def _read_model(self, s: Sighting) -> None:
        """A global model, or a region's between two of them."""
        message = decode(s.payload, ModelMeta)
        meta, digest = message.meta, digest_of(message.vector)
        at = (meta.run_started, meta.round, meta.fog_round)
        newest = self._newest.get(s.topic, at)
        self._newest[s.topic] = max(newest, at)
        key: tuple[object, ...]
        if s.topic == TOPICS.global_model:
            key = (meta.run, meta.round)
            self._fog_rounds[meta.run] = meta.hyperparameters.fog_rounds
            known = self.models.setdefault(key, _Model(digest, s.at))
            same = True
        else:
            region = s.topic.rpartition("/")[2]
            told, boot = meta.regions[region], self._boots.get(region)
            share = (told.num_clients, told.num_examples)
            key = RegionalId(meta.run, meta.round + 1, region, meta.fog_round)
            regional = _Regional(digest, s.at, message.vector, share, boot)
            known = regional = self.regionals.setdefault(key, regional)
            same = regional.share == share
        if at < newest:
            self._breach("went back", meta.run, f"{s.topic} to model {meta.round}.{meta.fog_round}")
        if {known.digest, meta.digest} != {digest} or not same:
            self._breach("two versions", key, "the model has another content")

    def _read_receipt(self, s: Sighting, levels: list[str]) -> None:
        region = levels[2]
        if len(levels) == 3:
            closed = decode_json(s.payload, RegionReceipt)
            of = RegionalId(closed.run, closed.round, region, closed.fog_round)
            if self._members.setdefault(of, closed.members) != closed.members:
                self._breach("two versions", of, "others were told `accepted`")
            for member in closed.members:
                self.accepted.add(UpdateId(*of[:3], member, closed.fog_round))
            return
        receipt = decode_json(s.payload, Receipt)
        if receipt.run is None or receipt.round is None:
            self._breach("rejected", levels[3], receipt.reason)
            return
        key = UpdateId(receipt.run, receipt.round, region, levels[3], receipt.fog_round)
        if receipt.verdict is Verdict.ACCEPTED:
            self.accepted.add(key)
        elif receipt.verdict is Verdict.REJECTED:
            self._breach("rejected", key, receipt.reason)
        elif receipt.verdict is Verdict.LATE:
            _, *newest = self._opened.get(region, (0, 0, ""))
            if newest == [key.round, key.run]:  # of an older one nobody remembers who was in it
                self.late.add(key)
        elif key in self.updates:
            self.updates[key].received.append((s.at, receipt.boot))

    # Sums

    def _check_regionals(self) -> None:
        for key, regional in self.regionals.items():
            regional.members = self._members.get(key, ())
            sent = self._gather(key, key, regional.members)
            if len(sent) < len(regional.members):
                continue  # said by _gather
            parts = [(update.message.vector, update.message.meta.num_examples) for update in sent]
            told = (len(parts), sum(examples for _, examples in parts))
            if regional.share != told:
                kind = "lost" if regional.share < told else "double-counted"
                what = f"(clients, examples) {regional.share}, but {told} were told `accepted`"
                self._breach(kind, key, what)
            elif not any(  # it does not say in which order they were added
                np.array_equal(weighted_mean(order), regional.vector)
                for order in permutations(parts)
            ):
                self._breach("wrong sum", key, "not the mean of the accepted updates")

    def _check_partials(self) -> None:
        for key, partial in self.partials.items():
            meta, of = partial.message.meta, self._closing(key)
            sent = self._gather(key, of, meta.members)
            before = [self.regionals.get(of._replace(fog_round=n)) for n in range(1, of.fog_round)]
            shares = [regional.share if regional else None for regional in before]
            if [(told.num_clients, told.num_examples) for told in meta.regional] != shares:
                self._breach("wrong sum", key, "its regional rounds are not those on the wire")
            parts = [(update.message.vector, update.message.meta.num_examples) for update in sent]
            if (weight := sum(meta.members.values())) != meta.num_examples:
                what = f"{meta.num_examples} examples of members that have {weight}"
                self._breach("double-counted", key, what)
            elif len(sent) < len(meta.members):
                continue  # said by _gather
            elif [examples for _, examples in parts] != list(meta.members.values()):
                self._breach("wrong sum", key, "its members sent updates of other examples")
            elif not np.array_equal(weighted_mean(parts), partial.message.vector):
                self._breach("wrong sum", key, "not the mean of its members' updates")

    def _gather(
        self, key: object, of: RegionalId, members: Iterable[str]
    ) -> list[_Update | _Partial]:
        """What the members of an aggregate sent, trained from what it is to be trained from, and
        counted nowhere else."""
        base, found = self._base_of(of), []
        for member in members:
            sent = self._sent(of, member)
            if sent is None:
                self._breach("wrong sum", key, f"{member} sent nothing for it")
                continue
            if base not in (None, sent.message.meta.base_digest):
                self._breach("wrong sum", f"{key}/{member}", "of another base model")
            at = (of.run, of.round, of.fog_round, member)
            if (other := self._counted.setdefault(at, of.region)) != of.region:
                self._breach("double-counted", key, f"{member} is in {other}, too")
            found.append(sent)
        return found

    def _closing(self, key: PartialId) -> RegionalId:
        """The regional round that makes the partial; an aggregator above others has one."""
        above = key.region in self.parents.values()
        return RegionalId(*key, 1 if above else self._fog_rounds.get(key.run, 1))

    def _base_of(self, of: RegionalId) -> str | None:
        """Digest of what its updates were to be trained from; None if no model 0 was seen."""
        if of.fog_round > 1:
            regional = self.regionals.get(of._replace(fog_round=of.fog_round - 1))
            return regional.digest if regional else ""
        model = self.models.get((of.run, of.round - 1))
        return model.digest if model else None

    def _sent(self, of: RegionalId, member: str) -> _Update | _Partial | None:
        """What a member of an aggregate sent: a client its update, a region its partial."""
        if self.parents.get(member) == of.region:
            return self.partials.get(PartialId(of.run, of.round, member))
        return self.updates.get(UpdateId(*of[:3], member, of.fog_round))

    def _check_run(self, run: RunFolder) -> None:
        """Records, and the models that they say."""
        rounds = [record.round for record in run.records]
        if rounds != list(range(1, len(rounds) + 1)):
            self._breach("lost", run.run, f"its history has the rounds {rounds}")
        for record in run.records:
            self._records[record.run, record.round] = record
        if run.completed:
            last = self.models.get((run.wire_id, max(rounds, default=0)))
            if last is None or last.digest != run.final:
                self._breach("wrong model", run.run, "its final model was not published")

    def _check_models(self) -> None:
        rewinds = {rewind.after: rewind for run in self._runs for rewind in run.rewinds}
        for (run, round_), model in self.models.items():
            if round_ == 0:
                continue
            if run in rewinds and round_ == rewinds[run].to_round:
                old = self.models.get((rewinds[run].before, round_))
                if old is not None and old.digest != model.digest:
                    self._breach("wrong model", (run, round_), "not the one that was gone back to")
                continue
            record = self._records.get((run, round_)) or self._told.get((run, round_))
            if record is None:
                if not self._void(run, round_):
                    self._breach("wrong model", (run, round_), "no record says what is in it")
                continue
            self._check_model(record, model)

    def _check_model(self, record: RoundRecord, model: _Model) -> None:
        key = (record.run, record.round)
        parts: list[tuple[Vector, int]] = []
        flat: list[tuple[Vector, int]] = []
        for region, meta in sorted(record.regions.items()):
            partial = self.partials.get(PartialId(*key, region))
            if partial is None or partial.message.meta != meta:
                self._breach("wrong model", key, f"its partial of {region} is not the published")
                return
            parts.append((partial.message.vector, meta.num_examples))
            if not self._flatten(PartialId(*key, region), partial, flat):
                return  # said by _check_partials
        mean = weighted_mean(parts)
        if digest_of(mean) != model.digest:
            self._breach("wrong model", key, "not the mean of its partials")
        elif not np.allclose(mean, weighted_mean(flat), rtol=1e-5, atol=1e-7):
            self._breach("wrong model", key, "not the mean of all accepted updates")

    def _flatten(self, key: PartialId, partial: _Partial, flat: list[tuple[Vector, int]]) -> bool:
        """Gather all updates below a partial; False if one is missing."""
        for member in partial.members:
            sent = self._sent(self._closing(key), member)
            if sent is None:
                return False
            if isinstance(sent, _Update):
                flat.append((sent.message.vector, sent.message.meta.num_examples))
            elif not self._flatten(PartialId(key.run, key.round, member), sent, flat):
                return False
        return True

    # Nothing lost

    def _left_out(self, key: PartialId) -> bool:
        """The history names the region as left out, or a tier above does that of itself or of a
        region below it."""
        parent = self.parents.get(key.region)
        if parent is None:
            record = self._records.get(key[:2])
            return record is not None and key.region in record.left_out
        above = PartialId(key.run, key.round, parent)
        partial = self.partials.get(above)
        named = partial is not None and key.region in partial.message.meta.left_out
        return named or self._left_out(above)

    def _void(self, run: str, round_: int) -> bool:
        return any(folder.voids(run, round_) for folder in self._runs)

    def _excused(self, key: PartialId) -> bool:
        """It is said that the region has no part in the model."""
        return self._left_out(key) or self._void(key.run, key.round)

    def _check_places(self) -> None:
        """Each partial is in its model, or its region is left out by name; so is what leads to a
        partial."""
        for of in self.regionals:
            if (key := PartialId(*of[:3])) not in self.partials and not self._excused(key):
                self._breach("lost", of, "no partial came of it, and nobody says why")
        for key, partial in self.partials.items():
            record = self._records.get(key[:2])
            if record is None:
                if not self._void(key.run, key.round):
                    self._breach("lost", key, "the partial's round is in no run's history")
            elif key.region in self.parents:
                above = self.partials.get(PartialId(*key[:2], self.parents[key.region]))
                counted = above is not None and key.region in above.message.meta.members
                if not counted and not self._left_out(key):
                    self._breach("lost", key, "the partial is in none of its parent, unsaid")
            elif key.region in record.regions:
                if record.regions[key.region].digest != partial.message.meta.digest:
                    self._breach("lost", key, "another partial is in the model")
            elif not self._left_out(key):
                self._breach("lost", key, "the partial is in no model, and nobody says why")

    def _aggregate_of(self, key: UpdateId) -> _Partial | _Regional | None:
        """Where an update belongs."""
        of = PartialId(*key[:3])
        if self._closing(of).fog_round == key.fog_round:
            return self.partials.get(of)
        return self.regionals.get(RegionalId(*of, key.fog_round))

    def _check_accepted(self) -> None:
        for key in self.accepted:
            aggregate, of = self._aggregate_of(key), PartialId(*key[:3])
            if aggregate is None:
                # A region's model is published after the receipts: it may have come to nothing.
                last = self._closing(of).fog_round == key.fog_round
                if last or not self._excused(of):
                    self._breach("lost", key, "accepted, but in no aggregate")
            elif key.client not in aggregate.members:
                self._breach("lost", key, "accepted, but not in its aggregate")

    def _check_late(self) -> None:
        for key in self.late:
            aggregate = self._aggregate_of(key)
            if key in self.accepted or (aggregate and key.client in aggregate.members):
                self._breach("contradicted", key, "answered with `late`, and it is counted")
            elif aggregate is None and not self._excused(PartialId(*key[:3])):
                self._breach("lost", key, "answered with `late`, and its round was never closed")

    def _check_received(self) -> None:
        for key, update in self.updates.items():
            aggregate = self._aggregate_of(key)
            if not update.received or (aggregate and key.client in aggregate.members):
                continue
            if aggregate and any(boot == aggregate.boot for _, boot in update.received):
                self._breach("lost", key, "received by the boot that published without it")
                continue
            if self._excused(PartialId(*key[:3])):
                continue
            names = (f"{key.region}-{key.client}", f"{key.region}-aggregator", BROKER)
            opened = self.models.get((key.run, key.round - 1))
            began = opened.at if opened else update.sent[0]
            closed = self.models.get((key.run, key.round))
            if not self._disturbed(names, began, closed.at if closed else self._end):
                self._breach("lost", key, "received, in no partial, and nothing had happened")

    def _check_debts(self) -> None:
        """Who has an update without a final verdict repeats it to each new boot."""
        owed: dict[str, list[tuple[UpdateId, _Update]]] = defaultdict(list)
        for key, update in self.updates.items():
            owed[f"{key.region}-{key.client}"].append((key, update))
        for service, updates in owed.items():
            for key, update in updates:
                self._check_debt(service, key, update)

    def _check_debt(self, service: str, key: UpdateId, update: _Update) -> None:
        seen = self._down[service]
        start = bisect_left(seen, update.sent[0], key=lambda s: s.at)
        holder = 0
        for s in seen[start:]:
            if s.topic == TOPICS.status(key.region):
                status = decode_json(s.payload, Status)
                if status.online and 0 < holder < status.boot:
                    until = s.at + REPEAT_SECONDS
                    sent = update.sent
                    again = bisect_left(sent, s.at) < bisect_left(sent, until)
                    settled = any(
                        self._settles(later, key) for later in seen if s.at <= later.at < until
                    )
                    names = (service, BROKER)
                    excused = until > self._end or self._disturbed(names, s.at - 1.0, until)
                    if not (again or settled or excused):
                        what = f"not sent again to boot {status.boot} within {REPEAT_SECONDS} s"
                        self._breach("forgotten", key, what)
                    holder = status.boot
            elif self._settles(s, key):
                return
            elif s.topic == TOPICS.receipts(key.region, key.client):
                holder = decode_json(s.payload, Receipt).boot

    @staticmethod
    def _settles(s: Sighting, key: UpdateId) -> bool:
        """The client is told that it owes this update no more."""
        at = (key.run, key.round, key.fog_round)
        if s.topic == TOPICS.global_model:
            model = decode_meta(s.payload, ModelMeta)
            return (model.run, model.round + 1) != key[:2]
        if s.topic == TOPICS.regional_model(key.region):
            model = decode_meta(s.payload, ModelMeta)
            return model.run == key.run and (model.round + 1, model.fog_round + 1) > at[1:]
        if s.topic == TOPICS.receipts(key.region):
            closed = decode_json(s.payload, RegionReceipt)
            told = (closed.run, closed.round, closed.fog_round)
            return told == at and key.client in closed.members
        if s.topic == TOPICS.receipts(key.region, key.client):
            receipt = decode_json(s.payload, Receipt)
            told_one = (receipt.run, receipt.round, receipt.fog_round)
            return told_one == at and receipt.verdict != Verdict.RECEIVED
        return False

    def _disturbed(self, names: Sequence[str], began: float, ended: float) -> bool:
        return any(f.target in names and f.began < ended and began < f.over for f in self._faults)


def recovery(
    log: Sequence[Sighting], faults: Sequence[Happened]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds, by kind of fault; of the later region if the fault met both.

    First, from each fault's healing to the next partial that is new on the wire. Second, the
    longest pause between two such partials from the fault's beginning to the next fault, which
    tells more of faults that nobody heals and nobody notices at once.
    """
    closed: dict[str, list[float]] = defaultdict(list)
    known: set[PartialId] = set()
    for s in log:
        if s.up and s.topic.startswith(TOPICS.partial):
            meta = decode(s.payload, PartialMeta).meta
            key = PartialId(meta.run, meta.round, meta.region)
            if key not in known:
                known.add(key)
                closed[key.region].append(s.at)
    seconds: dict[str, list[float]] = defaultdict(list)
    pauses: dict[str, list[float]] = defaultdict(list)
    begins = sorted(fault.began for fault in faults)
    for fault in faults:
        name = fault.target.removesuffix(FLOWER)
        both = name in (BROKER, SERVER)
        after = bisect_right(begins, fault.began)
        until = begins[after] if after < len(begins) else max(s.at for s in log)
        waits, gaps = [], []
        for times in closed.values() if both else [closed[name.split("-")[0]]]:
            if (index := bisect_left(times, fault.healed)) < len(times):
                waits.append(times[index] - fault.healed)
            first, last = bisect_left(times, fault.began), bisect_left(times, until)
            around = [*times[max(0, first - 1) : last], until]
            gaps += [later - earlier for earlier, later in pairwise(around)]
        kind = f"{fault.kind} {role(fault.target)}"
        if waits:
            seconds[kind].append(round(max(waits), 2))
        if gaps:
            pauses[kind].append(round(max(gaps), 2))
    return dict(seconds), dict(pauses)
