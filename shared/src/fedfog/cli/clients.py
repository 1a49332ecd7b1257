"""`python -m fedfog.cli.clients FILE`: the clients of a demo, forked from one process.

Loading PyTorch costs a process 1.2 s of a core and 120 MB of memory; forked processes share both.
Each client is a process of its own that runs the client's own entry point. When one of them ends,
that is written to stdout as the last line, and this process ends, and (on Linux) with it the rest.
"""

import importlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from fedfog.ml.runtime import load_torch
from fedfog.service import EXIT_FAILED, EXIT_OK, die_with, exit_now

_MODULE = "fedfog_client.main"
_SHARED = ("fedfog.ml.task", "fedfog.ml.training", "fedfog.ml.evaluation", _MODULE)


@dataclass(frozen=True)
class Client:
    """A client to start: its output goes to `log`, `env` is on top of this process's own."""

    name: str
    log: str
    env: dict[str, str]


def save(clients: Sequence[Client], path: Path) -> None:
    """Write what `main` reads."""
    path.write_text(json.dumps([asdict(client) for client in clients]))


def main(path: Path) -> int:
    """Fork the clients that `path` lists, and wait: until the first one ends, or after SIGTERM,
    which is passed on, until all have ended."""
    clients = [Client(**fields) for fields in json.loads(path.read_text())]
    load_torch(threads=1)
    for module in _SHARED:
        importlib.import_module(module)
    children: dict[int, Client] = {}
    parent, stopping = os.getpid(), False
    for client in clients:
        pid = os.fork()
        if pid == 0:
            _become(client, parent)
        children[pid] = client

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True
        for pid in children:
            with suppress(ProcessLookupError):  # it has ended by itself
                os.kill(pid, signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    while children:
        pid, status = os.wait()
        client = children.pop(pid)
        if not stopping:
            code = os.waitstatus_to_exitcode(status)
            first = {"name": client.name, "log": client.log, "code": code}
            sys.stdout.write(f"{json.dumps(first)}\n")
            return EXIT_FAILED
    return EXIT_OK


def _become(client: Client, parent: int) -> NoReturn:
    """Turn this forked process into the client."""
    os.setsid()
    die_with(parent)
    log = os.open(client.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(client.env)
    importlib.import_module(_MODULE).main()
    sys.exit(EXIT_OK)


if __name__ == "__main__":
    exit_now(main(Path(sys.argv[1])))
