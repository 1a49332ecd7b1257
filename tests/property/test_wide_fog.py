"""The rules in a wide and deep fog: the simulation of `bench` at a size that real processes would
not have."""

from collections import Counter

import numpy as np
from bench.scaling import CORE_CLIENTS, FEW, one_round
from bench.simulation import Costs, Fog, Layout, examples_of, kind_of, name_of

CLIENTS, REGIONS, TIERS = 2_000, 4, 3
COSTS = Costs(base=0.03, region=0.03, broker_message=1e-5, aggregator=1e-4, client=1e-3)


def test_two_thousand_clients_in_three_tiers_are_each_counted_once_in_flat_fedavg() -> None:
    fog = Fog(Layout(CLIENTS, REGIONS, TIERS), COSTS, parameters=1_000, size=50, training=0.2)
    for round in (1, 2):
        [*_, seen] = fog.run(round)
        counted: Counter[str] = Counter()
        for region in fog.regions:
            assert region.partial
            counted.update(region.partial.members)
        assert counted == {name_of(i): examples_of(i) for i in range(CLIENTS)}
        assert seen.members == CLIENTS

        total, weight = np.zeros(50), 0
        for i in range(CLIENTS):
            total += examples_of(i) * fog.updates[kind_of(i, round)].astype(np.float64)
            weight += examples_of(i)
        # Each tier rounds a mean to float32 once.
        bound = TIERS * np.finfo(np.float32).eps / 2 * np.abs(fog.updates).max()
        assert np.abs(fog.model - total / weight).max() <= bound


def test_a_slow_queue_is_met_with_patience_and_a_sudden_one_with_repeats() -> None:
    """A repeat is load, and the model is the same."""
    quick = Fog(Layout(200, 2), COSTS, parameters=1_000, size=50)
    assert [round_.copies for round_ in quick.run(3)] == [1.0, 1.0, 1.0]
    slow = Fog(Layout(200, 2), Costs(aggregator=0.1), parameters=1_000, size=50)
    first, *_, last = slow.run(3)
    assert first.copies > 1.1
    assert last.copies == 1.0


def test_the_widest_region_of_the_scaling_page_closes_its_round_and_admits_newcomers() -> None:
    """A full region refuses them, which is quick and no cost of a round."""
    clients = max(CORE_CLIENTS)
    _, region = one_round(clients)
    assert region.round == 2
    assert len(region.present) == clients + FEW
