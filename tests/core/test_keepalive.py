from __future__ import annotations

from collections.abc import Callable

from aiconexus.core.keepalive import KeepAlive, Verdict


def verdicts(
    keepalive: KeepAlive, until: float, received: Callable[[float], int] = lambda now: 0
) -> list[tuple[float, Verdict]]:
    """Check whenever it is due; return when it had something to say, and what."""
    found: list[tuple[float, Verdict]] = []
    while keepalive.due <= until and (not found or found[-1][1] is not Verdict.DEAD):
        now = keepalive.due
        verdict = keepalive.check(now, received=received(now))
        if verdict is not Verdict.WAIT:
            found.append((now, verdict))
    return found


def test_silence_is_pinged_and_then_given_up() -> None:
    keepalive = KeepAlive(100.0, interval=5.0, timeout=10.0)
    assert keepalive.check(104.9) is Verdict.WAIT
    assert verdicts(keepalive, until=115.0) == [(105.0, Verdict.PING), (115.0, Verdict.DEAD)]


def test_any_message_is_a_sign_of_life() -> None:
    keepalive = KeepAlive(0.0, interval=5.0, timeout=10.0)
    assert keepalive.check(5.0) is Verdict.PING
    keepalive.heard(7.0)
    assert keepalive.due == 12.0
    assert keepalive.check(7.5) is Verdict.WAIT
    keepalive.heard(14.0)
    assert keepalive.due == 19.0
    assert keepalive.check(15.0) is Verdict.WAIT
    assert keepalive.check(19.0) is Verdict.PING


def test_process_that_was_suspended_asks_again_before_it_gives_up() -> None:
    keepalive = KeepAlive(0.0, interval=5.0, timeout=10.0)
    assert keepalive.check(5.0) is Verdict.PING
    assert keepalive.check(3_600.0) is Verdict.PING
    assert verdicts(keepalive, until=3_610.0) == [(3_610.0, Verdict.DEAD)]


def test_peer_whose_packets_come_is_not_dead_however_late_its_pong() -> None:
    keepalive = KeepAlive(0.0, interval=5.0, timeout=10.0)
    assert verdicts(keepalive, until=60.0, received=int) == [(5.0, Verdict.PING)]
    # From then on nothing comes.
    assert verdicts(keepalive, until=80.0, received=lambda now: 60) == [(70.0, Verdict.DEAD)]


def test_peer_that_acknowledges_the_ping_and_nothing_else_is_dead() -> None:
    keepalive = KeepAlive(0.0, interval=5.0, timeout=10.0)
    found = verdicts(keepalive, until=30.0, received=lambda now: 100 if now > 5 else 0)
    assert found == [(5.0, Verdict.PING), (17.5, Verdict.DEAD)]


def test_congested_peer_that_takes_nothing_is_stalled() -> None:
    keepalive = KeepAlive(0.0, interval=5.0, timeout=10.0, stall=60.0)
    for now in range(0, 60, 4):
        keepalive.heard(now)  # it asks and asks
        assert keepalive.check(now, taken=7, is_congested=True) is Verdict.WAIT
    assert keepalive.check(60.0, taken=7, is_congested=True) is Verdict.STALLED


def test_congested_peer_that_takes_a_message_now_and_then_is_not_stalled() -> None:
    keepalive = KeepAlive(0.0, stall=60.0)
    for now in range(0, 600, 5):
        keepalive.heard(now)
        assert keepalive.check(now, taken=now // 50, is_congested=True) is Verdict.WAIT
