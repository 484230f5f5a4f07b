"""What the load test reports, as requests of Locust: type and name, a time, and a failure if it is one."""

from __future__ import annotations

from typing import Any

MILLISECONDS = 1000.0


class Statistics:
    """Fires Locust's request event. Times are in seconds here, in milliseconds there."""

    def __init__(self, environment: Any) -> None:
        self._fire = environment.events.request.fire

    def count(
        self, kind: str, name: str, seconds: float = 0.0, size: int = 0, failure: Exception | None = None
    ) -> None:
        """Report one event; `failure` makes it one."""
        self._fire(
            request_type=kind,
            name=name,
            response_time=seconds * MILLISECONDS,
            response_length=size,
            exception=failure,
            context={},
        )

    def registered(self, how: str, seconds: float) -> None:
        """Report a registration: from dialling until the gateway's answer."""
        self.count("REGISTER", how, seconds)

    def not_registered(self, how: str, seconds: float, failure: Exception) -> None:
        """Report a registration that failed."""
        self.count("REGISTER", how, seconds, failure=failure)

    def turned_away(self, seconds: float, failure: Exception | None) -> None:
        """Report a gateway that takes nobody; no failure while it stops."""
        self.count("REGISTER", "turned away", seconds, failure=failure)

    def answered(self, seconds: float, size: int, *, was_away: bool) -> None:
        """Report an ANSWER: from the OFFER, or from the return of an agent that was away."""
        self.count("OFFER", "answered after resume" if was_away else "answered", seconds, size)

    def delivered(self, seconds: float, size: int) -> None:
        """Report a candidate: from one agent's write to the other's read."""
        self.count("ICE_CANDIDATE", "delivered", seconds, size)

    def undelivered(self, kind: str, failure: Exception, *, was_away: bool = False) -> None:
        """Report a message that was lost, repeated, reordered or altered."""
        if kind == "ICE_CANDIDATE":
            self.count(kind, "delivered", failure=failure)
        else:
            self.count("OFFER", "answered after resume" if was_away else "answered", failure=failure)

    def interrupted(self, seconds: float) -> None:
        """Report an exchange whose connections did not last: counted, for nobody answers it, but no fault."""
        self.count("OFFER", "interrupted", seconds)

    def routing_error(self, name: str, seconds: float, failure: Exception | None) -> None:
        """Report an ERROR of the gateway; no failure if it had to be."""
        self.count("ERROR", name, seconds, failure=failure)

    def closed(self, name: str, seconds: float, failure: Exception | None) -> None:
        """Report a connection that the gateway ended: after `seconds`; no failure in a drain."""
        self.count("CLOSE", name, seconds, failure=failure)
