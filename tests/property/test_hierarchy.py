"""Tiers of weighted means are the flat mean, whoever belongs to which region."""

import numpy as np
from flwr.app import Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedfog.core.aggregation import WeightedSum
from fedfog.flower.grid import train_message
from fedfog.flower.strategy import FedAvg, to_record, to_vector
from fedfog.messages.codec import Vector
from flower import PlayedFlower

SIZE = 17
VALUES = st.floats(-1e6, 1e6, width=32)
CLIENTS = st.lists(
    st.tuples(
        hnp.arrays(np.float32, SIZE, elements=VALUES),
        st.integers(1, 100_000),  # examples
        st.integers(0, 4),  # region
    ),
    min_size=1,
    max_size=20,
)


def reply(vector: Vector, examples: int) -> Message:
    metrics = MetricRecord({"num-examples": examples})
    content = RecordDict({"arrays": to_record(vector), "metrics": metrics})
    return Message(content, reply_to=train_message(1, "run/1", 1.0))


@given(CLIENTS)
def test_mean_over_regions_is_the_flat_mean_to_float32_rounding(
    clients: list[tuple[Vector, int, int]],
) -> None:
    PlayedFlower()
    regions: dict[int, WeightedSum] = {}
    for vector, examples, region in clients:
        regions.setdefault(region, WeightedSum(SIZE)).add(vector, examples)
    replies = [reply(region.mean(), region.weight) for region in regions.values()]
    arrays, _ = FedAvg().aggregate_train(1, replies)
    assert arrays is not None
    vectors = np.stack([vector for vector, _, _ in clients]).astype(np.float64)
    flat = np.average(vectors, axis=0, weights=[examples for _, examples, _ in clients])
    # Each tier rounds to float32 once: half a unit in the last place of the largest partial.
    scale = np.max([np.abs(region.mean()) for region in regions.values()], axis=0)
    error = np.abs(to_vector(arrays) - flat)
    assert (error <= 2 * np.finfo(np.float32).eps / 2 * scale + 1e-38).all()


PARENTS = st.lists(st.integers(0, 2), min_size=5, max_size=5)


@given(CLIENTS, PARENTS, PARENTS)
def test_mean_over_four_tiers_is_the_flat_mean_to_float32_rounding(
    clients: list[tuple[Vector, int, int]], middle: list[int], upper: list[int]
) -> None:
    """Regions, two tiers of aggregators above, and the server; `middle` and `upper` say to which
    parent each node of the tier below belongs."""
    vectors = np.stack([vector for vector, _, _ in clients]).astype(np.float64)
    flat = np.average(vectors, axis=0, weights=[examples for _, examples, _ in clients])
    below: dict[int, WeightedSum] = {}
    for vector, examples, region in clients:
        below.setdefault(region, WeightedSum(SIZE)).add(vector, examples)
    scale = np.max([np.abs(node.mean()) for node in below.values()], axis=0)
    for belongs in (middle, upper, [0] * 5):
        above: dict[int, WeightedSum] = {}
        for name, node in sorted(below.items()):
            above.setdefault(belongs[name], WeightedSum(SIZE)).add(node.mean(), node.weight)
        below = above
    (root,) = below.values()
    assert root.weight == sum(examples for _, examples, _ in clients)
    # Each of the four tiers rounds to float32 once, by half a unit in the last place of what is at
    # most the largest partial of a region; a weighted mean passes on at most the largest error
    # below it. All else is float64: a few units of it, of the largest term, for each addition.
    single = 4 * np.finfo(np.float32).eps / 2 * scale * (1 + 1e-6)
    double = (len(clients) + 12) * np.finfo(np.float64).eps * np.abs(vectors).max(axis=0)
    assert (np.abs(root.mean() - flat) <= single + double + 1e-44).all()
