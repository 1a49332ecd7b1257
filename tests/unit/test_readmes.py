"""Both READMEs say the same, and all that they and the pages in docs/ point to is there."""

import inspect
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from conftest import REPOSITORY
from fedfog import settings

ENGLISH = REPOSITORY / "README.md"
SPANISH = REPOSITORY / "README.es.md"
PAGES = [ENGLISH, SPANISH, *sorted(REPOSITORY.glob("docs/*.md"))]


def tokens(page: Path) -> list[Token]:
    blocks = MarkdownIt("commonmark").enable("table").parse(page.read_text("utf-8"))
    return [token for block in blocks for token in (block, *(block.children or ()))]


def targets(page: Path) -> list[str]:
    return [
        str(token.attrs["src" if token.type == "image" else "href"])
        for token in tokens(page)
        if token.type in ("image", "link_open")
    ]


def without_comments(code: str) -> str:
    return re.sub("#.*", "#", code)


def heading_levels(page: Path) -> list[str]:
    return [token.tag for token in tokens(page) if token.type == "heading_open"]


def rows_of_each_table(page: Path) -> list[int]:
    rows: list[int] = []
    for token in tokens(page):
        if token.type == "table_open":
            rows.append(0)
        elif token.type == "tr_open":
            rows[-1] += 1
    return rows


def links_but_the_mutual_one(page: Path) -> list[str]:
    return [target for target in targets(page) if target not in (ENGLISH.name, SPANISH.name)]


def code_blocks_but_the_picture(page: Path) -> list[tuple[str, str]]:
    blocks = [token for token in tokens(page) if token.type == "fence"]
    return [(block.info, without_comments(block.content)) for block in blocks[1:]]


def code_in_the_text(page: Path) -> Counter[str]:
    return Counter(token.content for token in tokens(page) if token.type == "code_inline")


@pytest.mark.parametrize(
    "part",
    [
        heading_levels,
        rows_of_each_table,
        links_but_the_mutual_one,
        code_blocks_but_the_picture,
        code_in_the_text,
    ],
)
def test_both_readmes_have_the_same(part: Callable[[Path], object]) -> None:
    assert part(ENGLISH), "nothing found to compare"
    assert part(SPANISH) == part(ENGLISH)


def test_each_readme_begins_with_the_link_to_the_other() -> None:
    assert (targets(ENGLISH)[0], targets(SPANISH)[0]) == (SPANISH.name, ENGLISH.name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_point_to_what_exists(page: Path) -> None:
    urls = [urlsplit(target) for target in targets(page)]
    paths = {unquote(url.path) for url in urls if not url.scheme}
    assert {path for path in paths if not (page.parent / path).exists()} == set()


@pytest.mark.parametrize("page", [ENGLISH, SPANISH], ids=lambda page: page.name)
def test_settings_named_in_a_readme_exist(page: Path) -> None:
    known = {
        name.upper()
        for cls in vars(settings).values()
        if inspect.isclass(cls) and issubclass(cls, settings.CommonSettings)
        for name in cls.model_fields
    }
    # Not read by a service: variables of make, and what only the compose files use.
    known |= set(re.findall(r"^([A-Z_]+) \?=", (REPOSITORY / "Makefile").read_text("utf-8"), re.M))
    for compose in REPOSITORY.glob("compose*.yaml"):
        known |= set(re.findall(r"\$\{([A-Z_]+)", compose.read_text("utf-8")))
    code = [
        without_comments(token.content)
        for token in tokens(page)
        if token.type == "code_inline" or token.info in ("sh", "powershell")
    ]
    # A word in capitals that is no part of a path or file name.
    named = {name for c in code for name in re.findall(r"(?<![\w./])[A-Z][A-Z0-9_]*(?![\w./])", c)}
    assert named, "nothing found to check"
    assert named - known == set()
