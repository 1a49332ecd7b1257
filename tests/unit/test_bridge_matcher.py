"""Which partial answers which train message."""

import pytest

from fedfog.core.bridge import Matcher

R1, R2, OTHER = ("run", 1), ("run", 2), ("other", 1)


@pytest.fixture
def matcher() -> Matcher[str]:
    return Matcher()


def test_message_and_partial_meet_in_either_order(matcher: Matcher[str]) -> None:
    assert matcher.on_message(R1, "m1").reply is None
    assert matcher.on_partial(R1, b"p1").reply == ("m1", b"p1")
    assert matcher.on_partial(R2, b"p2").reply is None
    assert matcher.on_message(R2, "m2").reply == ("m2", b"p2")


def test_message_is_answered_once(matcher: Matcher[str]) -> None:
    matcher.on_message(R1, "m1")
    matcher.on_partial(R1, b"p1")
    assert matcher.on_partial(R1, b"p1").reply is None


def test_message_that_is_pushed_again_is_answered_again(matcher: Matcher[str]) -> None:
    matcher.on_message(R1, "m1")
    matcher.on_partial(R1, b"p1")
    assert matcher.on_message(R1, "again").reply == ("again", b"p1")


def test_message_is_confirmed_only_when_its_successor_is_in_hand(matcher: Matcher[str]) -> None:
    assert matcher.on_message(R1, "m1").confirm is None
    assert matcher.on_partial(R1, b"p1").confirm is None
    assert matcher.on_message(R2, "m2").confirm == "m1"


def test_message_without_an_answer_is_confirmed_too(matcher: Matcher[str]) -> None:
    matcher.on_message(R1, "m1")
    assert matcher.on_message(R2, "m2").confirm == "m1"


def test_partial_of_another_run_or_round_answers_nothing(matcher: Matcher[str]) -> None:
    matcher.on_message(R2, "m2")
    assert matcher.on_partial(OTHER, b"x").reply is None
    assert matcher.on_partial(R1, b"p1").reply is None
    assert matcher.waiting_for == R2


def test_partial_of_an_earlier_round_does_not_displace_a_newer_one(
    matcher: Matcher[str],
) -> None:
    matcher.on_partial(R2, b"p2")
    matcher.on_partial(R1, b"p1")
    assert matcher.on_message(R2, "m2").reply == ("m2", b"p2")


def test_partial_that_is_asked_for_counts_whatever_came_before(matcher: Matcher[str]) -> None:
    matcher.on_partial(("run", 7), b"p7")
    matcher.on_message(R1, "m1")
    assert matcher.on_partial(R1, b"p1").reply == ("m1", b"p1")


def test_stale_partial_of_an_old_run_does_not_displace_the_present_one(
    matcher: Matcher[str],
) -> None:
    matcher.on_partial(R1, b"p1")
    matcher.on_partial(OTHER, b"x")
    assert matcher.on_message(R1, "m1").reply == ("m1", b"p1")


def test_partials_of_old_runs_are_dropped(matcher: Matcher[str]) -> None:
    for number in range(5):
        matcher.on_partial((f"run-{number}", 1), b"p")
    assert matcher.on_message(("run-0", 1), "m").reply is None


def test_messages_of_a_lost_session_are_neither_answered_nor_confirmed(
    matcher: Matcher[str],
) -> None:
    matcher.on_message(R1, "m1")
    matcher.forget_messages()
    assert matcher.on_partial(R1, b"p1").reply is None
    assert matcher.on_message(R1, "new").confirm is None
