"""What waits in a worker is written down, and can be read by others when it is dead."""

from __future__ import annotations

import json
import os
import signal

import pytest
from processes import forked

from aiconexus.protocol import DIDKey
from gateway._ledger import LEDGER_FULL, Ledger
from gateway.shelf import Shelf

A, B = (DIDKey.from_seed(letter * 32).did for letter in (b"a", b"b"))
RECORDS = 65_536


def message(number: int, size: int = 0) -> bytes:
    return json.dumps(
        {
            "id": f"{number:08x}-0000-4000-8000-000000000000",
            "timestamp": "2026-01-12T10:00:00Z",
            "from": A,
            "to": B,
            "type": "OFFER",
            "payload": {"sdp": "x" * size},
            "version": "1.0",
        }
    ).encode()


def record(number: int) -> tuple[str, str, str]:
    return (A, B, f"{number:08x}-0000-4000-8000-000000000000")


@pytest.fixture
def ledger() -> Ledger:
    ledger = Ledger(2)
    ledger.begin(0, 0)
    return ledger


def test_a_message_stands_there_until_the_pass_in_which_it_left_is_over(ledger):
    number = ledger.add(message(1))
    assert ledger.read(0, 0) == [record(1)]
    ledger.strike(number)
    assert ledger.read(0, 0) == [record(1)]
    ledger.settle()
    assert ledger.read(0, 0) == []
    assert ledger.size == 0


def test_what_no_agent_sent_is_not_written_down(ledger):
    number = ledger.add(b'{"id":"x"}')
    assert number not in (LEDGER_FULL, 0)
    ledger.strike(number)
    ledger.settle()
    assert ledger.read(0, 0) == []


def test_others_read_what_a_killed_process_left(ledger):
    ready, started = os.pipe()

    def work() -> None:
        ledger.begin(1, 4)
        for number in range(100):
            ledger.add(message(number))
        os.write(started, b"x")
        signal.pause()

    pid = forked(work)
    os.read(ready, 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert sorted(ledger.read(1, 4)) == sorted(record(number) for number in range(100))
    assert ledger.read(1, 5) == []
    for end in (ready, started):
        os.close(end)


def test_the_next_process_does_not_write_over_what_others_still_read(ledger):
    ledger.add(message(1))
    ledger.begin(0, 1)
    ledger.add(message(2))
    assert ledger.read(0, 0) == [record(1)]
    assert ledger.read(0, 1) == [record(2)]
    ledger.begin(0, 2)
    assert ledger.read(0, 2) == []


def test_a_full_ledger_takes_no_more_and_recovers(ledger):
    data = message(1)
    numbers = [ledger.add(data) for _ in range(RECORDS)]
    assert sorted(numbers) == list(range(RECORDS))
    assert ledger.add(data) == LEDGER_FULL
    assert not Shelf(ledger, 10, 10_000).put(data)
    ledger.strike(numbers[0])
    ledger.settle()
    assert ledger.add(data) == numbers[0]


def test_a_shelf_is_bounded_in_messages_and_bytes_and_keeps_the_order(ledger):
    shelf = Shelf(ledger, 3, 2_000)
    assert shelf.put(message(2))
    assert shelf.put(message(3))
    assert shelf.put_first(message(1))
    assert not shelf.put(message(4))
    assert ledger.size == 3
    assert shelf.take() == [message(1), message(2), message(3)]
    ledger.settle()
    assert ledger.size == 0
    assert not shelf.put(message(5, size=2_000))
    assert shelf.put(message(5, size=1_000))
