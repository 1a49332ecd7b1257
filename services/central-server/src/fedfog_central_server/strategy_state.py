"""The arrays that a Flower strategy keeps from round to round, such as FedAdam's moments.

Flower's strategies have no way to save their state. What they keep is a dict of arrays by tensor
name (`m_t`, `v_t`) or a list of arrays (`momentum_vector`), so that is what is looked for.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.serverapp.strategy import Strategy

from fedfog.messages.codec import Vector

# Set from the model at the beginning of each round.
_RECOMPUTED = {"current_arrays"}
_NAME = re.compile(r"^(\w+)(?:/(?P<key>.+)|\[(?P<index>\d+)\])$")


def arrays_of(strategy: Strategy) -> dict[str, Vector]:
    """Arrays by names like `m_t/conv1.weight` and `momentum_vector[00003]`, as float32."""
    found: dict[str, Any] = {}
    for attribute, value in vars(strategy).items():
        if attribute in _RECOMPUTED:
            continue
        if isinstance(value, dict):
            found |= {f"{attribute}/{key}": item for key, item in value.items()}
        elif isinstance(value, list):
            found |= {f"{attribute}[{index:05}]": item for index, item in enumerate(value)}
    return {
        name: item.astype(np.float32)
        for name, item in found.items()
        if isinstance(item, np.ndarray)
    }


def restore(strategy: Strategy, arrays: Mapping[str, Vector]) -> None:
    """Set what `arrays_of` has read. Raises ValueError for a name of another form."""
    state: dict[str, Any] = {}
    for name in sorted(arrays):
        match = _NAME.match(name)
        if match is None:
            raise ValueError(f"{name} is no array of a strategy")
        if match["key"] is not None:
            state.setdefault(match[1], {})[match["key"]] = arrays[name]
        else:
            state.setdefault(match[1], []).append(arrays[name])
    for attribute, value in state.items():
        setattr(strategy, attribute, value)
