"""How each rival is started: its processes, as its own examples have them, with its defaults."""

import os
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

from bench.rivals.model import FOLDER, FRAMEWORK, PORT
from bench.rivals.processes import NotMeasuredError, Processes, environment
from fedfog.cli.broker import free_port, installed_mosquitto
from fedfog.flower import fleet

SDFLMQ, NVFLARE = "sdflmq==0.1.0.6", "nvflare==2.9.0"
START_SECONDS = 60.0
BIN = Path(sys.executable).parent
HERE = Path(__file__).parent
# Flower's defaults, except that nothing calls out. Its own commands are found by name.
STOCK = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "PATH": os.pathsep.join([str(BIN), os.environ.get("PATH", "")]),
}

_MOSQUITTO = "listener {port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\n"


def flower(processes: Processes, folder: Path, clients: int, framework: str = "numpy") -> str:
    """SuperLink and a SuperNode per client; each message starts a ClientApp process."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    command = [f"{BIN}/flower-superlink", "--insecure", "--host=127.0.0.1", f"--port={port}"]
    processes.start("superlink", command, {**STOCK, "FLWR_HOME": str(folder / "superlink")})
    for client in range(1, clients + 1):
        name = f"supernode-{client}"
        command = [f"{BIN}/flower-supernode", "--insecure", f"--superlink={address}"]
        command += [f"--port={free_port()}", f"--node-config=client={client}"]
        env = {**STOCK, "FLWR_HOME": str(folder / name), FRAMEWORK: framework}
        processes.start(name, command, env)
    processes.wait_for_line("superlink", "Uvicorn running", START_SECONDS)
    try:
        fleet.submit_run(address, HERE / "flower_app", {})
    except fleet.ControlError as error:
        raise NotMeasuredError(str(error)) from error
    return version("flwr")


def flower_grpc(processes: Processes, _folder: Path, clients: int) -> str:
    """The deprecated `start_server` and `start_client`."""
    env = {PORT: str(free_port()), "FLWR_TELEMETRY_ENABLED": "0"}
    command = [sys.executable, "-m", "bench.rivals.flower_apps"]
    processes.start("server", [*command, "server"], env)
    processes.wait_for_line("server", "gRPC server running", START_SECONDS)
    for client in range(1, clients + 1):
        processes.start(f"client-{client}", [*command, "client", str(client)], env)
    return version("flwr")


def sdflmq(processes: Processes, folder: Path, clients: int) -> str:
    """Its coordinator and clients on Mosquitto; clients that it appoints aggregate."""
    mosquitto = installed_mosquitto()
    if mosquitto is None:
        raise NotMeasuredError("Mosquitto is not installed")
    # Its coordinator needs Matplotlib, which it does not ask for.
    python = environment(processes, SDFLMQ, borrow=True)
    port = free_port()
    (folder / "mosquitto.conf").write_text(_MOSQUITTO.format(port=port))
    processes.start("broker", [mosquitto, "-c", str(folder / "mosquitto.conf")])
    processes.wait_for_line("broker", "running", START_SECONDS)
    env = {PORT: str(port), "PYTHONUNBUFFERED": "1", FOLDER: str(folder)}
    command = [python, "-m", "bench.rivals.sdflmq_peers"]
    processes.start("coordinator", [*command, "coordinator"], env)
    processes.wait_for_line("coordinator", "subscribed to client_to_coordinator", START_SECONDS)
    processes.start("client-1", [*command, "client", "1"], env)
    # Whoever joins a session that is not there yet waits for ever.
    processes.wait_for_line("client-1", "New session established", START_SECONDS)
    for client in range(2, clients + 1):
        processes.start(f"client-{client}", [*command, "client", str(client)], env)
    return SDFLMQ.split("==")[1]


def nvflare(processes: Processes, folder: Path, _clients: int) -> str:
    """Its simulator, with a process per client."""
    python = environment(processes, NVFLARE)
    processes.start("simulator", [python, f"{HERE}/nvflare_job.py", str(folder / "workspace")])
    return NVFLARE.split("==")[1]


STARTERS: dict[str, Callable[[Processes, Path, int], str]] = {
    "flower": flower,
    "flower-torch": partial(flower, framework="torch"),
    "flower-grpc": flower_grpc,
    "sdflmq": sdflmq,
    "nvflare": nvflare,
}
