"""What a client owes: when it trains, when it sends, when it is rid of an update."""

import random

import pytest

from fedfog.core.participation import (
    RESEND_SECONDS,
    AggregatorSeen,
    Announce,
    CancelTraining,
    Connected,
    Duty,
    EmptyOutbox,
    ModelArrived,
    Participation,
    RunFinished,
    Send,
    SlotDealt,
    Tick,
    Train,
    Trained,
    VerdictArrived,
)


def trained_client() -> Participation:
    client = Participation(random.Random(1))
    client.handle(Connected(), 0)
    client.handle(AggregatorSeen(5), 0)
    client.handle(ModelArrived("run", 1, 1), 0)
    client.handle(SlotDealt("run", 0), 0)
    assert client.handle(Trained("run", 1), 1) == [Send("run", 1, 1, "trained")]
    return client


def test_trains_only_with_a_slot_of_this_run() -> None:
    client = Participation(random.Random(1))
    client.handle(SlotDealt("old", 0), 0)
    assert client.handle(ModelArrived("run", 2, 1), 0) == []
    assert client.handle(SlotDealt("run", 0), 0) == [Announce(), Train("run", 1)]


def test_client_with_data_of_its_own_needs_no_slot() -> None:
    client = Participation(random.Random(1), own_data=True)
    assert client.handle(ModelArrived("run", 1, 1), 0) == [Train("run", 1)]


def test_nothing_is_sent_twice_without_a_fault() -> None:
    client = trained_client()
    assert client.handle(VerdictArrived("run", 1, "received", 5), 1.1) == []
    assert client.wake_at() is None
    assert client.handle(Tick(), 500) == []
    accepted = client.handle(VerdictArrived("run", 1, "accepted", 5), 501)
    assert accepted == [EmptyOutbox("run", 1, "accepted", "")]
    assert client.handle(Tick(), 600) == []


def test_silence_is_answered_with_repeats_that_slow_down() -> None:
    client = trained_client()
    gaps, last = [], 1.0
    for attempt in range(2, 8):
        due = client.wake_at()
        assert due is not None
        assert client.handle(Tick(), due - 0.01) == []
        assert client.handle(Tick(), due) == [Send("run", 1, attempt, "no answer")]
        gaps.append(due - last)
        last = due
    assert 0.8 * RESEND_SECONDS[0] <= gaps[0] <= 1.2 * RESEND_SECONDS[0]
    assert 6.4 <= gaps[-1] <= 9.6


@pytest.mark.parametrize(("took", "patience"), [(0.01, 4.0), (10.0, 20.0), (1000.0, 120.0)])
def test_the_first_repeat_waits_twice_as_long_as_the_last_answer_took(
    took: float, patience: float
) -> None:
    """A slow way or a long queue is no reason to send a model once more into it."""
    client = trained_client()
    client.handle(VerdictArrived("run", 1, "received", 5), 1.0 + took)
    began = 5000.0
    client.handle(ModelArrived("run", 1, 2), began)
    client.handle(Trained("run", 2), began)
    due = client.wake_at()
    assert due is not None
    assert 0.8 * patience <= due - began <= 1.2 * patience


def test_held_update_is_sent_again_to_a_new_boot_and_after_a_reconnect() -> None:
    client = trained_client()
    client.handle(VerdictArrived("run", 1, "received", 5), 1)
    assert client.handle(AggregatorSeen(5), 2) == []
    sent = client.handle(AggregatorSeen(6), 3)
    assert sent == [Send("run", 1, 2, "new boot of the aggregator")]
    client.handle(VerdictArrived("run", 1, "received", 6), 4)
    assert client.handle(Connected(), 5) == [Announce(), Send("run", 1, 3, "reconnect")]


def test_received_of_a_boot_that_is_already_gone_is_not_trusted() -> None:
    client = trained_client()
    client.handle(AggregatorSeen(6), 2)
    late_word = client.handle(VerdictArrived("run", 1, "received", 5), 3)
    assert [type(action) for action in late_word] == [Send]
    assert client.duty is Duty.SENDING


def test_verdict_on_another_round_changes_nothing() -> None:
    client = trained_client()
    for run, round_ in (("run", 0), ("run", 2), ("other", 1)):
        assert client.handle(VerdictArrived(run, round_, "accepted", 5), 2) == []
    assert client.duty is Duty.SENDING


def test_newer_model_voids_what_is_unanswered_and_stops_what_is_trained() -> None:
    client = trained_client()
    assert client.handle(ModelArrived("run", 1, 2), 2) == [
        EmptyOutbox("run", 1, "void", "a newer model came first"),
        Train("run", 2),
    ]
    assert client.handle(ModelArrived("run", 1, 3), 3) == [CancelTraining(), Train("run", 3)]
    assert client.handle(Trained("run", 2), 4) == []


def test_regional_rounds_are_ordered_within_their_global_round() -> None:
    client = trained_client()
    second = ModelArrived("run", 1, 1, fog_round=2)
    why = "a newer model came first"
    assert client.handle(second, 2) == [
        EmptyOutbox("run", 1, "void", why),
        Train("run", 1, fog_round=2),
    ]
    for older in (second, ModelArrived("run", 1, 1)):
        assert client.handle(older, 3) == []
    assert client.handle(Trained("run", 1), 3) == []  # of the first
    sent = client.handle(Trained("run", 1, fog_round=2), 3)
    assert sent == [Send("run", 1, 1, "trained", fog_round=2)]
    assert client.handle(VerdictArrived("run", 1, "late", 5), 4) == []
    assert client.handle(ModelArrived("run", 1, 2), 5) == [
        EmptyOutbox("run", 1, "void", why, fog_round=2),
        Train("run", 2),
    ]


def test_older_model_or_run_is_ignored() -> None:
    client = trained_client()
    for model in (
        ModelArrived("run", 1, 1),
        ModelArrived("run", 1, 0),
        ModelArrived("earlier", 0, 9),
    ):
        assert client.handle(model, 2) == []


def test_update_of_an_earlier_life_is_sent_first() -> None:
    client = Participation(random.Random(1), outbox=("run", 4, 1))
    assert client.handle(Connected(), 0) == [Announce(), Send("run", 4, 1, "reconnect")]
    assert client.handle(ModelArrived("run", 1, 4), 0) == []  # the model it was trained from


def test_finished_model_tells_whether_the_client_took_part() -> None:
    idle = Participation(random.Random(1))
    assert idle.handle(ModelArrived("old", 1, 4, finished=True), 0) == [RunFinished("old", False)]
    client = trained_client()
    client.handle(VerdictArrived("run", 1, "accepted", 5), 1)
    assert client.handle(ModelArrived("run", 1, 2, finished=True), 2) == [RunFinished("run", True)]


def test_update_is_not_repeated_while_it_is_on_its_way_to_the_broker() -> None:
    """Nor right after it got there: what took a minute to the broker takes its time from there."""
    client = Participation(random.Random(1), own_data=True)
    client.handle(ModelArrived("run", 1, 1), 0)
    assert client.handle(Trained("run", 1), 0) == [Send("run", 1, 1, "trained")]
    sent = 0
    while (due := client.wake_at() or 0.0) < 60:
        assert client.handle(Tick(sending=True), due) == []
        sent += 1
    assert 0 < sent < 8
    assert client.handle(Tick(sending=False), due) == []
    again = client.wake_at()
    assert again is not None
    assert again >= due + 60
    assert client.handle(Tick(sending=False), again) == [Send("run", 1, 2, "no answer")]
