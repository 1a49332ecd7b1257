"""`python -m bench.rivals [--quick] [NAME ...]`: a table of what users would pick instead."""

import argparse

from rich.console import Console
from rich.table import Table

from bench.rivals import NAMES, Rival, measure


def table(rivals: list[Rival]) -> Table:
    made = Table("rival", "version", "clients", "median s", "p95 s", "rounds", "note")
    for rival in rivals:
        figures = [f"{s:.3f}" if s is not None else "-" for s in (rival.median_s, rival.p95_s)]
        made.add_row(
            rival.name, rival.version, str(rival.clients), *figures, str(rival.n), rival.note
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.rivals", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="only Flower, with 10 clients")
    arguments = parser.parse_args()
    console = Console()
    with console.status("") as status:
        rivals = measure(arguments.names or NAMES, arguments.quick, status.update)
    console.print(table(rivals))


if __name__ == "__main__":
    main()
