"""What a user of Flower writes, with training switched off.

`server_app` and `client_app` are for SuperLink and SuperNodes; `python -m bench.rivals.flower_apps
server` and `... client K` speak Flower's deprecated flat gRPC.
"""

import importlib
import os
import sys
import time

from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.client import NumPyClient, start_client
from flwr.clientapp import ClientApp
from flwr.common import NDArrays, Scalar, ndarrays_to_parameters
from flwr.server import ServerConfig, start_server
from flwr.server.strategy import FedAvg as FlatFedAvg
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from bench.rivals import model

server_app, client_app = ServerApp(), ClientApp()


@server_app.main()
def serve(grid: Grid, _context: Context) -> None:
    clients = model.number(model.CLIENTS)
    while len(list(grid.get_node_ids())) < clients:
        time.sleep(0.5)

    def evaluate(_round: int, arrays: ArrayRecord) -> None:
        model.mark(arrays["conv1.weight"].numpy())

    FedAvg(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients).start(
        grid=grid,
        initial_arrays=ArrayRecord({name: Array(value) for name, value in model.zeros().items()}),
        num_rounds=model.number(model.ROUNDS),
        evaluate_fn=evaluate,
    )


@client_app.train()
def train(message: Message, context: Context) -> Message:
    # What an app would import to train with; its process is a new one for every message.
    importlib.import_module(os.environ[model.FRAMEWORK])
    constant = model.step(int(context.node_config["client"]))
    arrays = message.content.array_records["arrays"]
    updated = {name: Array(array.numpy() + constant) for name, array in arrays.items()}
    content = RecordDict(
        {
            "arrays": ArrayRecord(updated),
            "metrics": MetricRecord({"num-examples": 1}),
        }
    )
    return Message(content, reply_to=message)


class FlatClient(NumPyClient):
    def __init__(self, client: int) -> None:
        self._constant = model.step(client)

    def fit(
        self, parameters: NDArrays, config: dict[str, Scalar]
    ) -> tuple[NDArrays, int, dict[str, Scalar]]:
        return [p + self._constant for p in parameters], 1, {}


def serve_flat() -> None:
    def evaluate(_round: int, parameters: NDArrays, _config: dict[str, Scalar]) -> None:
        model.mark(parameters[0])

    clients = model.number(model.CLIENTS)
    start_server(
        server_address=_address(),
        config=ServerConfig(num_rounds=model.number(model.ROUNDS)),
        strategy=FlatFedAvg(
            fraction_evaluate=0.0,
            min_fit_clients=clients,
            min_available_clients=clients,
            initial_parameters=ndarrays_to_parameters([*model.zeros().values()]),
            evaluate_fn=evaluate,
        ),
    )


def _address() -> str:
    return f"127.0.0.1:{model.number(model.PORT)}"


if __name__ == "__main__":
    if sys.argv[1] == "server":
        serve_flat()
    else:
        client = FlatClient(int(sys.argv[2])).to_client()
        start_client(server_address=_address(), client=client, insecure=True)
