"""The package that docs/bring-your-own.md shows, written to a folder as its reader writes it."""

import subprocess
import sys
from pathlib import Path

from markdown_it import MarkdownIt

from conftest import REPOSITORY

PAGE = REPOSITORY / "docs" / "bring-your-own.md"
TASK = "digits_task:Digits"


def write_package(folder: Path) -> Path:
    """Write all files of the page below `folder`, and make the data; returns the package."""
    for token in MarkdownIt("commonmark").parse(PAGE.read_text("utf-8")):
        first, _, rest = token.content.partition("\n")
        if token.type == "fence" and first.startswith("# digits/"):
            path = folder / first.removeprefix("# ")
            path.parent.mkdir(exist_ok=True)
            path.write_text(rest)
    package = folder / "digits"
    subprocess.run([sys.executable, "make_data.py"], cwd=package, check=True, timeout=120)
    return package
