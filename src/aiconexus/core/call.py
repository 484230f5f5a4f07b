"""The call that runs: what a capability may know of it, and what it can tell its caller meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from numbers import Real
from typing import Any, Final

_current: Final[ContextVar[Call | None]] = ContextVar("aiconexus_call", default=None)


@dataclass(frozen=True)
class Call:
    """One execution of a capability, or of `on_intent`.

    Attributes:
        id: Of the message that asked.
        caller: DID of the agent that asked; its signature was verified.
        deadline: When it must be done, in seconds of the event loop's clock.
    """

    id: str
    caller: str
    deadline: float
    _progress: Callable[[Any], None]
    _is_over: Callable[[], bool]

    @property
    def remaining(self) -> float:
        """Seconds until the deadline; 0 if it has passed. What it calls itself has no more time.

        Tasks that it started and that outlive it are bound by it no longer.
        """
        return max(0.0, self.deadline - asyncio.get_running_loop().time())

    def progress(self, value: Any) -> None:
        """Tell the caller how far it is, if it wants to know: anything short that has a JSON form.

        It never waits: on a slow connection only the latest arrives.

        Raises:
            CapabilityError: It has no JSON form, or more than 15 KiB.
        """
        self._progress(value)

    def enter(self) -> None:
        """Make it the current call of this task, and of the tasks that it starts."""
        _current.set(self)


def current_call() -> Call:
    """Return the call that this code runs for.

    Raises:
        RuntimeError: It runs for none.
    """
    call = _current.get()
    if call is None:
        raise RuntimeError("no call: this code does not run in a capability")
    return call


def check_seconds(timeout: float) -> None:
    """Check what was given as a timeout.

    Raises:
        TypeError: It is no number.
    """
    if not isinstance(timeout, Real):
        raise TypeError(f"timeout is in seconds, a number, not {timeout!r}")


def time_left(timeout: float | None, default: float) -> float:
    """Return how long something may take that this code asks of others, in seconds.

    Args:
        timeout: As it was asked for; None for as long as there is.
        default: Where nobody says anything, not even the call that this code runs for.

    Raises:
        TypeError: `timeout` is no number.
    """
    if timeout is not None:
        check_seconds(timeout)
    call = _current.get()
    # A task, a connection or a timer that began in a call and outlives it still finds it here.
    if call is None or call._is_over():
        return default if timeout is None else timeout
    # Not 0, which is no timeout: what is too late fails by itself.
    remaining = max(0.001, call.remaining)
    return remaining if timeout is None else min(timeout, remaining)
