"""Who may write and read which topic: the compose stack's configuration and access list, in a real
Mosquitto, judged by the broker's answer and by what arrives."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedfog.cli.broker import LocalBroker, installed_mosquitto
from fedfog.messages.catalog import CHANNELS
from fedfog.messages.topics import Topics
from fedfog_enrolment import pki
from fedfog_enrolment.acl import acl
from fedfog_enrolment.ca import CA
from secured import NOT_AUTHORIZED, Holder, certify, shipped_broker

# Regions r0 and r1 have clients and a bridge; `low` is below `top`.
REGIONS = ["r0", "r1", "top", "low"]
PARENTS = {"low": "top"}

LONG = "x" * 64
WILD = ["+", "#", "r0/+", "+/c1"]
STRANGE = ["unknown", "r0", "r0/", "r0/c1/x", "aggregator.r9", LONG]
IDENTITIES = [
    *("r0/c1", "r1/c1", "top/low"),
    *("aggregator.r0", "aggregator.r1", "aggregator.top", "aggregator.low"),
    *("bridge.r0", "bridge.r1", "bridge.top"),
    *("central-server", "monitor", "probe"),
    *STRANGE,
    *WILD,
]
# A certificate with a wildcard in its name has no rights at all, and the probe has its own only.
EVERYBODY = [name for name in IDENTITIES if name not in (*WILD, "probe", "monitor")]

# Topic: who writes it, who reads it. The monitor, which reads all of FedFog's, is not repeated.
ALLOWED: dict[str, tuple[list[str], list[str]]] = {
    "fl/global_model": (["central-server"], EVERYBODY),
    "fl/updates/r0/c1": (["r0/c1"], ["aggregator.r0"]),
    "fl/updates/r0/c2": ([], ["aggregator.r0"]),
    "fl/updates/r1/c1": (["r1/c1"], ["aggregator.r1"]),
    "fl/updates/top/low": ([], ["aggregator.top"]),
    "fl/receipts/r0/c1": (["aggregator.r0"], ["r0/c1"]),
    "fl/receipts/r0/c2": (["aggregator.r0"], []),
    "fl/receipts/r1/c1": (["aggregator.r1"], ["r1/c1"]),
    "fl/receipts/top/low": (["aggregator.top"], ["aggregator.low"]),
    "fl/receipts/r0": (["aggregator.r0"], EVERYBODY),
    "fl/receipts/r1": (["aggregator.r1"], EVERYBODY),
    "fl/receipts/top": (["aggregator.top"], EVERYBODY),
    "fl/partial/r0": (["aggregator.r0"], ["bridge.r0"]),
    "fl/partial/r1": (["aggregator.r1"], ["bridge.r1"]),
    "fl/partial/top": (["aggregator.top"], ["bridge.top"]),
    "fl/partial/low": (["aggregator.low"], []),
    "fl/partial/top/low": (["aggregator.low"], ["aggregator.top"]),
    "fl/partial/r0/c1": ([], []),
    "fl/regional_model/r0": (["aggregator.r0"], EVERYBODY),
    "fl/regional_model/r1": (["aggregator.r1"], EVERYBODY),
    "fl/regional_model/top": (["aggregator.top"], EVERYBODY),
    "fl/slots/r0/c1": (["aggregator.r0"], ["r0/c1"]),
    "fl/slots/r0/c2": (["aggregator.r0"], []),
    "fl/slots/r1/c1": (["aggregator.r1"], ["r1/c1"]),
    "fl/presence/r0/c1": (["r0/c1"], ["aggregator.r0"]),
    "fl/presence/r0/c2": ([], ["aggregator.r0"]),
    "fl/presence/r1/c1": (["r1/c1"], ["aggregator.r1"]),
    "fl/presence/top/low": (["aggregator.low"], ["aggregator.top"]),
    "fl/status/r0": (["aggregator.r0"], EVERYBODY),
    "fl/status/r1": (["aggregator.r1"], EVERYBODY),
    "fl/status/top": (["aggregator.top"], EVERYBODY),
    "fl/progress/r0": (["aggregator.r0"], []),
    "fl/progress/r1": (["aggregator.r1"], []),
    "fl/bridge/r0": (["bridge.r0"], ["bridge.r0", "central-server"]),
    "fl/bridge/r1": (["bridge.r1"], ["bridge.r1", "central-server"]),
    "fl/cue": (["central-server"], ["bridge.r0", "bridge.r1", "bridge.top"]),
    "fl/bell": (["bridge.r0", "bridge.r1", "bridge.top"], ["central-server"]),
    "fl/evaluations/r0/c1": (["r0/c1"], ["central-server"]),
    "fl/evaluations/r0/c2": ([], ["central-server"]),
    "fl/evaluations/r1/c1": (["r1/c1"], ["central-server"]),
    "fl/evaluations/top/low": ([], ["central-server"]),
    "fl/history": (["central-server"], []),
}
# What a name that the CA never gives would get: a level of its own, which is nobody's topic, but
# for one with an empty client, which is why the CA does not give it.
OF_STRANGE_NAMES: dict[str, tuple[list[str], list[str]]] = {
    "fl/updates/unknown": (["unknown"], []),
    "fl/presence/unknown": (["unknown"], []),
    "fl/updates/r0": (["r0"], []),
    "fl/updates/r0/": (["r0/"], ["aggregator.r0"]),
    "fl/updates/r0/c1/x": (["r0/c1/x"], []),
    "fl/receipts/r0/c1/x": ([], ["r0/c1/x"]),
    f"fl/updates/{LONG}": ([LONG], []),
    "fl/updates/aggregator.r0": (["aggregator.r0"], []),
}
NOBODYS = [
    "fl",
    "fl/",
    "fl/unknown",
    "fl/probe/x",
    "fl/updates",
    "fl/updates/probe",
    "fl/presence/probe",
    "fl/global_model/x",
    "FL/global_model",
    "/fl/global_model",
    "probe",
    "x",
    "$SYS/broker/version",
    "$SYS/x",
    "$CONTROL/dynamic-security/v1",
    "$share/group/fl/global_model",
    "$x",
]
TOPICS = [*ALLOWED, *OF_STRANGE_NAMES, *NOBODYS]


def intended(name: str) -> tuple[set[str], set[str]]:
    """Topics that a certificate with this name may write and read."""
    table = ALLOWED | OF_STRANGE_NAMES
    writes = {topic for topic, (writers, _) in table.items() if name in writers}
    if name == "monitor":  # `fl/updates/r0/` has the form of an update's topic
        return writes, {*ALLOWED, "fl/updates/r0/"}
    return writes, {topic for topic, (_, readers) in table.items() if name in readers}


@dataclass(frozen=True)
class Gate:
    """The broker, a folder for each certificate, and two that may do everything."""

    broker: LocalBroker
    folders: dict[str, Path]

    def enter(self, name: str, **more: object) -> Holder:
        return Holder(self.broker.port, self.folders[name], **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    if installed_mosquitto() is None:
        pytest.skip("Mosquitto is not installed (apt install mosquitto)")
    folder = tmp_path_factory.mktemp("gate")
    ca: CA = pki.ensure(folder / "pki", REGIONS, parents=PARENTS)
    # The test's own: nobody else's rights change by them.
    everything = [f"topic {{}} {root}" for root in ("#", "$SYS/#", "$CONTROL/#", "$x/#")]
    observer = "\n".join(["user observer", *everything]).format(*["read"] * 4)
    sender = "\n".join(["user sender", *everything]).format(*["write"] * 4)
    text = f"{acl(REGIONS, Topics(), PARENTS)}{observer}\n{sender}\n"
    (folder / "pki" / "broker" / "acl").write_text(text)
    folders = {
        name: certify(ca, folder / f"holder{number}", name)
        for number, name in enumerate([*IDENTITIES, "observer", "sender"])
    }
    broker = shipped_broker(folder / "broker", folder / "pki" / "broker").start()
    yield Gate(broker, folders)
    broker.stop()


@pytest.fixture
def observer(gate: Gate) -> Iterator[Holder]:
    """Sees all that is published, also what is retained."""
    holder = gate.enter("observer")
    holder.subscribe("#", "$CONTROL/#", "$x/#", "$SYS/x")
    holder.received.clear()
    yield holder
    holder.close()


def arrived(observer: Holder, name: str, retained: bool) -> set[str]:
    """Topics on which the observer received a message of `name`."""
    return {
        message.topic
        for message in observer.received
        if message.payload == name.encode() and message.retain == retained
    }


def test_every_topic_of_the_catalog_is_in_the_matrix() -> None:
    for channel in CHANNELS:
        form = re.sub(r"\{\w+\}", "[^/]+", channel.template(Topics()))
        assert any(re.fullmatch(form, topic) for topic in ALLOWED), channel.name


@pytest.mark.parametrize("retained", [False, True], ids=["published", "retained"])
def test_a_certificate_writes_its_own_topics_and_no_others(
    gate: Gate, observer: Holder, retained: bool
) -> None:
    def attempt(name: str) -> dict[str, int]:
        holder = gate.enter(name)
        answers = holder.publish(TOPICS, name.encode(), retained)
        holder.close()
        return answers

    with ThreadPoolExecutor() as pool:
        answers = dict(zip(IDENTITIES, pool.map(attempt, IDENTITIES), strict=True))
    observer.catch_up()

    for name, codes in answers.items():
        writes, _ = intended(name)
        assert {topic for topic, code in codes.items() if code < 0x80} == writes, name
        assert arrived(observer, name, retained) == writes, name
        assert {codes[topic] for topic in ALLOWED.keys() - writes} <= {NOT_AUTHORIZED}, name


def test_nothing_is_retained_but_by_who_may_write_it(gate: Gate) -> None:
    def attempt(name: str) -> None:
        holder = gate.enter(name)
        holder.publish(TOPICS, name.encode(), retain=True)
        holder.close()

    sender = gate.enter("sender")
    ours = [topic for topic in TOPICS if not topic.startswith("$")]
    sender.publish(ours, b"", retain=True)  # nothing is there
    for name in IDENTITIES:
        attempt(name)
    latecomer = gate.enter("observer")
    latecomer.subscribe("#", "$CONTROL/#", "$x/#")
    latecomer.catch_up()
    for message in latecomer.received:
        assert message.topic in intended(message.payload.decode())[0]
    written = {topic for name in IDENTITIES for topic in intended(name)[0]}
    assert {message.topic for message in latecomer.received} == written
    sender.publish(ours, b"", retain=True)
    latecomer.close()
    sender.close()


def test_a_will_is_published_where_its_owner_may_write_and_nowhere_else(
    gate: Gate, observer: Holder
) -> None:
    def attempt(name: str) -> None:
        for topic in TOPICS:
            if not topic.startswith("$share"):
                gate.enter(name, will=(topic, name.encode(), True)).cut()
        # The session is this certificate's only one: when it is taken over, the last will is out.
        gate.enter(name).close()

    with ThreadPoolExecutor() as pool:
        list(pool.map(attempt, IDENTITIES))
    observer.catch_up()

    for name in IDENTITIES:
        assert arrived(observer, name, retained=True) == intended(name)[0], name


def test_a_certificate_reads_its_own_topics_and_no_others(gate: Gate) -> None:
    """By whatever filter it asks: all of them, shared, or one topic by its name."""
    holders = {name: gate.enter(name) for name in IDENTITIES}
    for number, holder in enumerate(holders.values()):
        holder.subscribe("#", "$CONTROL/#", "$x/#", f"$share/{number}/#", *NOBODYS[:-2])
        holder.received.clear()
    sender = gate.enter("sender")
    topics = [topic for topic in TOPICS if not topic.startswith(("$share", "$SYS/broker"))]
    refused = {topic for topic, code in sender.publish(topics, b"seen").items() if code >= 0x80}
    assert refused == {"$SYS/x"}  # Mosquitto's own: there is no message that could be read

    for name, holder in holders.items():
        holder.catch_up()
        seen = {message.topic for message in holder.received if message.payload == b"seen"}
        assert seen == intended(name)[1], name
        holder.close()
    sender.close()


def test_only_the_monitor_reads_the_figures_of_the_broker(gate: Gate) -> None:
    for name in IDENTITIES:
        holder = gate.enter(name)
        holder.subscribe("$SYS/#")
        holder.catch_up()
        seen = {message.topic for message in holder.received}
        if name == "monitor":
            assert {"$SYS/broker/version", "$SYS/broker/uptime"} <= seen
        else:
            assert seen == ({"$SYS/broker/version"} if name == "probe" else set()), name
        holder.close()
