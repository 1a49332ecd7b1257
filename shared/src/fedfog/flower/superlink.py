"""`python -m fedfog.flower.superlink`: Flower's `flower-superlink` with the same arguments.

Two things are different. A full collection of its start-up heap holds the interpreter's lock for
60-77 ms in the middle of a round; frozen, the heap is not looked at again (p95 of a round of two
regions 217 -> 141 ms). And the SuperExec, which it starts, dies with it: Flower's own watch lets
it live on for seconds when the SuperLink is killed.
"""

import gc
import os
import subprocess
from typing import Any

from fedfog.flower.fleet import load_superlink
from fedfog.service import die_with


class _Popen(subprocess.Popen[Any]):
    """A child that dies with this process; Flower starts it in the main thread."""

    def __init__(self, args: Any, **kwargs: Any) -> None:
        parent = os.getpid()
        super().__init__(args, preexec_fn=lambda: die_with(parent), **kwargs)


if __name__ == "__main__":
    flower_superlink = load_superlink()
    subprocess.Popen = _Popen  # type: ignore[assignment, misc]
    gc.collect()
    gc.freeze()
    flower_superlink()
