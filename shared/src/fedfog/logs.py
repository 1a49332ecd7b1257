"""Structured logs: readable on a terminal, JSON lines in containers.

A run tells its story in eight steps. Every tier logs the step it does, with its duration and the
id of the update (`run/round/region/client`) or of the partial (`run/round/region`), so that one
grep follows an update through the whole fog.
"""

import logging
import sys
from enum import StrEnum

import structlog
from structlog.typing import EventDict, Processor


class Step(StrEnum):
    """Names of the eight steps of a round, in order."""

    TRAIN = "step_1_local_training"
    PUBLISH_UPDATE = "step_2_update_published"
    AGGREGATE_REGION = "step_3_regional_aggregation"
    PUBLISH_PARTIAL = "step_4_partial_published"
    BRIDGE = "step_5_partial_bridged_to_flower"
    AGGREGATE_GLOBAL = "step_6_global_aggregation"
    PUBLISH_MODEL = "step_7_global_model_published"
    APPLY_MODEL = "step_8_global_model_received"


def configure(service: str, level: str = "info", form: str = "auto", **context: object) -> None:
    """Send this process's logs to stdout.

    Args:
        service: name of the tier, in every line.
        level: debug, info, warning or error.
        form: `console`, `json`, or `auto` (console on a terminal, JSON otherwise).
        context: more fields for every line, such as the region.
    """
    terminal = sys.stdout.isatty() if form == "auto" else form == "console"
    renderer: Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stdout.isatty())
        if terminal
        else structlog.processors.JSONRenderer()
    )
    fields = {"service": service, **context}

    def add_fields(_logger: object, _method: str, event: EventDict) -> EventDict:
        return fields | dict(event)

    structlog.configure(
        processors=[
            add_fields,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[level.upper()]
        ),
        logger_factory=structlog.PrintLoggerFactory(sys.stdout),
    )
