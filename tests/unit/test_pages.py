"""The reference pages say what the code says."""

import inspect
import re
from pathlib import Path

import pytest

from fedfog import settings
from fedfog.cli import pages
from fedfog.messages.catalog import CHANNELS
from fedfog.messages.topics import Topics

REPOSITORY = Path(__file__).parents[2]
PAGES = pages.pages()


@pytest.mark.parametrize("path", PAGES)
def test_page_in_the_repository_is_the_one_made_from_the_code(path: str) -> None:
    assert (REPOSITORY / path).read_text() == PAGES[path], "run `make docs` and commit"


def test_every_topic_is_in_the_table() -> None:
    topics = Topics()
    told = {channel.template(topics) for channel in CHANNELS}
    for name, member in inspect.getmembers(Topics):
        if name.startswith("_") or name in ("prefix", "updates", "partial"):
            continue  # only beginnings of topics
        topic = getattr(topics, name)
        if callable(member):
            levels = len(inspect.signature(topic).parameters)
            topic = topic(*("{region}", "{client}")[:levels])
        assert topic in told
    for topic in told:
        assert f"| `{topic}` |" in PAGES["docs/messages.md"]


def test_every_settings_class_of_a_service_is_on_the_page() -> None:
    bases = {
        base
        for cls in vars(settings).values()
        if inspect.isclass(cls) and issubclass(cls, settings.CommonSettings)
        for base in cls.__bases__
    }
    services = {
        cls
        for cls in vars(settings).values()
        if inspect.isclass(cls) and issubclass(cls, settings.CommonSettings) and cls not in bases
    }
    assert services == set(pages.SERVICES.values())


def test_env_example_has_the_settings_of_the_compose_file_and_no_others() -> None:
    compose = (REPOSITORY / "compose.yaml").read_text()
    handed_on = set(re.findall(r"^ +([A-Z0-9_]+):$", compose, re.MULTILINE))
    handed_on |= set(re.findall(r"\$\{([A-Z0-9_]+)", compose))
    in_example = re.findall(r"^#([A-Z0-9_]+)=", PAGES[".env.example"], re.MULTILINE)
    assert set(in_example) == handed_on
    assert len(in_example) == len(set(in_example))


def test_env_example_changes_nothing_until_a_line_is_uncommented() -> None:
    assert all(line == "" or line.startswith("#") for line in PAGES[".env.example"].splitlines())
