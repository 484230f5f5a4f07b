"""What the processes of one node share: made by the supervisor before it forks the workers."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from http import HTTPStatus

from aiconexus.protocol.errors import CAUSES, CLOSE_CODES
from gateway._addresses import Addresses
from gateway._counters import Counters
from gateway._ledger import Ledger
from gateway._routing import RoutingTable
from gateway.lifeline import Lifeline

# Refusals that are no ERROR: of frames (RFC 6455) and of HTTP requests.
_FRAME_FAULTS = (
    "frame",
    "early_frame",
    "reserved_bits",
    "unexpected_continuation",
    "interrupted_fragments",
    "too_many_fragments",
    "close_code",
    "close_reason",
)
_HTTP_REFUSALS = (
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.NOT_FOUND,
    HTTPStatus.UPGRADE_REQUIRED,
    HTTPStatus.INTERNAL_SERVER_ERROR,
    HTTPStatus.SERVICE_UNAVAILABLE,
)
_REFUSED = (*CAUSES, *_FRAME_FAULTS, *(f"http_{status.value}" for status in _HTTP_REFUSALS))
_COUNTED = (
    "messages_received",
    "messages_routed",
    "bytes_routed",
    "messages_crossed",
    "pings_sent",
    "errors_dropped",
)
_FAULTS = "faults"  # of this program
_DRAINING = "draining"  # of a worker: 1 once it is told to send its agents away, also when it has ended
# A client may close with any number; those that mean nothing to us are counted together.
_OTHER_CODE = "other"


@dataclass(frozen=True, slots=True)
class Node:
    """What the processes of a node share. `instance` tells it from all other nodes, and its own last life."""

    workers: int
    table: RoutingTable
    counters: Counters
    addresses: Addresses
    ledger: Ledger
    lifeline: Lifeline
    instance: str

    @classmethod
    def create(cls, workers: int, agents: int, elsewhere: int = 0) -> Node:
        """Make room for `agents` sessions on `workers` processes, and for routes to some at other nodes."""
        return cls(
            workers=workers,
            table=RoutingTable(agents, elsewhere),
            counters=Counters(
                workers,
                (
                    _FAULTS,
                    _DRAINING,
                    "errors_dropped",
                    *(f"refused:{name}" for name in _REFUSED),
                    *(f"closed:{name}" for name in (*CLOSE_CODES, _OTHER_CODE)),
                ),
            ),
            addresses=Addresses(workers),
            ledger=Ledger(workers),
            lifeline=Lifeline(),
            instance=secrets.token_hex(8),
        )

    def set_draining(self, worker: int, is_draining: bool) -> None:
        """Let the other workers know whether the end of this one is meant."""
        self.counters.set(worker, _DRAINING, is_draining)

    def is_draining(self, worker: int) -> bool:
        """Tell whether a worker sends its agents away, or is about to, or did so before it ended."""
        return bool(self.counters.get(worker, _DRAINING))

    def forget(self, worker: int) -> int:
        """Clean up after a worker that is gone; return how many routes it had."""
        self.counters.reset_gauges(worker)
        self.addresses.forget(worker)
        return self.table.purge(worker)

    def _totals(self, prefix: str) -> dict[str, int]:
        totals = {
            name.removeprefix(prefix): self.counters.total(name)
            for name in self.counters.names
            if name.startswith(prefix)
        }
        return {name: total for name, total in totals.items() if total}

    def totals(self) -> dict[str, object]:
        """Return the counts of all workers together."""
        return {
            **{name: self.counters.total(name) for name in (*_COUNTED, _FAULTS)},
            "refused": self._totals("refused:"),
            "closed": self._totals("closed:"),
        }


@dataclass(frozen=True, slots=True)
class Tally:
    """The counters of one worker."""

    counters: Counters
    worker: int

    def refused(self, name: str) -> None:
        """Count a refusal by its cause."""
        self.counters.add(self.worker, f"refused:{name}")

    def fault(self) -> None:
        """Count a fault of this program, which the log explains."""
        self.counters.add(self.worker, _FAULTS)

    def closed(self, code: int) -> None:
        """Count the end of a connection by its close code."""
        self.counters.add(self.worker, f"closed:{code if code in CLOSE_CODES else _OTHER_CODE}")

    def sessions(self, present: int, away: int) -> None:
        """Say how many sessions there are, and how many of them are away."""
        self.counters.set(self.worker, "sessions", present)
        self.counters.set(self.worker, "away", away)
