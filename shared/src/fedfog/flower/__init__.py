"""What speaks Flower.

The Fleet and Control clients (`fleet.py`) use names that Flower does not promise to keep, so one
version is supported at a time; `tests/integration/test_flower_contract.py` says whether another
one will do.
"""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

FLWR_VERSION = "1.42.0"

# Environment of every Flower process: nothing calls out, and a new run is noticed at once.
FLOWER_ENVIRONMENT: Mapping[str, str] = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
}

try:
    _found = version("flwr")
except PackageNotFoundError:
    _found = "none"
if _found != FLWR_VERSION:
    raise ImportError(
        f"fedfog.flower needs flwr=={FLWR_VERSION}, found {_found}: "
        "pip install 'fedfog[flower]' into an environment of its own"
    )
