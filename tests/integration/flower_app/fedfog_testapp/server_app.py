"""Rounds through `FogGrid` and `FogStrategy`; each new model goes to `fl/global_model`, and as a
line of JSON to the file `out`."""

import json
import queue
import threading
import time
from pathlib import Path

import numpy as np
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedfog.flower.grid import BellRung, BridgeSeen, FogEvent, FogGrid
from fedfog.flower.strategy import FogStrategy, GlobalModel, make_strategy
from fedfog.messages.codec import TensorTable, Vector, decode_json, digest_of, encode
from fedfog.messages.schemas import Bell, Bridge, Cue, Hyperparameters, ModelMeta, RunState
from fedfog.transport import mqtt

app = ServerApp()


class MqttFog:
    """The MQTT side of the grid in the ServerApp's own process."""

    def __init__(self, port: int) -> None:
        self.events: queue.Queue[FogEvent] = queue.Queue()
        self.session = mqtt.Session("test-server", "127.0.0.1", port, ["fl/bridge/+", "fl/bell"])
        self.session.start()
        threading.Thread(target=self._listen, daemon=True).start()

    def cue(self, run: str, round_: int) -> None:
        self.session.publish("fl/cue", Cue(run=run, round=round_).to_json())

    def _listen(self) -> None:
        while True:
            event = self.session.next()
            if not isinstance(event, mqtt.Received) or not event.payload:
                continue
            if event.topic == "fl/bell":
                self.events.put(BellRung(decode_json(event.payload, Bell)))
            else:
                region = event.topic.rsplit("/", 1)[1]
                self.events.put(BridgeSeen(region, decode_json(event.payload, Bridge)))


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    run, first = str(config["run"]), int(config["first-round"])
    rounds = int(config["num-server-rounds"])
    table = TensorTable((("weight", (int(config["parameters"]),)),))
    fog = MqttFog(int(config["mqtt-port"]))
    out = Path(str(config["out"]))

    def publish(round_: int, vector: Vector) -> None:
        meta = ModelMeta(
            run=run,
            run_started=1,
            round=round_,
            rounds=rounds,
            state=RunState.TRAINING,
            digest=digest_of(vector),
            hyperparameters=Hyperparameters(
                local_epochs=1, batch_size=1, learning_rate=1.0, seed=0
            ),
        )
        fog.session.publish("fl/global_model", encode(meta, table, vector), retain=True)

    def on_model(model: GlobalModel) -> None:
        line = {
            "time": time.time(),
            "model": model.vector[:13].tolist(),
            "record": model.record.model_dump(mode="json"),
        }
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        publish(model.round, model.vector)

    while not fog.session.connected:
        time.sleep(0.01)
    start = np.full(table.num_parameters, first - 1, np.float32)
    publish(first - 1, start)
    strategy = FogStrategy(
        make_strategy(str(config["strategy"]), int(config["min-fit"]), 1e-3),
        table=table,
        run=run,
        first_round=first,
        min_fit=int(config["min-fit"]),
        min_available=int(config["min-fit"]),
        regions=str(config["regions"]).split(","),
        regions_timeout=60.0,
        round_timeout=float(config["round-timeout"]),
        on_model=on_model,
    )
    strategy.run_rounds(FogGrid(grid, fog, float(config["grace"])), start, rounds - first + 1)
    fog.session.stop()
