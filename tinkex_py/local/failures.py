"""Logging of unexpected failures."""

import logging
import traceback

logger = logging.getLogger("tinkex_py.local")
logger.addHandler(logging.NullHandler())


def log_failure(what: str, error: BaseException) -> None:
    """Log an error's class and where it came from, without its text: that may quote what a client sent."""
    places = "".join(traceback.format_tb(error.__traceback__))
    logger.error("%s failed: %s\n%s", what, type(error).__name__, places)
