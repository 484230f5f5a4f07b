"""The load client must notice whatever a server does to a message: `python -m pytest bench/test_load.py`."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from aiconexus.protocol import DIDKey
from bench.load import Endpoint, Load, LoadError
from bench.offers import MESSAGE_BYTES, offer

FRAME_BYTES = 8 + MESSAGE_BYTES  # masked, 16-bit length

Relay = Callable[[int, bytes], bytes]


def frame(payload: bytes, opcode: int = 0x1) -> bytes:
    if len(payload) < 126:
        return bytes([0x80 | opcode, len(payload)]) + payload
    return bytes([0x80 | opcode, 126]) + len(payload).to_bytes(2, "big") + payload


def faithful(count: int, payload: bytes) -> bytes:
    return frame(payload)


@contextmanager
def pair(relay: Relay) -> Iterator[list[Endpoint]]:
    """Two endpoints; when one sends a message, the other gets the bytes `relay(count, payload)`."""
    with ExitStack() as stack:
        sockets = [socket.socketpair() for _ in range(2)]
        for each in sockets:
            for end in each:
                stack.enter_context(end)
        servers = [server for _, server in sockets]

        def serve() -> None:
            count = 0
            while True:
                ready, _, _ = select.select(servers, [], [], 20)
                for server in ready or servers:
                    data = server.recv(FRAME_BYTES, socket.MSG_WAITALL)
                    if len(data) < FRAME_BYTES:
                        return
                    key = data[4:8] * (MESSAGE_BYTES // 4)
                    payload = bytes(a ^ b for a, b in zip(data[8:], key, strict=True))
                    count += 1
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
        load.run(0.5)
