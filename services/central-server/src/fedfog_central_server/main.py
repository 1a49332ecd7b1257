"""Entry point of the central server."""

from fedfog import service
from fedfog.settings import CentralSettings, load
from fedfog_central_server.supervisor import Supervisor


def main() -> None:
    settings = load(CentralSettings)
    service.run("central-server", settings, lambda: Supervisor(settings).run())


if __name__ == "__main__":
    main()
