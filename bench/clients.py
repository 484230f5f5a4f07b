"""The agents of a swarm, as the swarm sees them: spread over client processes that are driven together."""

from __future__ import annotations

import ipaddress
import multiprocessing
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

from aiconexus.protocol import DIDKey
from bench import compile as build
from bench import holders
from bench.holders import (
    NOWHERE,
    Called,
    CallRoll,
    Connect,
    Connected,
    Event,
    Handed,
    HandOver,
    Progress,
    Ready,
)
from bench.registration import Dialer

START_TIMEOUT = 60.0  # s for an interpreter to start and import, beside others
STOP_TIMEOUT = 10.0  # s

_AnEvent = TypeVar("_AnEvent", Ready, Connected, Called, Handed)


class ClientError(Exception):
    """A client process ended or does not answer. The text is for the user."""


@dataclass(frozen=True)
class Totals:
    """What all client processes report, added up."""

    registered: int
    failed: int  # to register
    held: int
    lost: int  # connections that ended after registration
    silent: int  # did not answer the roll call
    pings: int  # answered
    messages: int  # that arrived unasked
    cpu_seconds: float  # of the client processes
    first_loss: str


class Place(NamedTuple):
    """An agent: the client process that holds it, its number in there, and the worker it is at."""

    client: int
    number: int
    worker: int


@dataclass(frozen=True)
class Taken:
    """An agent that a client process has given up: its key and its connection, which is the caller's."""

    place: Place
    key: DIDKey
    connection: socket.socket


class Clients:
    """Starts client processes, and drives them.

    Args:
        url: Where the agents dial.
        agents: How many, over all processes.
        processes: How many of those.
        capability_bytes: Size of the capability that each agent registers.
        kinds: How many of those differ.
    """

    def __init__(self, url: str, agents: int, processes: int, capability_bytes: int, kinds: int = 1) -> None:
        build.library("hold")  # once, not in each process
        self._pipes: list[Connection] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._latest: list[Progress | None] = []
        self.first_failure = ""
        processes = min(processes, agents)
        spawn = multiprocessing.get_context("spawn")
        try:
            for number in range(processes):
                # Shares differ by one agent at most.
                count = agents * (number + 1) // processes - agents * number // processes
                dialer = Dialer(url, _source(url, number))
                ours, theirs = spawn.Pipe()
                share = holders.Share(dialer, count, capability_bytes, kinds)
                process = spawn.Process(target=holders.main, args=(share, theirs), daemon=True)
                process.start()
                theirs.close()
                self._pipes.append(ours)
                self._processes.append(process)
                self._latest.append(None)
            self._gather(Ready, START_TIMEOUT)
        except BaseException:
            self.close()
            raise

    def connect(self, on_progress: Callable[[Totals], None]) -> list[Place]:
        """Register all agents; return those that are."""
        self._send_all(Connect())
        found = self._gather(Connected, None, on_progress)
        self.first_failure = next((event.first_failure for event in found if event.first_failure), "")
        return [
            Place(client, number, worker)
            for client, event in enumerate(found)
            for number, worker in enumerate(event.workers)
            if worker != NOWHERE
        ]

    def hold(self, seconds: float, on_progress: Callable[[Totals], None]) -> None:
        """Let time pass, in which the client processes answer pings."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            for _ in self._events(min(left, holders.REPORT_INTERVAL)):
                raise ClientError("a client process answered what nobody asked")
            on_progress(self.totals())

    def call_roll(self) -> Totals:
        """Ask every connection for a sign of life."""
        self._send_all(CallRoll())
        for client, event in enumerate(self._gather(Called, None)):
            latest = self._latest[client]
            assert latest is not None
            self._latest[client] = Progress(
                latest.registered, latest.failed, event.counts, latest.cpu_seconds
            )
        return self.totals()

    def take(self, places: list[Place]) -> list[Taken]:
        """Take agents out of the client processes; those whose connection has ended are left out."""
        found = {}
        for client, pipe in enumerate(self._pipes):
            wanted = {place.number: place for place in places if place.client == client}
            if not wanted:
                continue
            pipe.send(HandOver(list(wanted)))
            handed = self._await(client, Handed)
            fds = holders.receive_sockets(pipe, len(handed.seeds))
            for (number, seed), fd in zip(handed.seeds.items(), fds, strict=True):
                connection = socket.socket(fileno=fd)
                found[wanted[number]] = Taken(wanted[number], DIDKey.from_seed(seed), connection)
        return [found[place] for place in places if place in found]

    def totals(self) -> Totals:
        """Add up the latest reports."""
        known = [progress for progress in self._latest if progress is not None]
        counts = [progress.counts for progress in known]
        return Totals(
            registered=sum(progress.registered for progress in known),
            failed=sum(progress.failed for progress in known),
            held=sum(each.held for each in counts),
            lost=sum(each.lost for each in counts),
            silent=sum(each.silent for each in counts),
            pings=sum(each.pings for each in counts),
            messages=sum(each.messages for each in counts),
            cpu_seconds=sum(progress.cpu_seconds for progress in known),
            first_loss=next((each.first_loss for each in counts if each.first_loss), ""),
        )

    def close(self) -> None:
        """Disconnect the agents by ending their processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(STOP_TIMEOUT)
            if process.is_alive():
                process.kill()
                process.join()
        self._pipes, self._processes = [], []

    def __enter__(self) -> Clients:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- talking to the processes ------------------------------------------------------------------

    def _send_all(self, command: holders.Command) -> None:
        for pipe in self._pipes:
            pipe.send(command)

    def _events(self, timeout: float | None) -> Iterator[tuple[int, Event]]:
        """Yield what has arrived, with the number of its process; take reports of progress in passing."""
        for pipe in wait(self._pipes, timeout):
            assert isinstance(pipe, Connection)
            client = self._pipes.index(pipe)
            if (event := self._receive(client)) is not None:
                yield client, event

    def _receive(self, client: int) -> Event | None:
        try:
            event: Event = self._pipes[client].recv()
        except (EOFError, ConnectionResetError):
            self._processes[client].join(1)
            status = self._processes[client].exitcode
            raise ClientError(f"client process {client} ended with status {status}") from None
        if isinstance(event, Progress):
            self._latest[client] = event
            return None
        return event

    def _await(self, client: int, kind: type[_AnEvent]) -> _AnEvent:
        while True:
            event = self._receive(client)
            if isinstance(event, kind):
                return event

    def _gather(
        self,
        kind: type[_AnEvent],
        timeout: float | None,
        on_progress: Callable[[Totals], None] = lambda totals: None,
    ) -> list[_AnEvent]:
        """Wait until each process has answered with an event of one kind."""
        found: dict[int, _AnEvent] = {}
        until = None if timeout is None else time.monotonic() + timeout
        while len(found) < len(self._pipes):
            events = self._events(holders.REPORT_INTERVAL)
            found |= {client: event for client, event in events if isinstance(event, kind)}
            on_progress(self.totals())
            if until is not None and time.monotonic() > until:
                raise ClientError(f"a client process does not answer within {timeout:g} s")
        return [found[client] for client in sorted(found)]


def _source(url: str, number: int) -> str | None:
    """Return the source address of a client process: on loopback each has its own."""
    try:
        address = ipaddress.ip_address(urlsplit(url).hostname or "")
    except ValueError:
        return None
    if address.version == 4 and address.is_loopback:
        return str(ipaddress.IPv4Address("127.0.0.2") + number)
    return None
