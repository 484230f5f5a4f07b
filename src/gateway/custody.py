"""Who answers for a message that waits at another node: the worker that sent it there, if that node dies.

A worker that keeps a message for an agent that is away, on its way or slow confirms it, and writes it down
for its siblings to read (ext/gateway/_ledger.pxd). That memory dies with the node. So the worker of another
node from which the message came is told of it, before it is told that it is confirmed, and told again when
the message has left: delivered, passed on or given back. It notes what waits elsewhere, and when the
process that keeps it is gone it tells each sender "unconfirmed". Siblings answer only for messages of this
node's own agents.

What two workers tell each other, as records of the stream between them::

    HELLO    first of every stream: the instance of the node, and the life of the process (Router.life)
    ACCOUNT  answers HELLO: all that waits here of yours, which takes the place of what you had noted
    KEPT     this waits here, too. Nothing: are you there?
    FREED    and this does no longer

A process that has died says nothing, but the next one with its number says HELLO with another life. It does
so to whoever says something to it, so those who have noted something ask with every heartbeat. A node that
is gone has no lease.

Peers are known by instance and worker, not by number: nodes may get other numbers when Redis has lost all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import orjson

from gateway._connection import Router
from gateway._ledger import LEDGER_ENTRY_BYTES, Ledger
from gateway._mesh import NODE_WORKERS
from gateway.kinds import ACCOUNT, FREED, HELLO, KEPT

if TYPE_CHECKING:
    from gateway.cluster import Cluster

# Noted in one worker: 20 MiB. The sender of what does not fit is told at once that nobody will answer for it.
NOTED_MAX = 65_536
# In one record: 60 KiB.
ENTRIES_PER_RECORD = 400
# Of the senders that are told when a process is gone: agents here do not wait for longer than 10 ms.
ANSWERS_PER_TICK = 200

_NUMBER_BYTES = 4


@dataclass(slots=True)
class Peer:
    """A worker of another node.

    Attributes:
        instance: Of its node.
        worker: Its number there.
        source: By which the ledger knows it.
        life: Of the process that was heard last; 0: none was.
        link: Its number for this node, while there is a stream to it; None if that is not known.
        patience: Heartbeats without its node, after which that is gone. One that was never met may be coming.
        noted: What waits there of this worker's messages, by number: sender, target and id.
    """

    instance: str
    worker: int
    source: int
    life: int = 0
    link: int | None = None
    patience: int = 2
    noted: dict[bytes, bytes] = field(default_factory=dict)


class Custody:
    """What this worker keeps for workers of other nodes, and they for it.

    Args:
        instance: Of this node.
        router: Where the streams are.
        ledger: Where it is written down what waits here.
        cluster: The other nodes.
        answer: Tells a sender that its message is lost, or may be: (sender, target, message id).
    """

    def __init__(
        self,
        instance: str,
        router: Router,
        ledger: Ledger,
        cluster: Cluster,
        answer: Callable[[str, str, str], None],
    ) -> None:
        self._instance = instance
        self._router = router
        self._ledger = ledger
        self._cluster = cluster
        self._answer = answer
        self._peers: dict[tuple[str, int], Peer] = {}
        self._by_source: dict[int, Peer] = {}
        self._by_link: dict[int, Peer] = {}
        self._noted = 0
        self._lost: deque[bytes] = deque()  # of processes that are gone: their senders are still to be told

    def __len__(self) -> int:
        """How many messages of this worker's agents wait at other nodes, as far as it was told."""
        return self._noted + len(self._lost)

    # --- peers ---------------------------------------------------------------------------------

    def _peer(self, instance: str, worker: int) -> Peer:
        peer = self._peers.get((instance, worker))
        if peer is None:
            source = 1
            while source in self._by_source:
                source += 1
            peer = self._peers[instance, worker] = self._by_source[source] = Peer(instance, worker, source)
        return peer

    def _bind(self, link: int, peer: Peer) -> None:
        """Take note of who is at the other end of a stream."""
        if self._by_link.get(link) is not peer:
            self._unbind(link)
            if peer.link is not None:
                self._unbind(peer.link)
            self._by_link[link] = peer
            peer.link = link
        self._router.know(link, peer.source)

    def _unbind(self, link: int) -> None:
        peer = self._by_link.pop(link, None)
        if peer is not None:
            peer.link = None

    def on_stream(self, link: int, is_new: bool) -> None:
        """Begin a stream; `is_new` if there was none to that worker, so that it is not known who it is."""
        if is_new:
            self._unbind(link)
        hello = orjson.dumps({"instance": self._instance, "life": self._router.life})
        self._router.account(link, HELLO, hello)
        if (peer := self._by_link.get(link)) is not None:
            self._tell_account(link, peer)

    def source_of(self, origin: int, link: int) -> int:
        """Return by which number the ledger knows who answers for a message that was passed on.

        Args:
            origin: The worker that has answered for it so far.
            link: The worker that has passed it on: it answers where nothing is known of the other.
        """
        if origin < NODE_WORKERS:
            return 0
        if origin not in self._by_link:
            instance = self._cluster.instance_of(origin // NODE_WORKERS)
            if instance is not None and self._cluster.reach(origin):
                self._bind(origin, self._peer(instance, origin % NODE_WORKERS))
        peer = self._by_link.get(origin) or self._by_link.get(link)
        return peer.source if peer is not None else 0

    def origin_of(self, data: bytes) -> int | None:
        """Return the worker that answers for a message which waits here; None if this one does."""
        peer = self._by_source.get(self._ledger.source_of(data))
        return peer.link if peer is not None else None

    # --- what waits here -----------------------------------------------------------------------

    def on_news(self, kept: list[tuple[int, bytes]], freed: list[tuple[int, bytes]]) -> None:
        """Tell the others what begins to wait here, and what does no longer; see `Ledger.take_news`."""
        for kind, news in ((KEPT, kept), (FREED, freed)):
            by_source: dict[int, list[bytes]] = {}
            for source, entry in news:
                by_source.setdefault(source, []).append(entry)
            for source, entries in by_source.items():
                peer = self._by_source.get(source)
                # Without a stream to it, it is told with the next one.
                if peer is not None and peer.link is not None and not self._tell(peer.link, kind, entries):
                    # It confirms nothing. What is told when the stream begins anew is all there is.
                    self._cluster.begin_anew(peer.link)

    def _tell_account(self, link: int, peer: Peer) -> None:
        entries = self._ledger.waiting_from(peer.source)
        self._router.account(link, ACCOUNT, b"")
        self._tell(link, KEPT, entries)

    def _tell(self, link: int, kind: int, entries: list[bytes]) -> bool:
        return all(
            self._router.account(link, kind, b"".join(entries[start : start + ENTRIES_PER_RECORD]))
            for start in range(0, len(entries), ENTRIES_PER_RECORD)
        )

    # --- what waits elsewhere ------------------------------------------------------------------

    def on_record(self, link: int, kind: int, data: bytes) -> None:
        """Take what a worker of another node says of messages that wait."""
        if kind == HELLO:
            hello = orjson.loads(data)
            self._on_hello(link, self._peer(hello["instance"], link % NODE_WORKERS), hello["life"])
        elif (peer := self._by_link.get(link)) is None:
            return  # its stream began before this one knew its name: it is asked for it
        elif kind == FREED:
            for start in range(0, len(data), _NUMBER_BYTES):
                self._noted -= peer.noted.pop(data[start : start + _NUMBER_BYTES], None) is not None
        else:
            if kind == ACCOUNT:
                self._forget(peer)
            for start in range(0, len(data), LEDGER_ENTRY_BYTES):
                self._note(peer, data[start : start + LEDGER_ENTRY_BYTES])

    def _on_hello(self, link: int, peer: Peer, life: int) -> None:
        if life != peer.life:
            self._lose([peer])
            peer.life = life
        self._bind(link, peer)
        self._ledger.source = peer.source  # of what follows in the piece that is being read
        self._tell_account(link, peer)

    def _note(self, peer: Peer, entry: bytes) -> None:
        number, message = entry[:_NUMBER_BYTES], entry[_NUMBER_BYTES:]
        if number in peer.noted:
            peer.noted[number] = message
        elif len(self) < NOTED_MAX:
            peer.noted[number] = message
            self._noted += 1
        else:
            self._tell_sender(message)

    def _forget(self, peer: Peer) -> dict[bytes, bytes]:
        noted, peer.noted = peer.noted, {}
        self._noted -= len(noted)
        return noted

    def _lose(self, peers: list[Peer]) -> None:
        """Nobody keeps what these have kept. One message may be on its way from one of them to another."""
        self._lost.extend({message for peer in peers for message in self._forget(peer).values()})

    def look_after(self, alive: Mapping[str, int], is_sure: bool) -> None:
        """Ask those who keep something whether they are there.

        Args:
            alive: Numbers of the other nodes by their instance.
            is_sure: Those that are not among them are gone; False while they may not be back yet.
        """
        gone: dict[str, list[Peer]] = {}
        for peer in self._peers.values():
            if peer.instance in alive:
                peer.patience = 1
                link = alive[peer.instance] * NODE_WORKERS + peer.worker
                if peer.noted and self._cluster.reach(link):
                    self._router.account(link, KEPT, b"")
            elif is_sure:
                peer.patience -= 1
                if peer.patience <= 0:
                    gone.setdefault(peer.instance, []).append(peer)
        for peers in gone.values():
            self._lose(peers)
            for peer in peers:
                self._drop(peer)

    def _drop(self, peer: Peer) -> None:
        """Forget a peer that is gone, unless something still speaks of it."""
        if self._ledger.knows(peer.source) or peer.link in self._router.linked_workers():
            return
        if peer.link is not None:
            self._unbind(peer.link)
        del self._peers[peer.instance, peer.worker], self._by_source[peer.source]

    def answer_some(self) -> None:
        """Tell some of the senders whose messages waited at a process that is gone."""
        for message in list(islice(self._lost, ANSWERS_PER_TICK)):
            self._lost.popleft()
            self._tell_sender(message)

    def _tell_sender(self, message: bytes) -> None:
        self._answer(message[:56].decode(), message[56:112].decode(), message[112:].decode())
