"""How a process that has other things to do at the same time gets PyTorch."""

import gc


def load_torch(threads: int) -> None:
    """Import PyTorch, for `threads` threads of its own.

    Collections meanwhile would look again and again at the 190,000 objects that it makes, and
    later ones would hold up the thread that answers messages for 0.2 s: its heap is frozen.
    """
    gc.disable()
    try:
        import torch
    finally:
        gc.enable()
    gc.freeze()
    torch.set_num_threads(threads)
