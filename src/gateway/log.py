"""Logging: structlog to standard error, as text for people or as JSON lines for collectors."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO, cast

import structlog


class _StandardError:
    """Standard error without a buffer. If nobody reads it any more, lines are lost and nothing else."""

    def write(self, text: str) -> None:
        with suppress(OSError):
            os.write(2, text.encode(errors="backslashreplace"))

    def flush(self) -> None:
        """Do nothing: nothing is held back."""


def configure(level: str, style: str) -> None:
    """Set up structlog for the process; `style` is "console" or "json"."""
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if style == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=24)
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, _StandardError())),
        cache_logger_on_first_use=True,
    )


if TYPE_CHECKING:
    _LoggerAdapter = logging.LoggerAdapter[logging.Logger]
else:
    _LoggerAdapter = logging.LoggerAdapter  # generic from Python 3.11 on


class PicowsLog(_LoggerAdapter):
    """What picows logs through: only faults of this program pass.

    An adapter, because for a plain logger picows makes a child logger per connection. What picows says
    of a peer's protocol errors the gateway logs itself, once and with the agent's name.
    """

    def __init__(self) -> None:
        super().__init__(logging.getLogger("picows"), {})

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802
        """Spare picows the work of building texts that nobody reads."""
        return level >= logging.ERROR

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Pass what carries an exception on to structlog."""
        if kwargs.get("exc_info"):
            structlog.get_logger("picows").error(str(msg) % args if args else str(msg), exc_info=True)
