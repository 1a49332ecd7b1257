"""NVIDIA FLARE's simulator with a process per client, with training switched off.

`python nvflare_job.py FOLDER` starts it; in the clients the same file is the training script.
"""

import sys
from pathlib import Path

import nvflare.client as flare  # type: ignore[import-not-found]
from nvflare.app_common.workflows.fedavg import FedAvg  # type: ignore[import-not-found]
from nvflare.job_config.api import FedJob  # type: ignore[import-not-found]
from nvflare.job_config.script_runner import (  # type: ignore[import-not-found]
    FrameworkType,
    ScriptRunner,
)

from bench.rivals import model


class ZerosFedAvg(FedAvg):  # type: ignore[misc]
    """FedAvg from model 0, which would else be written into the job's JSON."""

    def run(self) -> None:
        self.model = model.zeros()
        super().run()


def simulate(folder: Path, clients: int, rounds: int) -> None:
    job = FedJob(name="rival", min_clients=clients)
    job.to_server(ZerosFedAvg(num_clients=clients, num_rounds=rounds, persistor_id=""))
    job.to_clients(ScriptRunner(script=__file__, framework=FrameworkType.NUMPY))
    job.simulator_run(str(folder), n_clients=clients, threads=clients)


def train() -> None:
    """Client 1 marks the models that it receives."""
    flare.init()
    client = int(flare.get_site_name().removeprefix("site-"))
    while flare.is_running():
        received = flare.receive()
        if client == 1:
            model.mark(received.params["conv1.weight"])
        params = {k: v + model.step(client) for k, v in received.params.items()}
        flare.send(flare.FLModel(params=params))


if __name__ == "__main__":
    if len(sys.argv) == 2:
        simulate(Path(sys.argv[1]), model.number(model.CLIENTS), model.number(model.ROUNDS))
    else:
        train()
