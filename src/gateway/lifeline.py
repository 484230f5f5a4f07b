"""How the workers of a node learn, all at the same moment, that their supervisor has gone."""

from __future__ import annotations

import os
import select


class Lifeline:
    """A pipe whose writing end only the supervisor holds: it is cut however that ends.

    A worker that dies with its supervisor is missed by the others before the kernel has ended them, too
    (PR_SET_PDEATHSIG comes last). So whoever misses a worker looks here first: the agents of a node that is
    dying have not left one by one.
    """

    def __init__(self) -> None:
        self._end, self._held = os.pipe()
        self._poll = select.poll()
        self._poll.register(self._end, 0)  # POLLHUP is always told

    def let_go(self) -> None:
        """Close the supervisor's end, in a worker that was just forked."""
        os.close(self._held)

    def fileno(self) -> int:
        """Return what becomes readable once the supervisor has gone."""
        return self._end

    def follow(self) -> None:
        """End this process if the supervisor has gone."""
        if self._poll.poll(0):
            os._exit(1)
