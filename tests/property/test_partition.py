"""Whatever the partition, the slots of all regions are disjoint and cover the training set."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedfog.core.partition import LEAST, deal, parse, slot_indices
from fedfog.settings import EXIT_BAD_SETTING, CentralSettings, load

Ints = NDArray[np.int64]

ALPHAS = st.one_of(st.sampled_from([1e-6, 0.1, 0.3, 1.0, 1e6]), st.floats(0.01, 100))
SPECS = st.one_of(
    st.just("iid"),
    ALPHAS.map("dirichlet:{:.6f}".format),
    ALPHAS.map("sizes:{:.6f}".format),
    st.sampled_from(["shards:1", "shards:2", "shards:3", "group"]),
)
SEEDS = st.integers(0, 2**32)


@st.composite
def labelled(draw: st.DrawFn) -> tuple[Ints, Ints]:
    """Labels of up to five classes, some of them rare, and groups."""
    counts = draw(st.lists(st.integers(1, 120), min_size=1, max_size=5))
    labels = np.repeat(np.arange(len(counts)), counts)
    return labels, np.arange(len(labels)) * draw(st.integers(1, 40)) // len(labels)


@settings(deadline=None)
@given(
    data=labelled(),
    slots=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    partition=SPECS,
    region_partition=SPECS,
    seed=SEEDS,
)
def test_slots_are_disjoint_and_cover_the_training_set_or_the_setting_is_named(
    data: tuple[Ints, Ints], slots: list[int], partition: str, region_partition: str, seed: int
) -> None:
    labels, groups = data
    try:
        parts = deal(
            labels,
            groups,
            slots,
            seed=seed,
            partition=partition,
            region_partition=region_partition,
        )
    except ValueError as error:
        named = (f"PARTITION={partition}: ", f"REGION_PARTITION={region_partition}: ")
        assert str(error).startswith(named)
        return
    assert set(np.concatenate([i for region in parts for i in region])) == set(range(len(labels)))
    for region in parts:
        held = np.concatenate(region)
        assert all(map(len, region))
        few = len(set(held)) < len(region)  # examples: slots share them
        assert len(set(held)) == len(held) or (partition == "iid" and few)


@settings(deadline=None)
@given(
    data=labelled(),
    slots=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    alpha=ALPHAS,
    kind=st.sampled_from(["dirichlet", "sizes"]),
    seed=SEEDS,
)
def test_dirichlet_leaves_nobody_with_less_than_ten_or_half_of_an_equal_part(
    data: tuple[Ints, Ints], slots: list[int], alpha: float, kind: str, seed: int
) -> None:
    labels, _ = data
    spec = f"{kind}:{alpha:.6f}"
    if len(labels) < len(slots):
        return
    for region in deal(labels, None, [1] * len(slots), seed=seed, region_partition=spec):
        assert len(region[0]) >= min(LEAST, max(1, len(labels) // (2 * len(slots))))
    if len(labels) < len(slots) * max(slots):
        return
    for region in deal(labels, None, slots, seed=seed, partition=spec):
        part = sum(map(len, region))
        fair = min(LEAST, max(1, part // (2 * len(region))))
        assert min(map(len, region)) >= fair


@given(
    classes=st.integers(1, 6),
    slots=st.integers(1, 12),
    per_slot=st.integers(1, 6),
    seed=SEEDS,
)
def test_shards_give_each_slot_its_number_of_classes_and_each_class_a_holder(
    classes: int, slots: int, per_slot: int, seed: int
) -> None:
    labels = np.repeat(np.arange(classes), 60)
    spec = f"shards:{per_slot}"
    if per_slot > classes or per_slot * slots < classes:
        with pytest.raises(ValueError, match=rf"^PARTITION={spec}: .* classes"):
            deal(labels, None, [slots], seed=seed, partition=spec)
        return
    (region,) = deal(labels, None, [slots], seed=seed, partition=spec)
    assert {len(np.unique(labels[indices])) for indices in region} == {per_slot}
    held = [Counter(labels[indices].tolist()) for indices in region]
    assert sorted(np.concatenate(region).tolist()) == list(range(len(labels)))
    shards = [count for counter in held for count in counter.values()]
    assert max(shards) <= -(-60 // (per_slot * slots // classes))


@given(
    groups=st.integers(4, 40),
    slots=st.lists(st.integers(1, 5), max_size=4, min_size=1),
    seed=SEEDS,
)
def test_groups_stay_whole_and_are_dealt_in_equal_numbers(
    groups: int, slots: list[int], seed: int
) -> None:
    group_of = np.random.default_rng(seed).permutation(np.arange(400) % groups)
    how = {"partition": "group", "region_partition": "group"}
    labels = np.zeros(400, np.int64)
    of_region = [len(part) for part in np.array_split(np.arange(groups), len(slots))]
    if any(own < count for own, count in zip(of_region, slots, strict=True)):
        with pytest.raises(ValueError, match=r"^PARTITION=group: \d+ groups are too few for"):
            deal(labels, group_of, slots, seed=seed, **how)
        return
    parts = deal(labels, group_of, slots, seed=seed, **how)
    held = [[len(np.unique(group_of[indices])) for indices in region] for region in parts]
    assert [sum(region) for region in held] == of_region
    assert all(max(region) - min(region) <= 1 for region in held)


def test_groups_that_the_task_does_not_name_are_refused() -> None:
    with pytest.raises(ValueError, match="REGION_PARTITION=group: the task does not say"):
        deal(np.zeros(9, np.int64), None, [1, 1], seed=1, region_partition="group")


def test_everybody_arrives_at_the_same_split_and_another_seed_gives_another() -> None:
    labels = np.arange(400) % 3
    for spec in ("iid", "dirichlet:0.3", "sizes:0.3", "shards:2", "group"):
        how = {"partition": spec, "region_partition": spec}
        first, again, other = (
            deal(labels, np.arange(400) // 10, [3, 3], seed=seed, **how) for seed in (5, 5, 6)
        )
        assert [i.tolist() for r in first for i in r] == [i.tolist() for r in again for i in r]
        assert [i.tolist() for r in first for i in r] != [i.tolist() for r in other for i in r]


def test_regions_split_alike_whatever_their_numbers_of_slots() -> None:
    """A region does not know how many slots the others have."""
    labels = np.arange(600) % 5
    how = {"partition": "dirichlet:0.3", "region_partition": "shards:3"}
    few, many = (
        deal(labels, None, [2, 3, 4], seed=8, **how),
        deal(labels, None, [7, 3, 1], seed=8, **how),
    )
    assert [i.tolist() for i in few[1]] == [i.tolist() for i in many[1]]
    assert set(np.concatenate(few[0])) == set(np.concatenate(many[0]))


def test_two_stages_of_dirichlet_are_one() -> None:
    """Aggregation property: 3 regions with 3 alpha, then 3 slots with alpha, is alpha over 9:
    standard deviation and quantiles of a slot's share of a class, over 300 seeds."""
    labels = np.zeros(9000, np.int64)
    flat, staged = [], []
    for seed in range(300):
        (region,) = deal(labels, None, [9], seed=seed, partition="dirichlet:1.5")
        flat += [len(indices) / 9000 for indices in region]
        how = {"partition": "dirichlet:1.5", "region_partition": "dirichlet:4.5"}
        staged += [
            len(indices) / 9000
            for region in deal(labels, None, [3, 3, 3], seed=seed, **how)
            for indices in region
        ]
    # Beta(1.5, 12): mean 1/9, variance (1/9)(8/9)/14.5.
    deviation = (8 / 81 / 14.5) ** 0.5
    for shares in (flat, staged):
        assert np.std(shares) == pytest.approx(deviation, rel=0.05)
    levels = np.linspace(0.05, 0.95, 19)
    assert np.quantile(staged, levels) == pytest.approx(np.quantile(flat, levels), rel=0.1)


def test_smaller_alpha_skews_more() -> None:
    labels = np.repeat([0, 1], [600, 400])
    spread = {}
    for alpha in (0.1, 1, 100):
        (region,) = deal(labels, None, [20], seed=1, partition=f"dirichlet:{alpha}")
        spread[alpha] = np.std([np.mean(labels[indices]) for indices in region])
    assert spread[0.1] > spread[1] > 3 * spread[100]


def test_sizes_differ_and_labels_do_not() -> None:
    labels = np.repeat([0, 1], [6000, 4000])
    (region,) = deal(labels, None, [5], seed=2, partition="sizes:0.5")
    sizes = list(map(len, region))
    assert max(sizes) > 4 * min(sizes)
    assert all(abs(np.mean(labels[indices]) - 0.4) < 3 / len(indices) ** 0.5 for indices in region)


# The default


@given(
    examples=st.integers(20, 600),
    slots=st.integers(1, 9),
    regions=st.integers(1, 5),
    seed=SEEDS,
)
def test_iid_is_equal_parts_of_equal_parts_of_a_permutation(
    examples: int, slots: int, regions: int, seed: int
) -> None:
    parts = deal(np.zeros(examples, np.int64), None, [slots] * regions, seed=seed)
    order = np.random.default_rng(seed).permutation(examples)
    for region, part in zip(parts, np.array_split(order, regions), strict=True):
        if len(part) >= slots:
            for mine, expected in zip(region, np.array_split(part, slots), strict=True):
                assert mine.tolist() == expected.tolist()


@given(
    examples=st.integers(5, 100), slots=st.integers(1, 200), regions=st.integers(1, 5), seed=SEEDS
)
def test_slots_without_an_example_of_their_own_share_one(
    examples: int, slots: int, regions: int, seed: int
) -> None:
    """More slots than examples: none is empty, none of the region's examples is left out, and no
    example is in more than one slot above the others."""
    every: list[int] = []
    for held in deal(np.zeros(examples, np.int64), None, [slots] * regions, seed=seed):
        assert all(len(indices) > 0 for indices in held)
        times = Counter(np.concatenate(held).tolist())
        assert max(times.values()) - min(times.values()) <= 1
        every += times
    assert sorted(every) == list(range(examples))


# What is refused


def test_region_without_an_example_is_refused() -> None:
    with pytest.raises(ValueError, match="REGION_PARTITION=iid: 2 examples are too few for 3"):
        deal(np.zeros(2, np.int64), None, [1, 1, 1], seed=1)


def test_more_slots_than_examples_are_refused_unless_iid() -> None:
    with pytest.raises(ValueError, match=r"^PARTITION=sizes:1: 5 examples are too few for 6 slots"):
        deal(np.zeros(5, np.int64), None, [6], seed=1, partition="sizes:1")


@pytest.mark.parametrize("wrong", [(3, 3, 0, 1), (-1, 3, 0, 1), (0, 3, 2, 2)])
def test_slot_that_does_not_exist_is_refused(wrong: tuple[int, int, int, int]) -> None:
    slot, slots, region, regions = wrong
    with pytest.raises(ValueError, match="no slot"):
        slot_indices(
            np.zeros(100, np.int64),
            None,
            slot=slot,
            slots=slots,
            region_index=region,
            regions=regions,
            seed=1,
        )


@pytest.mark.parametrize(
    "spec",
    [
        *(
            "",
            "IID",
            "iid:",
            "iid:1",
            "group:2",
            "labels",
            "dirichlet",
            "dirichlet:",
            "dirichlet:x",
        ),
        *("dirichlet:0", "dirichlet:-1", "dirichlet:nan", "dirichlet:inf", "dirichlet:1e9"),
        *("sizes:0", "shards", "shards:0", "shards:1.5", "shards:inf", "shards:-1"),
    ],
)
def test_unknown_partition_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="none of iid, dirichlet:ALPHA"):
        parse(spec)


@pytest.mark.parametrize("setting", ["PARTITION", "REGION_PARTITION"])
def test_unknown_partition_ends_the_central_server_at_its_start(
    setting: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(setting, "dirichlet:0")
    with pytest.raises(SystemExit) as ended:
        load(CentralSettings)
    assert ended.value.code == EXIT_BAD_SETTING
    assert capsys.readouterr().err.startswith(f"{setting}='dirichlet:0': ")


def test_partition_is_a_kind_and_a_number() -> None:
    assert parse("iid") == ("iid", 0)
    assert parse("dirichlet:0.3") == ("dirichlet", 0.3)
    assert parse("shards:2") == ("shards", 2)
