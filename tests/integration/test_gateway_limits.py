"""Limits: of connections, of their addresses, of messages, of time, of memory."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

from wire import Agent, RawClient, assert_exchange, upgrade_request, wait_until

# --- connections -------------------------------------------------------------------------------


def refused(port: int) -> tuple[int, dict[str, str], bytes]:
    with RawClient(port) as client:
        return client.request(upgrade_request(port))


def test_a_connection_over_the_limit_of_the_node_is_503_and_says_when_to_come_back(start_gateway):
    gateway = start_gateway("--workers", "3", "--max-connections", "5")
    agents = [Agent(gateway.port) for _ in range(5)]
    for _ in range(5):
        status, headers, body = refused(gateway.port)
        assert status == 503
        assert 1 <= int(headers["retry-after"]) <= 10
        assert b"as many connections as it takes" in body
    assert gateway.health()["counters"]["refused"] == {"http_503": 5}
    assert_exchange(agents[0], agents[1])
    agents.pop().close()
    wait_until(lambda: gateway.health()["connections"] == 4)
    agents.append(Agent(gateway.port))
    for agent in agents:
        agent.close()


def test_an_address_has_its_own_limit_at_all_workers_together(start_gateway):
    gateway = start_gateway("--workers", "3", "--max-connections-per-address", "4")
    agents = [Agent(gateway.port) for _ in range(4)]
    for _ in range(5):
        status, headers, body = refused(gateway.port)
        assert status == 503
        assert "retry-after" in headers
        assert b"from this address" in body
    with socket.create_connection(("127.0.0.1", gateway.port), 10, source_address=("127.0.0.2", 0)) as other:
        other.sendall(upgrade_request(gateway.port))
        assert other.recv(12) == b"HTTP/1.1 101"
    for agent in agents:
        agent.close()
    wait_until(lambda: gateway.health()["connections"] == 0)
    Agent(gateway.port).close()


def test_as_many_as_an_address_may_have_can_come_at_once(start_gateway):
    gateway = start_gateway("--workers", "1", "--max-connections-per-address", "40")
    clients = [RawClient(gateway.port) for _ in range(40)]
    gateway.signal_workers(signal.SIGSTOP)  # so that all their requests are there when it looks
    for client in clients:
        client.write(upgrade_request(gateway.port))
    gateway.signal_workers(signal.SIGCONT)
    for client in clients:
        assert client.socket.recv(12) == b"HTTP/1.1 101"
        client.drop()


def test_requests_that_fail_do_not_use_up_the_limit_of_their_address(start_gateway):
    gateway = start_gateway("--workers", "1", "--max-connections-per-address", "3")
    for _ in range(20):
        with RawClient(gateway.port) as client:
            assert client.request(upgrade_request(gateway.port, without="Sec-WebSocket-Key"))[0] == 400
        with RawClient(gateway.port) as client:
            client.write(b"nonsense\r\n\r\n")
            client.read_to_end()
        RawClient(gateway.port).drop()
    wait_until(lambda: opens(gateway.port))


def opens(port: int) -> bool:
    """Whether three connections fit at once."""
    agents = []
    try:
        agents = [Agent(port) for _ in range(3)]
    except AssertionError:
        return False
    finally:
        for agent in agents:
            agent.close()
    return True


def test_unfinished_requests_count_as_connections_of_their_address(start_gateway):
    gateway = start_gateway("--workers", "1", "--max-connections-per-address", "3")
    clients = [RawClient(gateway.port) for _ in range(20)]
    for client in clients:
        client.write(b"GET /ws HTTP/1.1\r\n")
    for client in clients[4:]:
        assert client.read_to_end().startswith(b"HTTP/1.1 503 ")
    for client in clients:
        client.drop()


def test_too_many_unfinished_requests_at_one_worker_are_503(start_gateway):
    gateway = start_gateway("--workers", "1")
    clients = [RawClient(gateway.port) for _ in range(4_200)]
    try:
        assert clients[-1].read_to_end().startswith(b"HTTP/1.1 503 ")
    finally:
        for client in clients:
            client.drop()
    wait_until(lambda: is_served(gateway.port))


def is_served(port: int) -> bool:
    try:
        Agent(port).close()
    except (AssertionError, OSError):
        return False
    return True


# --- messages ----------------------------------------------------------------------------------


def test_messages_over_the_rate_are_refused_with_a_time_and_the_session_goes_on(start_gateway):
    gateway = start_gateway("--message-rate", "1", "--message-burst", "30")
    with Agent(gateway.port) as sender, Agent(gateway.port) as target:
        announced = sender.hello["ext"]["limits"]
        assert (announced["message_rate"], announced["message_burst"]) == (1, 30)
        messages = [sender.candidate(target.did, number) for number in range(60)]
        sender.send(*messages)
        errors = [sender.receive() for _ in range(30)]
        assert {error["payload"]["details"]["name"] for error in errors} == {"rate_limited"}
        pause = errors[0]["payload"]["details"]["retry_after_ms"]
        assert 500 <= pause <= 2_000
        assert [target.read_text() for _ in range(30)] == messages[:30]
        wait_until(lambda: passes(sender, target))
    assert gateway.health()["counters"]["refused"]["rate_limited"] >= 30


def passes(sender: Agent, target: Agent) -> bool:
    """Whether one more message is delivered."""
    data = sender.candidate(target.did, 0)
    sender.send(data)
    target.socket.settimeout(1)
    try:
        return target.read_text() == data
    except TimeoutError:
        return False
    finally:
        target.socket.settimeout(10)


def test_a_session_that_does_not_slow_down_is_closed_with_4005(start_gateway):
    gateway = start_gateway("--message-rate", "20", "--message-burst", "30")
    with Agent(gateway.port) as sender, Agent(gateway.port) as other, Agent(gateway.port) as target:
        sender.send(*(sender.candidate(target.did, number) for number in range(200)))
        close = sender.read_close()
        assert (close.close_code, close.close_reason["n"]) == (4005, "rate_limited")
        assert close.close_reason["r"] > 0
        for _ in range(30):
            target.read_text()
        assert_exchange(other, target)
    assert gateway.health()["counters"]["closed"]["4005"] == 1


# --- time --------------------------------------------------------------------------------------


def drip(client: RawClient, data: bytes) -> float:
    """Send byte by byte, as slow as nobody minds, until the gateway ends it; return the seconds that took."""
    began = time.monotonic()
    client.socket.settimeout(0.02)
    for byte in data:
        try:
            client.write(bytes([byte]))
            client.read_bytes(client.socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF))
        except TimeoutError:
            continue
        except (EOFError, OSError):
            break
    return time.monotonic() - began


def test_a_request_that_comes_byte_by_byte_gets_no_more_time(start_gateway):
    gateway = start_gateway("--register-timeout", "1")
    with RawClient(gateway.port) as slow:
        assert drip(slow, upgrade_request(gateway.port) + b"x" * 10_000) < 3
        assert slow.buffer == b""


def test_a_register_that_comes_byte_by_byte_gets_no_more_time(start_gateway):
    gateway = start_gateway("--register-timeout", "1")
    with Agent(gateway.port, register=False) as slow:
        assert drip(slow, b"\x81\xfe\x27\x10mask" + b"x" * 10_000) < 5
        assert slow.read_close().close_code == 4007
        wait_until(lambda: gateway.health()["connections"] == 0)


# --- memory ------------------------------------------------------------------------------------


def private(pid: int) -> int:
    """Bytes of a process that it shares with no other."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024


def test_connections_return_to_their_size_after_a_burst_of_large_messages(start_gateway):
    gateway = start_gateway("--workers", "1", "--message-rate", "0")
    (worker,) = gateway.worker_pids
    agents = [Agent(gateway.port) for _ in range(400)]
    for agent in agents:
        assert_exchange(agent, agents[0])
    before = private(worker)
    messages = [agent.offer(agents[0].did, 65_000) for agent in agents]
    for agent, data in zip(agents, messages, strict=True):
        # A part of the frame, masked with zeros: the gateway must keep it.
        agent.write(b"\x81\xfe" + len(data).to_bytes(2, "big") + bytes(4) + data[:50_000])
    wait_until(lambda: private(worker) - before > 300 * 50_000)
    for agent, data in zip(agents, messages, strict=True):
        agent.write(data[50_000:])
        assert agents[0].read_text() == data
    # Free memory goes back to the system every few seconds.
    wait_until(lambda: private(worker) - before < 400 * 2_048)
    for agent in agents:
        agent.close()
