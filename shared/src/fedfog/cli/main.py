"""`fedfog`: the commands of a user. Each is imported when it is called, so that help is instant."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fedfog.cli import identity

app = typer.Typer(
    help="Federated learning over a fog.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(identity.token, name="token")
app.add_typer(identity.client, name="client")

Rounds = Annotated[int, typer.Option(min=1, envvar="ROUNDS", help="global rounds")]
Regions = Annotated[int, typer.Option(min=1, help="regions, each with its fog")]
Seed = Annotated[
    int, typer.Option(min=0, envvar="SEED", help="of weights, partition and shuffling")
]
LocalEpochs = Annotated[
    int, typer.Option(min=1, envvar="LOCAL_EPOCHS", help="epochs of a client in a round")
]
Task = Annotated[
    str, typer.Option(envvar="TASK", help="ecg5000, wesad ... or package.module:attribute")
]
DataDir = Annotated[Path, typer.Option(envvar="DATA_DIR", help="folder of the data sets")]
RunsDir = Annotated[Path, typer.Option(envvar="RUNS_DIR", help="folder of the results")]
TimeLimit = Annotated[float, typer.Option(min=1, help="seconds after which it gives up")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="tell each round, until the end")]
RunFolder = Annotated[
    Path,
    typer.Argument(
        metavar="RUN", exists=True, file_okay=False, help="folder of a run, such as runs/latest"
    ),
]


@app.command()
def demo(
    clients: Annotated[int, typer.Option(min=1, help="clients in each region")] = 3,
    rounds: Rounds = 3,
    regions: Regions = 1,
    tiers: Annotated[
        int,
        typer.Option(
            min=2,
            max=5,
            help="that average: 2 is regions and server; each more puts aggregators "
            "over every two of the tier below",
        ),
    ] = 2,
    seed: Seed = 42,
    local_epochs: LocalEpochs = 3,
    task: Task = "ecg5000",
    broker: Annotated[
        Literal["auto", "mosquitto", "embedded"],
        typer.Option(help="auto: Mosquitto if it is installed, else the embedded one"),
    ] = "auto",
    secure: Annotated[
        bool,
        typer.Option(
            "--secure",
            help="TLS, an identity for each client and access lists, as in the compose stack; "
            "needs Mosquitto",
        ),
    ] = False,
    runs_dir: RunsDir = Path("runs"),
    data_dir: DataDir = Path("data"),
    time_limit: TimeLimit = 3600,
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
        tiers=tiers,
        seed=seed,
        local_epochs=local_epochs,
        task=task,
        broker=None if broker == "auto" else broker,
        secure=secure,
        runs_dir=runs_dir,
        data_dir=data_dir,
        time_limit=time_limit,
    )
    raise typer.Exit(command.run(options))


@app.command()
def simulate(
    clients: Annotated[int, typer.Option(min=1, help="clients in all")] = 1000,
    regions: Regions = 4,
    processes: Annotated[
        int,
        typer.Option(
            min=0,
            help="that host the clients, in all; at least one for each region. "
            "Default: as many as there are cores",
        ),
    ] = 0,
    rounds: Rounds = 5,
    seed: Seed = 42,
    local_epochs: LocalEpochs = 3,
    task: Task = "ecg5000",
    runs_dir: RunsDir = Path("runs"),
    data_dir: DataDir = Path("data"),
    time_limit: TimeLimit = 36000,
) -> None:
    """Run a federation of very many clients on this machine: like the demo, but a process hosts
    many clients.

    Each client has its own name, data slot, session with the broker and receipts; the model is bit
    for bit that of a process for each. All other settings are taken from the environment.
    """
    import os

    from fedfog.cli import demo as command
    from fedfog.cli.federation import Options

    if clients % regions:
        raise typer.BadParameter(f"{clients} clients cannot be dealt evenly to {regions} regions")
    in_all = processes or os.cpu_count() or 1
    options = Options(
        clients=clients // regions,
        rounds=rounds,
        regions=regions,
        tiers=2,
        seed=seed,
        local_epochs=local_epochs,
        task=task,
        broker=None,
        runs_dir=runs_dir,
        data_dir=data_dir,
        time_limit=time_limit,
        processes=min(clients // regions, -(-in_all // regions)),
    )
    raise typer.Exit(command.run(options, "simulation"))


@app.command()
def partition(
    clients: Annotated[int, typer.Option(min=1, help="clients in each region")] = 3,
    regions: Regions = 1,
    partition: Annotated[
        str, typer.Option(envvar="PARTITION", help="of a region's part to its clients")
    ] = "iid",
    region_partition: Annotated[
        str, typer.Option(envvar="REGION_PARTITION", help="of the training set to the regions")
    ] = "iid",
    seed: Seed = 42,
    task: Task = "ecg5000",
    data_dir: DataDir = Path("data"),
    show: Annotated[bool, typer.Option("--show", help="draw it, too")] = False,
    out: Annotated[Path, typer.Option(help="file of the picture")] = Path("partition.png"),
) -> None:
    """Show who holds what: the classes of each client's training examples.

    A partition is iid, dirichlet:ALPHA, sizes:ALPHA, shards:K or group (docs/settings.md).
    """
    from fedfog.cli import partition as command

    picture = out if show else None
    raise typer.Exit(
        command.run(clients, regions, partition, region_partition, seed, task, data_dir, picture)
    )


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


@app.command()
def run(
    name: Annotated[str, typer.Option(help="of the run; default: now")] = "",
    rounds: Annotated[int | None, typer.Option(min=1, help="global rounds")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="of weights, partition and shuffling")
    ] = None,
    local_epochs: Annotated[
        int | None, typer.Option(min=1, help="epochs of a client in a round")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="examples per training step")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="of the clients' OPTIMIZER")] = None,
    strategy: Annotated[
        str | None, typer.Option(help="Flower strategy that averages the regions")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="any other setting of a run (docs/settings.md), may be repeated: "
            "--set optimizer=sgd --set proximal_mu=0.1",
        ),
    ] = None,
    follow: Follow = False,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Begin a run on a central server that stands.

    What is not given here is as in the server's environment. The task cannot be chosen: the
    clients have it from theirs (TASK).
    """
    from fedfog.cli import runs as command

    chosen: dict[str, Any] = {
        "rounds": rounds,
        "seed": seed,
        "local_epochs": local_epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "strategy": strategy,
    }
    for text in setting or []:
        key, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"--set {text!r}: not of the form NAME=VALUE")
        chosen[key.strip().lower()] = value.strip()
    given = {key: value for key, value in chosen.items() if value is not None}
    raise typer.Exit(command.run(runs_dir, name, given, follow))


@app.command()
def runs(runs_dir: RunsDir = Path("runs")) -> None:
    """List all runs. Needs no server."""
    from fedfog.cli import runs as command

    raise typer.Exit(command.show(runs_dir))


@app.command()
def stop(
    name: Annotated[str, typer.Argument(help="of the run; default: the present one")] = "",
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Stop the present run. It goes on with `fedfog resume`; a restart of the server leaves it.

    (With EXIT_WHEN_FINISHED the server ends, and the next start goes on with the run.)
    """
    from fedfog.cli import runs as command

    raise typer.Exit(command.stop(runs_dir, name))


@app.command()
def resume(
    name: Annotated[str, typer.Argument(help="of a run that is not completed")],
    follow: Follow = False,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Go on with a run that was stopped, has failed or was interrupted, where it was."""
    from fedfog.cli import runs as command

    raise typer.Exit(command.resume(runs_dir, name, follow))


@app.command()
def experiment(
    sweep: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="TOML file (docs/experiments.md)")
    ],
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Do runs over a grid of settings and seeds on a federation of this machine, and put the
    results into one table, plots and a page.

    SWEEP is a TOML file (docs/experiments.md). A sweep that was stopped or killed goes on where it
    was when the command is given again.
    """
    from fedfog.cli import experiment as command

    raise typer.Exit(command.run(sweep, runs_dir))


@app.command()
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER...", exists=True, file_okay=False, help="of runs or sweeps"),
    ],
) -> None:
    """Write report.html into the folder of a run (runs/latest) or a sweep: settings, curves,
    confusion matrix, participation and times on one page that needs nothing else."""
    from fedfog.cli import report as command

    raise typer.Exit(command.run(folders))


@app.command()
def export(
    run: RunFolder,
    onnx: Annotated[Path, typer.Option(help="file to write")],
    data_dir: DataDir = Path("data"),
) -> None:
    """Write a run's model as ONNX, after a check that its outputs for the test data are PyTorch's
    to 1e-5."""
    from fedfog.cli import export as command

    raise typer.Exit(command.run(run, onnx, data_dir))


@app.command()
def predict(
    run: RunFolder,
    examples: Annotated[
        Path,
        typer.Argument(
            exists=True,
            dir_okay=False,
            help="one example in a line, without a label or a header",
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="file to write; default: stdout")] = None,
    data_dir: DataDir = Path("data"),
) -> None:
    """Have a run's model tell class and probabilities of each line of a file, as CSV.

    A line is one example, without a label: for ECG5000 140 numbers, with commas or tabs between
    them. There is no header (docs/experiments.md).
    """
    from fedfog.cli import predict as command

    raise typer.Exit(command.run(run, examples, out, data_dir))


if __name__ == "__main__":
    app()
