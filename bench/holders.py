"""The client processes of the swarm: each registers its share of the agents and holds them.

One process may have 20,000 descriptors, and one address some 28,000 ports to one gateway; so there are
several, each with a source address of its own. The swarm talks to them over pipes: it sends a command, they
answer with events.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import secrets
import select
import signal
import socket
import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from aiconexus.protocol import DIDKey
from aiconexus.protocol.errors import AIConexusError
from bench.hold import Counts, Hold
from bench.registration import Dialer, RegistrationError, register

IN_FLIGHT = 32  # handshakes of one process at once: the gateway is busy, and its 10 s are never near
REGISTER_TIMEOUT = 20.0  # s without a step of a handshake
REPORT_INTERVAL = 0.25  # s
NOWHERE = 255  # in place of a worker's number: not registered
FDS_PER_MESSAGE = 200  # Linux takes 253 (SCM_MAX_FD)

SKILL, TAG = "summarize", "text"

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Share:
    """What one client process has to hold."""

    dialer: Dialer
    agents: int
    capability_bytes: int
    kinds: int  # of capabilities


# --- commands ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Connect:
    """Register all agents; answered with `Progress` and at last `Connected`."""


@dataclass(frozen=True)
class CallRoll:
    """Ask every agent's connection for a sign of life; answered with `Called`."""


@dataclass(frozen=True)
class HandOver:
    """Give these agents up; answered with `Handed` and their sockets."""

    numbers: list[int]


# --- events --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ready:
    """The process has started."""


@dataclass(frozen=True)
class Progress:
    """How far it is; comes by itself, several times a second."""

    registered: int
    failed: int
    counts: Counts
    cpu_seconds: float


@dataclass(frozen=True)
class Connected:
    """All agents are registered or have failed to.

    Args:
        workers: The worker that each agent is at, in one byte; NOWHERE for none.
        first_failure: Why the first failed; empty if none did.
    """

    workers: bytes
    first_failure: str


@dataclass(frozen=True)
class Called:
    """The roll call is over."""

    counts: Counts


@dataclass(frozen=True)
class Handed:
    """The seeds of the keys of those agents whose connections are still open; their sockets follow."""

    seeds: dict[int, bytes]


Command = Connect | CallRoll | HandOver
Event = Ready | Progress | Connected | Called | Handed


def skill(kind: int) -> str:
    """Return the name of a capability."""
    return f"{SKILL}-{kind:06}"


def capabilities(size: int, number: int, kinds: int) -> list[Any]:
    """Return the one capability of an agent, one of `kinds`, that takes about `size` bytes as JSON."""
    named: dict[str, Any] = {"name": skill(number % kinds), "tags": [TAG]}
    empty = len(json.dumps([named | {"description": ""}], separators=(",", ":")))
    return [named | {"description": "x" * (size - empty)}] if size > empty else [named] if size else []


def main(share: Share, swarm: Connection) -> None:
    """Serve the swarm until it goes."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the swarm gets it too, and ends this process
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with Hold(share.agents) as hold:
            _Holder(share, swarm, hold).serve()
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the swarm has gone
        sys.exit(0)


class _Handshake:
    """One agent on its way in."""

    def __init__(self, number: int, connection: socket.socket, steps: Generator[int, None, int]) -> None:
        self.number = number
        self.connection = connection
        self.steps = steps
        self.moved_at = time.monotonic()


class _Holder:
    def __init__(self, share: Share, swarm: Connection, hold: Hold) -> None:
        self._share = share
        self._swarm = swarm
        self._hold = hold
        self._seeds = [b""] * share.agents
        self._workers = bytearray([NOWHERE]) * share.agents
        self._registered = self._failed = 0
        self._first_failure = ""
        self._poller = select.epoll()
        self._poller.register(swarm.fileno(), select.EPOLLIN)
        # An epoll descriptor can be waited for like a socket: pings are answered all the time.
        self._poller.register(hold.fileno(), select.EPOLLIN)
        self._handshakes: dict[int, _Handshake] = {}
        self._waiting: Iterator[int] = iter(())
        self._is_connecting = False
        self._reported_at = 0.0

    def serve(self) -> None:
        """Obey commands and answer pings, until the pipe breaks."""
        self._swarm.send(Ready())
        while True:
            for fd, _ in self._poller.poll(REPORT_INTERVAL):
                if fd == self._swarm.fileno():
                    self._obey(self._swarm.recv())
                elif fd == self._hold.fileno():
                    self._hold.serve()
                elif fd in self._handshakes:
                    self._step(self._handshakes[fd])
            if time.monotonic() >= self._reported_at + REPORT_INTERVAL:
                self._report()
                self._give_up_stalled()
            if self._is_connecting and not self._handshakes:
                self._is_connecting = False
                self._report()
                self._swarm.send(Connected(bytes(self._workers), self._first_failure))

    def _obey(self, command: Command) -> None:
        if isinstance(command, Connect):
            self._waiting = iter(range(self._share.agents))
            self._is_connecting = True
            for _ in range(IN_FLIGHT):
                self._begin()
        elif isinstance(command, CallRoll):
            self._hold.call_roll()
            self._swarm.send(Called(self._hold.counts()))
        else:
            self._hand_over(command.numbers)

    def _report(self) -> None:
        self._reported_at = time.monotonic()
        progress = Progress(self._registered, self._failed, self._hold.counts(), time.process_time())
        self._swarm.send(progress)

    # --- registering -----------------------------------------------------------------------------

    def _begin(self) -> None:
        """Let the next agent dial, if there is one."""
        for number in self._waiting:
            self._seeds[number] = secrets.token_bytes(32)
            key = DIDKey.from_seed(self._seeds[number])
            try:
                connection = self._share.dialer.dial()
            except OSError as error:
                self._note_failure(error)
                continue
            offers = capabilities(self._share.capability_bytes, number, self._share.kinds)
            steps = register(connection, key, self._share.dialer, offers)
            self._handshakes[connection.fileno()] = _Handshake(number, connection, steps)
            self._poller.register(connection.fileno(), next(steps))
            return

    def _step(self, handshake: _Handshake) -> None:
        handshake.moved_at = time.monotonic()
        try:
            self._poller.modify(handshake.connection.fileno(), next(handshake.steps))
        except StopIteration as done:
            self._end(handshake)
            self._hold.add(handshake.number, handshake.connection)
            self._workers[handshake.number] = min(done.value, NOWHERE - 1)
            self._registered += 1
        except (RegistrationError, AIConexusError, OSError) as error:
            self._end(handshake)
            self._fail(handshake, error)
        else:
            return
        self._begin()

    def _end(self, handshake: _Handshake) -> None:
        self._poller.unregister(handshake.connection.fileno())
        del self._handshakes[handshake.connection.fileno()]

    def _fail(self, handshake: _Handshake, error: Exception) -> None:
        handshake.connection.close()
        self._note_failure(error)

    def _note_failure(self, error: Exception) -> None:
        self._failed += 1
        self._first_failure = self._first_failure or f"{type(error).__name__}: {error}"

    def _give_up_stalled(self) -> None:
        limit = time.monotonic() - REGISTER_TIMEOUT
        for handshake in [each for each in self._handshakes.values() if each.moved_at < limit]:
            self._end(handshake)
            self._fail(handshake, TimeoutError(f"no answer within {REGISTER_TIMEOUT:g} s"))
            self._begin()

    # --- handing over ----------------------------------------------------------------------------

    def _hand_over(self, numbers: list[int]) -> None:
        fds = {number: self._hold.socket(number) for number in numbers}
        seeds = {number: self._seeds[number] for number in numbers if fds[number] >= 0}
        self._swarm.send(Handed(seeds))
        send_sockets(self._swarm, [fds[number] for number in seeds])
        for number in seeds:
            self._hold.release(number)


def send_sockets(pipe: Connection, fds: list[int]) -> None:
    """Send descriptors over a pipe, between two of its messages."""
    with socket.socket(fileno=os.dup(pipe.fileno())) as line:
        for first in range(0, len(fds), FDS_PER_MESSAGE):
            socket.send_fds(line, [b"s"], fds[first : first + FDS_PER_MESSAGE])


def receive_sockets(pipe: Connection, count: int) -> list[int]:
    """Receive what `send_sockets` sends."""
    found: list[int] = []
    with socket.socket(fileno=os.dup(pipe.fileno())) as line:
        while len(found) < count:
            data, fds, _, _ = socket.recv_fds(line, 1, min(count - len(found), FDS_PER_MESSAGE))
            if not data:
                raise EOFError("a client process ended")
            found += fds
    return found
