"""Files that survive a crash at any instant."""

import os
import time
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data` so that a reader, or a start after a power loss, finds either the
    old or the new content whole.

    Raises:
        OSError: the disk is full or the folder cannot be written; `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def next_boot(state_dir: Path) -> int:
    """A boot id higher than all before it: the counter in `state_dir`, raised by one.

    It starts from the clock, so that a service whose store was lost still comes after the
    retained messages of its former life.
    """
    state_dir.mkdir(parents=True, exist_ok=True)
    path = state_dir / "boot"
    before = int(path.read_text()) if path.exists() else 0
    boot = max(before + 1, int(time.time()))
    write_atomically(path, str(boot).encode())
    return boot
