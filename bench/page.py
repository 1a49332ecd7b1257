"""Figures in a page of docs/, each block between two comments."""

from collections.abc import Mapping
from pathlib import Path


def write(path: Path, blocks: Mapping[str, str]) -> None:
    """Put each block, by its name, in the place of the one that is there.

    Raises:
        ValueError: a block has no place in the page.
    """
    text = path.read_text("utf-8")
    for name, block in blocks.items():
        begin, end = f"<!-- figures: {name} -->\n", f"<!-- end: {name} -->"
        if begin not in text or end not in text:
            raise ValueError(f"{path.name} has no place for the figures '{name}'")
        before, rest = text.split(begin)
        text = before + begin + block + "\n" + end + rest.split(end)[1]
    path.write_text(text, "utf-8")
