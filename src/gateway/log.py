"""Logging: structlog to standard error, as text for people or as JSON lines for collectors."""

from __future__ import annotations

import logging
import os
import select
import stat
import sys
import time
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO, cast

import structlog
from structlog.typing import EventDict

# Of one event and cause in one worker.
LINES_PER_SECOND = 100


class _StandardError:
    """Standard error without a buffer. If nobody reads it, lines are lost and nothing else: nobody waits."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._poll.register(2, select.POLLOUT)
        # A pipe that can be written to takes so many bytes (pipe(7)); for more it might wait for its reader.
        self._line_max = select.PIPE_BUF if stat.S_ISFIFO(os.fstat(2).st_mode) else sys.maxsize
        self._lost = 0

    def write(self, text: str) -> None:
        if self._lost and self._write(f"({self._lost} lines of the log were lost)\n"):
            self._lost = 0
        self._lost += not self._write(text)

    def _write(self, text: str) -> bool:
        data = text.encode(errors="backslashreplace")
        if len(data) > self._line_max:
            data = data[: self._line_max - 1] + b"\n"
        if not self._poll.poll(0):
            return False
        with suppress(OSError):
            os.write(2, data)
        return True

    def flush(self) -> None:
        """Do nothing: nothing is held back."""


class _Throttle:
    """Lets a few lines of one event and cause through per second, and says how many there were.

    Strangers can cause refusals as fast as they like; every one is counted, but the log stays readable and
    its disk does not fill.
    """

    def __init__(self) -> None:
        self._second = 0
        self._lines: Counter[tuple[object, object]] = Counter()

    def __call__(self, logger: object, method: str, event: EventDict) -> EventDict:
        second = int(time.monotonic())
        key = (event.get("event"), event.get("cause"))
        if second != self._second:
            self._second = second
            left_out = self._lines[key] - LINES_PER_SECOND
            self._lines.clear()
            if left_out > 0:
                event["left_out"] = left_out
        self._lines[key] += 1
        if self._lines[key] > LINES_PER_SECOND and method in ("info", "debug"):
            raise structlog.DropEvent
        return event


_STAMP = (structlog.processors.add_log_level, structlog.processors.TimeStamper(fmt="iso", utc=True))


def print_line(event: str, **facts: object) -> None:
    """Print a JSON line to standard output, whatever the level of the log is."""
    structlog.wrap_logger(
        structlog.PrintLogger(sys.stdout),
        processors=[*_STAMP, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.BoundLogger,
    ).info(event, **facts)


def configure(level: str, style: str) -> None:
    """Set up structlog for the process; `style` is "console" or "json"."""
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if style == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=24)
    )
    structlog.configure(
        processors=[
            _Throttle(),
            *_STAMP,
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
        """Pass faults on to structlog."""
        if level >= logging.ERROR:
            text = str(msg) % args if args else str(msg)
            structlog.get_logger("picows").error(text, exc_info=bool(kwargs.get("exc_info")))
