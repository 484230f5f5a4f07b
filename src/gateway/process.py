"""One worker process: its line to the supervisor, its links to the other workers, its signals."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterable

import uvloop

from gateway.worker import Gateway

# What is said on the line between supervisor and worker (SOCK_SEQPACKET):
LINK = b"link"  # "link 3 1", with a descriptor: here is your link to worker 3, in its second life
LINKED = b"linked"  # "linked 3": I have it
SERVE = b"serve"  # everybody who runs has a link to you: begin
READY = b"ready"  # I accept connections

_WORD_MAX = 64
# Between the end of the line and that of the lifeline: the kernel closes what a process had in any order.
FOLLOW_SECONDS = 1.0
# Blocked from the fork until there are handlers for them.
STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT})


class WorkerProcess:
    """Runs a gateway's worker in a process that the supervisor forked.

    Args:
        gateway: The worker.
        line: To the supervisor.
        links: To the workers that run already: number, generation and socket.
        listener: Bound to the public address.
    """

    def __init__(
        self,
        gateway: Gateway,
        line: socket.socket,
        links: Iterable[tuple[int, int, socket.socket]],
        listener: socket.socket,
    ) -> None:
        self._gateway = gateway
        self._line = line
        self._listener = listener
        for worker, generation, link in links:
            gateway.add_link(worker, generation, link.detach())
        self._may_serve = asyncio.Event()

    def run(self) -> None:
        """Serve until the supervisor or a signal ends it."""
        uvloop.run(self._main())

    async def _main(self) -> None:
        loop = asyncio.get_running_loop()
        self._line.setblocking(False)
        lifeline = self._gateway.node.lifeline
        loop.add_reader(lifeline.fileno(), lifeline.follow)
        loop.add_reader(self._line.fileno(), self._on_line)
        # A terminal sends SIGINT to the whole group; the supervisor passes it on as SIGTERM.
        loop.add_signal_handler(signal.SIGTERM, self._on_sigterm)
        loop.add_signal_handler(signal.SIGINT, lambda: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        await self._may_serve.wait()
        await self._gateway.serve(self._listener, lambda: self._say(READY))

    def _say(self, *words: bytes) -> None:
        self._line.send(b" ".join(words))

    def _on_sigterm(self) -> None:
        self._may_serve.set()
        self._gateway.stop()

    def _on_line(self) -> None:
        data, descriptors, _, _ = socket.recv_fds(self._line, _WORD_MAX, 1)
        if not data:  # the supervisor is going, and we shall follow it
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._line.fileno())
            loop.call_later(FOLLOW_SECONDS, os._exit, 1)
            return
        word, _, argument = data.partition(b" ")
        if word == LINK:
            number, generation = argument.split()
            self._gateway.add_link(int(number), int(generation), descriptors[0])
            self._say(LINKED, number)
        elif word == SERVE:
            self._may_serve.set()
