"""`fedfog`: the commands of a user. Each is imported when it is called, so that help is instant."""

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(
    help="Federated learning over a fog.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def demo(
    clients: Annotated[int, typer.Option(min=1, help="clients in each region")] = 3,
    rounds: Annotated[int, typer.Option(min=1, envvar="ROUNDS", help="global rounds")] = 3,
    regions: Annotated[int, typer.Option(min=1, help="regions, each with its fog")] = 1,
    seed: Annotated[
        int, typer.Option(min=0, envvar="SEED", help="of weights, partition and shuffling")
    ] = 42,
    local_epochs: Annotated[
        int, typer.Option(min=1, envvar="LOCAL_EPOCHS", help="epochs of a client in a round")
    ] = 3,
    task: Annotated[
        str, typer.Option(envvar="TASK", help="ecg5000, ecg5000-5class or package.module:attribute")
    ] = "ecg5000",
    broker: Annotated[
        Literal["auto", "mosquitto", "embedded"],
        typer.Option(help="auto: Mosquitto if it is installed, else the embedded one"),
    ] = "auto",
    runs_dir: Annotated[Path, typer.Option(envvar="RUNS_DIR", help="folder of the results")] = Path(
        "runs"
    ),
    data_dir: Annotated[
        Path, typer.Option(envvar="DATA_DIR", help="folder of the data sets")
    ] = Path("data"),
    time_limit: Annotated[
        float, typer.Option(min=1, help="seconds after which the demo gives up")
    ] = 3600,
) -> None:
    """Run a whole federation on this machine: every tier as its own process, on loopback.

    All other settings (docs/settings.md) are taken from the environment.
    """
    from fedfog.cli import demo as command
    from fedfog.cli.federation import Options

    options = Options(
        clients=clients,
        rounds=rounds,
        regions=regions,
        seed=seed,
        local_epochs=local_epochs,
        task=task,
        broker=None if broker == "auto" else broker,
        runs_dir=runs_dir,
        data_dir=data_dir,
        time_limit=time_limit,
    )
    raise typer.Exit(command.run(options))


@app.command()
def monitor(
    topic_filter: Annotated[
        list[str] | None,
        typer.Option(help="MQTT topic filter, may be repeated; default: all of FedFog's topics"),
    ] = None,
) -> None:
    """Show what travels over MQTT, decoded, and what each region does.

    Connects to MQTT_BROKER and MQTT_PORT (docs/settings.md). Ends with Ctrl-C.
    """
    from fedfog.cli import monitor as command

    for text in topic_filter or []:
        levels = text.split("/")
        if not text or "#" in levels[:-1] or any(set(v) & set("+#") and len(v) > 1 for v in levels):
            raise typer.BadParameter(f"not an MQTT topic filter: {text!r}")
    raise typer.Exit(command.run(topic_filter or []))


if __name__ == "__main__":
    app()
