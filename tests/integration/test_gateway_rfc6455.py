"""What RFC 6455 asks of the gateway, on raw sockets. The numbers in names are sections of the RFC."""

from __future__ import annotations

import json
import socket

import pytest
from wire import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    Agent,
    RawClient,
    assert_exchange,
    close_frame,
    frame,
    upgrade_request,
    wait_until,
)

from aiconexus.protocol import PingPayload

LIMIT = 65_536


@pytest.fixture
def port(shared_gateway) -> int:
    return shared_gateway.port


@pytest.fixture
def agent(port):
    with Agent(port) as agent:
        yield agent


def assert_closed(client: RawClient, code: int) -> None:
    assert client.read_close().close_code == code
    client.write(close_frame(code))
    client.assert_ended()


# --- the upgrade (section 4.2) ---------------------------------------------------------------------


def test_the_accept_key_is_that_of_the_rfc_4_2_2(port):
    with RawClient(port) as client:
        client.write(upgrade_request(port, Sec_WebSocket_Key="dGhlIHNhbXBsZSBub25jZQ=="))
        status, headers = client.read_head()
        assert status == 101
        assert headers["sec-websocket-accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
        assert headers["sec-websocket-protocol"] == "ioap.v1"
        assert headers["upgrade"].lower() == "websocket"
        assert headers["connection"].lower() == "upgrade"
        assert "sec-websocket-extensions" not in headers


def test_the_first_message_comes_in_the_same_segment_as_the_101(port):
    with RawClient(port) as client:
        client.write(upgrade_request(port))
        head, _, rest = client.socket.recv(65_536).partition(b"\r\n\r\n")
        client.buffer = rest
        assert head.startswith(b"HTTP/1.1 101 ")
        client.socket.setblocking(False)
        assert json.loads(client.read_frame().payload)["type"] == "REGISTER"


@pytest.mark.parametrize(
    "changed",
    [
        {"Connection": "keep-alive, Upgrade"},
        {"Connection": "Upgrade,keep-alive"},
        {"Connection": "upgrade"},
        {"Upgrade": "WebSocket"},
        {"Sec_WebSocket_Protocol": "chat, ioap.v1"},
        {"Sec_WebSocket_Extensions": "permessage-deflate; client_max_window_bits"},
        {"Origin": "null", "Cookie": "a=b", "User_Agent": "x" * 2000},
    ],
    ids=str,
)
def test_upgrades_that_browsers_and_proxies_send_work(port, changed):
    with RawClient(port) as client:
        assert client.upgrade(**changed)["type"] == "REGISTER"


def test_without_a_subprotocol_none_is_answered(port):
    with RawClient(port) as client:
        client.write(upgrade_request(port, without="Sec-WebSocket-Protocol"))
        status, headers = client.read_head()
        assert (status, headers.get("sec-websocket-protocol")) == (101, None)


def test_tls_is_refused_at_its_first_byte(start_gateway):
    gateway = start_gateway("--workers", "1")
    with RawClient(gateway.port) as client:
        status, headers, body = client.request(b"\x16")
    assert (status, headers["content-length"]) == (400, str(len(body)))
    assert b"does not speak TLS" in body
    with RawClient(gateway.port) as client:  # a whole handshake in pieces is no other
        client.write(b"\x16\x03\x01")
        client.read_to_end()
    with RawClient(gateway.port) as client:  # and behind the beginning of a request it is none
        client.write(b"GET")
        client.write(b"\x16 / HTTP/1.1\r\n\r\n")
        client.read_to_end()
    wait_until(lambda: gateway.health()["counters"]["refused"]["http_400"] == 2)
    texts = [line["text"] for line in gateway.log_lines() if line["event"] == "http refused"]
    assert [text for text in texts if "TLS" in text] == ["TLS is not spoken here"] * 2


@pytest.mark.parametrize(
    ("request_of", "status"),
    [
        (lambda port: upgrade_request(port, without="Host"), 400),
        (lambda port: upgrade_request(port).replace(b"\r\n\r\n", b"\r\nHost: other\r\n\r\n"), 400),
        (lambda port: upgrade_request(port, Sec_WebSocket_Version="8"), 426),
        (lambda port: upgrade_request(port, without="Sec-WebSocket-Version"), 426),
        (lambda port: upgrade_request(port, Sec_WebSocket_Protocol="chat"), 400),
        (lambda port: upgrade_request(port, without="Upgrade"), 426),
        (lambda port: upgrade_request(port, Upgrade="h2c"), 426),
        (lambda port: upgrade_request(port, without="Connection"), 400),
        (lambda port: upgrade_request(port, Connection="keep-alive"), 400),
        (lambda port: upgrade_request(port, without="Sec-WebSocket-Key"), 400),
        (lambda port: upgrade_request(port, Sec_WebSocket_Key="too short"), 400),
        (lambda port: upgrade_request(port, path="/"), 404),
        (lambda port: upgrade_request(port, path="/ws/other"), 404),
        (lambda port: upgrade_request(port, Content_Length="3") + b"abc", 400),
        (lambda port: upgrade_request(port).replace(b"GET", b"POST"), 400),
        (lambda port: upgrade_request(port).replace(b"HTTP/1.1", b"HTTP/1.0"), 400),
        (lambda port: b"GET /ws\r\n\r\n", 400),
        (lambda port: b"\r\n\r\n", 400),
        (lambda port: b"\xff\xfe\x00 \x80 \x81\r\n\xff: \xff\r\n\r\n", 400),
        (lambda port: upgrade_request(port, X="\xff\xfe"), 101),
        (lambda port: upgrade_request(port, without="Host").replace(b"Upgrade:", b"Upgr\xffade:"), 400),
        (lambda port: upgrade_request(port).replace(b"Upgrade: websocket", b"Upgrade websocket"), 400),
        (lambda port: upgrade_request(port, path="/ws?token=1"), 101),
        (lambda port: upgrade_request(port, path="/\xff"), 404),
    ],
)
def test_what_is_no_upgrade_gets_its_http_status(port, request_of, status):
    with RawClient(port) as client:
        client.write(request_of(port))
        assert client.read_head()[0] == status


def test_the_426_names_the_version_that_is_spoken_4_4(port):
    with RawClient(port) as client:
        _, headers, _ = client.request(upgrade_request(port, Sec_WebSocket_Version="99"))
        assert headers["sec-websocket-version"] == "13"


def test_a_request_that_never_ends_is_cut_off(port):
    with RawClient(port) as client:
        client.write(b"GET /ws HTTP/1.1\r\nX: ")
        try:
            for _ in range(64):
                client.write(b"x" * 1024)
        except OSError:
            return  # it was, while we wrote
        assert client.read_to_end() == b""


def test_an_upgrade_byte_by_byte_works_as_in_one_piece(port):
    key = Agent(port)
    with Agent(port, register=False) as agent, key as other:
        whole = frame(TEXT, agent.signed(agent.registration()))
        for i in range(len(whole)):
            agent.write(whole[i : i + 1])
        assert agent.receive()["type"] == "REGISTER"
        agent.ping()
        assert_exchange(agent, other)
    with RawClient(port) as client:
        request = upgrade_request(port)
        for i in range(len(request)):
            client.write(request[i : i + 1])
        assert client.read_head()[0] == 101
        assert json.loads(client.read_text())["type"] == "REGISTER"


def test_a_client_that_speaks_before_it_is_answered_is_refused_4_1(port):
    with RawClient(port) as client:
        client.write(upgrade_request(port) + frame(PING, b"early") + frame(TEXT, b"no JSON"))
        assert client.read_head()[0] == 101
        assert json.loads(client.read_text())["type"] == "REGISTER"
        assert client.read_close().close_code == 1002


def test_health_is_json_on_the_same_port(shared_gateway, port):
    with RawClient(port) as client:
        request = b"GET /health?verbose HTTP/1.1\r\nHost: x\r\n\r\n"
        status, headers, body = client.request(request)
    assert (status, headers["content-type"]) == (200, "application/json")
    assert headers["connection"] == "close"
    assert int(headers["content-length"]) == len(body)
    assert json.loads(body)["status"] == "ok"
    assert json.loads(body)["did"].startswith("did:key:z6Mk")


@pytest.mark.parametrize("path", ["/health", "/ready"])
@pytest.mark.parametrize("headers", [b"", b"Host: x\r\nConnection: keep-alive\r\n"])
@pytest.mark.parametrize("size", [1, 1024])
def test_a_health_checker_may_speak_http_1_0(port, path, headers, size):
    request = f"GET {path} HTTP/1.0\r\n".encode() + headers + b"\r\n"
    with RawClient(port) as client:
        for i in range(0, len(request), size):
            client.write(request[i : i + size])
        status, answered = client.read_head()
        body = client.read_to_end()
    assert (status, answered["connection"]) == (200, "close")
    assert int(answered["content-length"]) == len(body)
    assert json.loads(body)["status"] == "ok"


def test_an_upgrade_needs_http_1_1_4_1(port):
    with RawClient(port) as client:
        status, _, body = client.request(upgrade_request(port).replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert (status, body) == (400, b"WebSocket needs HTTP/1.1\n")
    with RawClient(port) as client:  # what another line says of a version is nothing
        client.upgrade(Via="GET / HTTP/1.0")


@pytest.mark.parametrize(
    "line", ["HTTP/0.9", "HTTP/1.00", "HTTP/1.2", "HTTP/2.0", "HTTP/1.0 HTTP/1.1", "HTTP/1.0 "]
)
def test_no_other_version_is_answered(port, line):
    request = f"GET /health {line}\r\nHost: x\r\n\r\n".encode()
    for size in (1, len(request)):
        with RawClient(port) as client:
            for i in range(0, len(request), size):
                client.write(request[i : i + size])
            assert client.read_head()[0] == 400


def test_another_path_is_404_with_a_hint(port):
    with RawClient(port) as client:
        status, _, body = client.request(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (status, body) == (404, b"the WebSocket endpoint is /ws\n")


# --- fragments (section 5.4) -----------------------------------------------------------------------


def test_a_fragmented_message_is_forwarded_whole_5_4(agent, port):
    with Agent(port) as other:
        data = agent.offer(other.did)
        pieces = [data[:1], data[1:1], data[1:300], data[300:]]
        agent.write_frame(TEXT, pieces[0], fin=False)
        agent.write_frame(CONTINUATION, pieces[1], fin=False)
        agent.write_frame(PING, b"between")
        agent.write_frame(CONTINUATION, pieces[2], fin=False)
        agent.write_frame(PONG, b"unasked")
        agent.write_frame(CONTINUATION, pieces[3])
        assert agent.read_frame().payload == b"between"
        assert other.read_text() == data
        assert_exchange(agent, other)


def test_a_character_may_be_split_between_fragments_5_6(agent, port):
    with Agent(port) as other:
        data = agent.offer(other.did, sdp="é€😀")
        at = data.index("😀".encode()) + 2
        agent.write(frame(TEXT, data[:at], fin=False) + frame(CONTINUATION, data[at:]))
        assert other.read_text() == data


def test_a_close_between_fragments_ends_the_connection_5_4(agent):
    agent.write_frame(TEXT, b'{"id"', fin=False)
    agent.write(close_frame(1000))
    assert agent.read_close().close_code == 1000
    agent.assert_ended()


@pytest.mark.parametrize("size", [LIMIT - 1, LIMIT])
def test_fragments_up_to_the_limit_are_one_message(agent, port, size):
    with Agent(port) as other:
        data = agent.offer(other.did, size)
        agent.write(frame(TEXT, data[:40_000], fin=False) + frame(CONTINUATION, data[40_000:]))
        assert other.read_text() == data


def test_fragments_over_the_limit_are_1009(agent, port):
    with Agent(port) as other:
        data = agent.offer(other.did, LIMIT) + b" "
        agent.write(frame(TEXT, data[:40_000], fin=False) + frame(CONTINUATION, data[40_000:], fin=False))
        agent.receive_error("too_large", json.loads(data)["id"])
        assert_closed(agent, 1009)
        other.ping()


@pytest.mark.parametrize(
    "written",
    [
        frame(CONTINUATION, b"x"),
        frame(CONTINUATION, b"x", fin=False),
        frame(TEXT, b"{", fin=False) + frame(TEXT, b"}"),
        frame(TEXT, b"{", fin=False) + frame(TEXT, b"}", fin=False),
        frame(TEXT, b"{", fin=False) + frame(BINARY, b"}"),
        frame(TEXT, b"{", fin=False) + frame(CONTINUATION, b"}", rsv=1),
        frame(TEXT, b"{", rsv=4),
        frame(TEXT, b"{", rsv=2),
        frame(TEXT, b"{", rsv=1),
        frame(PING, b"", rsv=4),
        frame(CLOSE, b"", rsv=1),
        frame(TEXT, b"{", masked=False),
        frame(PING, b"", masked=False),
        *(frame(opcode, b"") for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)),
        frame(PING, b"", fin=False),
        frame(CLOSE, b"", fin=False),
        frame(PING, b"x" * 126),
        frame(PONG, b"x" * 126),
        frame(CLOSE, b"\x03\xe8" + b"x" * 124),
        b"\x81\xfe\x00\x05" + b"maskhello",  # 5.2: 5 bytes need no 16-bit length
        b"\x81\xff" + b"\0" * 6 + b"\x00\x05" + b"maskhello",
        b"\x81\xff\x80" + b"\0" * 7 + b"mask",  # 5.2: the top bit must be 0
        frame(CLOSE, b"\x03"),
    ],
    ids=lambda written: written[:2].hex(),
)
def test_what_breaks_the_framing_is_1002_and_counted(shared_gateway, agent, port, written):
    before = sum(shared_gateway.health()["counters"]["refused"].values())
    with Agent(port) as a, Agent(port) as b:
        agent.write(written)
        assert agent.read_close().close_code == 1002
        agent.write(close_frame(1002))
        agent.assert_ended()
        assert_exchange(a, b)
    wait_until(lambda: sum(shared_gateway.health()["counters"]["refused"].values()) == before + 1)
    lines = [line for line in shared_gateway.log_lines() if line.get("did") == agent.did]
    assert [line["event"] for line in lines] == ["protocol error"]


def test_messages_behind_a_refused_frame_are_ignored(agent, port):
    with Agent(port) as other:
        agent.write(frame(TEXT, b"", rsv=4) + frame(TEXT, agent.offer(other.did)))
        assert agent.read_close().close_code == 1002
        agent.write(frame(TEXT, agent.offer(other.did)) + close_frame(1002))
        agent.assert_ended()
        other.ping()  # and so: nothing else came


def test_the_close_of_a_refused_frame_comes_behind_all_answers_and_last_5_5_1(agent, port):
    with Agent(port) as other:
        ping = agent.message(agent.gateway_did, PingPayload())
        agent.write(frame(TEXT, agent.offer(other.did)) + frame(TEXT, ping) + b"\x83\x80mask")
        assert json.loads(agent.read_frame().payload)["type"] == "PONG"
        assert agent.read_frame().opcode == CLOSE
        agent.write(close_frame(1002))
        agent.assert_ended()
        assert json.loads(other.read_text())["from"] == agent.did


@pytest.mark.parametrize("size", [4 * LIMIT + 1, 2**40, 2**63 - 1])
def test_a_frame_that_is_far_too_large_is_1009_at_its_header(shared_gateway, agent, size):
    agent.write(frame(TEXT, b"", length=size))
    assert agent.read_close().close_code == 1009
    agent.assert_ended()
    wait_until(lambda: any(x.get("did") == agent.did for x in shared_gateway.log_lines()))
    (line,) = (line for line in shared_gateway.log_lines() if line.get("did") == agent.did)
    assert line["cause"] == "too_large"


# --- control frames (section 5.5) ------------------------------------------------------------------


@pytest.mark.parametrize("payload", [b"", b"x", b"\x00\xff\xfe", b"x" * 125])
def test_a_ping_is_answered_with_its_bytes_5_5_3(agent, payload):
    agent.write_frame(PING, payload)
    got = agent.read_frame()
    assert (got.opcode, got.payload) == (PONG, payload)
    agent.ping()


def test_an_unasked_pong_is_ignored_5_5_3(agent):
    agent.write_frame(PONG, b"unasked")
    agent.ping()


def test_pings_are_answered_before_registration(port):
    with Agent(port, register=False) as agent:
        agent.write_frame(PING, b"hello")
        assert agent.read_frame().payload == b"hello"
        agent.register()


# --- text (section 8.1) ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad", [b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82", b"\x80"], ids=bytes.hex
)
def test_text_that_is_not_utf_8_is_1007(agent, port, bad):
    with Agent(port) as other:
        data = agent.offer(other.did, sdp="here").replace(b"here", bad)
        agent.write_frame(TEXT, data)
        agent.receive_error("invalid_utf8", None if b'"id"' not in data else json_id(data))
        assert_closed(agent, 1007)
        other.ping()


def json_id(data: bytes) -> str:
    """Return the id of a message whose rest may be spoilt."""
    return data.partition(b'"id":"')[2][:36].decode()


# --- closing (section 7) ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code", [1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 3000, 3999, 4000, 4999]
)
def test_a_close_is_answered_with_its_code_7_4(port, code):
    assert Agent(port).close(code) == code


def test_a_close_without_a_code_is_answered_with_1000(port):
    assert Agent(port).close(None) == 1000


@pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65_535])
def test_a_close_code_that_may_not_be_sent_is_1002(agent, code):
    agent.write(close_frame(code))
    assert agent.read_close().close_code == 1002
    agent.assert_ended()


def test_a_close_reason_that_is_not_utf_8_is_1007(agent):
    agent.write(close_frame(1000, b"\xff\xff"))
    assert agent.read_close().close_code == 1007
    agent.assert_ended()


def test_a_close_with_the_longest_reason_is_answered(agent):
    agent.write(close_frame(1000, "é".encode() * 61))
    assert agent.read_close().close_code == 1000
    agent.assert_ended()


def test_frames_behind_a_close_are_ignored(agent, port):
    with Agent(port) as other:
        agent.write(close_frame(1000) + frame(TEXT, agent.offer(other.did)) + frame(PING, b"") + b"\x83\x80")
        assert agent.read_frame().opcode == CLOSE
        agent.assert_ended()
        other.ping()


def test_two_closes_are_answered_once(agent):
    agent.write(close_frame(1000) + close_frame(1000))
    assert agent.read_close().close_code in (1000, 1002)
    agent.assert_ended()


def test_a_client_that_does_not_answer_our_close_is_dropped_after_a_timeout(agent):
    agent.write_frame(BINARY, b"x")
    agent.receive_error("binary_frame", None)
    assert agent.read_close().close_code == 1003
    agent.assert_ended()


def test_a_half_closed_connection_is_ended(shared_gateway, agent):
    agent.socket.shutdown(socket.SHUT_WR)
    agent.assert_ended()


@pytest.mark.parametrize("how", ["drop", "reset"])
def test_a_connection_that_breaks_in_the_middle_of_a_frame_is_forgotten(shared_gateway, port, how):
    agent = Agent(port)
    before = shared_gateway.health()["connections"]
    agent.write(frame(TEXT, agent.offer(agent.did))[:-5])
    getattr(agent, how)()
    wait_until(lambda: shared_gateway.health()["connections"] < before)
