"""Where agents of other nodes are: messages wait here while the shared registry is asked.

What is found is cached in the routing table of the node, so that the next message does not come here. A cached
route goes when the agent's node says so, or says that the agent is not there.

Order: while a message of an agent waits here, all that this agent sends takes this way (`is_waiting`), for
another worker may have found the target meanwhile, and the table would let the newer message overtake.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from gateway._connection import Connection
from gateway._mesh import NODE_WORKERS
from gateway._routing import RoutingTable, TableBusyError
from gateway.cluster import Cluster
from gateway.shared_registry import Place

# For which an agent that was not found is not asked for again: long enough for a sender that tries and tries,
# short enough that nobody notices once it has come.
ABSENT_SECONDS = 0.1
ABSENT_MAX = 10_000
# Messages that wait in one worker.
WAITING_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Waiting:
    """A message whose target is looked up; `sender` is None if it did not come from a connection here."""

    data: bytes
    sender: Connection | None


@dataclass(slots=True)
class _Search:
    did: str
    messages: list[Waiting] = field(default_factory=list)


class Locations:
    """The searches of one worker.

    Args:
        cluster: Asked.
        table: Where what is found is cached.
        deliver: Called with the DID and what waited for it, in order, once the table has its route.
        refuse: Called with the DID, what waited for it, and the cause.
    """

    def __init__(
        self,
        cluster: Cluster,
        table: RoutingTable,
        *,
        deliver: Callable[[str, Waiting], None],
        refuse: Callable[[str, Waiting, str], None],
    ) -> None:
        self._cluster = cluster
        self._table = table
        self._deliver = deliver
        self._refuse = refuse
        self._searches: dict[str, _Search] = {}
        self._waiting = 0
        self._senders: dict[Connection, int] = {}
        self._absent: dict[str, float] = {}

    def __contains__(self, did: str) -> bool:
        return did in self._searches

    def search(self, did: str, data: bytes, sender: Connection | None) -> str | None:
        """Keep a message until it is known where its target is; return the cause if that cannot be."""
        search = self._searches.get(did)
        if search is None:
            if not self._cluster.is_connected:
                return "unreachable"
            if self._absent.get(did, 0.0) > time.monotonic():
                return "not_online"
        if self._waiting >= WAITING_MAX:
            return "overloaded"
        self._waiting += 1
        waiting = Waiting(data, sender)
        if sender is not None:
            self._senders[sender] = self._senders.get(sender, 0) + 1
            sender.is_waiting = True
        if search is not None:
            search.messages.append(waiting)
            return None
        self._searches[did] = _Search(did, [waiting])
        self._cluster.locate(did, lambda answer: self._found(did, answer))
        return None

    def _found(self, did: str, answer: Place | None | Exception) -> None:
        search = self._searches.pop(did)
        cause: str | None = None
        if isinstance(answer, Exception):
            cause = "unreachable"
        elif answer is None:
            cause = "not_online"
            self._be_absent(did)
        elif answer.worker >= NODE_WORKERS:
            try:
                self._table.cache(did.encode(), answer.worker, answer.connection, answer.epoch)
            except TableBusyError:
                cause = "unreachable"
            else:
                self._cluster.reach(answer.worker)
        for waiting in search.messages:
            self._release(waiting.sender)
            if cause is None:
                self._deliver(did, waiting)
            else:
                self._refuse(did, waiting, cause)

    def _release(self, sender: Connection | None) -> None:
        self._waiting -= 1
        if sender is None:
            return
        self._senders[sender] -= 1
        if self._senders[sender] == 0:
            del self._senders[sender]
            sender.is_waiting = False

    def _be_absent(self, did: str) -> None:
        if len(self._absent) >= ABSENT_MAX:
            self._absent.clear()
        self._absent.pop(did, None)  # the oldest come first
        now = time.monotonic()
        self._absent[did] = now + ABSENT_SECONDS
        while next(iter(self._absent.values())) <= now:
            del self._absent[next(iter(self._absent))]

    def appear(self, did: str) -> None:
        """Take note that an agent has come to this node."""
        self._absent.pop(did, None)
