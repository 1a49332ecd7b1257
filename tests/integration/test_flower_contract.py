"""What FedFog takes from Flower beyond its public API, against the stock SuperNode.

If this fails after `FLWR_VERSION` was raised, read the sources that changed before you enter their
new hashes.
"""

import ast
import hashlib
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import flwr.superlink.main as superlink_main
import httpx
import pytest

from conftest import Peer, Service
from fedfog.cli.broker import LocalBroker
from fedfog.flower import fleet, routes
from flower import SuperLink, partial, publish_partial

# First ten digits of the SHA-256 of the source of each internal name.
SOURCES = {
    "flwr.app.message.message:remove_content_from_message": "1e153b885f",
    "flwr.cli.build:build_fab_from_disk": "d4912729f7",
    "flwr.common.serde:fab_to_proto": "c5b6015038",
    "flwr.common.serde:message_from_proto": "adfc00f7b4",
    "flwr.common.serde:message_to_proto": "257d477d31",
    "flwr.common.serde:user_config_to_proto": "b69bb9067e",
    "flwr.supercore.cli:flower_superexec": "f0e2725c92",
    "flwr.supercore.control:ControlHttpClient": "ee524b3741",
    "flwr.supercore.error:FlowerError": "5791034e46",
    "flwr.supercore.exit:exit_handler": "a13675bf24",
    "flwr.supercore.fab:Fab": "140aff940c",
    "flwr.supercore.inflatable.inflatable_object:get_all_nested_objects": "409d9822fd",
    "flwr.supercore.inflatable.inflatable_object:get_object_tree": "d247ce6d76",
    "flwr.supercore.inflatable.inflatable_object:no_object_id_recompute": "1374cc3f64",
    "flwr.supercore.interceptors:RuntimeVersionHttpInterceptor": "32dc4f3d76",
    "flwr.supercore.primitives.asymmetric:generate_key_pairs": "e551269ddc",
    "flwr.supercore.primitives.asymmetric:public_key_to_bytes": "552b787ae3",
    "flwr.supercore.protobuf.client:ProtobufClient": "e2206492f9",
    "flwr.superlink.cli:flower_superlink": "398ce9c857",
    "flwr.superlink.cli:flwr_serverapp": "b274501e3b",
    "flwr.supernode.fleet_http_client:FleetHttpClient": "9f33ca6d39",
    "flwr.supernode.node_auth_http_interceptor:NodeAuthHttpInterceptor": "a032beb3c4",
}

# What `routes.py` passes by: it must do nothing for the paths of other APIs.
MIDDLEWARES = {
    "flwr.superlink.main:_get_middleware": "911d5e2a5a",
    "flwr.superlink.routers.control.middlewares:ControlAuthenticationMiddleware": "1495e41d9b",
    "flwr.superlink.routers.control.middlewares:ControlEventLogMiddleware": "d8db2d506c",
    "flwr.superlink.routers.control.middlewares:ControlLicenseMiddleware": "0f57194171",
    "flwr.superlink.routers.control.middlewares:ControlSensitiveResponseMiddleware": "25cca93860",
    "flwr.superlink.routers.fleet.middlewares:FleetEventLogMiddleware": "4466ecde96",
    "flwr.superlink.routers.fleet.node_auth:NodeAuthMiddleware": "36b9ef8b48",
}
# What it runs in its own way: it must not stream an answer, or wait in a dependency.
RUN_BY = {
    "flwr.superlink.main:create_app": "ee966b630c",
    "flwr.supercore.error:http_error_translator": "63e39a1212",
    "flwr.supercore.protobuf.translation:ProtobufTranslationMiddleware": "5ff23a6fdd",
    "starlette.middleware.base:BaseHTTPMiddleware": "4206508787",
    "starlette.middleware.base:_CachedRequest": "e2eee45274",
    "fastapi.dependencies.utils:solve_dependencies": "06cf9dbaa6",
    "flwr.superlink.dependencies.linkstate:get_linkstate": "a5afb79e37",
    "flwr.supercore.dependencies.version:VersionDependency": "e028ba9177",
}

# Public API (`flwr.app`), and generated code whose fields the run below uses.
NOT_HASHED = re.compile(r"^flwr\.(app:|proto\.)")


def internals() -> set[str]:
    """All names that `fleet.py` imports from Flower, as module:name."""
    names = set()
    for node in ast.walk(ast.parse(Path(fleet.__file__).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flwr"):
            names |= {f"{node.module}:{alias.name}" for alias in node.names}
    return {name for name in names if not NOT_HASHED.match(name)}


def source_hash(name: str) -> str:
    module, attribute = name.split(":")
    found = getattr(importlib.import_module(module), attribute)
    source = inspect.getsource(found if inspect.isclass(found) else inspect.unwrap(found))
    return hashlib.sha256(source.encode()).hexdigest()[:10]


def test_only_the_known_sources_of_flower_are_used() -> None:
    used = internals() | {"flwr.supercore.protobuf.client:ProtobufClient"}  # parent of the clients
    assert {name: source_hash(name) for name in sorted(used)} == SOURCES


def test_nothing_else_in_the_wheel_uses_internals_of_flower() -> None:
    public = re.compile(r"^flwr\.(app|serverapp|clientapp)$|^flwr\.serverapp\.strategy$")
    package = Path(fleet.__file__).parents[1]
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            module = getattr(node, "module", None) or ""
            if module.startswith("flwr") and path.name not in ("fleet.py", "routes.py"):
                assert public.match(module), f"{path.name} imports {module}"


def test_the_middlewares_that_are_passed_by_are_the_known_ones() -> None:
    assert {name: source_hash(name) for name in MIDDLEWARES} == MIDDLEWARES
    assert {name: source_hash(name) for name in RUN_BY} == RUN_BY
    passed_by = {
        f"{m.cls.__module__}:{m.cls.__qualname__}"  # type: ignore[attr-defined]
        for m in superlink_main._get_middleware()
        if routes.shortened(m).kwargs["paths"] != ("/",)
    }
    assert passed_by == MIDDLEWARES.keys() - {"flwr.superlink.main:_get_middleware"}


@pytest.mark.parametrize("path", ["pull-messages", "push-messages", "push-object", "get-run"])
def test_a_node_without_a_signature_is_still_refused(superlink: SuperLink, path: str) -> None:
    headers = {"content-type": "application/protobuf", "accept": "application/protobuf"}
    answer = httpx.post(f"http://{superlink.address}/v1/fleet/{path}", headers=headers)
    assert answer.status_code == 401, answer.text


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    running = SuperLink(tmp_path_factory.mktemp("flower")).start()
    yield running
    running.stop()


def fleet_calls(log: str) -> set[str]:
    """Fleet requests in the SuperLink's log; all must have succeeded."""
    calls = re.findall(r'"POST /v1/fleet/([a-z-]+) HTTP/1.1" (\d+)', log)
    assert {status for _, status in calls} == {"200"}
    return {call for call, _ in calls}


def test_resident_bridge_does_what_the_stock_supernode_does(
    superlink: SuperLink,
    broker: LocalBroker,
    services: Callable[..., Service],
    peers: Callable[..., Peer],
) -> None:
    """Both serve the same two rounds: same models, same Fleet calls, except that the resident
    bridge needs no app bundle and no content of a train message."""
    peer = peers(broker.port)
    models, calls = {}, {}
    for runner, ready in (("supernode", "SuperNode ID"), ("resident", "bridge_online")):
        before = len(superlink.log.read_text())
        bridge = services(
            "fedfog_bridge.main",
            broker,
            runner,
            flower_server=superlink.address,
            bridge_runner=runner,
        )
        bridge.wait_for_log(ready)
        run = superlink.submit(mqtt_port=broker.port, run=runner)
        for round_ in (1, 2):
            publish_partial(peer, partial(round_ / 3, round_, run=runner))
            run.wait_rounds(round_)
        run.wait_state("finished:completed")
        assert bridge.stop() == 0
        models[runner] = [r["model"] for r in run.rounds]
        calls[runner] = fleet_calls(superlink.log.read_text()[before:])
    assert models["supernode"] == models["resident"]
    heartbeat = {"send-node-heartbeat"}  # the resident bridge's first one comes after 15 s
    not_needed = {"get-run", "get-fab", "pull-object"}
    assert calls["supernode"] - heartbeat - calls["resident"] == not_needed
    assert calls["resident"] <= calls["supernode"]
