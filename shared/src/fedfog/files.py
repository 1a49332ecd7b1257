"""Files that survive a crash at any instant."""

import os
import time
from functools import partial
from pathlib import Path

import structlog

log = structlog.get_logger()


def write_atomically(path: Path, *data: bytes, mode: int = 0o666, owner: int = -1) -> None:
    """Replace `path` by `data`, one after the other, so that a reader, or a start after a power
    loss, finds either the old or the new content whole.

    Args:
        mode: of the file, less the umask; 0o600 for a secret.
        owner: user and group id of the file; -1: this process's.

    Raises:
        OSError: the disk is full or the folder cannot be written; it names `path`.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb", opener=partial(os.open, mode=mode)) as file:
            os.fchown(file.fileno(), owner, owner)
            file.writelines(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:  # of a write it would name no file, of the rest the temporary one
        if temporary.is_file():
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync_folder(folder: Path) -> None:
    """Have the names in it survive a power loss. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def next_boot(state_dir: Path) -> int:
    """A boot id higher than all before it: the counter in `state_dir`, raised by one.

    It starts from the clock, so that a service whose store was lost still comes after the
    retained messages of its former life.

    Raises:
        OSError: STATE_DIR is full or cannot be written.
    """
    path = state_dir / "boot"
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        boot = max(_boot_before(path) + 1, int(time.time()))
        write_atomically(path, str(boot).encode())
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} (STATE_DIR)", error.filename) from error
    return boot


def _boot_before(path: Path) -> int:
    try:
        return int(path.read_text())
    except FileNotFoundError:
        return 0
    except ValueError:
        log.warning("boot_file_damaged", path=str(path), instead="the clock")
        return 0
