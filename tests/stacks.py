"""Compose projects on a real Docker engine: fixtures for the tests in `tests/compose`."""

import io
import json
import os
import shutil
import ssl
import subprocess
import tarfile
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from conftest import REPOSITORY
from fedfog.transport import tls

SECONDS = 300.0


@pytest.fixture(scope="session")
def engine() -> None:
    """Docker with Compose, or a skip that says what is missing."""
    if shutil.which("docker") is None:
        pytest.skip("no `docker` command: install Docker Engine or Docker Desktop")
    for command, missing in (
        (["docker", "info"], "no Docker engine answers"),
        (["docker", "compose", "version"], "Docker has no Compose v2"),
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if done.returncode:
            pytest.skip(f"{missing}: {done.stderr.strip()[-200:]}")


@pytest.fixture(scope="session")
def images(engine: None) -> None:
    """The six images, built from this checkout."""
    command = ["docker", "compose", "--profile", "monitor", "build"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]


class Project:
    """One compose project: a name of its own, and no settings but those it is given.

    `files` are merged, as `COMPOSE_FILE=a.yaml:b.yaml` does it.
    """

    def __init__(self, name: str, env_file: Path, files: str, settings: dict[str, str]) -> None:
        self.name = name
        self._command = ["docker", "compose", "--env-file", str(env_file), "-p", name]
        for file in files.split(":"):
            self._command += ["-f", str(REPOSITORY / file)]
        kept = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME") or "DOCKER" in k}
        own = {"MQTT_HOST_PORT": "0", "ENROLMENT_HOST_PORT": "0"}
        own["COHORT_LIMIT"] = str(SECONDS)  # nobody is left out because the machine is slow
        self._environment = kept | own | settings

    def command(self, *arguments: str, timeout: float = SECONDS) -> tuple[int, bytes, str]:
        """Run `docker compose ARGUMENTS`; returns exit code, standard output and the end of
        everything it said."""
        done = subprocess.run(
            [*self._command, *arguments],
            env=self._environment,
            capture_output=True,
            timeout=timeout,
        )
        said = (done.stdout[-4000:] + done.stderr[-2000:]).decode(errors="replace")
        return done.returncode, done.stdout, said

    def ok(self, *arguments: str) -> bytes:
        """Standard output of a command that has to succeed."""
        code, output, said = self.command(*arguments)
        assert code == 0, said
        return output

    def popen(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self._command, *arguments], env=self._environment, stdout=subprocess.PIPE, text=True
        )

    def result(self, name: str) -> Any:
        """A JSON file of the newest run, fetched as a user fetches it."""
        archive = self.ok("cp", f"central-server:/runs/latest/{name}", "-")
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            file = files.extractfile(name)
            assert file is not None
            return json.load(file)

    def observer(self) -> ssl.SSLContext:
        """What gets in at the broker to listen, from the host: the monitor's certificate."""
        with tempfile.TemporaryDirectory() as folder:
            archive = self.ok("cp", "pki:/pki/monitor/.", "-")
            with tarfile.open(fileobj=io.BytesIO(archive)) as files:
                files.extractall(folder, filter="data")
            return tls.context(Path(folder), Path(folder, "tls.crt"), Path(folder, "tls.key"))

    def containers(self) -> dict[str, Any]:
        """What `docker inspect` says of each container, by name."""
        ids = self.ok("ps", "--all", "--quiet").decode().split()
        found = json.loads(subprocess.check_output(["docker", "inspect", *ids]))
        return {c["Name"].removeprefix(f"/{self.name}-"): c for c in found}


Stack = Callable[..., Project]


@contextmanager
def projects(folder: Path) -> Iterator[Stack]:
    """Makes compose projects; takes down, with their volumes, all that were made."""
    env_file = folder / "empty.env"
    env_file.touch()
    name = f"fedfog-test-{uuid.uuid4().hex[:8]}"
    made: list[Project] = []

    def make(files: str = "compose.yaml", suffix: str = "", **settings: str) -> Project:
        made.append(Project(name + suffix, env_file, files, settings))
        return made[-1]

    try:
        yield make
    finally:
        # The last one first: it hangs on the networks of the first.
        for project in reversed(made):
            project.ok("--profile", "*", "down", "--volumes", "--remove-orphans")


@pytest.fixture
def stack(images: None, tmp_path: Path) -> Iterator[Stack]:
    with projects(tmp_path) as make:
        yield make
