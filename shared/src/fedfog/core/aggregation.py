"""Weighted means that cost the same memory for any number of clients.

The mean over all clients, sum(n_i w_i) / sum(n_i), is FedAvg (McMahan et al. 2017,
https://arxiv.org/abs/1602.05629). A partial aggregate carries its mean and its summed examples, so
a mean of partials weighted by their examples is the mean over all clients, for any grouping.
"""

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1 << 16


def all_finite(vector: NDArray[np.float32]) -> bool:
    """No value is NaN or infinite; in blocks, so that it needs no second array."""
    blocks = (vector[start : start + _BLOCK] for start in range(0, vector.size, _BLOCK))
    return all(bool(np.isfinite(block).all()) for block in blocks)


class WeightedSum:
    """Running sum of weighted float32 vectors in float64, and the sum of the weights."""

    def __init__(self, size: int) -> None:
        self._sum = np.zeros(size, np.float64)
        self._scratch = np.empty(min(size, _BLOCK), np.float64)
        self._mean: NDArray[np.float32] | None = None
        self.weight = 0

    def add(self, vector: NDArray[np.float32], weight: int) -> None:
        """Add `weight` (examples, above 0) times `vector` (float32, shape (size,)).

        Raises:
            ValueError: the shape or the weight does not fit, or the mean was taken; the sum is as
                it was.
        """
        if self._mean is not None:
            raise ValueError("the mean was taken")
        if vector.shape != self._sum.shape:
            raise ValueError(f"a vector of shape {vector.shape}, not {self._sum.shape}")
        if weight <= 0:
            raise ValueError(f"the weight is {weight}, not above 0")
        # In blocks, so that the product needs no second array of the model's size. The factor is
        # a float64: a Python int would have NumPy multiply in float32.
        factor = np.float64(weight)
        for start in range(0, vector.size, _BLOCK):
            block = vector[start : start + _BLOCK]
            product = self._scratch[: block.size]
            np.multiply(block, factor, out=product)
            self._sum[start : start + _BLOCK] += product
        self.weight += weight

    def mean(self) -> NDArray[np.float32]:
        """The weighted mean, rounded once to float32, shape (size,). It takes the place of the
        sum, to which nothing can be added any more.

        Raises:
            ValueError: nothing was added.
        """
        if self.weight == 0:
            raise ValueError("the mean of nothing")
        if self._mean is None:
            # A float32 ends before the float64 of the same index begins, or where it does.
            self._mean = self._sum.view(np.float32)[: self._sum.size]
            for start in range(0, self._sum.size, _BLOCK):
                block = self._sum[start : start + _BLOCK]
                quotient = np.divide(block, self.weight, out=self._scratch[: block.size])
                self._mean[start : start + _BLOCK] = quotient
        return self._mean
