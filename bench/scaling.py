"""`python -m bench.scaling`: how a round's cost grows, and what that says for 10^4 to 10^6 clients.

Measures what the rules alone cost for up to 10^5 clients, and what broker, aggregator and client
cost per update; fits a model to the rounds that `make bench` measured; simulates wider fogs with
the real rules (`bench.simulation`). All goes under `scaling` into `bench/results/full.json`, and
into a plot. `--write` also writes the figures into `docs/scaling.md`; `--only-show` takes what an
earlier call found.
"""

import gc
import json
import math
import os
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from bench import page
from bench.simulation import Costs, Fog, Layout, Sizes, name_of, partial_meta
from bench.swarm import Peer, Peers
from fedfog import logs
from fedfog.cli.broker import LocalBroker
from fedfog.core import rounds
from fedfog.core.participation import RESEND_SECONDS
from fedfog.messages.codec import MAX_HEADER_BYTES, TensorTable, encode

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "scaling.md"
PARAMETERS = 68_353
MEGABYTES = 4 * PARAMETERS / 1e6
KINDS = ("broker", "aggregators", "clients", "bridges", "SuperLink", "ServerApp")
NAMES = ("base", "client", "region", "megabyte")
FEW = 100  # of what costs as much as the region is wide
LIMIT_SECONDS = 60.0
CLOCK_SECONDS = 0.001  # less of CPU time a round is not seen
MESSAGES = 7  # per client at the broker: model, update in and out, receipts, two of the status
STEPS = ("birth", "update", "close", "open", "death", "return", "newcomer")
KEYS = ("clients", "regions", "parameters", "median_s", "fitted_s", "error")
PLACE = ("clients", "regions", "tiers", "brokers")
CORE_CLIENTS = (100, 1_000, 9_000)  # a region admits MAX_CLIENTS
LINK = 8 / 1000  # seconds per megabyte at 1 Gbit/s

Row = dict[str, Any]


# What the rules alone cost


def core_costs(clients: int) -> Row:
    """Microseconds of one core and bytes for each client of one region, without any shell."""
    row: Row = {"clients": clients} | one_round(clients)[0]
    tracemalloc.start()
    _, region = one_round(clients)
    row["bytes"] = round(tracemalloc.get_traced_memory()[0] / clients)
    tracemalloc.stop()
    assert len(region.present) >= clients
    return row


def one_round(clients: int) -> tuple[Row, rounds.RegionRounds]:
    """All come and send; in the next round some die, come again, and others are new."""
    names = [name_of(i) for i in range(clients)]
    vector = np.ones(1, np.float32)
    region = rounds.RegionRounds("region", rounds.Policy(expected=clients), boot=1)
    costs: Row = {}

    def timed(step: str, events: Sequence[rounds.Event], per: int) -> None:
        began = time.process_time()
        for event in events:
            region.handle(event, 0.0)
        costs[f"{step}_us"] = round(1e6 * (time.process_time() - began) / per, 2)

    def born(name: str, boot: int = 1) -> rounds.PresenceSeen:
        return rounds.PresenceSeen(name, True, boot)

    updates = [rounds.UpdateArrived("run", 1, n, "m", 5, vector, {"loss": 1.0}) for n in names]
    some = names[1 : 1 + FEW]
    region.handle(rounds.ModelArrived("run", 1, 1, "m", 1), 0.0)
    timed("birth", [born(name) for name in names], clients)
    timed("update", updates, clients)
    timed("close", [rounds.Committed()], clients)
    timed("open", [rounds.ModelArrived("run", 1, 2, "m", 1)], clients)
    timed("death", [rounds.PresenceSeen(name, False, 1) for name in some], len(some))
    timed("return", [born(name, 2) for name in some], len(some))
    timed("newcomer", [born(f"new-{i}") for i in range(FEW)], FEW)
    return costs, region


# What an update costs each process


def broker_costs() -> dict[str, float]:
    """CPU seconds of the broker for a message in or out, and for a megabyte."""
    little, much = 100, 4 * PARAMETERS
    small, large = _broker_seconds(little, 1_000), _broker_seconds(much, 60)
    byte = (large - small) / (much - little)
    message = max(0.0, small - little * byte)
    return {"broker_message_s": round(message, 8), "broker_mb_s": round(1e6 * byte, 7)}


def _broker_seconds(size: int, messages: int, subscribers: int = 50) -> float:
    """CPU seconds of the broker for a message in or out."""
    received = ready = 0

    def count(_topic: str, _payload: bytes) -> None:
        nonlocal received
        received += 1

    def connected() -> None:
        nonlocal ready
        ready += 1

    with tempfile.TemporaryDirectory(prefix="fedfog-bench-") as folder:
        broker = LocalBroker(Path(folder)).start()
        assert broker.process
        try:
            peers = Peers(broker.host, broker.port)
            everybody = [
                Peer(peers, f"p{i}", ["down"], count, connected) for i in range(subscribers)
            ]
            deadline = time.monotonic() + LIMIT_SECONDS
            cpu = psutil.Process(broker.process.pid).cpu_times
            before = cpu()
            for number in range(1, messages + 1):
                while ready < subscribers or received < (number - 1) * subscribers:
                    peers.step(1.0)
                    if time.monotonic() > deadline:
                        raise RuntimeError(f"{received} of {messages * subscribers} messages came")
                if number == 1:
                    before = cpu()
                everybody[0].publish("down", number.to_bytes(8) + bytes(size - 8))
            while received < messages * subscribers:
                peers.step(1.0)
            after = cpu()
        finally:
            broker.stop()
    spent = after.user + after.system - before.user - before.system
    return float(spent / (messages * (subscribers + 1)))


# The fit


def fit(report: Mapping[str, Any]) -> Row:
    """Fit `base + client * clients + region * regions + megabyte * megabytes` to the medians in
    `round_overhead` and `big_models`, in seconds. None of the four is below 0, and each row's error
    counts relative to its median. A client and a region's aggregator move the model twice each,
    down and up: megabytes = 2 * model * (clients + regions). `cpu` has the same of the CPU seconds
    of each kind of process, over the rounds of the default model.

    Raises:
        ValueError: the report has too few different rows.
    """
    rows = [
        {"clients": r["clients"], "regions": r["regions"], "parameters": PARAMETERS}
        | {"median_s": r["median_s"]}
        for r in report["round_overhead"]
    ]
    rows += [
        {key: r[key] for key in ("clients", "regions", "parameters", "median_s")}
        for r in report.get("big_models", [])
    ]
    # Rows of one model alone cannot tell a client from its megabytes.
    names = NAMES if len({row["parameters"] for row in rows}) > 1 else NAMES[:3]
    costs = _least_squares(rows, [row["median_s"] for row in rows], names)
    for row in rows:
        row["fitted_s"] = round(seconds_of(costs, row), 4)
        row["error"] = round(row["fitted_s"] / row["median_s"] - 1, 3)
    errors = [abs(row["error"]) for row in rows]
    wide = report["round_overhead"]
    return costs | {
        "median_error": round(float(np.median(errors)), 3),
        "largest_error": max(errors),
        "residuals": rows,
        "cpu": {
            kind: _least_squares(rows[: len(wide)], [row["cpu_s"][kind] for row in wide], NAMES[:3])
            for kind in KINDS
        },
    }


def _least_squares(
    rows: Sequence[Mapping[str, Any]], seconds: Sequence[float], names: Sequence[str]
) -> Row:
    """Costs that are not negative, from errors relative to the seconds."""
    from scipy.optimize import nnls  # type: ignore[import-untyped]

    matrix = np.array([_terms(row)[: len(names)] for row in rows])
    matrix /= np.maximum(seconds, CLOCK_SECONDS)[:, None]
    if np.linalg.matrix_rank(matrix) < len(names):
        raise ValueError(f"{len(rows)} rows do not tell {', '.join(names)} apart")
    found, _ = nnls(matrix, np.ones(len(rows)))
    return {f"{name}_s": float(f"{value:.4g}") for name, value in zip(names, found, strict=True)}


def _terms(row: Mapping[str, Any]) -> list[float]:
    megabytes = 2 * 4e-6 * row["parameters"] * (row["clients"] + row["regions"])
    return [1.0, row["clients"], row["regions"], megabytes]


def seconds_of(costs: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    """What a fit says for a row."""
    terms = zip(NAMES, _terms(row), strict=True)
    return float(sum(costs.get(f"{name}_s", 0.0) * term for name, term in terms))


# The simulation


def costs_of(scaling: Mapping[str, Any], link: float) -> Costs:
    """What was fitted and measured; with a link, clients have machines of their own."""
    cpu = scaling["cpu"]
    return Costs(
        base=scaling["base_s"],
        region=scaling["region_s"],
        broker_message=scaling["broker_message_s"],
        broker_mb=scaling["broker_mb_s"],
        aggregator=cpu["aggregators"]["client_s"],
        client=0.0 if link else cpu["clients"]["client_s"],
        link_mb=link,
    )


def simulate(layout: Layout, costs: Costs) -> Row:
    """The second round: in the first one the clients gather.

    Raises:
        AssertionError: not every client was counted once.
    """
    began = time.process_time()
    gc.disable()  # a million objects, none of them garbage
    fog = Fog(layout, costs, PARAMETERS, size=16)
    last = fog.run(2)[-1]
    gc.enable()
    assert last.members == layout.clients
    row = asdict(layout) | asdict(last)
    row["cores"] = layout.cores if math.isfinite(layout.cores) else None
    row = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
    return row | {"cpu_s": round(time.process_time() - began, 1)}


def walls(layout: Layout, costs: Costs) -> Row:
    """Seconds that the busiest process or link of each kind is busy in a round, if nothing is sent
    twice; the largest is the first wall. Bytes are those of that broker."""
    sizes = Sizes.of(PARAMETERS)
    width = math.ceil(layout.clients / layout.regions)
    brokers = layout.regions if layout.broker_per_region else 1
    clients = math.ceil(layout.clients / brokers)
    answers = sizes.receipt + 2 * sizes.status + sizes.member * width
    over_link = clients * (sizes.update + answers)
    bytes_in = clients * sizes.update
    messages = clients * MESSAGES
    top = layout.regions
    for _ in range(2, layout.tiers):
        top = math.ceil(top / layout.fan_in)
    busy = {
        "broker's core": messages * costs.broker_message
        + (2 * bytes_in + over_link) / 1e6 * costs.broker_mb,
        "broker's link": over_link / 1e6 * costs.link_mb,
        "first broker's link": (brokers - 1) * sizes.update / 1e6 * costs.link_mb,
        "aggregator's core": max(width, layout.fan_in) * costs.aggregator,
        "SuperLink": top * costs.region,
    }
    return asdict(layout) | {
        "cores": None,
        "bytes_in": bytes_in,
        "bytes_out": bytes_in + over_link,
        "busy_s": {name: round(seconds, 3) for name, seconds in busy.items()},
        "wall": max(busy, key=lambda name: busy[name]),
        "bridges": top,
    }


def largest_region(name_length: int) -> int:
    """Clients whose names, all of this length, still fit into the header of a region's partial."""
    table = TensorTable((("weights", (1,)),))
    vector = np.zeros(1, np.float32)

    def header(members: int) -> int:
        meta = partial_meta(1)
        names = {f"{i:x}".rjust(name_length, "n"): 1000 for i in range(members)}
        return len(encode(meta.model_copy(update={"members": names}), table, vector))

    base, more = header(1), header(1001)
    return int((MAX_HEADER_BYTES - base) / ((more - base) / 1000))


WIDE = (  # of regions of 1,000 clients: one broker; one for each region; and more tiers
    Layout(1_000, 1),
    Layout(10_000, 10),
    Layout(10_000, 10, broker_per_region=True),
    Layout(100_000, 100, broker_per_region=True),
    Layout(100_000, 100, tiers=3, fan_in=10, broker_per_region=True),
)
WIDEST = (
    Layout(1_000_000, 1_000),
    Layout(1_000_000, 1_000, broker_per_region=True),
    Layout(1_000_000, 1_000, tiers=3, fan_in=32, broker_per_region=True),
    Layout(1_000_000, 1_000, tiers=4, fan_in=10, broker_per_region=True),
    Layout(1_000_000, 10_000, tiers=5, fan_in=10, broker_per_region=True),
)


def measure(report: Mapping[str, Any], console: Console) -> Row:
    """The fit, and all that takes time: about three minutes."""
    scaling = fit(report)
    console.print("the rules alone ...")
    scaling["core"] = [core_costs(clients) for clients in CORE_CLIENTS]
    console.print("a message at the broker ...")
    scaling |= broker_costs()
    here, cores = costs_of(scaling, link=0.0), report["machine"]["cores"]
    for row in scaling["residuals"][: len(report["round_overhead"])]:
        seen = simulate(Layout(row["clients"], row["regions"], cores=cores), here)
        row |= {"simulated_s": seen["seconds"], "simulated_copies": seen["copies"]}
    apart = costs_of(scaling, link=LINK)
    scaling["simulated"] = []
    for layout in WIDE:
        console.print(f"simulating {layout} ...")
        scaling["simulated"].append(simulate(layout, apart))
    scaling["predicted"] = [walls(layout, apart) for layout in (*WIDE, *WIDEST)]
    scaling["largest_region"] = {str(length): largest_region(length) for length in (12, 31)}
    return scaling


# What is shown


def plot(report: Mapping[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    scaling = report["scaling"]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    rows = report["round_overhead"]
    wide = scaling["simulated"]
    for index, regions in enumerate(sorted({row["regions"] for row in rows})):
        mine = [row for row in rows if row["regions"] == regions]
        colour = f"C{index}"
        x, y = [r["clients"] for r in mine], [r["median_s"] for r in mine]
        axes.plot(x, y, "o", color=colour, label=f"measured, {regions} region(s)")
        line = np.geomspace(min(x), max(x), 50)
        ends = [{"clients": c, "regions": regions, "parameters": PARAMETERS} for c in line]
        axes.plot(line, [seconds_of(scaling, end) for end in ends], color=colour, lw=1)
    here = [row for row in scaling["residuals"] if "simulated_s" in row]
    x, y = [r["clients"] for r in here], [r["simulated_s"] for r in here]
    axes.plot(x, y, "k+", label="simulated, same")
    for marker, label, chosen in (
        ("s", "one broker", lambda r: not r["broker_per_region"]),
        ("^", "a broker per region", lambda r: r["broker_per_region"] and r["tiers"] == 2),
        ("v", "and one more tier", lambda r: r["tiers"] > 2),
    ):
        some = [r for r in wide if chosen(r)]
        axes.plot(
            [r["clients"] for r in some],
            [r["seconds"] for r in some],
            marker,
            color="grey",
            label=f"simulated, own cores, 1 Gbit/s, {label}",
        )
    axes.set(xscale="log", yscale="log", xlabel="clients", ylabel="s per round, training off")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def blocks(report: Mapping[str, Any]) -> dict[str, str]:
    """The generated parts of the page, by name."""
    scaling = report["scaling"]
    machine = report["machine"]
    of_fedfog = [
        {**row, "name": "FedFog", "version": f"in {row['regions']} region(s)"}
        for row in report["round_overhead"]
        if (row["clients"], row["regions"]) in ((3, 1), (10, 2), (100, 2), (1000, 1))
    ]
    bound = {**report["raw_lower_bound"], "name": "raw lower bound", "version": ""}
    real = report["rounds_of_real_clients"]

    def place(row: Row) -> list[object]:
        brokers = "one per region" if row["broker_per_region"] else "1"
        return [f"{row['clients']:,}", f"{row['regions']:,}", row["tiers"], brokers]

    units = {"base": "per round", "client": "per client", "region": "per region"}
    units["megabyte"] = "per megabyte moved"
    parts = [
        [units[name], f"{1e3 * scaling[f'{name}_s']:.3g} ms"]
        for name in NAMES
        if f"{name}_s" in scaling
    ]
    busy = list(scaling["predicted"][0]["busy_s"])
    sizes = Sizes.of(PARAMETERS)
    return {
        "machine": f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, "
        f"loopback, {machine['date']}.",
        "measured": markdown(
            ["clients", "regions", "parameters", "measured s", "fitted s", "error", "simulated s"],
            [
                [
                    f"{r['clients']:,}",
                    r["regions"],
                    f"{r['parameters']:,}",
                    r["median_s"],
                    r["fitted_s"],
                    f"{100 * r['error']:+.0f} %",
                    r.get("simulated_s", ""),
                ]
                for r in scaling["residuals"]
            ],
        ),
        "plot": "![Rounds as measured, fitted and simulated](../bench/results/scaling.png)",
        "fit": markdown(["part", "cost"], parts)
        + f"\n\nMedian error {100 * scaling['median_error']:.0f} %, largest "
        f"{100 * scaling['largest_error']:.0f} %, {len(scaling['residuals'])} rows.",
        "costs": markdown(
            ["process", "a round", "per client", "per region"],
            [
                [kind, *(f"{1e3 * costs[f'{name}_s']:.2f} ms" for name in NAMES[:3])]
                for kind, costs in scaling["cpu"].items()
            ],
        )
        + f"\n\nThe broker alone: {1e6 * scaling['broker_message_s']:.0f} µs a message in or out, "
        f"and {1e6 * scaling['broker_mb_s']:.0f} µs a megabyte.",
        "core": markdown(
            ["clients", *STEPS, "memory"],
            [
                [
                    f"{r['clients']:,}",
                    *(f"{r[f'{step}_us']:,.1f} µs" for step in STEPS),
                    f"{r['bytes']} B",
                ]
                for r in scaling["core"]
            ],
        ),
        "simulated": markdown(
            [
                *PLACE,
                "round",
                "an update is sent",
                "one broker in",
                "out",
                "broker busy",
                "aggregator busy",
                "SuperLink busy",
            ],
            [
                [
                    *place(r),
                    f"{r['seconds']:.2f} s",
                    f"{r['copies']:.2f} times",
                    f"{r['bytes_in'] / 1e6:,.0f} MB",
                    f"{r['bytes_out'] / 1e6:,.0f} MB",
                    *(f"{r[f'{k}_seconds']:.2f} s" for k in ("broker", "aggregator", "superlink")),
                ]
                for r in scaling["simulated"]
            ],
        ),
        "beside": markdown(
            ["what", "clients", "median", "95th percentile", "rounds"],
            [
                [f"{r['name']} {r['version']}", r["clients"], *_times(r)]
                for r in (*of_fedfog, bound, *report["rivals"])
            ],
        ),
        "waterfall": markdown(
            ["step", *(_case(case) for case in real)],
            [
                [step, *(f"{case['waterfall'][step]['took_ms']:.0f} ms" for case in real)]
                for step in real[0]["waterfall"]
            ],
        ),
        "arrows": markdown(
            ["topic", "messages a round", "bytes a round"],
            [[name, n, f"{size:,.0f}"] for name, (n, size) in report["wire"][0]["arrows"].items()],
        ),
        "stack": markdown(
            ["service", "MB"],
            [
                *([name, size] for name, size in report["stack_pss_by_program_mb"].items()),
                ["all", report["stack_pss_mb"]],
            ],
        ),
        "predicted": markdown(
            [*PLACE, "bridges", *busy, "first wall"],
            [
                [*place(r), r["bridges"], *(f"{r['busy_s'][n]:,.2f} s" for n in busy), r["wall"]]
                for r in scaling["predicted"]
            ],
        ),
        "limits": markdown(
            ["limit", ""],
            [
                *(
                    [f"clients in a region, names of {length} characters", f"{most:,}"]
                    for length, most in scaling["largest_region"].items()
                ),
                ["clients that an aggregator admits", f"{rounds.MAX_CLIENTS:,}"],
                [
                    "clients in a region whose receipt of a close is as large as an update",
                    f"{sizes.update // sizes.member:,}",
                ],
                ["first repeat, not before", f"{RESEND_SECONDS[0]:.0f} s"],
                ["longest time between repeats", f"{RESEND_SECONDS[1]:.0f} s"],
            ],
        ),
    }


def _times(row: Row) -> list[object]:
    if row["median_s"] is None:
        return [row["note"], "", ""]
    return [f"{row['median_s']:.3f} s", f"{row['p95_s']:.3f} s", row["n"]]


def _case(case: Row) -> str:
    return f"{case['clients']} clients, training {'on' if case['training'] else 'off'}"


def write_page(report: Mapping[str, Any], path: Path = PAGE) -> None:
    """Put the figures into the page. Raises ValueError: one has no place there."""
    page.write(path, blocks(report))


def main() -> int:
    logs.configure("bench", "error")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")]))
    console = Console(width=140)
    full = RESULTS / "full.json"
    report = json.loads(full.read_text())
    if "--only-show" not in sys.argv:
        report["scaling"] = measure(report, console)
        full.write_text(json.dumps(report, indent=1) + "\n")
    table = Table(*KEYS)
    for row in report["scaling"]["residuals"]:
        table.add_row(*(str(row[key]) for key in KEYS))
    console.print(table)
    for name, text in blocks(report).items():
        console.print(f"[bold]{name}[/bold]", text, "", sep="\n", highlight=False)
    plot(report, RESULTS / "scaling.png")
    if "--write" in sys.argv:
        write_page(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
