"""What one sender may have looked at, whatever the others do."""

from hypothesis import given
from hypothesis import strategies as st

from fedfog.core.quota import MAX_UNKNOWN, REPORT_SECONDS, WINDOW_SECONDS, Quota
from fedfog.core.rounds import MAX_CLIENTS, Log, Policy, PresenceSeen, RegionRounds


def test_what_exceeds_the_quota_is_refused_until_the_minute_or_the_round_is_over() -> None:
    quota = Quota(3)
    assert [quota.take("a", True, 1, 0.0) for _ in range(5)] == [True] * 3 + [False] * 2
    assert quota.take("b", True, 1, 0.0), "another client has its own"
    assert not quota.take("a", True, 1, WINDOW_SECONDS - 1)
    assert quota.take("a", True, 1, WINDOW_SECONDS)
    assert [quota.take("a", True, 2, WINDOW_SECONDS) for _ in range(4)] == [True] * 3 + [False]


def test_refused_messages_are_counted_and_told_at_a_bounded_rate() -> None:
    quota = Quota(1)
    reports = []
    for tick in range(100):
        now = 0.1 * tick  # ten seconds
        quota.take("a", True, 1, now)
        quota.take("a", True, 1, now)
        if report := quota.report(now):
            reports.append(report)
    assert len(reports) == 1
    last = quota.report(REPORT_SECONDS)
    assert reports[0]["a"] + last["a"] == 199
    assert not quota.report(10 * REPORT_SECONDS), "nothing is told twice"


@given(st.lists(st.floats(0, 600), min_size=1, max_size=200), st.integers(1, 20))
def test_no_minute_has_more_than_twice_the_quota(times: list[float], limit: int) -> None:
    """Twice: the window may change in its middle."""
    quota = Quota(limit)
    taken = [now for now in sorted(times) if quota.take("a", True, 1, now)]
    for now in taken:
        assert sum(now <= other < now + WINDOW_SECONDS for other in taken) <= 2 * limit


def test_neither_an_hour_of_repeats_nor_rounds_of_a_tenth_of_a_second_meet_the_quota() -> None:
    quota = Quota(60)
    assert all(quota.take("a", True, 1, 4.0 * n) for n in range(900))
    assert all(quota.take("a", True, n, 3600 + 0.1 * n) for n in range(6000))


def test_made_up_names_take_no_room_of_the_known() -> None:
    quota = Quota(2)
    taken = [quota.take(f"x{n}", False, 1, 0.0) for n in range(2 * MAX_UNKNOWN)]
    assert sum(taken) == MAX_UNKNOWN + 2
    assert quota.take("a", True, 1, 0.0)
    assert quota.report(0.0) == {"": MAX_UNKNOWN - 2}


def test_a_region_remembers_no_more_clients_than_its_limit_and_says_so_once() -> None:
    region = RegionRounds("r", Policy(), boot=1)
    said = []
    for n in range(2 * MAX_CLIENTS):
        said += region.handle(PresenceSeen(f"x{n}", True, 1), 0.0)
    assert [action.event for action in said if isinstance(action, Log)] == ["region_is_full"]
    assert len(region.present) == MAX_CLIENTS
    region.handle(PresenceSeen("x0", False, 1), 0.0)
    region.handle(PresenceSeen("late", True, 1), 0.0)
    assert "late" in region.present, "who has left makes room"
