"""Halts a service at an exact instant, so that a test can kill it there (`tests/halting.py`).

The functions that HALT_SITES names (`module:qualified.name`, comma-separated) are wrapped as soon
as their module is imported, in whichever process of the service. While there is a file HALT_FILE,
the first call that fits it is halted for ever, and the file gets the suffix `.reached`. It holds
JSON: [site, "before" or "after" the call itself, a pattern found in one of the arguments].
"""

import functools
import importlib.util
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any


def install() -> None:
    for site in os.environ["HALT_SITES"].split(","):
        module, _, name = site.partition(":")
        if module in sys.modules:
            _wrap(sys.modules[module], site, name)
        else:
            sys.meta_path.insert(0, _WrapsOnImport(module, site, name))


class _WrapsOnImport(MetaPathFinder):
    def __init__(self, module: str, site: str, name: str) -> None:
        self._module, self._site, self._name = module, site, name

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_wrap(module: ModuleType) -> None:
                execute(module)
                _wrap(module, self._site, self._name)

            spec.loader.exec_module = execute_and_wrap  # type: ignore[method-assign]
        return spec


def _wrap(module: ModuleType, site: str, name: str) -> None:
    *path, last = name.split(".")
    owner: Any = functools.reduce(getattr, path, module)
    original: Callable[..., Any] = getattr(owner, last)
    file = Path(os.environ["HALT_FILE"])

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        _halt_if(file, [site, "before"], args)
        result = original(*args, **kwargs)
        _halt_if(file, [site, "after"], args)
        return result

    setattr(owner, last, wrapper)


def _halt_if(file: Path, here: list[str], args: tuple[Any, ...]) -> None:
    try:
        *wanted, pattern = json.loads(file.read_text())
        fits = any(re.search(pattern, str(a)) for a in args if not isinstance(a, bytes))
        if wanted != here or not fits:
            return
        # os.replace: a test may halt the methods of `Path`.
        os.replace(file, f"{file}.reached")  # noqa: PTH105
    except FileNotFoundError:  # not armed, or another thread was first
        return
    threading.Event().wait()
