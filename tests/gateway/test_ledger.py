"""What waits in a worker is written down, and can be read by others when it is dead."""

from __future__ import annotations

import os
import signal
import sys

import pytest
from offer_bytes import A, B, message, name
from processes import forked

from aiconexus.protocol import DIDKey
from gateway import replies
from gateway._ledger import LEDGER_ENTRY_BYTES, LEDGER_FULL, Ledger
from gateway.shelf import Shelf

RECORDS = 65_536


def record(number: int, source: int = 0) -> tuple[str, str, str, int]:
    return (A, B, name(number), source)


def entry(place: int, number: int) -> bytes:
    """What another node is told of a message that stands at some place."""
    return place.to_bytes(4, sys.byteorder) + f"{A}{B}{name(number)}".encode()


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


def test_what_the_gateway_itself_sends_takes_no_record(ledger):
    own = Ledger(1)
    own.begin(0, 0, A.encode())
    shelf = Shelf(own, 2, 10_000)
    assert shelf.put(message(1))
    assert own.size == 0
    assert own.read(0, 0) == []
    assert shelf.take() == [message(1)]
    assert ledger.add(message(1)) == 0  # that of another


def test_what_came_from_another_node_is_told_once_when_it_waits_and_once_when_it_does_no_longer(ledger):
    assert ledger.take_news(True) == ([], [])
    ledger.add(message(1))
    assert ledger.take_news(True) == ([], [])  # from here
    ledger.source = 7
    number = ledger.add(message(2))
    ledger.source = 0
    assert ledger.read(0, 0) == [record(1), record(2, source=7)]
    assert ledger.take_news(True) == ([(7, entry(1, 2))], [])
    assert len(entry(1, 2)) == LEDGER_ENTRY_BYTES
    assert ledger.waiting_from(7) == [entry(1, 2)]
    assert ledger.waiting_from(8) == []
    ledger.strike(number)
    assert ledger.waiting_from(7) == []
    assert ledger.take_news(True) == ([], [(7, entry(1, 2)[:4])])
    assert ledger.take_news(True) == ([], [])
    assert ledger.knows(7)
    ledger.settle()
    assert not ledger.knows(7)


def test_what_waits_for_less_than_a_pass_is_no_news(ledger):
    ledger.source = 7
    ledger.strike(ledger.add(message(1)))
    assert ledger.take_news(True) == ([], [])


def test_what_does_no_longer_wait_may_be_told_later(ledger):
    ledger.source = 7
    first = ledger.add(message(1))
    assert ledger.take_news(False) == ([(7, entry(first, 1))], [])
    ledger.strike(first)
    second = ledger.add(message(2))
    third = ledger.add(message(3))
    ledger.strike(third)
    assert ledger.take_news(False) == ([(7, entry(second, 2))], [])
    assert ledger.take_news(True) == ([], [(7, entry(first, 1)[:4])])


def test_what_waits_elsewhere_in_the_process_comes_from_where_it_came(ledger):
    """It leaves the queue of a connection, say, for the shelf of a session that is away."""
    ledger.source = 7
    first = ledger.add(message(1))
    ledger.take_news(True)
    ledger.source = 0
    assert ledger.source_of(message(1)) == 7
    assert ledger.source_of(message(2)) == 0
    ledger.strike(first)
    second = ledger.add(message(1))
    ledger.settle()
    assert ledger.take_news(True) == ([(7, entry(second, 1))], [(7, entry(first, 1)[:4])])
    assert ledger.waiting_from(7) == [entry(second, 1)]
    ledger.strike(second)
    ledger.settle()
    assert ledger.source_of(message(1)) == 0


def test_an_error_that_is_owed_stands_for_the_message_that_it_answers():
    """Until it is on its way, nobody was told what became of the message."""
    own = Ledger(1)
    gateway = DIDKey.from_seed(b"g" * 32).did
    own.begin(0, 0, gateway.encode())
    error = replies.error(gateway, A, "away_expired", correlation_id=name(1))
    own.source = 7
    first = own.add(message(1))
    own.source = 0
    own.take_news(True)
    own.strike(first)
    second = own.owe(error)
    assert own.take_news(True) == ([(7, entry(second, 1))], [(7, entry(first, 1)[:4])])
    own.settle()
    assert own.read(0, 0) == [record(1, source=7)]
    own.strike(second)
    own.settle()
    assert own.take_news(True) == ([], [(7, entry(second, 1)[:4])])
    assert own.read(0, 0) == []


def test_what_is_owed_for_a_message_that_never_waited_is_written_down_too():
    own = Ledger(1)
    gateway = DIDKey.from_seed(b"g" * 32).did
    own.begin(0, 0, gateway.encode())
    own.source = 7
    own.owe(replies.error(gateway, A, "not_online", correlation_id=name(1)))
    assert own.read(0, 0) == [(A, gateway, name(1), 7)]
    # What is no answer of the gateway to a message is not owed.
    for data in (
        replies.error(gateway, A, "too_large"),
        replies.error(B, A, "not_online", correlation_id=name(2)),
        replies.pong(gateway, A, name(2), None),
        message(2),
        b"{",
    ):
        own.strike(own.owe(data))
    assert own.size == 1
