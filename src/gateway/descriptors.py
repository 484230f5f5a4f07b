"""File descriptors: every connection is one, and the system sets the limit."""

from __future__ import annotations

import resource

# 256 for streams, libraries, links and event loops; the others for connections whose request is to come.
RESERVED = 1_024


def raise_limit() -> None:
    """Raise the limit of this process, and of those that it starts, as far as the system lets it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def connections_per_worker() -> int:
    """Return how many connections one worker can hold."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(soft - RESERVED, soft // 2)
