"""What the import linter cannot see: names inside of other packages."""

import re

from conftest import REPOSITORY

INTERNAL = re.compile(r"flwr\.(supernode|supercore|superlink|proto|cli|common)\b")


def test_only_two_files_use_flower_internals() -> None:
    """A new Flower version is then looked at in these places."""
    sources = [*REPOSITORY.glob("shared/src/**/*.py"), *REPOSITORY.glob("services/*/src/**/*.py")]
    users = {path.name for path in sources if INTERNAL.search(path.read_text())}
    assert users == {"fleet.py", "routes.py"}
