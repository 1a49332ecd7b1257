"""Entry point of the central server."""

from fedfog import service
from fedfog.settings import CentralSettings, load
from fedfog_central_server.server import CentralServer


def main() -> None:
    settings = load(CentralSettings)

    def body() -> int:
        try:
            return CentralServer(settings).run()
        except OSError as error:
            if not str(error.filename).startswith(str(settings.runs_dir)):
                raise
            raise service.ServiceError(f"{error} (RUNS_DIR)") from error

    service.run("central-server", settings, body)


if __name__ == "__main__":
    main()
