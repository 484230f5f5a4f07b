"""Messages that are lost all at once: every sender is told, and nobody else waits for that."""

from __future__ import annotations

import asyncio

import pytest
from offer_bytes import A, B, message, name

from gateway._ledger import Ledger
from gateway.losses import TOLD_PER_PASS, Losses

NAME, MESSAGE = name(1), message(1)


@pytest.fixture
def ledger() -> Ledger:
    ledger = Ledger(1)
    ledger.begin(0, 0)
    return ledger


async def test_all_are_told_in_order_a_few_in_each_pass_of_the_loop(ledger):
    told: list[int] = []
    flushed: list[int] = []
    losses = Losses(ledger, after=lambda: flushed.append(len(told)))
    count = 2 * TOLD_PER_PASS + 1
    for number in range(count):
        losses.add(lambda number=number: told.append(number))
    assert told == []
    for expected in (TOLD_PER_PASS, 2 * TOLD_PER_PASS, count):
        await asyncio.sleep(0)
        assert len(told) == flushed[-1] == expected
    assert told == list(range(count))
    assert len(losses) == 0


async def test_what_is_lost_is_written_down_until_its_sender_is_told(ledger):
    losses = Losses(ledger, after=lambda: None)
    losses.add(lambda: None, MESSAGE)
    assert ledger.read(0, 0) == [(A, B, NAME, 0)]
    await asyncio.sleep(0)
    ledger.settle()
    assert ledger.read(0, 0) == []


async def test_what_is_lost_because_one_is_told_has_its_turn(ledger):
    told: list[str] = []
    losses = Losses(ledger, after=lambda: None)

    def tell() -> None:
        told.append("first")
        losses.add(lambda: told.append("second"))

    losses.add(tell)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert told == ["first", "second"]


async def test_a_fault_with_one_keeps_no_other_from_being_told(ledger):
    faults: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context["exception"]))
    told: list[int] = []
    losses = Losses(ledger, after=lambda: None)
    losses.add(lambda: 1 // 0)
    losses.add(lambda: told.append(1))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert told == [1]
    assert len(faults) == 1
