"""Settings of the PKI and of the enrolment service."""

from pathlib import Path

from pydantic import Field, field_validator

from fedfog.settings import CommonSettings, Seconds, region_names

# By which the broker and enrolment are reached on their own host.
LOCAL = ("localhost", "127.0.0.1")


class EnrolmentSettings(CommonSettings):
    """Settings of `fedfog-pki` and `fedfog-enrolment`."""

    pki_dir: Path = Field(Path("pki"), description="folder of the PKI, one folder per reader in it")
    pki_owners: str = Field(
        "",
        description="user ids that the readers of PKI_DIR run as, `broker=1883,*=10001`; "
        "default: that of fedfog-pki",
    )
    regions: str = Field(
        "region_0",
        description="names of all regions, comma-separated; each gets the certificates of its "
        "services and a join token",
    )
    region_parents: str = Field(
        "",
        description="regions whose partials another one takes, `r0=m0,r1=m0`; "
        "default: all go to their fog bridge",
    )
    server_names: str = Field(
        "",
        description="host names and addresses, comma-separated, by which other hosts reach the "
        "broker and enrolment; `mosquitto`, `enrolment`, `localhost` and `127.0.0.1` are known",
    )
    service_cert_days: float = Field(
        365.0, gt=0, description="days that a service's certificate is valid"
    )
    cert_seconds: Seconds = Field(
        86400.0, description="seconds that a client's certificate is valid"
    )
    join_token_hours: float = Field(
        720.0, gt=0, description="hours that a region's first join token is valid"
    )
    join_token_uses: int = Field(
        1000, ge=1, description="devices that a region's first join token admits"
    )
    enrolment_host: str = Field("127.0.0.1", description="address that enrolment listens on")
    enrolment_port: int = Field(8443, ge=1, le=65535, description="port of enrolment")
    guard_socket: Path = Field(
        Path("guard/guard.sock"), description="Unix socket of the broker's guard"
    )

    @field_validator("regions")
    @classmethod
    def _names(cls, value: str) -> str:
        return ",".join(region_names(value))

    @field_validator("region_parents")
    @classmethod
    def _relatives(cls, value: str) -> str:
        for name, parent in pairs(value).items():
            if region_names(f"{name},{parent}") != [name, parent]:
                raise ValueError(f"not two regions: {name}={parent}")
        return value

    @field_validator("pki_owners")
    @classmethod
    def _owners(cls, value: str) -> str:
        for owner in pairs(value).values():
            int(owner)
        return value

    @property
    def region_list(self) -> list[str]:
        return region_names(self.regions)

    @property
    def parents(self) -> dict[str, str]:
        return pairs(self.region_parents)

    @property
    def owners(self) -> dict[str, int]:
        return {reader: int(owner) for reader, owner in pairs(self.pki_owners).items()}

    @property
    def server_name_list(self) -> list[str]:
        more = [name.strip() for name in self.server_names.split(",") if name.strip()]
        return [*dict.fromkeys((*LOCAL, *more))]


def pairs(text: str) -> dict[str, str]:
    """`a=1,b=2` as a dictionary. Raises ValueError."""
    found = {}
    for item in filter(None, (item.strip() for item in text.split(","))):
        name, equals, value = item.partition("=")
        if not (name and equals and value):
            raise ValueError(f"not of the form name=value: {item!r}")
        found[name] = value
    return found
