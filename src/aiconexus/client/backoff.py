"""When to try again: exponential backoff with full jitter, never before the gateway allows it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

import orjson

from aiconexus.protocol import CloseCode
from aiconexus.protocol.limits import RECONNECT_BASE_SECONDS, RECONNECT_MAX_SECONDS

RETRY_AFTER_MAX_SECONDS: Final = 3_600.0  # a gateway that means longer closes with 4503

# 2**64 times any base is over any maximum; beyond 2**1023 a float overflows.
_EXPONENT_MAX = 64


class Backoff:
    """Decides how long to wait before the next attempt.

    The delay is a random number between 0 and `min(maximum, base * 2**n)`, n counting the attempts: *full*
    jitter, which of all kinds spreads the return of many clients best (AWS Architecture Blog, "Exponential
    Backoff And Jitter").

    Args:
        base: Upper bound of the first delay, in seconds.
        maximum: Upper bound of every delay, in seconds.
        lasting: A session that lived this many seconds was a good one: the count begins anew. Shorter ones
            do not reset it, or a gateway that drops everybody after REGISTER would be called without pause.
        uniform: Returns a random number in [0, 1); for tests.
    """

    def __init__(
        self,
        base: float = RECONNECT_BASE_SECONDS,
        maximum: float = RECONNECT_MAX_SECONDS,
        *,
        lasting: float = RECONNECT_MAX_SECONDS,
        uniform: Callable[[], float] = random.random,
    ) -> None:
        if not 0 < base <= maximum:
            raise ValueError(f"0 < base <= maximum is needed, not base={base}, maximum={maximum}")
        self.base = base
        self.maximum = maximum
        self.lasting = lasting
        self.attempts = 0
        self._uniform = uniform

    def next(self, not_before: float = 0.0) -> float:
        """Count an attempt and return the seconds to wait before it.

        Args:
            not_before: What the gateway asked for, in seconds. The jitter comes on top, so that those who
                were all told the same do not come back together.
        """
        ceiling = min(self.maximum, self.base * 2.0 ** min(self.attempts, _EXPONENT_MAX))
        self.attempts += 1
        return not_before + self._uniform() * ceiling

    def ended(self, lived: float) -> None:
        """Note that a session ended after `lived` seconds."""
        if lived >= self.lasting:
            self.attempts = 0


def retry_after(close: CloseCode, reason: str) -> float:
    """Return the earliest return after a CLOSE frame, in seconds.

    Args:
        close: What the table says of its code.
        reason: Its text. If that is JSON `{"r": retry_after_ms, ...}`, it wins over the table.
    """
    milliseconds: object = None
    try:
        fields = orjson.loads(reason)
    except orjson.JSONDecodeError:
        fields = None
    if isinstance(fields, dict):
        milliseconds = fields.get("r")
    if type(milliseconds) is not int or milliseconds < 0:
        milliseconds = close.retry_after_ms
    return min(milliseconds / 1000, RETRY_AFTER_MAX_SECONDS)


def retry_after_http(header: str | None) -> float:
    """Return the seconds of a `Retry-After` header (RFC 9110 section 10.2.3); 0 for a date or none."""
    if header is None or not (header.isascii() and header.isdigit()):
        return 0.0
    return min(float(header[:9]), RETRY_AFTER_MAX_SECONDS)
