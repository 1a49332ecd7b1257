"""`python -m fedfog.flower.superlink`: Flower's `flower-superlink` with the same arguments.

A full collection of its start-up heap holds the interpreter's lock for 60-77 ms in the middle of
a round; frozen, the heap is not looked at again (p95 of a round of two regions 217 -> 141 ms).
"""

import gc

from fedfog.flower.fleet import load_superlink

if __name__ == "__main__":
    flower_superlink = load_superlink()
    gc.collect()
    gc.freeze()
    flower_superlink()
