"""Entry point of the central server."""

from fedfog import service
from fedfog.settings import CentralSettings, load
from fedfog_central_server.server import CentralServer


def main() -> None:
    settings = load(CentralSettings)
    service.run("central-server", settings, lambda: CentralServer(settings).run())


if __name__ == "__main__":
    main()
