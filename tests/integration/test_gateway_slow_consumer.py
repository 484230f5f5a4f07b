"""A client that does not read: bounded memory, a close with 4003, and no message lost in silence."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter, deque
from functools import partial
from pathlib import Path

import pytest
from wire import PING, TEXT, Agent, assert_exchange, close_frame, frame, wait_until

QUEUE_MAX = 1_048_576
# The smallest that Linux takes; the sender's side of a connection still holds up to 4 MiB (tcp_wmem).
TINY = 2048


@pytest.fixture
def start_gateway(start_gateway):
    """One worker, so that the answer to a PING says that all before it is dealt with; no message limit."""
    return partial(start_gateway, "--workers", "1", "--message-rate", "0")


@pytest.fixture
def gateway(start_gateway):
    return start_gateway()


@pytest.fixture
def port(gateway) -> int:
    return gateway.port


def read_all(agent: Agent) -> tuple[list[dict], int]:
    """Read up to the CLOSE frame; return the messages and its code."""
    messages = []
    while True:
        got = agent.read_frame()
        if got.opcode == TEXT:
            messages.append(json.loads(got.payload))
        elif got.opcode != PING:
            return messages, got.close_code


def read_to_marker(agent: Agent, sender: Agent) -> list[str]:
    """Return the ids of all that comes to an agent before what is sent to it now."""
    marker = sender.offer(agent.did)
    sender.send(marker)
    ids = []
    while (data := agent.read_text()) != marker:
        ids.append(json.loads(data)["id"])
    return ids


class Collector(threading.Thread):
    """Reads what comes to an agent, so that its own writes never block on the gateway's answers."""

    def __init__(self, agent: Agent) -> None:
        super().__init__(daemon=True)
        self.agent = agent
        self.messages: list[dict] = []
        self.pongs = 0
        self.start()

    def run(self) -> None:
        try:
            while True:
                got = json.loads(self.agent.read_text())
                self.pongs += got["type"] == "PONG"
                self.messages.append(got)
        except (OSError, EOFError, AssertionError):
            pass

    def errors(self) -> Counter[str]:
        return Counter(got["correlation_id"] for got in self.messages if got["type"] == "ERROR")

    def sync(self) -> None:
        """Wait until the gateway has dealt with everything that the agent sent."""
        from aiconexus.protocol import PingPayload

        before = self.pongs
        self.agent.send(self.agent.message(self.agent.gateway_did, PingPayload()))
        wait_until(lambda: self.pongs > before)


def flood(collector: Collector, target: str, size: int, total: int, first: int = 0) -> list[str]:
    """Send messages of `size` bytes up to `total` bytes, no faster than answers are read."""
    sender = collector.agent
    ids = []
    template = sender.offer(target, size)
    start = template.index(b'"id":"') + 6
    for number in range(first, first + total // size):
        name = f"{number:08x}-0000-4000-8000-000000000000"
        sender.send(template[:start] + name.encode() + template[start + 36 :])
        ids.append(name)
        if number % 500 == 499:
            collector.sync()
    collector.sync()
    return ids


@pytest.mark.parametrize("size", [700, 5_000, 65_536])
def test_every_message_to_a_slow_agent_is_delivered_or_comes_back(gateway, port, size):
    with (
        Agent(port) as a,
        Agent(port) as sender,
        Agent(port, receive_buffer=TINY) as slow,
        Agent(port) as b,
    ):
        collector = Collector(sender)
        sent = flood(collector, slow.did, size, 8 * QUEUE_MAX)
        assert gateway.health()["counters"]["closed"] == {"4003": 1}
        assert_exchange(a, b)
        messages, code = read_all(slow)
        assert code == 4003
        slow.write(close_frame(4003))
        slow.assert_ended()
        with Agent(port, slow.key, resume=slow.resume_token) as back:
            assert back.resumed
            delivered = [got["id"] for got in messages] + read_to_marker(back, a)
        collector.sync()
        assert len(set(delivered)) == len(delivered), "one came twice"
        errors = collector.errors()
        assert Counter(delivered) + errors == Counter(sent)
        names = {got["payload"]["details"]["name"] for got in collector.messages if got["type"] == "ERROR"}
        assert names <= {"slow_consumer", "away_full"}
        refused = gateway.health()["counters"]["refused"]
        assert sum(refused.values()) == sum(errors.values())
        assert delivered == sorted(delivered), "the order changed"


def test_a_slow_agent_that_never_reads_again_is_dropped_and_all_comes_back(start_gateway):
    gateway = start_gateway("--away", "0.5")
    with Agent(gateway.port) as sender, Agent(gateway.port, receive_buffer=TINY) as slow:
        collector = Collector(sender)
        sent = flood(collector, slow.did, 30_000, 8 * QUEUE_MAX)
        taken_by_kernel = in_kernel(slow)
        slow.reset()
        wait_until(lambda: gateway.health()["connections"] == 1 and gateway.health()["away"] == 0)
        collector.sync()
        # What the kernels of both sides took cannot be known; all else came back, once, also the message
        # of which they took a part only.
        errors = collector.errors()
        assert set(errors.values()) == {1}
        assert set(errors) <= set(sent)
        taken = sum(1 for name in sent if name not in errors)
        assert taken <= taken_by_kernel / 30_000
        assert sent[-(len(sent) - taken) :] == [name for name in sent if name in errors], "all but the first"


def test_memory_stays_bounded_while_many_agents_do_not_read(gateway, port):
    with Agent(port) as sender:
        collector = Collector(sender)
        slow = [Agent(port, receive_buffer=TINY) for _ in range(10)]
        before = resident(gateway)
        for agent in slow:
            flood(collector, agent.did, 60_000, 8 * QUEUE_MAX)
        # Each may have 1 MiB in its queue (its buffer is of twice that at most) and 64 KiB waiting.
        assert resident(gateway) - before < 10 * (2 * QUEUE_MAX + 300_000)
        assert gateway.health()["counters"]["closed"] == {"4003": 10}
        for agent in slow:
            agent.drop()
        wait_until(lambda: gateway.health()["connections"] == 1)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(4))
def test_partial_writes_keep_the_stream_whole_and_in_order(gateway, port, seed):
    """A reader that stops and goes while the queue is just below its limit."""
    rng = random.Random(seed)
    sizes = [600, 700, 1_400, 4_096, 9_000, 65_535, 65_536]
    with Agent(port) as a, Agent(port, receive_buffer=rng.choice([TINY, 4_096, 16_384])) as b:
        waiting: deque[bytes] = deque()
        sent_bytes = read_bytes = most_held = 0
        while sent_bytes < 20 * QUEUE_MAX or waiting:
            held = sent_bytes - read_bytes - in_kernel(b)
            most_held = max(most_held, held)
            if sent_bytes < 20 * QUEUE_MAX and held < 700_000:  # and a batch is at most 262 KB
                batch = [a.offer(b.did, rng.choice(sizes)) for _ in range(4)]
                stream = b"".join(frame(TEXT, data) for data in batch)
                at = rng.randrange(len(stream))
                a.write(stream[:at])
                a.write(stream[at:])
                a.ping()  # the gateway has them all
                waiting.extend(batch)
                sent_bytes += sum(map(len, batch))
                continue
            for _ in range(min(len(waiting), rng.choice([1, 2, 10, 100]))):
                # Small reads let the window open a little at a time; pongs come in between.
                while len(b.buffer) < 64 and rng.random() < 0.5:
                    b.buffer += b.socket.recv(rng.choice([1, 7, 500, 4_096]))
                if rng.random() < 0.1:
                    b.write_frame(PING, b"between")
                data = waiting.popleft()
                assert b.read_text() == data
                read_bytes += len(data)
        assert most_held > 500_000, "nothing waited in the gateway"
        assert_exchange(a, b)
        assert gateway.health()["counters"]["closed"] == {}


def resident(gateway) -> int:
    """Return the resident memory of a gateway in bytes."""
    return int(Path(f"/proc/{gateway.worker_pids[0]}/statm").read_text().split()[1]) * 4096


def in_kernel(agent: Agent) -> int:
    """Return the bytes on their way to an agent that the kernel holds on both sides (Linux)."""
    gateway_port = f":{agent.port:04X}"
    agent_port = f":{agent.socket.getsockname()[1]:04X}"
    total = len(agent.buffer)
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, _, queues, *_ = line.split()
        to_send, _, to_read = queues.partition(":")
        if local.endswith(gateway_port) and remote.endswith(agent_port):
            total += int(to_send, 16)
        elif local.endswith(agent_port) and remote.endswith(gateway_port):
            total += int(to_read, 16)
    return total


def test_an_agent_that_pings_and_does_not_read_gets_no_endless_queue_of_pongs(gateway, port):
    with Agent(port, receive_buffer=TINY) as agent, Agent(port) as other:
        before = resident(gateway)
        agent.socket.settimeout(2)
        try:
            for _ in range(200):
                agent.write(frame(PING, b"x" * 125) * 1_000)
        except OSError:
            pass
        other.ping()
        assert resident(gateway) - before < 10 * 2**20


def test_an_agent_that_asks_and_does_not_read_is_a_slow_consumer(gateway, port):
    with Agent(port, receive_buffer=TINY) as agent, Agent(port) as other:
        for _ in range(40):
            agent.write(frame(TEXT, b"{}") * 1_000)  # each gets an ERROR of 400 bytes
            if "4003" in gateway.health()["counters"]["closed"]:
                break
        assert gateway.health()["counters"]["closed"] == {"4003": 1}
        assert read_all(agent)[1] == 4003
        other.ping()


def test_a_slow_agent_that_writes_to_itself_is_closed_once(gateway, port):
    with Agent(port, receive_buffer=TINY) as agent:
        data = frame(TEXT, agent.offer(agent.did, 60_000))
        agent.socket.settimeout(2)
        try:
            for _ in range(200):
                agent.write(data)
        except OSError:
            pass
        wait_until(lambda: gateway.health()["counters"]["closed"] == {"4003": 1})
        assert read_all(agent)[1] == 4003


@pytest.mark.parametrize(("code", "is_kept"), [(1001, True), (1000, False)])
def test_half_a_message_of_a_session_reaches_no_later_one(gateway, port, code, is_kept):
    with Agent(port) as sender, Agent(port, receive_buffer=TINY) as slow:
        collector = Collector(sender)
        sent: list[str] = []
        while gateway.health()["waiting"] == 0:
            assert len(sent) * 5_000 < 8 * QUEUE_MAX
            sent += flood(collector, slow.did, 5_000, 25_000, first=len(sent))
        slow.write(close_frame(code))
        # The session ends at once, the connection when it has read or is gone.
        wait_until(lambda: gateway.health()["sessions"] == 1 + is_kept)
        assert gateway.health()["away"] == is_kept
        assert gateway.health()["connections"] == 2
        with Agent(port, slow.key, resume=slow.resume_token) as second:
            assert second.resumed is is_kept
            got = read_to_marker(second, sender)
        wait_until(lambda: gateway.health()["away"] == 1)
        slow.reset()
        wait_until(lambda: gateway.health()["connections"] == 1)
        with Agent(port, slow.key, resume=second.resume_token) as third:
            assert third.resumed
            assert read_to_marker(third, sender) == []
        collector.sync()
        errors = collector.errors()
        assert set(got).isdisjoint(errors)
        assert max(errors.values(), default=1) == 1
        written = [name for name in sent if name not in got and name not in errors]
        assert written == sent[: len(written)], "one is lost"


def test_a_takeover_of_a_blocked_connection_resumes_with_what_waited(gateway, port):
    """The new connection gets what the old one's socket did not take; what is too much comes back."""
    with Agent(port) as sender, Agent(port, receive_buffer=TINY) as old:
        collector = Collector(sender)
        sent: list[str] = []
        while len(sent) * 30_000 - in_kernel(old) < 400_000:
            sent += flood(collector, old.did, 30_000, 150_000, first=len(sent))
        with Agent(port, old.key, resume=old.resume_token) as new:
            assert new.resumed
            got_new = read_to_marker(new, sender)
        messages, code = read_all(old)
        assert code == 4504
        got_old = [got["id"] for got in messages]
        collector.sync()
        assert Counter(got_old) + Counter(got_new) + collector.errors() == Counter(sent)
        assert got_old == sorted(got_old)
        assert got_new == sorted(got_new)
        assert len(got_new) > 5
