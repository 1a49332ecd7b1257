"""Shorter limits of the central server, so that a test can wait for them."""


def short() -> None:
    from fedfog_central_server import flower_side, tier

    flower_side.ROUND_SLACK = 1.0
    tier.BOOT_SECONDS = 5.0
