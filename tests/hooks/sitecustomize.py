"""Python runs this at the start of every process that has this folder on its PYTHONPATH: it calls
the functions that TEST_PATCHES names (`module:function`, comma-separated), so that a test can
patch a service and all its children without a hook in the product."""

import importlib
import os
import traceback

try:
    for _name in filter(None, os.environ.get("TEST_PATCHES", "").split(",")):
        _module, _, _function = _name.partition(":")
        getattr(importlib.import_module(_module), _function)()
except Exception:  # noqa: BLE001
    # `site` would print the error and go on without the patch.
    traceback.print_exc()
    os._exit(99)
