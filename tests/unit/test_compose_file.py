"""What compose.yaml promises, as far as it can be read from the file."""

from pathlib import Path

import pytest
import yaml

from fedfog import settings

COMPOSE = yaml.safe_load((Path(__file__).parents[2] / "compose.yaml").read_text())["services"]

# What the images fix, because it is a path or a port inside the container; and what all replicas
# of a service would share although each needs its own.
INSIDE = {"STATE_DIR", "DATA_DIR", "RUNS_DIR", "FLOWER_PORT", "CLIENT_ID", "PKI_DIR"}
INSIDE |= {"CLIENT_DATA", "ENROLMENT_PORT", "BROKER_PID", "BROKER_SIGNALS"}


@pytest.mark.parametrize(
    ("service", "cls"),
    [
        ("central-server", settings.CentralSettings),
        ("fog-aggregator", settings.AggregatorSettings),
        ("fog-bridge", settings.BridgeSettings),
        ("client", settings.ClientSettings),
        ("monitor", settings.CommonSettings),
        ("enrolment", settings.EnrolmentSettings),
        ("pki", settings.EnrolmentSettings),
        ("guard", settings.GuardSettings),
    ],
)
def test_every_setting_of_a_service_can_be_set_from_outside(
    service: str, cls: type[settings.CommonSettings]
) -> None:
    known = {name.upper() for name in cls.model_fields} - INSIDE
    # A client that ended after a run would end the whole stack under `--exit-code-from`.
    if service == "client":
        known.remove("EXIT_WHEN_FINISHED")
    assert set(COMPOSE[service]["environment"]) == known


def test_images_that_are_not_built_here_are_pulled_where_they_are_missing() -> None:
    for name, service in COMPOSE.items():
        here = service["image"].startswith("fedfog-")
        assert service["pull_policy"] == ("never" if here else "missing"), name
