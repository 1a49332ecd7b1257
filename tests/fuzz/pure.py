"""Mutants of every kind of message, at every reader, in this process."""

import random
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fuzz.mutator import mutants
from fuzz.readers import READERS, Reader

# Of a payload's size, what a reader may have in memory beside it at any time, with room for what
# does not depend on it: small objects, a few errors, and a line of the log.
TIMES, BESIDE = 40, 4 << 20


class FuzzError(Exception):
    """What a reader did not bear; the text has the payload."""


@dataclass(frozen=True)
class Result:
    reader: str
    payloads: int
    largest: int
    memory: int  # bytes: the most that a payload took beside itself, of those that were measured


def run(
    folder: Path,
    count: int,
    seed: int = 1,
    told: Callable[[int], None] = lambda _done: None,
    readers: Sequence[Reader] = READERS,
) -> list[Result]:
    """Give `count` mutants to the readers, in equal parts.

    Raises:
        FuzzError: one ended with an exception, or took far more memory than its payload.
    """
    results = []
    each = -(-count // len(readers))
    for number, reader in enumerate(readers):
        chance = random.Random(seed + number)
        take = reader.make(folder / reader.name.replace(" ", "-"))
        topics = list(reader.valid)
        sources = {
            topic: mutants(reader.valid[topic], seed + 100 * number + index)
            for index, topic in enumerate(topics)
        }
        largest = memory = 0
        for done in range(each):
            topic = chance.choice(topics)
            payload = next(sources[topic])
            largest = max(largest, len(payload))
            measured = done % 20 == 10 or len(payload) > 10_000
            if measured:
                tracemalloc.start()
            try:
                take(topic, payload)
            except Exception as error:
                shown = payload[:2000]
                raise FuzzError(f"{reader.name}, {topic}: {error!r} from {shown!r}") from error
            finally:
                if measured:
                    peak = tracemalloc.get_traced_memory()[1]
                    tracemalloc.stop()
            if measured:
                memory = max(memory, peak)
                if peak > TIMES * len(payload) + BESIDE:
                    raise FuzzError(
                        f"{reader.name}, {topic}: {peak} bytes for a payload of {len(payload)}: "
                        f"{payload[:2000]!r}"
                    )
            if done % 500 == 0:
                told(number * each + done)
        results.append(Result(reader.name, each, largest, memory))
    return results
