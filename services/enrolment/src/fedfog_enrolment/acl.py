"""Mosquitto's access list (its option `acl_file`): who writes and reads which topic.

It is made of the messages' own catalog: a topic has the writers and readers that `docs/messages.md`
shows, and no others. A client's certificate is named `region/client`, which is also how its topics
end: one pattern holds for all clients, and gives none of them another's topics. What has no client
in its name (the global model and a region's, its status and receipts) every certificate may read.

The last line says that the file is whole, and lines that forbid stand first: of a list that was cut
off all the same, only permissions are missing.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from itertools import combinations

from fedfog.messages.catalog import CHANNELS
from fedfog.messages.topics import Topics, is_name

PROBE = "probe"
END = "# the end"
_EVERYBODY = ""
_CLIENT = "{region}/{client}"
# Less than what Mosquitto understands, so that it understands all of it.
_LINE = re.compile(r"(#.*|user [!-~]+|(topic|pattern) (read|write|deny) (?P<topic>\S+))?")
_LEVEL = re.compile(r"[^+#]*|\+|#")


def acl(regions: Collection[str], topics: Topics, parents: Mapping[str, str]) -> str:
    """The text of the file.

    Args:
        regions: names of all regions, also of those above others.
        parents: PARENT_REGION of each region that has one.

    Raises:
        ValueError: a name is not one, a parent is no region, or two kinds of topics could be
            mistaken for each other.
    """
    _check(regions, topics, parents)
    grants: dict[str, dict[str, None]] = {}  # of each user, in order and once
    for channel in CHANNELS:
        template = channel.template(topics)
        roles = [("write", role) for role in channel.sender.split(", ")]
        roles += [("read", role) for role in (*channel.receivers.split(", "), "monitor")]
        for action, role in roles:
            for user, region, client in _users(role, regions, parents):
                topic = template.replace(_CLIENT, client).replace("{region}", region)
                grants.setdefault(user, {})[f"{action} {topic}"] = None
    for region in regions:  # it watches what is said in its name
        grants[f"bridge.{region}"][f"read {topics.bridge(region)}"] = None
    grants["monitor"]["read $SYS/#"] = None
    everybody = grants.pop(_EVERYBODY)

    # What holds for everybody does not for the guard's probe. And a region below is towards its
    # parent what a client is, under a certificate of its own: no client may have its name there.
    denied = [grant.partition(" ")[2] for grant in everybody]
    parts = [_block(PROBE, [f"deny {topic.replace('%u', PROBE)}" for topic in denied])]
    for child, parent in sorted(parents.items()):
        name = f"{parent}/{child}"
        own = [topic.replace("%u", name) for topic in denied if "%u" in topic]
        parts.append(_block(name, [f"deny {topic}" for topic in own]))
    parts.append("".join(f"pattern {grant}\n" for grant in everybody))
    parts += [_block(user, lines) for user, lines in sorted(grants.items())]
    # The health check's question.
    parts.append(_block(PROBE, ["read $SYS/broker/version"]))
    return "\n".join([*parts, END, ""])


def with_probe(text: str, topic: str) -> str:
    """An access list with one topic that the guard's probe may write, in place of another one."""
    whole = f"{text.partition(END)[0]}{END}\n"
    return whole + _block(PROBE, [f"write {topic}"]) + f"{END}\n"


def check(text: str) -> None:
    """Raises ValueError: this is no access list that Mosquitto would read whole."""
    lines = text.split("\n")
    if lines[-2:] != [END, ""]:
        raise ValueError("the end of the access list is missing")
    for number, line in enumerate(lines, 1):
        found = _LINE.fullmatch(line)
        if found is None or not line.isprintable():
            raise ValueError(f"line {number} of the access list is none: {line[:80]!r}")
        levels = (found["topic"] or "").split("/")
        if not all(_LEVEL.fullmatch(level) for level in levels) or "#" in levels[:-1]:
            raise ValueError(
                f"line {number} of the access list has a wildcard out of place: {line[:80]!r}"
            )


def _block(user: str, lines: Collection[str]) -> str:
    return f"user {user}\n" + "".join(f"topic {line}\n" for line in lines)


def _users(
    role: str, regions: Collection[str], parents: Mapping[str, str]
) -> Iterator[tuple[str, str, str]]:
    """Names of certificates with a role of the catalog, and what stands in their topics for
    `{region}` and for `{region}/{client}`."""
    match role:
        case "client":
            yield _EVERYBODY, "", "%u"
        case "all" | "clients":
            yield _EVERYBODY, "+", "+/+"
        case "central-server" | "monitor":
            yield role, "+", "+/+"
        case "aggregator":
            yield from ((f"aggregator.{region}", region, f"{region}/+") for region in regions)
        case "aggregator at its parent":
            for child, parent in parents.items():
                yield f"aggregator.{child}", parent, f"{parent}/{child}"
        case "its parent":
            for child, parent in parents.items():
                yield f"aggregator.{parent}", parent, f"{parent}/{child}"
        case "bridge" | "bridges":
            yield from ((f"bridge.{region}", region, f"{region}/+") for region in regions)
        case _:
            raise ValueError(f"the catalog of messages has a role without a rule here: {role}")


def _check(regions: Collection[str], topics: Topics, parents: Mapping[str, str]) -> None:
    if bad := [name for name in regions if not is_name(name)]:
        raise ValueError(f"not a region name: {bad[0]!r}")
    if strange := {*parents, *parents.values()} - set(regions):
        raise ValueError(f"REGIONS lacks a region that has a parent or children: {min(strange)}")
    kinds = [channel.template(topics) for channel in CHANNELS]
    for topic in kinds:
        # `%` stands for names in a pattern, and a line break begins another rule.
        if not topic.isprintable() or set(topic) & set("+#% "):
            raise ValueError(f"the access list cannot hold the topic {topic!r} (TOPIC_*)")
    for one, other in combinations(kinds, 2):
        levels = list(zip(one.split("/"), other.split("/"), strict=False))
        if one.count("/") == other.count("/") and all(a == b or "{" in a + b for a, b in levels):
            raise ValueError(f"topics {one} and {other} could be mistaken for each other (TOPIC_*)")
