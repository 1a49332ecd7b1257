"""All settings: name (of the environment variable, upper case), type, bounds, default, meaning.

`docs/settings.md` and `.env.example` are made from these classes.
"""

import sys
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, Field, FiniteFloat, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict

from fedfog.core.robust import Rule
from fedfog.messages.schemas import Hyperparameters, Name, Training
from fedfog.messages.topics import Topics, is_name

EXIT_BAD_SETTING = 2

Seconds = Annotated[float, Field(gt=0)]
# By which the broker and enrolment are reached on their own host.
LOCAL = ("localhost", "127.0.0.1")
S = TypeVar("S", bound="CommonSettings")


class CommonSettings(BaseSettings):
    """Settings of every service."""

    model_config = SettingsConfigDict(frozen=True, env_ignore_empty=True, extra="ignore")

    mqtt_broker: str = Field("localhost", description="host name of the MQTT broker")
    mqtt_port: int = Field(1883, ge=1, le=65535, description="port of the MQTT broker")
    mqtt_timeout: Seconds = Field(
        300.0, description="seconds without a broker after which a service gives up"
    )
    tls_dir: Path | None = Field(
        None,
        description="folder with ca.crt, tls.crt and tls.key: MQTT goes over TLS and this "
        "certificate is the service's identity; default: plain MQTT",
    )
    topic_prefix: str = Field("fl", description="first level of all topics")
    topic_updates: str = Field("", description="topic of updates; default `<prefix>/updates`")
    topic_partial: str = Field("", description="topic of partials; default `<prefix>/partial`")
    topic_global_model: str = Field(
        "", description="topic of the global model; default `<prefix>/global_model`"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe log line that is written"
    )
    log_format: Literal["auto", "console", "json"] = Field(
        "auto", description="`auto`: readable on a terminal, JSON otherwise"
    )

    @field_validator("topic_prefix", "topic_updates", "topic_partial", "topic_global_model")
    @classmethod
    def _no_wildcard(cls, value: str) -> str:
        if set(value) & set("+#\0 ") or value.startswith(("/", "$")) or value.endswith("/"):
            raise ValueError("a topic without wildcards, blanks, leading `$` or outer slashes")
        return value

    @property
    def topics(self) -> Topics:
        prefix = self.topic_prefix
        return Topics(
            prefix,
            self.topic_updates or f"{prefix}/updates",
            self.topic_partial or f"{prefix}/partial",
            self.topic_global_model or f"{prefix}/global_model",
        )


class StateSettings(CommonSettings):
    """Settings of a service that keeps something."""

    state_dir: Path = Field(Path("state"), description="folder of what the service must not lose")


class DataSettings(CommonSettings):
    """Settings of a service that knows the learning task."""

    task: str = Field(
        "ecg5000",
        description="`ecg5000`, `ecg5000-5class`, `wesad`, `wesad-unscaled`, or "
        "`package.module:attribute`; arguments after a `?`, as in `wesad?test=S2,S3`",
    )
    data_dir: Path = Field(Path("data"), description="folder of the data sets")


class RegionSettings(StateSettings):
    """Settings of a service that belongs to a region."""

    region: Name = Field("region_0", description="name of this region")


def region_names(text: str) -> list[str]:
    """Split a comma-separated list of region names.

    Raises:
        ValueError: a name is not one, or stands twice.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if bad := [name for name in names if not is_name(name)]:
        raise ValueError(f"not a region name (a-z, 0-9, _ and -, at most 31): {bad[0]!r}")
    if len(set(names)) < len(names):
        raise ValueError("a region stands twice")
    return names


class _WithRegions(CommonSettings):
    regions: str = Field(
        "",
        description="names of all regions, comma-separated; the training set is dealt to them, "
        "and the server waits for them. Default: this region alone / whoever comes",
    )

    @field_validator("regions")
    @classmethod
    def _names(cls, value: str) -> str:
        return ",".join(region_names(value))

    @property
    def region_list(self) -> list[str]:
        return region_names(self.regions)


class _WithAggregation(CommonSettings):
    aggregation: Literal["fedavg", Rule] = Field(
        "fedavg",
        description="rule that makes one model of many; all but `fedavg` bound what a minority of "
        "poisoned ones can do (docs/robustness.md)",
    )
    byzantine: float = Field(
        0.2,
        ge=0,
        lt=0.5,
        description="share of the models that may be poisoned, for AGGREGATION; of the models at "
        "hand, rounded down, but one at least",
    )


class AggregatorSettings(RegionSettings, _WithRegions, _WithAggregation):
    """Settings of a fog aggregator."""

    k: Literal["all"] | Annotated[int, Field(ge=1)] = Field(
        "all",
        description="updates that close a round: `all` (every client present when the round "
        "opened) or a number",
    )
    min_clients: int = Field(
        1, ge=1, description="least updates with which a round may close at its deadline"
    )
    round_deadline: Seconds = Field(
        60.0, description="seconds after which a round closes with at least the minimum"
    )
    clients_expected: int = Field(
        0, ge=0, description="clients to wait for before round 1; 0: see COHORT_SETTLE"
    )
    cohort_settle: Seconds = Field(
        3.0,
        description="seconds without a newcomer after which the first cohort is complete; if K is "
        "a number, K clients have to be there",
    )
    cohort_limit: Seconds = Field(
        60.0, description="seconds after which round 1 opens with whoever is there"
    )
    max_examples: int = Field(
        1_000_000,
        ge=1,
        le=10**9,
        description="largest num_examples that a client's update may claim",
    )
    client_quota: int = Field(
        60,
        ge=1,
        description="messages of one client that are looked at in a round and in a minute; an "
        "honest one sends an update in a round, and repeats it every few seconds at most",
    )
    parent_region: str = Field(
        "",
        description="region of the aggregator above this one, which takes this region's partial; "
        "default: none, the partial goes to the region's fog bridge",
    )
    child_regions: str = Field(
        "",
        description="regions whose PARENT_REGION is this one, comma-separated; such an aggregator "
        "takes their partials, waits for each until ROUND_DEADLINE, and has no clients",
    )
    keep_rounds: int = Field(2, ge=1, description="closed rounds whose partial is kept")
    store_timeout: Seconds = Field(
        600.0,
        description="seconds for which a partial that cannot be stored is tried again, before the "
        "aggregator gives up",
    )

    @field_validator("parent_region", "child_regions")
    @classmethod
    def _relatives(cls, value: str, info: ValidationInfo) -> str:
        names = region_names(value)
        if info.data.get("region") in names:
            raise ValueError("a region is not its own parent or child")
        if info.field_name == "parent_region" and len(names) > 1:
            raise ValueError("a region has one parent")
        return ",".join(names)

    @property
    def children(self) -> frozenset[str]:
        return frozenset(region_names(self.child_regions))

    @property
    def share(self) -> tuple[int, int]:
        """Index of this region and number of regions. Raises ValueError."""
        names = self.region_list or [self.region]
        if self.region not in names:
            raise ValueError(f"REGIONS: {','.join(names)} does not contain REGION {self.region}")
        return names.index(self.region), len(names)


class BridgeSettings(RegionSettings):
    """Settings of a fog bridge."""

    flower_server: str = Field(
        "localhost:8080", pattern=r"^[^:\s]+:\d+$", description="host:port of the SuperLink"
    )
    flower_timeout: Seconds = Field(
        300.0, description="seconds without a SuperLink after which the bridge gives up"
    )
    bridge_runner: Literal["resident", "supernode"] = Field(
        "resident", description="`supernode` runs the bridge under Flower's stock SuperNode"
    )


class ClientSettings(RegionSettings, DataSettings):
    """Settings of an edge client."""

    client_id: str = Field(
        "", description="name of this client; default: one made at first start, kept in STATE_DIR"
    )
    enrolment_url: str = Field(
        "",
        pattern=r"^(https://[^/\s]+)?$",
        description="`https://host:port` where the client gets and renews its certificate, which "
        "then carries its name; default: tls.crt and tls.key of TLS_DIR are the client's",
    )
    join_token_file: Path | None = Field(
        None,
        json_schema_extra={"format": "file-path"},
        description="file with the token that admits a new client at ENROLMENT_URL",
    )
    client_data: Path | None = Field(
        None,
        json_schema_extra={"format": "file-path"},
        description="file of the client's own examples (`.csv`, `.tsv`, `.parquet`, `.npz`), "
        "`{client}` in it stands for its name and `{region}` for its region: it trains on them and "
        "needs no slot. Default: its slot of the task's training set",
    )
    client_slowdown: float = Field(
        1.0,
        ge=1,
        le=1000,
        description="simulates a slow device: each training takes that many times as long",
    )
    client_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="simulates an unreliable device: probability that it sits a round out, drawn "
        "from the run's seed, the client and the round; see K and ROUND_DEADLINE",
    )
    validation_fraction: float = Field(
        0.1, ge=0, lt=1, description="share of the client's own examples kept for validation"
    )
    clients_per_process: int = Field(
        1,
        ge=1,
        le=10_000,
        description="clients that this process hosts, each with a session and a name of its own: "
        "`<CLIENT_ID>-0000` and so on. They train one after the other: use a process for each core",
    )
    training_threads: int = Field(1, ge=1, description="threads that PyTorch may use")
    exit_when_finished: bool = Field(
        False, description="end after a run in which the client took part"
    )

    @field_validator("client_id")
    @classmethod
    def _name(cls, value: str) -> str:
        if value and not is_name(value):
            raise ValueError("a-z, 0-9, _ and -, at most 31 characters")
        return value

    @field_validator("enrolment_url")
    @classmethod
    def _has_ca(cls, value: str, info: ValidationInfo) -> str:
        if value and not info.data.get("tls_dir"):
            raise ValueError("needs TLS_DIR with the federation's ca.crt")
        return value

    @field_validator("clients_per_process")
    @classmethod
    def _has_names(cls, value: int, info: ValidationInfo) -> int:
        data = info.data.get("client_data")
        if value > 1 and data and "{client}" not in str(data):
            raise ValueError("needs {client} in CLIENT_DATA: each client has a file of its own")
        if value > 1 and info.data.get("tls_dir") and not info.data.get("enrolment_url"):
            raise ValueError("needs ENROLMENT_URL: the certificate in TLS_DIR is one client's")
        return value


class StrategySettings(BaseModel):
    """How the regions' models become the next global one."""

    strategy: str = Field(
        "FedAvg",
        description="Flower strategy that averages the regions. FedProx is FedAvg with "
        "PROXIMAL_MU; FedAvgM with SERVER_MOMENTUM=0.5 to 0.9 is a safe gain",
    )
    server_learning_rate: FiniteFloat | None = Field(
        None,
        gt=0,
        description="of FedAvgM, FedAdam, FedYogi and FedAdagrad; default: Flower's (1; 0.1, 0.01 "
        "and 0.1). In the latter three it decides everything, with TAU: of the order of what a "
        "weight moves in a round of local training. On ECG5000 0.01 with TAU=0.001 was good, "
        "0.001 was 15 points worse; try more than one",
    )
    server_momentum: FiniteFloat | None = Field(
        None, ge=0, lt=1, description="of FedAvgM; default: Flower's, 0"
    )
    tau: FiniteFloat | None = Field(
        None,
        gt=0,
        description="of FedAdam, FedYogi and FedAdagrad: the smaller, the more adaptive; default: "
        "Flower's, 0.001",
    )
    beta_1: FiniteFloat | None = Field(
        None, ge=0, lt=1, description="of FedAdam and FedYogi: momentum; default: Flower's, 0.9"
    )
    beta_2: FiniteFloat | None = Field(
        None,
        ge=0,
        lt=1,
        description="of FedAdam and FedYogi: memory of squares; default: Flower's, 0.99",
    )


# What `fedfog run` and a sweep can choose for a run, on a server that stands.
CHOOSABLE = ("rounds", "early_stop_rounds", *Training.model_fields, *StrategySettings.model_fields)


class CentralSettings(DataSettings, _WithRegions, _WithAggregation, StrategySettings, Training):
    """Settings of the central server."""

    rounds: int = Field(3, ge=1, description="global rounds of a run")
    early_stop_rounds: int = Field(
        0,
        ge=0,
        description="rounds without a new highest accuracy on the server's test set after which "
        "the run ends, one round later; 0: it does not. The test set chooses then, so the figures "
        "on it are optimistic",
    )
    evaluation_timeout: float = Field(
        10.0,
        ge=0,
        description="seconds that the end of a run waits for the clients' evaluations of the "
        "finished model",
    )
    min_fit_clients: int = Field(
        1, ge=1, description="least regions whose partial makes a global round"
    )
    min_available_clients: int = Field(
        1, ge=1, description="least regions that must be online before a round begins"
    )
    regions_timeout: Seconds = Field(
        300.0, description="seconds to wait for MIN_AVAILABLE_CLIENTS regions"
    )
    round_timeout: Seconds = Field(
        600.0, description="seconds after which a global round ends with the regions it has"
    )
    bridge_grace: Seconds = Field(
        30.0, description="seconds a bridge may be offline before a round goes on without it"
    )
    flower_host: str = Field("127.0.0.1", description="address that the SuperLink listens on")
    flower_port: int = Field(8080, ge=1, le=65535, description="port of the SuperLink")
    superlink_tls_dir: Path | None = Field(
        None,
        description="folder with ca.crt, tls.crt and tls.key of the SuperLink, and the bridges' "
        "public keys as bridge.<region>.pub; default: `superlink` beside TLS_DIR. Without "
        "TLS_DIR the SuperLink is plain HTTP and admits every bridge",
    )
    runs_dir: Path = Field(Path("runs"), description="folder of the results")
    run_id: str = Field(
        "", pattern=r"^([a-z0-9][a-z0-9_-]{0,62})?$", description="name of the run; default: now"
    )
    tensorboard_dir: Path | None = Field(
        None,
        description="folder for TensorBoard: all figures of each round, a folder for each run; "
        "needs `pip install 'fedfog[tensorboard]'` (the image has it)",
    )
    keep_checkpoints: int = Field(3, ge=1, description="newest checkpoints that are kept")
    exit_when_finished: bool = Field(
        False, description="end with the run's exit code instead of standing by for the next run"
    )

    @field_validator("momentum")
    @classmethod
    def _of_sgd(cls, value: float, info: ValidationInfo) -> float:
        if value and info.data.get("optimizer") == "adam":
            raise ValueError("only OPTIMIZER=sgd has it, adam would ignore it")
        return value

    @property
    def superlink_dir(self) -> Path | None:
        """Folder of the SuperLink's certificate; None: it is plain HTTP."""
        if self.tls_dir is None:
            return None
        return self.superlink_tls_dir or self.tls_dir.parent / "superlink"

    @property
    def strategy_options(self) -> dict[str, float | None]:
        """Arguments of STRATEGY; None: as it has it."""
        names = StrategySettings.model_fields.keys() - {"strategy"}
        return {name: getattr(self, name) for name in sorted(names)}

    @property
    def hyperparameters(self) -> Hyperparameters:
        return Hyperparameters(**{name: getattr(self, name) for name in Training.model_fields})


class _PkiSettings(CommonSettings):
    pki_dir: Path = Field(
        Path("pki"),
        description="folder of the PKI, one folder per reader in it; the guard needs `broker` (to "
        "write), `probe` and `probe-revoked`",
    )
    guard_socket: Path = Field(
        Path("guard/guard.sock"),
        json_schema_extra={"format": "file-path"},
        description="Unix socket by which enrolment hands lists to the broker's guard",
    )


class GuardSettings(_PkiSettings):
    """Settings of the guard. MQTT_BROKER and MQTT_PORT are the broker that it tries."""

    broker_pid: int | None = Field(
        None, ge=1, description="process id of the broker; default: see BROKER_SIGNALS"
    )
    broker_signals: Path = Field(
        Path("pki/broker/signals"),
        json_schema_extra={"format": "file-path"},
        description="named pipe for the names of signals, read by what has started the broker, "
        "which may be in another container",
    )


class EnrolmentSettings(_PkiSettings, _WithRegions):
    """Settings of `fedfog-pki` and `fedfog-enrolment`."""

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


def why(detail: ErrorDetails) -> str:
    """What is wrong with a setting, without the kind of error that Pydantic puts before it."""
    return detail["msg"].removeprefix("Value error, ")


def load(settings: type[S]) -> S:
    """Read a service's settings from the environment; end the process, naming the setting, if
    one is impossible (exit code 2)."""
    try:
        return settings()
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            name = str(detail["loc"][0]).upper() if detail["loc"] else "settings"
            sys.stderr.write(f"{name}={detail['input']!r}: {why(detail)}\n")
        sys.stderr.write("Correct the environment (docs/settings.md has all settings).\n")
        sys.exit(EXIT_BAD_SETTING)
