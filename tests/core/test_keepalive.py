from aiconexus.core.keepalive import KeepAlive, Verdict


def test_silence_is_pinged_and_then_given_up() -> None:
    keepalive = KeepAlive(100.0, interval=5.0, timeout=10.0)
    assert keepalive.check(104.9) is Verdict.WAIT
    assert keepalive.check(105.0) is Verdict.PING
    assert keepalive.check(114.9) is Verdict.WAIT
    assert keepalive.check(115.0) is Verdict.DEAD


def test_any_message_is_a_sign_of_life() -> None:
    keepalive = KeepAlive(0.0, interval=5.0, timeout=10.0)
    assert keepalive.check(5.0) is Verdict.PING
    keepalive.heard(14.0)
    assert keepalive.due == 19.0
    assert keepalive.check(15.0) is Verdict.WAIT
    assert keepalive.check(19.0) is Verdict.PING


def test_process_that_was_suspended_asks_again_before_it_gives_up() -> None:
    keepalive = KeepAlive(0.0, interval=5.0, timeout=10.0)
    assert keepalive.check(5.0) is Verdict.PING
    assert keepalive.check(3_600.0) is Verdict.PING
    assert keepalive.check(3_610.0) is Verdict.DEAD
