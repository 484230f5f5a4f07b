"""ERRORs that cannot be sent for now: all are tried, in order, some at a time, and there are only so many."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from aiconexus.protocol import DIDKey
from gateway import replies
from gateway._ledger import Ledger
from gateway.debts import DEBTS_MAX, PAID_PER_TICK, Debts

GATEWAY, A = (DIDKey.from_seed(letter * 32).did for letter in (b"g", b"a"))


@pytest.fixture
def ledger() -> Ledger:
    ledger = Ledger(1)
    ledger.begin(0, 0, GATEWAY.encode())
    return ledger


def make(ledger: Ledger, pay: Callable[[str, bytes], None]) -> tuple[Debts, list[int]]:
    """Return debts, and the list that gets an item for each that is dropped."""
    dropped: list[int] = []
    return Debts(ledger, pay, lambda: dropped.append(1)), dropped


def test_what_is_owed_is_paid_once_in_order_when_it_is_due(ledger):
    paid: list[tuple[str, bytes]] = []
    debts, _ = make(ledger, lambda did, data: paid.append((did, data)))
    debts.owe("a", b"1")
    debts.owe("b", b"2")
    debts.pay_some()
    assert paid == []
    debts.fall_due()
    debts.pay_some()
    debts.pay_some()
    assert paid == [("a", b"1"), ("b", b"2")]
    assert len(debts) == 0


def test_what_cannot_be_paid_now_is_tried_again_when_it_is_due_again(ledger):
    tried: list[bytes] = []

    def pay(did: str, data: bytes) -> None:
        tried.append(data)
        if len(tried) == 1:
            debts.owe(did, data)

    debts, _ = make(ledger, pay)
    debts.owe("a", b"1")
    debts.fall_due()
    debts.pay_some()
    debts.pay_some()
    assert tried == [b"1"]
    assert len(debts) == 1
    debts.fall_due()
    debts.pay_some()
    assert tried == [b"1", b"1"]
    assert len(debts) == 0


def test_nobody_waits_while_many_are_paid(ledger):
    paid: list[bytes] = []
    debts, _ = make(ledger, lambda _, data: paid.append(data))
    for number in range(2 * PAID_PER_TICK + 1):
        debts.owe("a", b"%d" % number)
    debts.fall_due()
    debts.pay_some()
    assert len(paid) == PAID_PER_TICK
    debts.pay_some()
    debts.pay_some()
    assert paid == [b"%d" % number for number in range(2 * PAID_PER_TICK + 1)]


def test_the_oldest_debt_is_dropped_and_counted_when_there_are_too_many(ledger):
    paid: list[bytes] = []
    debts, dropped = make(ledger, lambda _, data: paid.append(data))
    debts.owe("a", b"first")
    debts.owe("a", b"second")
    debts.fall_due()
    for number in range(DEBTS_MAX):
        debts.owe("a", b"%d" % number)
    assert len(debts) == DEBTS_MAX
    assert len(dropped) == 2
    debts.pay_some()
    assert paid == []  # those that were due are gone
    debts.fall_due()
    debts.pay_some()
    assert paid[0] == b"0"


def test_what_is_owed_is_written_down_until_it_is_paid(ledger):
    debts, _ = make(ledger, lambda _did, _data: None)
    message_id = "00000001-0000-4000-8000-000000000000"
    debts.owe(A, replies.error(GATEWAY, A, "away_expired", correlation_id=message_id))
    assert ledger.read(0, 0) == [(A, GATEWAY, message_id, 0)]
    debts.fall_due()
    debts.pay_some()
    ledger.settle()
    assert ledger.read(0, 0) == []
