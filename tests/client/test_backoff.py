"""Backoff without sleeping."""

from __future__ import annotations

import random

import pytest

from aiconexus.client import Backoff


def longest() -> float:
    return 1.0


def shortest() -> float:
    return 0.0


def test_upper_bound_doubles_until_the_maximum() -> None:
    backoff = Backoff(0.5, 30, uniform=longest)
    assert [backoff.next() for _ in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]


def test_lower_bound_is_zero_full_jitter() -> None:
    backoff = Backoff(0.5, 30, uniform=shortest)
    assert [backoff.next() for _ in range(8)] == [0] * 8


def test_delays_fill_the_whole_range() -> None:
    source = random.Random(1)
    backoff = Backoff(1, 1, uniform=source.random)
    delays = [backoff.next() for _ in range(1_000)]
    assert min(delays) < 0.01
    assert max(delays) > 0.99
    assert 0.45 < sum(delays) / len(delays) < 0.55


def test_never_earlier_than_the_gateway_allows() -> None:
    assert Backoff(uniform=shortest).next(7.5) == 7.5
    assert Backoff(0.5, uniform=longest).next(7.5) == 8.0


def test_only_a_session_that_lasted_resets_it() -> None:
    backoff = Backoff(1, 60, lasting=10, uniform=longest)
    assert [backoff.next(), backoff.next()] == [1, 2]
    backoff.ended(9.9)
    assert backoff.next() == 4
    backoff.ended(10)
    assert backoff.next() == 1


def test_a_year_of_attempts_does_not_overflow() -> None:
    backoff = Backoff(uniform=longest)
    backoff.attempts = 1_000_000
    assert backoff.next() == backoff.maximum


@pytest.mark.parametrize(("base", "maximum"), [(0, 1), (-1, 1), (2, 1)])
def test_bounds_that_make_no_sense_are_refused(base: float, maximum: float) -> None:
    with pytest.raises(ValueError, match="base"):
        Backoff(base, maximum)
