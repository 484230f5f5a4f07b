"""The load client: the Python face of bench/_load.c."""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

from bench import compile as build
from bench.websocket import WebSocket

TEXT, BINARY = 0x1, 0x2

_SECOND = 1e9  # ns


class LoadError(Exception):
    """A message was lost, reordered or altered, or the server closed a connection."""


class Template(NamedTuple):
    """A message whose sequence number is written into eight hex digits at the offset `digits`."""

    payload: bytes
    digits: int


class Stream(NamedTuple):
    """How a server speaks whose messages follow each other in a byte stream, in frames cut anywhere.

    Between two messages it may ask for a sign of life, with `asks`, and is sent `answers`. Both have at most
    125 bytes, and `asks` does not begin like a message.
    """

    asks: bytes = b""
    answers: bytes = b""


@dataclass(frozen=True)
class Endpoint:
    """An open, registered connection: what it sends, and what its partner makes it receive.

    Without `stream`, each frame that arrives must hold one message.
    """

    connection: WebSocket | socket.socket
    sends: Template
    receives: Template
    opcode: int = TEXT
    stream: Stream | None = None


@dataclass(frozen=True)
class LoadResult:
    """What one run saw. Latencies are from send (open loop: from the scheduled time) to receipt.

    The faults are 0 unless they are counted; then `fault` is the first of them, or empty.
    """

    messages: int  # received, each counted once
    seconds: float
    client_cpu_seconds: float
    p50_ms: float
    p99_ms: float
    undelivered: int = 0
    reordered: int = 0
    repeated: int = 0
    foreign: int = 0  # ERRORs of the server, altered messages
    ended: int = 0  # connections
    fault: str = ""


class _Connection(ctypes.Structure):
    _fields_ = [
        ("sends", ctypes.c_char_p),
        ("receives", ctypes.c_char_p),
        ("sends_bytes", ctypes.c_uint32),
        ("receives_bytes", ctypes.c_uint32),
        ("sends_sequence", ctypes.c_uint32),
        ("receives_sequence", ctypes.c_uint32),
        ("fd", ctypes.c_int32),
        ("opcode", ctypes.c_uint32),
        ("streams", ctypes.c_uint32),
        ("asks", ctypes.c_char_p),
        ("answers", ctypes.c_char_p),
        ("asks_bytes", ctypes.c_uint32),
        ("answers_bytes", ctypes.c_uint32),
    ]


class _Result(ctypes.Structure):
    _fields_ = [
        ("sent", ctypes.c_uint64),
        ("received", ctypes.c_uint64),
        ("elapsed_ns", ctypes.c_uint64),
        ("client_cpu_ns", ctypes.c_uint64),
        ("p50_ns", ctypes.c_uint64),
        ("p99_ns", ctypes.c_uint64),
        ("reordered", ctypes.c_uint64),
        ("repeated", ctypes.c_uint64),
        ("foreign", ctypes.c_uint64),
        ("ended", ctypes.c_uint64),
        ("failure", ctypes.c_char * 256),
    ]


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build.library("load")))
    library.load_open.argtypes = [
        ctypes.POINTER(_Connection),
        ctypes.c_uint32,
        ctypes.c_uint32,
        ctypes.c_bool,
    ]
    library.load_open.restype = ctypes.c_void_p
    library.load_run.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint64,
        ctypes.c_uint32,
        ctypes.POINTER(_Result),
    ]
    library.load_run.restype = ctypes.c_bool
    library.load_percentile.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
    library.load_percentile.restype = ctypes.c_uint64
    library.load_count_faults.argtypes = [ctypes.c_void_p]
    library.load_count_faults.restype = None
    library.load_close.argtypes = [ctypes.c_void_p]
    library.load_close.restype = None
    return library


class Load:
    """Drives endpoints, two and two of them partners that send to each other.

    Args:
        endpoints: An even number of them; 2i and 2i + 1 are partners.
        burst: Messages per write.
        spin: Never sleep. For a client with a core of its own, whose waking up would add some 0.1 ms to
            every latency; without one it would take the server's time.
        count_faults: In open loops, go on after a fault and count it, instead of raising LoadError.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        burst: int = 1,
        *,
        spin: bool = False,
        count_faults: bool = False,
    ) -> None:
        self._library = _library()
        self._result = _Result()
        self._counts_faults = count_faults
        specs = (_Connection * len(endpoints))()
        for spec, endpoint in zip(specs, endpoints, strict=True):
            spec.sends, spec.sends_sequence = endpoint.sends
            spec.receives, spec.receives_sequence = endpoint.receives
            spec.sends_bytes = len(endpoint.sends.payload)
            spec.receives_bytes = len(endpoint.receives.payload)
            spec.fd = endpoint.connection.fileno()
            spec.opcode = endpoint.opcode
            spec.streams = endpoint.stream is not None
            spec.asks, spec.answers = stream = endpoint.stream or Stream()
            spec.asks_bytes, spec.answers_bytes = map(len, stream)
        self._handle = self._library.load_open(specs, len(endpoints), burst, spin)
        if not self._handle:
            raise LoadError("the load client takes pairs of sockets and messages of 126 to 65,535 bytes")
        if count_faults:
            self._library.load_count_faults(self._handle)

    def run(self, seconds: float, rate: int = 0) -> LoadResult:
        """Send for `seconds`, then wait for what is under way (5 s of silence at most).

        Args:
            seconds: Duration of the sending.
            rate: Messages per second over all endpoints, on a fixed schedule (open loop); 0: closed
                loop, in which who has received a burst sends the next.

        Raises:
            LoadError: Not every message arrived once, unaltered and in order.
        """
        result = self._result
        ends = self._library.load_run(self._handle, round(seconds * _SECOND), rate, ctypes.byref(result))
        fault = result.failure.decode(errors="replace")
        if fault and not (ends and self._counts_faults and rate):
            raise LoadError(fault)
        return LoadResult(
            messages=result.received,
            seconds=result.elapsed_ns / _SECOND,
            client_cpu_seconds=result.client_cpu_ns / _SECOND,
            p50_ms=result.p50_ns / 1e6,
            p99_ms=result.p99_ns / 1e6,
            undelivered=result.sent - result.received,
            reordered=result.reordered,
            repeated=result.repeated,
            foreign=result.foreign,
            ended=result.ended,
            fault=fault,
        )

    @property
    def received(self) -> int:
        """Messages of the current run so far; another thread may ask."""
        count: int = self._result.received
        return count

    def percentile_ms(self, percent: float) -> float:
        """Return the latency that `percent` of the messages of the latest run did not exceed."""
        latency: int = self._library.load_percentile(self._handle, round(percent * 100))
        return latency / 1e6

    def close(self) -> None:
        """Free the load client; the sockets stay open."""
        self._library.load_close(self._handle)

    def __enter__(self) -> Load:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
