"""`fedfog token` and `fedfog client`: who may join, and who is out. Enrolment does the work."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from fedfog.control import IdentityAnswer

token = typer.Typer(help="Join tokens, which admit new clients.", no_args_is_help=True)
client = typer.Typer(help="Clients that have joined.", no_args_is_help=True)

PkiDir = Annotated[
    Path, typer.Option(envvar="PKI_DIR", help="folder of the PKI that enrolment works in")
]
PKI = Path("pki")


@token.command("create")
def create_token(
    region: Annotated[str, typer.Option(help="that its clients will belong to")],
    uses: Annotated[int, typer.Option(min=1, help="devices that it admits")] = 1,
    hours: Annotated[float, typer.Option(min=0.01, max=1e6, help="that it is valid")] = 24,
    pki_dir: PkiDir = PKI,
) -> None:
    """Make a token and print it. It is shown this once: enrolment keeps only its hash."""
    sys.stdout.write(_ask(pki_dir, "create token", region, uses, hours).token + "\n")


@token.command("list")
def list_tokens(pki_dir: PkiDir = PKI) -> None:
    """List all tokens, by their ids."""
    _show(_ask(pki_dir, "tokens"), "id", "region", "left", "until (UTC)", "state")


@token.command("revoke")
def revoke_token(
    token_id: Annotated[str, typer.Argument(metavar="ID", help="see the list")],
    pki_dir: PkiDir = PKI,
) -> None:
    """Let nobody join with a token any more. Clients that have stay."""
    _ask(pki_dir, "revoke token", token_id)
    sys.stdout.write(f"Token {token_id} revoked.\n")


@client.command("list")
def list_clients(pki_dir: PkiDir = PKI) -> None:
    """List all clients and the ids of the tokens that they joined with."""
    _show(_ask(pki_dir, "clients"), "client", "token", "until (UTC)", "state")


@client.command("revoke")
def revoke_client(
    name: Annotated[
        str,
        typer.Argument(
            metavar="REGION/CLIENT", help="see the list; or a service, such as bridge.region_0"
        ),
    ],
    pki_dir: PkiDir = PKI,
) -> None:
    """Cut a client off at once, for good, and free its name; or a service, until the next start of
    fedfog-pki."""
    answer = _ask(pki_dir, "revoke client", name)
    sys.stdout.write(f"{name} revoked and cut off. {answer.note}\n")


def _ask(
    pki_dir: Path,
    kind: Literal["create token", "revoke token", "tokens", "revoke client", "clients"],
    subject: str = "",
    uses: int = 1,
    hours: float = 24,
) -> "IdentityAnswer":
    from fedfog.control import ControlError, IdentityCommand, ask_enrolment

    asked = IdentityCommand(kind=kind, subject=subject, uses=uses, hours=hours)
    try:
        return ask_enrolment(pki_dir, asked)
    except ControlError as error:
        sys.stderr.write(f"{error}\n")
        raise typer.Exit(1) from error


def _show(answer: "IdentityAnswer", *columns: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=box.SIMPLE, pad_edge=False)
    for row in answer.rows:
        table.add_row(*row)
    # Into a pipe, a line stays a line.
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table)
