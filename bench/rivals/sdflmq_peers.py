"""SDFLMQ's coordinator and clients as its examples write them, with training switched off.

`python -m bench.rivals.sdflmq_peers coordinator | client K`, in an environment that has `sdflmq`.
Client 1 founds the session and marks the models.
"""

import os
import sys
from datetime import timedelta

import torch
from sdflmq import DFLMQ_Coordinator, SDFLMQ_Client  # type: ignore[import-not-found]
from torch import nn

from bench.rivals import model

SESSION = "rival"


class Cnn(nn.Module):
    """The parameters of FedFog's CNN, by their names."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in model.zeros().items():
            layer, parameter = name.split(".")
            if not hasattr(self, layer):
                self.add_module(layer, nn.Module())
            getattr(self, layer).register_parameter(parameter, nn.Parameter(torch.tensor(value)))


def train(client: int, port: int, rounds: int, clients: int) -> None:
    peer = SDFLMQ_Client(f"client_{client}", "127.0.0.1", port, "aggregator", loop_forever=False)
    session = {
        "session_id": SESSION,
        "fl_rounds": rounds,
        "model_name": "cnn",
        "preferred_role": "aggregator",
    }
    if client == 1:
        peer.create_fl_session(
            **session,
            session_time=timedelta(hours=1),
            session_capacity_min=clients,
            session_capacity_max=clients,
            waiting_time=timedelta(minutes=10),
        )
    else:
        peer.join_fl_session(**session)
    cnn = Cnn()
    for _ in range(rounds):
        with torch.no_grad():
            for parameter in cnn.parameters():
                parameter.add_(float(model.step(client)))
        peer.set_model(SESSION, cnn)
        peer.send_local(SESSION)
        peer.wait_global_update()
        if client == 1:
            model.mark(next(cnn.parameters()).detach().numpy())


if __name__ == "__main__":
    os.chdir(os.environ[model.FOLDER])  # it makes its folders where it is started
    port = model.number(model.PORT)
    if sys.argv[1] == "coordinator":
        DFLMQ_Coordinator("coordinator", "127.0.0.1", port, loop_forever=True, plot_stats=False)
    else:
        train(int(sys.argv[2]), port, model.number(model.ROUNDS), model.number(model.CLIENTS))
