"""Where agents of other nodes are: messages wait here while the shared registry is asked.

What is found is cached in the routing table of the node, so that the next message does not come here. A
cached route goes when the agent's node says so, or says that the agent is not there.

Order: while a message of an agent waits here, all that this agent sends takes this way (`is_waiting`), for
another worker may have found the target meanwhile, and the table would let the newer message overtake.

An ERROR that waits here is written down: if this worker dies, others answer for the message that it is about.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from gateway._connection import Connection
from gateway._ledger import Ledger
from gateway._mesh import NODE_WORKERS
from gateway._routing import RoutingTable, TableBusyError
from gateway.cluster import Cluster
from gateway.shared_registry import Place

# For which an agent that was not found is not asked for again: who wants it meanwhile, waits. A refusal from
# memory would be wrong for an agent that has come just now.
ABSENT_SECONDS = 0.05
ABSENT_MAX = 10_000
# Messages that wait in one worker.
WAITING_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Waiting:
    """A message whose target is looked up.

    Attributes:
        data: The message.
        sender: From which it came; None if that was no connection here.
        number: In the ledger.
    """

    data: bytes
    sender: Connection | None
    number: int


@dataclass(slots=True)
class _Search:
    did: str
    messages: list[Waiting] = field(default_factory=list)
    asked_for: int = 0  # of the messages: those that came before the registry was asked


class Locations:
    """The searches of one worker.

    Args:
        cluster: Asked.
        table: Where what is found is cached.
        ledger: Where it is written down which ERRORs wait.
        deliver: Called with the DID and what waited for it, in order, once the table has its route.
        refuse: Called with the DID, what waited for it, and the cause.
    """

    def __init__(
        self,
        cluster: Cluster,
        table: RoutingTable,
        ledger: Ledger,
        *,
        deliver: Callable[[str, Waiting], None],
        refuse: Callable[[str, Waiting, str], None],
    ) -> None:
        self._cluster = cluster
        self._table = table
        self._ledger = ledger
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
        if search is None and not self._cluster.is_connected:
            return "unreachable"
        if self._waiting >= WAITING_MAX:
            return "overloaded"
        self._waiting += 1
        waiting = Waiting(data, sender, self._ledger.owe(data))
        if sender is not None:
            self._senders[sender] = self._senders.get(sender, 0) + 1
            sender.is_waiting = True
        if search is None:
            search = self._searches[did] = _Search(did)
            wait = self._absent.pop(did, 0.0) - time.monotonic()
            if wait > 0:
                asyncio.get_running_loop().call_later(wait, self._ask, search)
            else:
                self._ask(search, waiting)
                return None
        search.messages.append(waiting)
        return None

    def _ask(self, search: _Search, *messages: Waiting) -> None:
        search.messages.extend(messages)
        search.asked_for = len(search.messages)
        self._cluster.locate(search.did, partial(self._found, search))

    def _found(self, search: _Search, answer: Place | Exception | None) -> None:
        did, messages = search.did, search.messages
        cause: str | None = None
        if isinstance(answer, Exception):
            cause = "unreachable"
        elif answer is None:
            cause = "not_online"
            messages, search.messages = messages[: search.asked_for], messages[search.asked_for :]
        elif answer.worker >= NODE_WORKERS:
            try:
                self._table.cache(did.encode(), answer.worker, answer.connection, answer.epoch)
            except TableBusyError:
                cause = "unreachable"
            else:
                self._cluster.reach(answer.worker)
        elif self._table.get(did.encode()) is None:
            # Its worker has died, and Redis is not told yet; or it has left just now.
            cause = "unreachable"
        if cause == "not_online" and search.messages:
            # The agent may have come after the registry was asked, and before these were sent.
            asyncio.get_running_loop().call_later(ABSENT_SECONDS, self._ask, search)
        else:
            del self._searches[did]
            if cause == "not_online":
                self._be_absent(did)
        for waiting in messages:
            self._release(waiting)
            if cause is None:
                self._deliver(did, waiting)
            else:
                self._refuse(did, waiting, cause)

    def _release(self, waiting: Waiting) -> None:
        self._waiting -= 1
        self._ledger.strike(waiting.number)
        if (sender := waiting.sender) is None:
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
