"""Idle agents that answer pings: the Python face of bench/_hold.c."""

from __future__ import annotations

import ctypes
import socket
import time
from dataclasses import dataclass
from functools import cache
from types import TracebackType

from bench import compile as build

CALL_SLICE = 500  # pings between two looks at the answers: the gateway shall not choke on a roll call
CALL_TIMEOUT = 20.0  # s


class HoldError(Exception):
    """A connection cannot be held. The text is for the user."""


@dataclass(frozen=True)
class Counts:
    """What happened to held connections so far."""

    pings: int  # answered
    messages: int  # that arrived unasked
    held: int
    lost: int  # ended
    silent: int  # were called and have not answered
    first_loss: str  # why the first was lost; empty if none was


class _Counts(ctypes.Structure):
    _fields_ = [
        ("pings", ctypes.c_uint64),
        ("messages", ctypes.c_uint64),
        ("held", ctypes.c_uint32),
        ("lost", ctypes.c_uint32),
        ("silent", ctypes.c_uint32),
        ("first_loss", ctypes.c_char * 256),
    ]


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build.library("hold")))
    handle, number = ctypes.c_void_p, ctypes.c_uint32
    for name, arguments, result in (
        ("hold_open", [number], handle),
        ("hold_add", [handle, number, ctypes.c_int], ctypes.c_bool),
        ("hold_socket", [handle, number], ctypes.c_int),
        ("hold_release", [handle, number], None),
        ("hold_call", [handle, number, number], None),
        ("hold_pass", [handle, ctypes.c_int], None),
        ("hold_fileno", [handle], ctypes.c_int),
        ("hold_count", [handle], ctypes.POINTER(_Counts)),
        ("hold_close", [handle], None),
    ):
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return library


class Hold:
    """Holds up to `capacity` connections, numbered from 0."""

    def __init__(self, capacity: int) -> None:
        self._library = _library()
        self._capacity = capacity
        self._handle = self._library.hold_open(capacity)
        if not self._handle:
            raise HoldError("no memory, or no descriptor, to hold connections")
        self._counts = self._library.hold_count(self._handle).contents

    def add(self, number: int, connection: socket.socket) -> None:
        """Take an open connection whose agent is registered; `connection` is no longer the caller's."""
        fd = connection.detach()
        if not self._library.hold_add(self._handle, number, fd):
            socket.close(fd)
            raise HoldError(f"connection {number} cannot be held")

    def fileno(self) -> int:
        """Return the descriptor that is readable when `serve` has something to do."""
        descriptor: int = self._library.hold_fileno(self._handle)
        return descriptor

    def serve(self, seconds: float = 0) -> None:
        """Answer what arrives within `seconds`, or return at once."""
        self._library.hold_pass(self._handle, round(seconds * 1000))

    def socket(self, number: int) -> int:
        """Return the descriptor of a connection, or -1 if it has ended."""
        descriptor: int = self._library.hold_socket(self._handle, number)
        return descriptor

    def release(self, number: int) -> None:
        """Forget a connection that another process has taken over."""
        self._library.hold_release(self._handle, number)

    def call_roll(self) -> None:
        """Ping every connection and wait for the answers; `counts().silent` are those that gave none.

        A connection may look open and lead nowhere: its process hangs, or lost the session.
        """
        for first in range(0, self._capacity, CALL_SLICE):
            self._library.hold_call(self._handle, first, first + CALL_SLICE)
            self.serve()
        deadline = time.monotonic() + CALL_TIMEOUT
        while self._counts.silent and time.monotonic() < deadline:
            self.serve(0.1)

    def counts(self) -> Counts:
        """Return what happened so far."""
        now = self._counts
        return Counts(
            pings=now.pings,
            messages=now.messages,
            held=now.held,
            lost=now.lost,
            silent=now.silent,
            first_loss=now.first_loss.decode(errors="replace"),
        )

    def close(self) -> None:
        """Close all connections."""
        self._library.hold_close(self._handle)

    def __enter__(self) -> Hold:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
