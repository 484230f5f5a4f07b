"""File descriptors: every connection is one, and the system sets the limit."""

from __future__ import annotations

import resource

# For standard streams, libraries, links, event loops, and connections whose request is being read.
RESERVED = 256


def raise_limit() -> None:
    """Raise the limit of this process, and of those that it starts, as far as the system lets it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def connections_per_worker() -> int:
    """Return how many connections one worker can hold."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(soft - RESERVED, 1)
