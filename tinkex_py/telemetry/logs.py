"""Log lines, written to structlog if it is configured, else to the stdlib logger "tinkex_py"."""

import logging
import sys
from collections.abc import Mapping
from inspect import isfunction
from typing import Any

import structlog

from tinkex_py.arguments import shown
from tinkex_py.errors import InvalidData
from tinkex_py.unicode import plain_line, with_whole_texts

LOGGER = logging.getLogger("tinkex_py")
LOGGER.addHandler(logging.NullHandler())

_LEVEL_NAMES = {
    logging.DEBUG: "debug",
    logging.INFO: "info",
    logging.WARNING: "warning",
    logging.ERROR: "error",
    logging.CRITICAL: "critical",
}
_LEVELS = {name: level for level, name in _LEVEL_NAMES.items()}
_STDERR_FORMAT = logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s")
_COMPARED = ("wrapper_class", "logger_factory", "context_class")
# The default configuration of structlog; None if it was configured before this package was imported.
_DEFAULT_CONFIGURATION: dict[str, Any] | None = None if structlog.is_configured() else structlog.get_config()


def parse_level(level: str) -> int:
    """Returns the number of a level name.

    Raises:
        InvalidData: the level is unknown.
    """
    number = _LEVELS.get(level.lower()) if isinstance(level, str) else None  # pyright: ignore[reportUnnecessaryIsInstance]
    if number is None:
        raise InvalidData(f"unknown log level {shown(level)}; use one of: {', '.join(_LEVELS)}")
    return number


def structlog_is_configured() -> bool:
    """Whether the process has configured structlog.

    `structlog.is_configured()` stays true after `capture_logs()`; then the default processors would print even debug
    lines to stdout.
    """
    if not structlog.is_configured():
        return False
    now = structlog.get_config()
    if _DEFAULT_CONFIGURATION is None:
        return not _looks_like_the_defaults(now)
    if any(now[key] is not _DEFAULT_CONFIGURATION[key] for key in _COMPARED):
        return True
    processors, defaults = list(now["processors"]), list(_DEFAULT_CONFIGURATION["processors"])
    return len(processors) != len(defaults) or any(a is not b for a, b in zip(processors, defaults, strict=True))


def _looks_like_the_defaults(configuration: Mapping[str, Any]) -> bool:
    """Whether a configuration is structlog's default, as its documentation describes it ("Configuration")."""
    default_processors = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.StackInfoRenderer,
        structlog.dev.set_exc_info,
        structlog.processors.TimeStamper,
        structlog.dev.ConsoleRenderer,
    ]
    kinds: list[object] = [one if isfunction(one) else type(one) for one in configuration["processors"]]
    return (
        kinds == default_processors
        and configuration["wrapper_class"] is structlog.make_filtering_bound_logger(logging.NOTSET)
        and configuration["context_class"] is dict
        and type(configuration["logger_factory"]) is structlog.PrintLoggerFactory
    )


def logging_is_configured() -> bool:
    """Whether any handler of the process would receive a line of our logger."""
    logger: logging.Logger | None = LOGGER
    while logger is not None:
        if any(not isinstance(handler, logging.NullHandler) for handler in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False


def would_write(level: int) -> bool:
    """Whether `write_line` writes a line of this level without `asked_for`."""
    return (structlog.is_configured() and structlog_is_configured()) or LOGGER.isEnabledFor(level)


def write_line(event: str, fields: Mapping[str, Any], level: int, *, asked_for: bool = False) -> None:
    """Writes one log line: the event and flat key-values.

    Args:
        event: the event.
        fields: its details; never keys, tokens or prompt text.
        level: a stdlib log level.
        asked_for: the user requested this line: write it even if no logging is configured (to stderr), or if the root
            logger's level would drop it.
    """
    if structlog_is_configured():
        _write_to_structlog(event, fields, level)
    elif asked_for:
        _write_aloud(event, fields, level)
    elif LOGGER.isEnabledFor(level):
        LOGGER.log(level, "%s", _text(event, fields))


def _write_to_structlog(event: str, fields: Mapping[str, Any], level: int) -> None:
    method = _LEVEL_NAMES[level]
    try:
        getattr(structlog.get_logger(LOGGER.name), method)(event, **with_whole_texts(dict(fields), plain_line))
    except Exception as error:  # noqa: BLE001  (processors of the process: a broken log must not break training)
        LOGGER.warning("structlog failed to log %s (%s): check its configuration", event, type(error).__name__)


def _write_aloud(event: str, fields: Mapping[str, Any], level: int) -> None:
    if LOGGER.manager.disable >= level or (LOGGER.level and LOGGER.level > level):
        return
    record = LOGGER.makeRecord(LOGGER.name, level, "(tinkex_py)", 0, "%s", (_text(event, fields),), None)
    if logging_is_configured():
        LOGGER.handle(record)
    elif sys.stderr is not None:  # pyright: ignore[reportUnnecessaryComparison]  (None under pythonw)
        sys.stderr.write(_STDERR_FORMAT.format(record) + "\n")


def _text(event: str, fields: Mapping[str, Any]) -> str:
    return plain_line(" ".join([event, *(f"{key}={value}" for key, value in fields.items())]))
