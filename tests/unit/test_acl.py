"""The access list as a text. What a broker makes of it: integration/test_broker_matrix.py."""

import pytest

from fedfog.messages.topics import Topics
from fedfog_enrolment.acl import acl, check, with_probe


def test_renamed_topics_are_in_the_list_and_the_others_are_not() -> None:
    text = acl(["r0"], Topics("lab", "up/dates", "lab/partial", "models/now"), {})
    check(text)
    assert "pattern write up/dates/%u\n" in text
    assert "pattern read models/now\n" in text
    assert "fl/" not in text


@pytest.mark.parametrize(
    ("topics", "told"),
    [
        (Topics(updates="fl"), "fl/{region}/{client} and fl/receipts/{region}"),
        (Topics(updates="fl/presence"), "fl/presence/{region}/{client}"),
        (Topics(partial="fl/updates"), "fl/updates/{region}/{client}"),
        (Topics(global_model="fl/cue"), "fl/cue"),
        (Topics(global_model="m\ntopic readwrite fl/#"), "cannot hold the topic"),
        (Topics(updates="fl/%c"), "cannot hold the topic"),
        (Topics(updates="fl/+"), "cannot hold the topic"),
    ],
)
def test_topics_that_would_give_more_than_is_meant_are_refused(topics: Topics, told: str) -> None:
    with pytest.raises(ValueError, match="TOPIC_") as error:
        acl(["r0"], topics, {})
    assert told in str(error.value)


def test_names_and_parents_have_to_be_regions() -> None:
    with pytest.raises(ValueError, match="not a region name: 'r0/c1'"):
        acl(["r0/c1"], Topics(), {})
    with pytest.raises(ValueError, match="REGIONS lacks"):
        acl(["r0"], Topics(), {"r0": "top"})


def test_the_probe_has_one_topic_at_a_time() -> None:
    text = acl(["r0"], Topics(), {})
    once = with_probe(text, "fl/probe/1")
    check(once)
    assert with_probe(with_probe(once, "fl/probe/2"), "fl/probe/1") == once
    assert once.startswith(text)


def test_a_list_cut_off_anywhere_is_none() -> None:
    text = acl(["r0"], Topics(), {})
    for end in range(len(text)):
        with pytest.raises(ValueError, match="access list"):
            check(text[:end])
