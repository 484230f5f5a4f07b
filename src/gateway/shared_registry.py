"""Who is at which node: the registry in Redis that the nodes share.

Every operation is one Lua script (gateway/lua), for what it reads and what it writes must not be parted. All
keys have one hash tag, so that Redis Cluster keeps them on one node, where a script can touch them all.

An agent's entry names its node, worker, connection and epoch. Nodes renew a lease every few seconds; nothing
is done in Redis for an agent while it is merely there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from gateway._mesh import NODE_WORKERS
from gateway.directory import View
from gateway.redis_line import Done, RedisLine, key_prefix

# How often a node renews its lease, and how long that lasts. The others notice the end of it with their own
# next heartbeat: 10 s at most after the death, and what it owned is gone within 15.
HEARTBEAT_SECONDS = 2.0
LEASE_SECONDS = 8.0
# An agent that waits longer for the answer to its REGISTER may have gone to another node meanwhile.
REGISTER_SECONDS = 4.0
# In one script: Redis does nothing else meanwhile, for about a millisecond.
PURGE_COUNT = 200

# Agents that one step of a search looks at: about a millisecond of Redis.
LOOK_COUNT = 250
# Steps of all searches of one worker that Redis does at one go: what others want of it waits so long.
STEPS_TOGETHER = 4

_DID_PREFIX = "did:key:z6Mk"
_PREFIX_SIZE = len(_DID_PREFIX)


@dataclass(frozen=True, slots=True)
class Member:
    """One node, as the registry has it. One that has left was stopped; its lease may still hold."""

    number: int
    instance: str
    workers: int
    did: str
    name: str
    is_alive: bool
    has_left: bool

    def worker_numbers(self) -> range:
        """Return the numbers by which its workers are known to other nodes."""
        first = self.number * NODE_WORKERS
        return range(first, first + self.workers)


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The answer to one: `time` is that of Redis in ms, `owned` how many agents this worker owns there."""

    number: int
    term: int
    time: int
    owned: int
    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a session is: `worker` is its number for other nodes, see ext/gateway/_mesh.pxd."""

    worker: int
    connection: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Claim:
    """The answer to a registration.

    Attributes:
        outcome: "done"; "late": too much time has passed, nothing was changed; "kept": the other session was
            proven later and stays.
        before: The session that was replaced, or stays.
        asked: The nodes that asked where the agent was.
    """

    outcome: str
    before: Place | None = None
    asked: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Entry:
    """What is registered of a session. `proven_at` is the time of Redis in ms at which it was proven."""

    did: str
    connection: int
    epoch: int
    proven_at: int
    is_away: bool
    card: bytes
    hidden: bool
    terms: tuple[str, ...]
    text: str  # casefolded, of all that it offers: what a search for a text looks at


def _numbers(text: bytes) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(b",") if number)


def _place(node: Any, worker: Any, connection: Any, epoch: Any) -> Place | None:
    if not int(node):
        return None
    return Place(int(node) * NODE_WORKERS + int(worker), int(connection), int(epoch))


def _member(number: int, instance: bytes, workers: int, label: bytes, is_alive: int, has_left: int) -> Member:
    did, _, name = label.decode().partition(" ")
    return Member(number, instance.decode(), workers, did, name, bool(is_alive), bool(has_left))


def _agents(found: list[bytes]) -> list[tuple[str, str, bytes]]:
    return [
        (_DID_PREFIX + key.decode(), status.decode(), card)
        for key, status, card in zip(found[::3], found[1::3], found[2::3], strict=True)
    ]


def read_presence(data: bytes) -> tuple[str, str, str, View | None, View | None]:
    """Return event, DID, status, and what could and can be seen, of what the presence channel says.

    See lua/register.lua for its form.
    """
    event, key, status, was_hidden, hidden, size, cards = data.split(b"\n", 6)
    card_before, card = (cards, cards) if size == b"=" else (cards[: int(size)], cards[int(size) :])
    return (
        event.decode(),
        _DID_PREFIX + key.decode(),
        status.decode(),
        View(card_before, was_hidden == b"1") if was_hidden else None,
        View(card, hidden == b"1") if hidden else None,
    )


class SharedRegistry:
    """The operations of one worker on the registry.

    Args:
        line: To Redis.
        searches: Another one, for what may take long and delay nothing else.
        prefix: What the keys of this network of nodes begin with.
        instance: Of this node: random, new at every start.
        did: Of this node.
        name: Of this node, for people.
        workers: How many it has.
        worker: Which one this is.
    """

    def __init__(
        self,
        line: RedisLine,
        searches: RedisLine,
        *,
        prefix: str,
        instance: str,
        did: str,
        name: str,
        workers: int,
        worker: int,
    ) -> None:
        self._line = line
        self._searches = searches
        self.prefix = key_prefix(prefix)
        self._instance = instance
        self._did = did
        self._name = name
        self._workers = workers
        self._worker = worker
        self._left = f"{self.prefix}left"
        self.number = 0  # of this node, once it has joined

    def channel(self, worker: int) -> str:
        """Return the name of the channel on which a worker hears the other nodes."""
        return f"{self.prefix}to:{worker}"

    def _owned(self, instance: str, worker: int) -> str:
        return f"{self.prefix}owned:{instance}:{worker}"

    def _agent(self, did: str) -> str:
        return f"{self.prefix}agent:{did[_PREFIX_SIZE:]}"

    async def heartbeat(self) -> Heartbeat:
        """Join, or renew the lease.

        Raises:
            LineLostError: Redis cannot be reached.
        """
        leases = f"{self.prefix}lease:"
        number, term, time, owned, members = await self._line.ask_script(
            "heartbeat",
            (
                f"{self.prefix}nodes",
                f"{self.prefix}terms",
                leases + self._instance,
                self._owned(self._instance, self._worker),
                self._left,
            ),
            self._instance,
            self._workers,
            f"{self._did} {self._name}",
            round(LEASE_SECONDS * 1000),
            leases,
        )
        return Heartbeat(
            number,
            term,
            time,
            owned,
            tuple(_member(*member) for member in members),
        )

    def register(self, entry: Entry, deadline: int | None, done: Done) -> None:
        """Make a session the one of its DID.

        Args:
            entry: It.
            deadline: Time of Redis in ms, after which it is too late; None for a session that this node has
                had already, which does not replace one that was proven later.
            done: Gets a Claim, or an exception.
        """

        def decide(answer: Any) -> None:
            if isinstance(answer, Exception):
                done(answer)
                return
            outcome, *rest = answer
            before = _place(*rest[:4]) if rest else None
            done(Claim(outcome.decode(), before, _numbers(rest[4]) if len(rest) > 4 else ()))

        self._line.run(
            "register",
            (self._agent(entry.did), self._owned(self._instance, self._worker)),
            self.prefix,
            entry.did[_PREFIX_SIZE:],
            self.number,
            self._instance,
            self._worker,
            entry.connection,
            entry.epoch,
            entry.proven_at,
            "away" if entry.is_away else "online",
            entry.card,
            orjson.dumps(entry.terms),
            "again" if deadline is None else "new",
            deadline or 0,
            int(entry.hidden),
            entry.text,
            done=decide,
        )

    def unregister(self, did: str, epoch: int, done: Done) -> None:
        """Forget a session; `done` gets the numbers of the nodes that asked where it was, or an exception."""

        def decide(answer: Any) -> None:
            done(answer if isinstance(answer, Exception) else _numbers(answer or b""))

        self._line.run(
            "unregister",
            (self._agent(did), self._owned(self._instance, self._worker)),
            self.prefix,
            did[_PREFIX_SIZE:],
            epoch,
            done=decide,
        )

    def set_away(self, did: str, epoch: int) -> None:
        """Say that an agent is away."""
        self._line.run(
            "away", (self._agent(did),), self.prefix, did[_PREFIX_SIZE:], epoch, done=lambda _: None
        )

    def locate(self, did: str, done: Done) -> None:
        """Find out where an agent is; `done` gets a Place, None, or an exception."""

        def decide(answer: Any) -> None:
            done(_place(*answer) if isinstance(answer, list) else answer)

        self._line.run("locate", (self._agent(did),), self.number, done=decide)

    async def purge(self, instance: str, worker: int) -> None:
        """Remove what a worker owned that is gone.

        Raises:
            LineLostError: Redis cannot be reached.
        """
        while await self._line.ask_script(
            "purge", (self._owned(instance, worker), self._left), self.prefix, instance, worker, PURGE_COUNT
        ):
            pass

    async def leave(self) -> None:
        """Say that this worker ends because it was stopped, behind all that it has asked for.

        Raises:
            LineLostError: Redis cannot be reached.
        """
        await self._line.ask_script("leave", (self._left,), self._instance, self._worker)

    async def settle(self) -> None:
        """Wait until Redis has done what it was told before, so that a search finds it done.

        Raises:
            LineLostError: Redis cannot be reached.
        """
        await self._line.ask("PING")

    @property
    def presence_channel(self) -> str:
        """On which whoever watches hears what happens to agents."""
        return f"{self.prefix}presence"

    async def discover(
        self, term: str, cursor: str, count: int, text: str
    ) -> tuple[str, list[tuple[str, str, bytes]]]:
        """Return some of the listed agents behind a DID, and the DID behind which to go on, if any.

        Args:
            term: An index: "all", "cap:..." or "tag:...".
            cursor: A DID, or "".
            count: How many agents at most.
            text: Casefolded; what they offer must have it. Or "".

        Raises:
            LineLostError: Redis cannot be reached.
        """
        last, *found = await self._searches.ask_script(
            "discover", (self.prefix + term,), self.prefix, cursor[_PREFIX_SIZE:], count, text, LOOK_COUNT
        )
        return (_DID_PREFIX + last.decode() if last else ""), _agents(found)

    async def describe(self, dids: Sequence[str]) -> list[tuple[str, str, bytes]]:
        """Return what is known of some agents.

        Raises:
            LineLostError: Redis cannot be reached.
        """
        keys = (did[_PREFIX_SIZE:] for did in dids)
        return _agents(
            await self._searches.ask_script("describe", (f"{self.prefix}nodes",), self.prefix, *keys)
        )

    async def owned(self) -> set[str]:
        """Return the DIDs of which this worker is the owner, as the registry has it.

        Raises:
            LineLostError: Redis cannot be reached.
        """
        keys = await self._line.ask("SMEMBERS", self._owned(self._instance, self._worker))
        return {_DID_PREFIX + key.decode() for key in keys}

    async def disown(self, dids: list[str]) -> None:
        """Remove what this worker no longer has.

        Raises:
            LineLostError: Redis cannot be reached.
        """
        await self._line.ask_script(
            "disown",
            (self._owned(self._instance, self._worker),),
            self.prefix,
            self._instance,
            self._worker,
            *(did[_PREFIX_SIZE:] for did in dids),
        )

    async def bury(self, number: int, instance: str) -> None:
        """Remove a node whose lease has ended.

        Raises:
            LineLostError: Redis cannot be reached.
        """
        await self._line.ask_script(
            "bury",
            (f"{self.prefix}nodes", f"{self.prefix}lease:{instance}"),
            number,
            instance,
        )
