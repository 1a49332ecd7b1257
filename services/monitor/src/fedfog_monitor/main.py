"""Entry point of the monitor."""

import sys

from fedfog.cli.main import app


def main() -> None:
    app(["monitor", *sys.argv[1:]])


if __name__ == "__main__":
    main()
