"""`python -m fedfog.cli.pages FOLDER`: the reference pages, made from the code they describe.

They are `docs/settings.md`, `docs/messages.md` and `.env.example` of the repository in FOLDER.
"""

import json
import sys
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter

from fedfog import settings
from fedfog.messages import schemas
from fedfog.messages.catalog import CHANNELS
from fedfog.messages.topics import NAME_PATTERN, Topics

_MADE = "Made by `make docs` from `shared/src/fedfog/{}`: change it there."

SERVICES: Mapping[str, type[settings.CommonSettings]] = {
    "central-server": settings.CentralSettings,
    "fog-aggregator": settings.AggregatorSettings,
    "fog-bridge": settings.BridgeSettings,
    "client": settings.ClientSettings,
    "enrolment": settings.EnrolmentSettings,
    "guard": settings.GuardSettings,
}

# What compose.yaml settles by itself, and where it has a default of its own.
_NOT_IN_COMPOSE = {
    "STATE_DIR",
    "DATA_DIR",
    "RUNS_DIR",
    "FLOWER_HOST",
    "FLOWER_PORT",
    "CLIENT_ID",
    "CLIENT_DATA",
    "TLS_DIR",
    "SUPERLINK_TLS_DIR",
    "JOIN_TOKEN_FILE",
    "PKI_DIR",
    "PKI_OWNERS",
    "GUARD_SOCKET",
    "BROKER_PID",
    "BROKER_SIGNALS",
    "ENROLMENT_HOST",
    "ENROLMENT_PORT",
}
_IN_COMPOSE = {
    "MQTT_BROKER": "mosquitto",
    "MQTT_PORT": "8883",
    "ENROLMENT_URL": "https://enrolment:8443",
    "FLOWER_SERVER": "central-server:8080",
    "LOG_FORMAT": "json",
}
_OF_COMPOSE = {
    "PUBLISH_ADDRESS": (
        "address of this machine where broker and enrolment can be reached",
        "127.0.0.1",
    ),
    "MQTT_HOST_PORT": ("port there of the broker", "8883"),
    "ENROLMENT_HOST_PORT": ("port there of the enrolment service", "8443"),
    "FLOWER_HOST_PORT": ("port there of the SuperLink for other hosts (profile `remote`)", "8444"),
    "ALL_REGIONS": (
        "regions that get identities, if more than REGIONS: also those above others",
        "",
    ),
}


def pages() -> dict[str, str]:
    """The content of each file, by its path in the repository."""
    return {
        "docs/settings.md": settings_page(),
        "docs/messages.md": messages_page(),
        ".env.example": env_example(),
    }


_KINDS = {
    TypeAdapter(kind).json_schema()["pattern"]: words
    for kind, words in (
        (schemas.Name, "name"),
        (schemas.RunId, "run id"),
        (schemas.Digest, "SHA-256 in hex"),
    )
}
_KINDS_TOLD = "A " + ", a ".join(f"{words} matches `{p}`" for p, words in _KINDS.items()) + "."


# Settings


def settings_page() -> str:
    """Every setting of every service."""
    lines = [
        "# Settings",
        "",
        _MADE.format("settings.py"),
        "",
        "Settings are environment variables. An impossible value ends a service at its start, with "
        "exit code 2 and the name of the setting; an empty one stands for the default. With "
        "Docker Compose they come from the shell or from `.env` (see `.env.example`). A name "
        f"matches `{NAME_PATTERN}`.",
        "",
        "## Every service",
        "",
        "`monitor` has no others. `HEALTH_FILE` names the file of the health check (default: "
        "`fedfog.health` in the folder for temporary files); `OMP_NUM_THREADS` is PyTorch's.",
        "",
        *_settings_table(settings.CommonSettings, set()),
    ]
    for service, model in SERVICES.items():
        lines += ["", f"## {service}", ""]
        lines += _settings_table(model, set(settings.CommonSettings.model_fields))
    return "\n".join(lines) + "\n"


def _settings_table(model: type[settings.CommonSettings], without: set[str]) -> Iterable[str]:
    yield "| setting | default | value | meaning |"
    yield "| --- | --- | --- | --- |"
    for name, schema in _settings(model):
        if name not in without:
            default = f"`{_default(schema)}`" if _default(schema) else ""
            cells = [f"`{name.upper()}`", default, _value(schema), schema["description"]]
            yield _row(cells)


def env_example() -> str:
    """The settings of a compose user, each with its default, commented out."""
    lines = [
        "# Settings of the compose stack: copy this file to `.env`, and take the `#` away from",
        "# what you change. Made by `make docs`; docs/settings.md says who reads which setting.",
    ]
    for name, (meaning, default) in _OF_COMPOSE.items():
        lines += ["", f"# {meaning}", f"#{name}={default}"]
    told = set(_NOT_IN_COMPOSE)
    models: list[type[settings.CommonSettings]] = [settings.CommonSettings, *SERVICES.values()]
    for model in models:
        for field, schema in _settings(model):
            if (name := field.upper()) in told:
                continue
            told.add(name)
            text = f"{schema['description']} ({_value(schema)})".replace("`", "")
            comment = textwrap.fill(text, 98, initial_indent="# ", subsequent_indent="# ")
            default = _IN_COMPOSE.get(name, _default(schema))
            lines += ["", comment, f"#{name}={default}"]
    return "\n".join(lines) + "\n"


def _settings(model: type[settings.CommonSettings]) -> Iterable[tuple[str, dict[str, Any]]]:
    """Name and JSON schema of each; that one may be unset is told by its default."""
    for name, schema in model.model_json_schema()["properties"].items():
        choices = [choice for choice in schema.pop("anyOf", []) if choice["type"] != "null"]
        more = choices[0] if len(choices) == 1 else {"anyOf": choices}
        yield name, more | schema


def _default(schema: Mapping[str, Any]) -> str:
    match schema["default"]:
        case None:
            return ""
        case bool(value):
            return str(value).lower()
        case float(value):
            return f"{value:g}"
        case value:
            return str(value)


# Messages


def messages_page() -> str:
    """Every topic, and the fields of every message."""
    topics = Topics()
    lines = [
        "# Messages",
        "",
        _MADE.format("messages/"),
        "",
        "All messages travel with QoS 1 over MQTT 5. `fl` is the setting `TOPIC_PREFIX`; "
        "`TOPIC_UPDATES`, `TOPIC_PARTIAL` and `TOPIC_GLOBAL_MODEL` rename one topic each. Where a "
        "will is named, the broker publishes it, retained, when the sender's session dies.",
        "",
        "| topic | from | to | retained | payload |",
        "| --- | --- | --- | --- | --- |",
    ]
    for channel in CHANNELS:
        payload = f"{_link(channel.payload.__name__)}, {_form(channel.tensors)}"
        retained = {(True, True): "yes, will", (True, False): "yes"}.get(
            (channel.retained, channel.will), "no"
        )
        topic = f"`{channel.template(topics)}`"
        lines.append(_row([topic, channel.sender, channel.receivers, retained, payload]))
    lines += [
        "",
        "A message with tensors is one valid `.safetensors` file: all tensors float32, without "
        "gaps, in order of their names. Its fields are JSON in the header's `__metadata__`, as the "
        "value of the key `fedfog`. The other messages are JSON objects. Unknown fields, NaN and "
        f"infinity are refused. {_KINDS_TOLD}",
    ]
    parts: dict[str, type[BaseModel]] = {}
    for channel in CHANNELS:
        lines += _message_section(channel.payload, "##")
        parts |= _parts(channel.payload)
    lines += ["", "## Parts of messages"]
    told = {channel.payload.__name__ for channel in CHANNELS}
    for name in sorted(parts.keys() - told):
        lines += _message_section(parts[name], "###")
    return "\n".join(lines) + "\n"


def _message_section(model: type[BaseModel], level: str) -> Iterable[str]:
    yield from ["", f"{level} {model.__name__}", "", " ".join((model.__doc__ or "").split()), ""]
    yield "| field | value | default | meaning |"
    yield "| --- | --- | --- | --- |"
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})
    for name, field in schema["properties"].items():
        required = name in schema.get("required", [])
        default = "" if required else f"`{json.dumps(field.get('default', {}))}`"
        # The description of an optional field may stand with its alternatives.
        described = [field, *field.get("anyOf", [])]
        description = next(d["description"] for d in described if "description" in d)
        yield _row([f"`{name}`", _value(field, definitions), default, description])


def _parts(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The models that a model's fields refer to, by name."""
    names = model.model_json_schema().get("$defs", {})
    found = {name: getattr(schemas, name, None) for name in names}
    return {
        name: part
        for name, part in found.items()
        if isinstance(part, type) and issubclass(part, BaseModel)
    }


def _form(tensors: bool) -> str:
    return "safetensors" if tensors else "JSON"


def _link(name: str) -> str:
    return f"[{name}](#{name.lower()})"


# Both


def _value(schema: Mapping[str, Any], definitions: Mapping[str, Any] | None = None) -> str:
    """What a JSON schema allows, in words."""
    definitions = definitions or {}
    if reference := schema.get("$ref"):
        name = reference.rpartition("/")[2]
        target = definitions[name]
        return _value(target) if "enum" in target else _link(name)
    if choices := schema.get("anyOf"):
        return " or ".join(_value(choice, definitions) for choice in choices)
    if "const" in schema:
        return f"`{schema['const']}`"
    if values := schema.get("enum"):
        return ", ".join(f"`{value}`" for value in values)
    match schema["type"]:
        case "null":
            return "`null`"
        case "boolean":
            return "`true` or `false`"
        case "array":
            return f"list of {_value(schema['items'], definitions)}"
        case "object":
            (values,) = schema.get(
                "patternProperties", {"": schema.get("additionalProperties")}
            ).values()
            return f"map: name to {_value(values, definitions)}"
        case "string" if schema.get("format") == "path":
            return "folder"
        case "string" if schema.get("format") == "file-path":
            return "file"
        case "string":
            pattern = schema.get("pattern")
            return _KINDS.get(pattern, f"text `{pattern}`") if pattern else "text"
    words = "whole number" if schema["type"] == "integer" else "number"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]:,}" for key, sign in signs.items() if key in schema]
    return " ".join([words, " and ".join(bounds)]).strip()


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main(folder: Path) -> None:
    for path, text in pages().items():
        (folder / path).write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
