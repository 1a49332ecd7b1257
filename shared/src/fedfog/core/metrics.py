"""How a model does on the clients' own validation examples, told of any number of clients at once.

What is said of one client and what is said of all clients of a fog has the same form and size, and
two of them make one of both: mean and variance by Chan, Golub and LeVeque 1983. So neither the
order nor the grouping changes the outcome by more than rounding.
"""

import math
from dataclasses import dataclass
from functools import reduce


@dataclass(frozen=True)
class Federated:
    """Of at least one client, each of which has at least one example.

    `loss` (none if a client's is not finite) and `accuracy` are weighted by examples;
    `mean_accuracy` and `std_accuracy` (of the population) count each client once. `worst_client`
    is its `region/client`.
    """

    num_clients: int
    num_examples: int
    loss: float | None
    accuracy: float
    mean_accuracy: float
    std_accuracy: float
    worst_accuracy: float
    worst_client: str
    best_accuracy: float

    @classmethod
    def of(cls, client: str, examples: int, loss: float | None, accuracy: float) -> "Federated":
        """What one client says."""
        return cls(1, examples, loss, accuracy, accuracy, 0.0, accuracy, client, accuracy)

    def __add__(self, other: "Federated") -> "Federated":
        """Of the clients of both."""
        examples, clients = self.num_examples, self.num_clients
        more_examples, more_clients = other.num_examples, other.num_clients
        every = clients + more_clients
        loss = None
        if self.loss is not None and other.loss is not None:
            loss = _mean(self.loss, examples, other.loss, more_examples)
        difference = other.mean_accuracy - self.mean_accuracy
        variance = _mean(self.std_accuracy**2, clients, other.std_accuracy**2, more_clients)
        variance += difference**2 * (clients / every) * (more_clients / every)
        worst = min((f.worst_accuracy, f.worst_client) for f in (self, other))
        return Federated(
            num_clients=every,
            num_examples=examples + more_examples,
            loss=loss,
            accuracy=_mean(self.accuracy, examples, other.accuracy, more_examples),
            mean_accuracy=_mean(self.mean_accuracy, clients, other.mean_accuracy, more_clients),
            std_accuracy=math.sqrt(variance),
            worst_accuracy=worst[0],
            worst_client=worst[1],
            best_accuracy=max(self.best_accuracy, other.best_accuracy),
        )


def merge(*parts: Federated | None) -> Federated | None:
    """All that is told; None: nothing is."""
    told = [part for part in parts if part is not None]
    return reduce(Federated.__add__, told) if told else None


def _mean(a: float, weight: int, b: float, other_weight: int) -> float:
    """Weighted mean. It is not outside a and b, also not by rounding: these are at the bounds of
    messages when a hostile client wants them to be."""
    mean = a + (b - a) * (other_weight / (weight + other_weight))
    return min(max(mean, min(a, b)), max(a, b))
