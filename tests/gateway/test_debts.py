"""ERRORs that cannot be sent for now: all are tried, in order, and there are only so many."""

from __future__ import annotations

from gateway.debts import DEBTS_MAX, Debts


def test_what_is_owed_is_paid_once_in_order():
    paid: list[tuple[str, bytes]] = []
    debts = Debts(lambda did, data: paid.append((did, data)), lambda: None)
    debts.owe("a", b"1")
    debts.owe("b", b"2")
    debts.settle()
    debts.settle()
    assert paid == [("a", b"1"), ("b", b"2")]
    assert len(debts) == 0


def test_what_cannot_be_paid_now_is_tried_again_with_the_next_settlement():
    tried: list[bytes] = []

    def pay(did: str, data: bytes) -> None:
        tried.append(data)
        if len(tried) == 1:
            debts.owe(did, data)

    debts = Debts(pay, lambda: None)
    debts.owe("a", b"1")
    debts.settle()
    assert len(debts) == 1
    debts.settle()
    assert tried == [b"1", b"1"]
    assert len(debts) == 0


def test_the_oldest_debt_is_dropped_and_counted_when_there_are_too_many():
    paid: list[bytes] = []
    dropped: list[int] = []
    debts = Debts(lambda _, data: paid.append(data), lambda: dropped.append(1))
    for number in range(DEBTS_MAX + 2):
        debts.owe("a", b"%d" % number)
    assert len(debts) == DEBTS_MAX
    assert len(dropped) == 2
    debts.settle()
    assert paid[0] == b"2"
