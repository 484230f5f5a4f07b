"""The load client must notice whatever a server does to a message: `python -m pytest bench/test_load.py`."""

from __future__ import annotations

import json
import random
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise

import pytest

from aiconexus.protocol import DIDKey
from bench.load import Endpoint, Load, LoadError, Stream, Template
from bench.offers import MESSAGE_BYTES, offer

Relay = Callable[[int, bytes], bytes]


def frame(payload: bytes, opcode: int = 0x1, *, final: bool = True) -> bytes:
    first, size = 0x80 * final | opcode, len(payload)
    if size < 126:
        return bytes([first, size]) + payload
    if size < 65_536:
        return bytes([first, 126]) + size.to_bytes(2, "big") + payload
    return bytes([first, 127]) + size.to_bytes(8, "big") + payload


def read_frame(server: socket.socket) -> bytes:
    """Return the payload of the next masked frame, or nothing at the end."""
    header = server.recv(2, socket.MSG_WAITALL)
    if len(header) < 2:
        return b""
    size = header[1] & 0x7F
    if size == 126:
        size = int.from_bytes(server.recv(2, socket.MSG_WAITALL), "big")
    key = server.recv(4, socket.MSG_WAITALL)
    masked = server.recv(size, socket.MSG_WAITALL)
    return bytes(byte ^ key[index % 4] for index, byte in enumerate(masked))


def faithful(count: int, payload: bytes) -> bytes:
    return frame(payload)


@contextmanager
def pair(relay: Relay) -> Iterator[list[Endpoint]]:
    """Two endpoints; when one sends a message, the `count`th, the other gets `relay(count, payload)`."""
    with ExitStack() as stack:
        sockets = [socket.socketpair() for _ in range(2)]
        for each in sockets:
            for end in each:
                stack.enter_context(end)
        servers = [server for _, server in sockets]

        def serve() -> None:
            count, talking = 0, list(servers)
            while talking:
                ready, _, _ = select.select(talking, [], [], 20)
                for server in ready or list(talking):
                    payload = read_frame(server)
                    if not payload:
                        talking.remove(server)
                        continue
                    count += len(payload) == MESSAGE_BYTES
                    other = servers[1 - servers.index(server)]
                    other.sendall(relay(count, payload))

        thread = threading.Thread(target=serve)
        thread.start()
        keys = [DIDKey.generate() for _ in range(2)]
        offers = [offer(keys[0], keys[1]), offer(keys[1], keys[0])]
        try:
            yield [
                Endpoint(sockets[0][0], offers[0], offers[1]),
                Endpoint(sockets[1][0], offers[1], offers[0]),
            ]
        finally:
            for client, _ in sockets:
                client.shutdown(socket.SHUT_WR)
            thread.join()


@pytest.mark.parametrize(("burst", "rate"), [(1, 0), (8, 0), (1, 500)])
def test_every_message_of_a_faithful_server_is_counted(burst, rate):
    seen = []

    def relay(count, payload):
        seen.append(payload)
        return frame(payload)

    with pair(relay) as endpoints, Load(endpoints, burst) as load:
        first, second = load.run(0.1, rate), load.run(0.1, rate)
    assert first.messages + second.messages == len(seen)
    assert len(set(seen)) == len(seen)
    assert 0 < first.p50_ms <= first.p99_ms


def test_open_loop_keeps_its_schedule():
    with pair(faithful) as endpoints, Load(endpoints) as load:
        assert load.run(0.2, 500).messages == 100


def at_the_20th(fault: Callable[[bytes], bytes]) -> Relay:
    return lambda count, payload: fault(payload) if count == 20 else frame(payload)


def swap() -> Relay:
    held: list[bytes] = []

    def relay(count: int, payload: bytes) -> bytes:
        held.insert(0, frame(payload))
        if count == 20:
            return b""
        data = b"".join(held)
        held.clear()
        return data

    return relay


@pytest.mark.parametrize(
    ("relay", "reason"),
    [
        (at_the_20th(lambda payload: b""), "lost"),
        (at_the_20th(lambda payload: 2 * frame(payload)), "repeated"),
        (at_the_20th(lambda payload: frame(payload.replace(b"OFFER", b"OFFEr"))), "unexpected message"),
        (at_the_20th(lambda payload: frame(b'{"type":"ERROR"}')), "unexpected message of 16 bytes: .*ERROR"),
        (at_the_20th(lambda payload: frame(b"\x0f\xa3slow", 0x8)), "closed a connection: 4003 slow"),
        (swap(), "reordered"),
    ],
    ids=["lost", "repeated", "altered", "refused", "closed", "reordered"],
)
def test_a_fault_ends_the_run(relay, reason):
    with pair(relay) as endpoints, Load(endpoints, 8) as load, pytest.raises(LoadError, match=reason):
        load.run(20)  # until the fault


def streamed(payload: bytes) -> bytes:
    return b"MSG " + payload + b"\r\n"


def as_stream(endpoints: list[Endpoint]) -> list[Endpoint]:
    """Let the endpoints expect the payloads in a byte stream with questions in it."""
    return [
        replace(
            endpoint,
            receives=Template(streamed(endpoint.receives.payload), endpoint.receives.digits + 4),
            stream=Stream(asks=b"PING\r\n", answers=b"PONG\r\n"),
        )
        for endpoint in endpoints
    ]


class Streaming:
    """Collects a burst, then sends it in frames that `cut` makes; notes what answers its questions."""

    def __init__(self, burst: int, cut: Callable[[bytes], bytes]) -> None:
        self.burst, self.cut = burst, cut
        self.held = b""
        self.answers: list[bytes] = []

    def __call__(self, count: int, payload: bytes) -> bytes:
        if len(payload) < MESSAGE_BYTES:
            self.answers.append(payload)
            return b""
        self.held += streamed(payload)
        if count % self.burst:
            return b""
        data, self.held = self.held, b""
        return self.cut(data)


def pieces(data: bytes) -> bytes:
    """Cut anywhere, also between the frames of a fragmented message."""
    chance = random.Random(len(data))
    cuts = sorted({0, len(data), *(chance.randrange(len(data)) for _ in range(20))})
    return b"".join(
        frame(data[start:end], opcode=0x2 if chance.random() < 0.5 else 0x0, final=chance.random() < 0.5)
        for start, end in pairwise(cuts)
    )


def bytewise(data: bytes) -> bytes:
    return b"".join(frame(data[i : i + 1]) for i in range(len(data)))


@pytest.mark.parametrize(
    ("burst", "cut"),
    [(1, frame), (8, frame), (120, frame), (8, pieces), (2, bytewise)],
    ids=["one", "batch", "64-bit length", "pieces", "bytewise"],
)
def test_messages_of_a_stream_are_found_in_any_frames(burst, cut):
    relay = Streaming(burst, cut)
    with pair(relay) as endpoints, Load(as_stream(endpoints), burst) as load:
        assert load.run(0.1).messages >= burst
    assert relay.answers == []


@pytest.mark.parametrize("cut", [frame, pieces, bytewise])
def test_questions_in_a_stream_are_answered(cut):
    asked = 0

    def ask(data: bytes) -> bytes:
        nonlocal asked
        asked += 2
        half = len(data) // 2  # between two messages
        return cut(b"PING\r\n" + data[:half] + b"PING\r\n" + data[half:])

    relay = Streaming(2, ask)
    with pair(relay) as endpoints, Load(as_stream(endpoints), 2) as load:
        load.run(0.1)
    assert relay.answers == asked * [b"PONG\r\n"]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda data: b"", "lost"),
        (lambda data: 2 * data, "repeated"),
        (lambda data: data[602 + 4 :] + data[: 602 + 4], "reordered"),
        (lambda data: data.replace(b"OFFER", b"OFFEr"), "unexpected message"),
        (lambda data: data[1:], "unexpected message"),
        (lambda data: b"-ERR 'no'\r\n", "unexpected message of [0-9]+ bytes: -"),
        (lambda data: b"PONG\r\n" + data, "unexpected message: PONG"),
    ],
    ids=["lost", "repeated", "reordered", "altered", "cut", "refused", "not the question"],
)
@pytest.mark.parametrize("cut", [frame, pieces], ids=["frame", "pieces"])
def test_a_fault_in_a_stream_ends_the_run(fault, reason, cut):
    bursts = 0

    def once(data: bytes) -> bytes:
        nonlocal bursts
        bursts += 1
        data = fault(data) if bursts == 5 else data
        return cut(data) if data else b""

    with (
        pair(Streaming(8, once)) as endpoints,
        Load(as_stream(endpoints), 8) as load,
        pytest.raises(LoadError, match=reason),
    ):
        load.run(20)  # until the fault


def test_faults_are_counted_where_the_run_shall_go_on():
    def relay(count, payload):
        if count == 20:
            return b""
        if count == 30:
            return 2 * frame(payload)
        if count == 40:
            return frame(payload.replace(b"OFFER", b"OFFEr"))
        if count == 50:
            return frame(b'{"type":"ERROR"}')
        return frame(payload)

    with pair(relay) as endpoints, Load(endpoints, count_faults=True) as load:
        result = load.run(0.2, 500)
        assert (result.messages, result.undelivered) == (97, 3)
        assert (result.repeated, result.foreign, result.ended) == (1, 2, 0)
        assert "lost, repeated or reordered" in result.fault
        # What was lost before is forgotten.
        result = load.run(0.1, 500)
        assert (result.messages, result.undelivered, result.fault) == (50, 0, "")


def test_messages_that_overtake_each_other_are_counted():
    held: list[bytes] = []
    sender = ""

    def relay(count, payload):
        # A message arrives behind the next one of its sender. The senders take turns, but the relay may find
        # two messages of one before it finds one of the other.
        nonlocal sender
        if count == 21:
            sender = json.loads(payload)["from"]
            held.append(frame(payload))
            return b""
        overtaken = held.pop() if held and json.loads(payload)["from"] == sender else b""
        return frame(payload) + overtaken

    with pair(relay) as endpoints, Load(endpoints, count_faults=True) as load:
        result = load.run(0.2, 500)
    assert (result.messages, result.undelivered, result.reordered, result.repeated) == (100, 0, 1, 0)


def test_a_connection_that_ends_is_counted():
    with (
        pair(at_the_20th(lambda payload: frame(b"\x0f\xa3slow", 0x8))) as endpoints,
        Load(endpoints, count_faults=True) as load,
    ):
        result = load.run(0.2, 500)
    assert result.ended == 1
    assert result.messages < 100
    assert "closed a connection: 4003 slow" in result.fault


def test_the_percentiles_do_not_fall():
    with pair(faithful) as endpoints, Load(endpoints) as load:
        result = load.run(0.2, 500)
        found = [load.percentile_ms(percent) for percent in (1, 50, 99, 99.9)]
    assert found == sorted(found)
    assert (result.p50_ms, result.p99_ms) == (found[1], found[2])
