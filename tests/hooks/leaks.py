"""What the soak must be able to notice (see `sitecustomize.py`)."""

from typing import Any


def keep_what_is_published() -> None:
    """A session keeps 100 kB for each message that it publishes."""
    from fedfog.transport import mqtt

    original, kept = mqtt.Session.publish, []

    def publish(self: mqtt.Session, *args: Any, **kwargs: Any) -> bool:
        kept.append(b"x" * 100_000)
        return original(self, *args, **kwargs)

    mqtt.Session.publish = publish  # type: ignore[method-assign]
