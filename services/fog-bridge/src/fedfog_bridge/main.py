"""Entry point: BRIDGE_RUNNER chooses how the bridge runs."""

from fedfog import service
from fedfog.settings import BridgeSettings, load


def main() -> None:
    settings = load(BridgeSettings)

    def body() -> int:
        if settings.bridge_runner == "supernode":
            from fedfog_bridge.supernode import SuperNodeBridge

            return SuperNodeBridge(settings).run()
        from fedfog_bridge.resident import ResidentBridge

        return ResidentBridge(settings).run()

    service.run("fog-bridge", settings, body, region=settings.region)


if __name__ == "__main__":
    main()
