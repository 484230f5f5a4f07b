"""Counters in shared memory: each worker writes its own, everybody reads all."""

from __future__ import annotations

import os

import pytest
from processes import forked

from gateway._counters import Counters
from gateway.node import Node, Tally


def test_what_workers_count_is_added_up():
    counters = Counters(3, ("a", "b"))
    counters.add(0, "a")
    counters.add(2, "a", 5)
    counters.add(2, "b")
    assert (counters.total("a"), counters.total("b"), counters.get(2, "a")) == (6, 1, 5)


def test_another_process_sees_what_one_counts():
    counters = Counters(2, ("a",))
    os.waitpid(forked(lambda: counters.add(1, "a", 7)), 0)
    assert counters.total("a") == 7


def test_a_dead_worker_leaves_its_counts_but_has_nothing_any_more():
    counters = Counters(2)
    counters.add(1, "messages_routed", 3)
    for gauge in ("connections", "sessions", "away", "waiting", "unconfirmed_bytes"):
        counters.set(1, gauge, 9)
        counters.set(0, gauge, 1)
    counters.reset_gauges(1)
    assert counters.total("messages_routed") == 3
    for gauge in ("connections", "sessions", "away", "waiting", "unconfirmed_bytes"):
        assert counters.total(gauge) == 1


def test_what_is_not_there_is_refused():
    counters = Counters(2, ("a",))
    with pytest.raises(IndexError):
        counters.add(2, "a")
    with pytest.raises(KeyError):
        counters.add(0, "b")
    with pytest.raises(ValueError, match="twice"):
        Counters(1, ("a", "a"))


def test_close_codes_that_clients_make_up_are_counted_together():
    node = Node.create(1, 10)
    tally = Tally(node.counters, 0)
    for code in (1000, 4001, 3123, 4321):
        tally.closed(code)
    tally.refused("not_json")
    assert node.totals()["closed"] == {"1000": 1, "4001": 1, "other": 2}
    assert node.totals()["refused"] == {"not_json": 1}
