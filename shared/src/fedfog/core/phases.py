"""Phases of a round in a region; the table of their transitions is in `rounds.py`."""

from enum import StrEnum


class Phase(StrEnum):
    WAITING = "waiting"  # no model seen yet
    FORMING = "forming"  # the first cohort of a run is gathering, slots are not dealt yet
    OPEN = "open"  # updates of the round are being summed
    STARVING = "starving"  # open past the deadline with less than the minimum
    CLOSING = "closing"  # the partial is being committed
    DEGRADED = "degraded"  # closing, but the store cannot be written
    CLOSED = "closed"  # the partial is committed and published
    FINISHED = "finished"  # the run is over
    STOPPED = "stopped"  # another process owns the region
