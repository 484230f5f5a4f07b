"""File descriptors: every connection is one, and the system sets the limit."""

from __future__ import annotations

import resource

# For streams, libraries, links and event loops.
_OWN = 64
# Connections whose request is still to come: as many as the kernel may hand over at once (worker.BACKLOG),
# where the limit leaves room for them.
_REQUESTS_MAX = 4_096
_REQUESTS_SHARE = 4


def _limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(soft - _OWN, 2)


def raise_limit() -> None:
    """Raise the limit of this process, and of those that it starts, as far as the system lets it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def requests_per_worker() -> int:
    """Return how many connections of one worker may be without a complete request."""
    return min(_limit() // _REQUESTS_SHARE, _REQUESTS_MAX) or 1


def connections_per_worker() -> int:
    """Return how many connections one worker can hold."""
    return _limit() - requests_per_worker()
