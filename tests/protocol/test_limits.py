"""Relations between limits that other parts rely on."""

from aiconexus.protocol import limits
from aiconexus.protocol.errors import CAUSES


def test_texts_of_causes_name_the_real_limits():
    assert str(limits.MESSAGE_MAX_BYTES) in CAUSES["too_large"].message
    assert str(limits.MESSAGE_MAX_DEPTH) in CAUSES["too_deep"].message


def test_two_clocks_at_the_edge_of_registration_still_accept_each_other():
    assert limits.CLOCK_SKEW_SECONDS >= 2 * limits.REGISTER_CLOCK_SKEW_SECONDS


def test_an_away_queue_holds_one_message_of_any_size():
    assert limits.AWAY_MAX_BYTES >= limits.MESSAGE_MAX_BYTES


def test_a_write_queue_holds_a_whole_away_queue():
    assert limits.WRITE_QUEUE_MAX_BYTES > limits.AWAY_MAX_BYTES


def test_capabilities_fit_a_register():
    assert limits.CAPABILITIES_MAX_BYTES < limits.MESSAGE_MAX_BYTES


def test_a_dead_peer_is_noticed_before_its_call_times_out():
    noticed = limits.PEER_PING_INTERVAL_SECONDS + limits.PEER_PONG_TIMEOUT_SECONDS
    assert noticed < limits.CALL_TIMEOUT_SECONDS
