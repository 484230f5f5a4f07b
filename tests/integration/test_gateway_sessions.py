"""Sessions: routing, takeover, away and resume, heartbeat, deadlines, drain."""

from __future__ import annotations

import json
import random
import select
import signal
import time
from contextlib import ExitStack

import pytest
from processes import send_signal
from wire import (
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    Agent,
    RawClient,
    agents_at,
    assert_exchange,
    close_frame,
    frame,
    upgrade_request,
    wait_until,
)

from aiconexus.protocol import (
    AnswerPayload,
    DIDKey,
    ErrorPayload,
    IceCandidatePayload,
    OfferPayload,
    PingPayload,
    RegisterPayload,
    verify_envelope,
)
from aiconexus.protocol.cards import sign_card


@pytest.fixture
def port(shared_gateway) -> int:
    return shared_gateway.port


def ids(messages: list[bytes]) -> list[str]:
    return [json.loads(data)["id"] for data in messages]


# --- the handshake ---------------------------------------------------------------------------------


def test_the_gateway_speaks_first_and_proves_its_key(port):
    with Agent(port, register=False) as agent:
        hello = agent.hello
        verify_envelope(hello)
        assert hello["from"] == hello["to"]
        assert hello["from"] == "did:key:" + hello["payload"]["public_key"]
        ext = hello["ext"]
        assert set(ext) == {"nonce", "features", "limits", "ping_interval_ms", "time"}
        assert abs(ext["time"] / 1000 - time.time()) < 60
        assert ext["limits"]["message_max_bytes"] == 65_536
        assert ext["ping_interval_ms"] == 25_000


def test_the_answer_to_register_is_signed_and_brings_a_session(port):
    with Agent(port) as agent, Agent(port) as other:
        assert set(agent.register_answer["ext"]) == {
            "session",
            "worker",
            "resume_token",
            "ice_servers",
            "resumed",
        }
        assert not agent.resumed
        assert agent.session != other.session
        assert agent.resume_token != other.resume_token


def test_an_agent_is_routable_when_it_has_its_answer(port):
    with Agent(port) as sender:
        for _ in range(20):
            with Agent(port) as fresh:
                data = sender.offer(fresh.did)
                sender.send(data)
                assert fresh.read_text() == data
                fresh.close()


# --- routing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload",
    [
        OfferPayload(sdp='v=0\r\no=- é€😀 \\ " / \x7f'),
        AnswerPayload(sdp=""),
        IceCandidatePayload(candidate="candidate:1", sdp_mid="0", sdp_mline_index=0),
        IceCandidatePayload(candidate=""),
        ErrorPayload.for_cause("busy", retry_after_ms=1000),
    ],
    ids=lambda payload: payload.type.value,
)
def test_a_message_arrives_as_the_exact_bytes(port, payload):
    with Agent(port) as a, Agent(port) as b:
        data = a.message(b.did, payload)
        a.send(data)
        assert b.read_text() == data


def test_white_space_order_and_escapes_of_a_message_are_kept(port):
    with Agent(port) as a, Agent(port) as b:
        envelope = a.envelope(b.did)
        items = list(envelope.items())
        for seed in range(10):
            random.Random(seed).shuffle(items)
            text = json.dumps(dict(items), indent=seed % 3 or None).replace("v=0", "v\\u003d0")
            data = f" \t\r\n{text}\n ".encode()
            a.send(data)
            assert b.read_text() == data


def test_a_message_to_oneself_comes_back(port):
    with Agent(port) as agent:
        data = agent.offer(agent.did)
        agent.send(data)
        assert agent.read_text() == data


@pytest.mark.parametrize("size", [1500, 4096, 65_535, 65_536])
def test_large_messages_arrive_whole(port, size):
    with Agent(port) as a, Agent(port) as b:
        data = a.offer(b.did, size)
        a.send(data)
        assert b.read_text() == data


@pytest.mark.parametrize("extra", [-2, -1, 0, 1, 2])
def test_every_length_form_of_the_frame_header_is_written_right(port, extra):
    """RFC 6455 section 5.2: over 65,535 bytes the length has 64 bits. No message is under 126."""
    with Agent(port) as a, Agent(port) as b:
        for around in (4096, 65_534):
            data = a.offer(b.did, around + extra)
            a.send(data)
            assert b.read_text() == data


def test_a_burst_arrives_in_order(port):
    with Agent(port) as a, Agent(port) as b, Agent(port) as c:
        to_b = [a.candidate(b.did, number) for number in range(500)]
        to_c = [a.candidate(c.did, number) for number in range(500)]
        mixed = [data for pair in zip(to_b, to_c, strict=True) for data in pair]
        a.send(*mixed)
        assert [b.read_text() for _ in to_b] == to_b
        assert [c.read_text() for _ in to_c] == to_c


def test_an_unknown_agent_is_answered_at_once_and_in_order(port):
    with Agent(port) as a, Agent(port) as b:
        nobody = DIDKey.generate().did
        lost = [a.offer(nobody) for _ in range(3)]
        found = a.offer(b.did)
        a.send(lost[0], found, *lost[1:])
        for name in ids(lost):
            assert a.receive_error("not_online", name)["code"] == "UNKNOWN_AGENT"
        assert b.read_text() == found


def test_a_ping_is_answered_with_its_sequence(port):
    with Agent(port) as agent:
        for sequence in (None, 0, -1, 2**53 - 1):
            payload = PingPayload() if sequence is None else PingPayload(sequence=sequence)
            data = agent.message(agent.gateway_did, payload)
            agent.send(data)
            pong = agent.receive()
            assert (pong["type"], pong["correlation_id"]) == ("PONG", json.loads(data)["id"])
            assert pong["payload"] == ({} if sequence is None else {"sequence": sequence})


def test_health_counts_what_goes_through(start_gateway):
    gateway = start_gateway()
    with Agent(gateway.port) as a, Agent(gateway.port) as b:
        data = a.offer(b.did)
        a.send(data, data)
        assert [b.read_text(), b.read_text()] == [data, data]
        state = gateway.health()
        assert (state["connections"], state["sessions"], state["away"]) == (2, 2, 0)
        counters = state["counters"]
        assert counters["messages_routed"] == 2
        assert counters["bytes_routed"] == 2 * len(data)
        assert counters["messages_received"] == 4
        b.close()
        wait_until(lambda: gateway.health()["sessions"] == 1)
        assert gateway.health()["counters"]["closed"] == {"1000": 1}


# --- one DID, one session --------------------------------------------------------------------------


def test_the_newest_proven_session_wins(port):
    with Agent(port) as other, Agent(port) as old, Agent(port, old.key) as new:
        close = old.read_close()
        assert (close.close_code, close.close_reason) == (4504, {"n": "replaced"})
        assert_exchange(new, other)
        assert (new.resumed, new.session == old.session) == (False, False)


@pytest.mark.parametrize("end", ["close", "drop", "reset", "timeout"])
def test_late_close_of_a_replaced_session_keeps_the_new_route(shared_gateway, port, end):
    with Agent(port) as other, Agent(port) as old:
        state = shared_gateway.health()
        with Agent(port, old.key) as new:
            assert old.read_close().close_code == 4504
            if end == "close":
                old.write(close_frame(4504))
                old.assert_ended()
            elif end != "timeout":
                getattr(old, end)()
            wait_until(lambda: shared_gateway.health()["connections"] == state["connections"])
            assert_exchange(new, other)
            assert shared_gateway.health()["sessions"] == state["sessions"]
            assert shared_gateway.health()["away"] == state["away"]


def test_what_a_replaced_session_still_sends_is_ignored(port):
    with Agent(port) as other, Agent(port) as old, Agent(port, old.key):
        old.send(old.offer(other.did))
        assert old.read_close().close_code == 4504
        other.ping()  # and so: nothing came


def test_takeovers_in_a_row_leave_one_session(shared_gateway, port):
    sessions = shared_gateway.health()["sessions"]
    key = DIDKey.generate()
    agents = [Agent(port, key) for _ in range(20)]
    assert shared_gateway.health()["sessions"] == sessions + 1
    with Agent(port) as other:
        assert_exchange(agents[-1], other)
    for agent in agents:
        agent.drop()


def test_a_refused_takeover_leaves_the_old_session_alone(port):
    with Agent(port) as old, Agent(port, old.key, register=False) as new:
        new.send(new.signed(new.registration(ext={"nonce": "wrong"})))
        assert new.receive()["type"] == "ERROR"
        old.ping()


def test_a_takeover_that_resumes_keeps_the_session(port):
    with Agent(port) as old, Agent(port, old.key, resume=old.resume_token) as new:
        assert old.read_close().close_code == 4504
        assert new.resumed
        assert new.session == old.session
        assert new.resume_token != old.resume_token


# --- away and resume -------------------------------------------------------------------------------


def gone(gateway, agent: Agent, how: str = "drop") -> None:
    """End an agent's connection and wait until the gateway has seen it."""
    away = gateway.health()["away"]
    getattr(agent, how)()
    wait_until(lambda: gateway.health()["away"] == away + 1)


def leave(gateway, agent: Agent, *messages: bytes) -> None:
    """Send messages to an agent that is away, and wait until they wait for it.

    They may be on their way to another worker still when a PONG is there, and then reach the next session.
    """
    agent.send(*messages)
    wait_until(lambda: gateway.health()["waiting"] == len(messages))


@pytest.mark.parametrize("how", ["drop", "reset"])
def test_messages_wait_for_an_agent_that_dropped_and_come_in_order(gateway, how):
    with Agent(gateway.port) as a, Agent(gateway.port) as b:
        gone(gateway, b, how)
        sent = [a.candidate(b.did, number) for number in range(64)]
        a.send(*sent)
        a.ping()
        with Agent(gateway.port, b.key, resume=b.resume_token) as back:
            assert back.resumed
            assert back.session == b.session
            assert [back.read_text() for _ in sent] == sent
            assert_exchange(a, back)
            assert gateway.health()["away"] == 0


@pytest.mark.parametrize("code", [1001, 1011, 3000, 4000])
def test_any_close_but_the_normal_one_may_be_followed_by_a_resume(gateway, code):
    with Agent(gateway.port) as a:
        b = Agent(gateway.port)
        b.close(code)
        wait_until(lambda: gateway.health()["away"] == 1)
        data = a.offer(b.did)
        a.send(data)
        a.ping()
        with Agent(gateway.port, b.key, resume=b.resume_token) as back:
            assert back.read_text() == data


def say_goodbye_before_an_offer(gateway, target: Agent, code: int, sender: Agent) -> bytes:
    """Let the gateway read a CLOSE and an OFFER to who sent it at once, while that one's socket is open."""
    data = sender.offer(target.did)
    target.ping()  # epoll may still list who was read last, and then reads that one first
    gateway.signal_workers(signal.SIGSTOP)
    target.write(close_frame(code))
    sender.send(data)
    gateway.signal_workers(signal.SIGCONT)
    assert target.read_close().close_code == code
    return data


@pytest.mark.parametrize("workers", ["1", "2"])
def test_who_is_just_saying_goodbye_is_not_online(start_gateway, workers):
    gateway = start_gateway("--workers", workers)
    with Agent(gateway.port) as a, Agent(gateway.port) as b:
        data = say_goodbye_before_an_offer(gateway, b, 1000, a)
        a.receive_error("not_online", json.loads(data)["id"])


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_offer_waits_for_who_is_just_going_away(start_gateway, workers):
    gateway = start_gateway("--workers", workers)
    with Agent(gateway.port) as a, Agent(gateway.port) as b:
        data = say_goodbye_before_an_offer(gateway, b, 1001, a)
        a.ping()
        with Agent(gateway.port, b.key, resume=b.resume_token) as back:
            assert back.read_text() == data


@pytest.mark.parametrize("token", [None, "", "wrong"])
def test_without_the_right_token_what_waits_goes_back(gateway, token):
    with Agent(gateway.port) as a, Agent(gateway.port) as b:
        gone(gateway, b)
        sent = [a.candidate(b.did, number) for number in range(3)]
        leave(gateway, a, *sent)
        with Agent(gateway.port, b.key, resume=token) as back:
            assert not back.resumed
            assert back.session != b.session
            for name in ids(sent):
                assert a.receive_error("away_expired", name)["code"] == "UNKNOWN_AGENT"
            assert_exchange(a, back)


def test_a_resume_token_works_once(gateway):
    with Agent(gateway.port) as b:
        gone(gateway, b)
        with Agent(gateway.port, b.key, resume=b.resume_token) as first:
            assert first.resumed
            gone(gateway, first)
            with Agent(gateway.port, b.key, resume=b.resume_token) as second:
                assert not second.resumed


def test_the_token_of_another_agent_does_not_resume(gateway):
    with Agent(gateway.port) as a, Agent(gateway.port) as b:
        gone(gateway, b)
        with Agent(gateway.port, a.key, resume=b.resume_token) as thief:
            assert not thief.resumed


def test_65_messages_are_one_too_many(gateway):
    with Agent(gateway.port) as a, Agent(gateway.port) as b:
        gone(gateway, b)
        sent = [a.candidate(b.did, number) for number in range(66)]
        a.send(*sent)
        for name in ids(sent[64:]):
            error = a.receive_error("away_full", name)
            assert (error["code"], error["details"]["temporary"]) == ("UNKNOWN_AGENT", True)
        with Agent(gateway.port, b.key, resume=b.resume_token) as back:
            assert [back.read_text() for _ in range(64)] == sent[:64]
            back.ping()


def test_64_kib_are_the_most_that_waits(gateway):
    with Agent(gateway.port) as a, Agent(gateway.port) as b:
        gone(gateway, b)
        sent = [a.offer(b.did, 40_000), a.offer(b.did, 25_537), a.offer(b.did, 25_536), a.offer(b.did, 700)]
        a.send(*sent)
        for refused in (sent[1], sent[3]):
            a.receive_error("away_full", json.loads(refused)["id"])
        with Agent(gateway.port, b.key, resume=b.resume_token) as back:
            assert [back.read_text(), back.read_text()] == [sent[0], sent[2]]


def test_when_the_time_is_up_what_waits_goes_back_and_the_agent_is_unknown(start_gateway):
    gateway = start_gateway("--away", "2")
    with Agent(gateway.port) as a, Agent(gateway.port) as b:
        gone(gateway, b)
        sent = [a.candidate(b.did, number) for number in range(3)]
        a.send(*sent)
        for name in ids(sent):
            a.receive_error("away_expired", name)
        state = gateway.health()
        assert (state["away"], state["sessions"]) == (0, 1)
        late = a.offer(b.did)
        a.send(late)
        a.receive_error("not_online", json.loads(late)["id"])
        with Agent(gateway.port, b.key, resume=b.resume_token) as back:
            assert not back.resumed


def test_with_no_time_to_be_away_a_dropped_agent_is_unknown_at_once(start_gateway):
    gateway = start_gateway("--away", "0")
    with Agent(gateway.port) as a, Agent(gateway.port) as b:
        b.drop()
        wait_until(lambda: gateway.health()["sessions"] == 1)
        data = a.offer(b.did)
        a.send(data)
        a.receive_error("not_online", json.loads(data)["id"])
        assert gateway.health()["away"] == 0


def test_an_error_for_an_agent_that_is_away_itself_waits_for_it(gateway):
    """a writes to b, who is away; then a drops, too. What comes back from b's queue finds a at its return."""
    with Agent(gateway.port) as a, Agent(gateway.port) as b:
        gone(gateway, b)
        data = a.offer(b.did)
        leave(gateway, a, data)
        gone(gateway, a)
        with Agent(gateway.port, b.key), Agent(gateway.port, a.key, resume=a.resume_token) as back:
            back.receive_error("away_expired", json.loads(data)["id"])


# --- the ends of sessions --------------------------------------------------------------------------


def test_unregister_ends_the_session_with_1000(gateway):
    with Agent(gateway.port) as a, Agent(gateway.port) as b:
        b.unregister()
        assert b.read_close().close_code == 1000
        data = a.offer(b.did)
        a.send(data)
        a.receive_error("not_online", json.loads(data)["id"])
        b.write(close_frame(1000))
        b.assert_ended()
        state = gateway.health()
        assert (state["sessions"], state["away"]) == (1, 0)


def test_a_normal_close_ends_the_session(gateway):
    with Agent(gateway.port) as a:
        for code in (1000, None):
            b = Agent(gateway.port)
            b.close(code)
            wait_until(lambda: gateway.health()["sessions"] == 1)
            data = a.offer(b.did)
            a.send(data)
            a.receive_error("not_online", json.loads(data)["id"])
            assert gateway.health()["away"] == 0


def test_silence_is_a_register_timeout(start_gateway):
    gateway = start_gateway("--register-timeout", "2")
    with Agent(gateway.port, register=False) as agent, Agent(gateway.port) as registered:
        agent.receive_error("register_timeout", None)
        close = agent.read_close()
        assert (close.close_code, close.close_reason) == (4007, {"n": "register_timeout", "r": 1000})
        registered.ping()
        assert gateway.health()["counters"]["refused"] == {"register_timeout": 1}


def test_half_a_register_is_a_register_timeout(start_gateway):
    gateway = start_gateway("--register-timeout", "2")
    with Agent(gateway.port, register=False) as agent:
        data = agent.signed(agent.registration())
        agent.write(frame(TEXT, data[:100], fin=False) + frame(PING, b"x") + frame(0, data[100:])[:-1])
        assert agent.read_close().close_code == 4007


def test_a_connection_that_sends_no_request_is_ended(start_gateway):
    gateway = start_gateway("--register-timeout", "0.3")
    with RawClient(gateway.port) as silent, RawClient(gateway.port) as slow:
        slow.write(b"GET /ws HTTP/1.1\r\n")
        silent.assert_ended()
        slow.assert_ended()


def test_silence_is_pinged_and_an_answer_keeps_the_session(start_gateway):
    gateway = start_gateway("--ping-interval", "0.3", "--pong-timeout", "1.5")
    with Agent(gateway.port) as agent:
        for _ in range(4):
            ping = agent.read_frame()
            assert ping.opcode == PING
            agent.write_frame(PONG, ping.payload)
        agent.ping()
        assert gateway.health()["counters"]["pings_sent"] >= 4


def talk_until_told(agent: Agent, silent: Agent) -> None:
    """Let one agent send messages until the gateway has something to say to another that is silent."""
    for _ in range(200):
        agent.ping()
        if select.select([silent.socket], [], [], 0.05)[0]:
            return


def test_an_agent_that_talks_is_not_pinged(start_gateway):
    gateway = start_gateway("--workers", "1", "--ping-interval", "2")
    # One clock for both, and its time comes first.
    with Agent(gateway.port) as agent, Agent(gateway.port) as silent:
        talk_until_told(agent, silent)
        assert silent.read_frame().opcode == PING
        assert gateway.health()["counters"]["pings_sent"] == 1


def test_a_ping_without_an_answer_is_4004_and_may_be_resumed(start_gateway):
    gateway = start_gateway("--ping-interval", "0.3", "--pong-timeout", "0.3")
    with Agent(gateway.port) as dead:
        close = dead.read_close()
        assert (close.close_code, close.close_reason) == (4004, {"n": "no_pong", "r": 500})
        wait_until(lambda: gateway.health()["away"] == 1)
    with Agent(gateway.port, dead.key, resume=dead.resume_token) as back:
        assert back.resumed


def test_any_frame_answers_a_ping(start_gateway):
    gateway = start_gateway("--ping-interval", "0.3", "--pong-timeout", "1.5")
    with Agent(gateway.port) as agent:
        for _ in range(4):
            assert agent.read_frame().opcode == PING
            agent.ping()


def test_a_session_without_messages_is_idle_whatever_else_it_sends(start_gateway):
    gateway = start_gateway("--idle-timeout", "1", "--ping-interval", "0.2")
    with Agent(gateway.port) as idle:
        kinds = []
        while CLOSE not in kinds:
            got = idle.read_frame()
            kinds.append(got.opcode)
            if got.opcode == PING:
                idle.write_frame(PONG, got.payload)
        assert PING in kinds
        assert (got.close_code, got.close_reason) == (4006, {"n": "idle", "r": 1000})
        wait_until(lambda: gateway.health()["sessions"] == 0)
        assert gateway.health()["away"] == 0


def test_messages_keep_a_session_from_being_idle(start_gateway):
    gateway = start_gateway("--workers", "1", "--idle-timeout", "2")
    with Agent(gateway.port) as agent, Agent(gateway.port) as silent:
        talk_until_told(agent, silent)
        assert silent.read_close().close_code == 4006
        agent.ping()


# --- drain -----------------------------------------------------------------------------------------


def test_sigterm_sends_every_agent_away_with_a_time_to_return(start_gateway):
    gateway = start_gateway()
    agents = [Agent(gateway.port) for _ in range(20)]
    unregistered = Agent(gateway.port, register=False)
    gateway.signal(signal.SIGTERM)
    delays = set()
    for agent in [*agents, unregistered]:
        close = agent.read_close()
        assert close.close_code == 4001
        assert close.close_reason["n"] == "draining"
        delays.add(close.close_reason["r"])
        agent.write(close_frame(4001))
        agent.assert_ended()
        agent.drop()
    assert len(delays) > 5, "they would all return at once"
    assert all(500 <= delay < 2000 for delay in delays)
    assert gateway.wait() == 0


def test_messages_sent_before_the_drain_arrive_before_the_close(start_gateway):
    gateway = start_gateway()
    with Agent(gateway.port) as a, Agent(gateway.port) as b:
        sent = [a.candidate(b.did, number) for number in range(100)]
        a.send(*sent)
        a.ping()
        gateway.signal(signal.SIGTERM)
        assert [b.read_text() for _ in sent] == sent
        assert b.read_frame().close_code == 4001


def test_a_drain_does_not_wait_for_ever(start_gateway):
    gateway = start_gateway()
    with Agent(gateway.port), RawClient(gateway.port):
        started = time.monotonic()
        gateway.signal(signal.SIGTERM)
        assert gateway.wait() == 0
        assert time.monotonic() - started < 8  # and not after the 10 s of a drain


def test_a_second_sigterm_ends_it_at_once(start_gateway):
    gateway = start_gateway()
    with Agent(gateway.port) as agent:
        gateway.signal(signal.SIGTERM)
        assert agent.read_close().close_code == 4001  # and is not answered
        started = time.monotonic()
        gateway.signal(signal.SIGTERM)
        assert gateway.wait() == 0
        assert time.monotonic() - started < 1.5  # and not after the 2 s for which a CLOSE is awaited


def test_sigint_drains_as_well(start_gateway):
    gateway = start_gateway()
    with Agent(gateway.port) as agent:
        gateway.signal(signal.SIGINT)
        assert agent.read_close().close_code == 4001
    assert gateway.wait() == 0


def test_an_upgrade_during_the_drain_is_503(start_gateway):
    gateway = start_gateway()
    with Agent(gateway.port) as agent, RawClient(gateway.port) as late:
        request = upgrade_request(gateway.port)
        late.write(request[:-2])
        agent.ping()
        gateway.signal(signal.SIGTERM)
        assert agent.read_close().close_code == 4001
        late.write(request[-2:])
        status, headers = late.read_head()
        assert status == 503
        assert 1 <= int(headers["retry-after"]) <= 10


def test_a_gateway_on_the_same_port_serves_the_agents_again(start_gateway, tmp_path):
    identity = tmp_path / "gateway.pem"
    gateway = start_gateway("--identity", str(identity))
    with Agent(gateway.port) as a, Agent(gateway.port) as b:
        before = a.gateway_did
        gateway.kill()
        gateway.start()
        with Agent(gateway.port, a.key, resume=a.resume_token) as a2, Agent(gateway.port, b.key) as b2:
            assert a2.gateway_did == before
            assert not a2.resumed
            assert_exchange(a2, b2)


def test_a_public_url_is_the_only_audience(start_gateway):
    gateway = start_gateway("--public-url", "wss://gateway.example/ws")
    with Agent(gateway.port, register=False) as agent:
        agent.url = "wss://gateway.example:443/ws"
        agent.register()
    with Agent(gateway.port, register=False) as agent:
        agent.send(agent.signed(agent.registration()))
        assert agent.receive()["payload"]["details"]["name"] == "wrong_audience"


def test_registration_with_a_card_and_unknown_ext_keys(port):
    with Agent(port, register=False) as agent:
        capabilities = [
            {"name": "a", "description": "é", "tags": ["x"], "input": {"type": "object"}, "new": [1.5]}
        ]
        card = sign_card(capabilities, agent.key)
        agent.send(agent.signed(agent.registration(ext={"card": card, "future": {"x": None}})))
        assert agent.receive()["type"] == "REGISTER"


def test_a_public_key_is_the_one_in_the_did(port):
    with Agent(port, register=False) as agent:
        payload = RegisterPayload(public_key=agent.did)
        agent.send(agent.signed(agent.registration(payload=payload)))
        assert agent.receive()["payload"]["details"]["name"] == "wrong_key"


# --- what a gateway must not do --------------------------------------------------------------------


def test_time_in_which_the_gateway_stood_still_is_nobodys_silence(start_gateway):
    gateway = start_gateway("--ping-interval", "1", "--pong-timeout", "1")
    with Agent(gateway.port) as agent:
        gateway.signal_workers(signal.SIGSTOP)
        time.sleep(3.5)  # longer than both together: the time itself is what is tested
        agent.write_frame(PONG)  # a sign of life that it can only read when it runs again
        gateway.signal_workers(signal.SIGCONT)
        data = agent.message(agent.gateway_did, PingPayload(sequence=7))
        agent.send(data)
        while (got := agent.read_frame()).opcode == PING:
            agent.write_frame(PONG, got.payload)
        assert got.opcode == TEXT, got
        assert json.loads(got.payload)["type"] == "PONG"
        assert "4004" not in gateway.health()["counters"]["closed"]


def test_a_drain_returns_what_waits_for_an_agent_that_is_away(start_gateway):
    gateway = start_gateway()
    with Agent(gateway.port) as a, Agent(gateway.port) as b:
        gone(gateway, b)
        data = a.offer(b.did)
        leave(gateway, a, data)
        gateway.signal(signal.SIGTERM)
        a.receive_error("away_expired", json.loads(data)["id"])
        assert a.read_close().close_code == 4001
        a.write(close_frame(4001))
        assert gateway.wait() == 0


def test_a_drain_closes_no_sender_before_all_workers_have_given_back_what_waits(start_gateway):
    gateway = start_gateway("--workers", "2")
    (a,), (b,) = (agents_at(gateway.port, worker, 1) for worker in (0, 1))
    with a, b:
        gone(gateway, b)
        data = a.offer(b.did)
        leave(gateway, a, data)
        keeper = gateway.worker_pids[1]
        send_signal(keeper, signal.SIGSTOP)
        gateway.signal(signal.SIGTERM)
        wait_until(lambda: "draining" in gateway.log)
        assert not select.select([a.socket], [], [], 0.5)[0]
        send_signal(keeper, signal.SIGCONT)
        a.receive_error("away_expired", json.loads(data)["id"])
        assert a.read_close().close_code == 4001
        a.write(close_frame(4001))
        assert gateway.wait() == 0


def test_a_drain_waits_until_what_has_expired_just_now_is_told(start_gateway):
    """It is told a few at a time: more than in the moment before agents are sent away."""
    gateway = start_gateway("--workers", "1", "--away", "2", "--message-rate", "0")
    with ExitStack() as stack:
        # Many senders, as one that reads slower than all is told would be a slow consumer.
        senders = [stack.enter_context(Agent(gateway.port)) for _ in range(30)]
        away = [Agent(gateway.port) for _ in range(300)]
        sent = {
            sender: [sender.candidate(agent.did, number) for agent in away[place::30] for number in range(64)]
            for place, sender in enumerate(senders)
        }
        for agent in away:
            agent.drop()
        for sender, messages in sent.items():
            sender.send(*messages)
        first = json.loads(senders[0].read_text())["correlation_id"]
        gateway.signal(signal.SIGTERM)
        for sender, messages in sent.items():
            told = {first} if sender is senders[0] else set()
            told |= {json.loads(sender.read_text())["correlation_id"] for _ in messages[len(told) :]}
            assert told == set(ids(messages))
            assert sender.read_close().close_code == 4001
            sender.write(close_frame(4001))
        assert gateway.wait() == 0


def test_a_message_in_too_many_fragments_is_refused(gateway):
    with Agent(gateway.port) as agent:
        agent.write(frame(TEXT, b"{", fin=False) + frame(CONTINUATION, b"", fin=False) * 4096)
        assert agent.read_close().close_code == 1009


def test_a_refused_upgrade_is_one_line_in_the_log(gateway):
    with RawClient(gateway.port) as client:
        status, _, _ = client.request(upgrade_request(gateway.port, path="/elsewhere"))
    assert status == 404
    lines = [json.loads(line) for line in gateway.log.splitlines()]
    assert [line["path"] for line in lines if line["event"] == "http refused"] == ["/elsewhere"]
