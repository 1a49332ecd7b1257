"""Two tiers of weighted means are the flat mean, whoever belongs to which region."""

import numpy as np
from flwr.app import Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedfog.core.aggregation import WeightedSum
from fedfog.flower.grid import train_message
from fedfog.flower.strategy import FedAvg, to_arrays
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
    content = RecordDict({"arrays": to_arrays({"weight": vector}), "metrics": metrics})
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
    error = np.abs(arrays["weight"].numpy() - flat)
    assert (error <= 2 * np.finfo(np.float32).eps / 2 * scale + 1e-38).all()
