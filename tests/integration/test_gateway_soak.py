"""Two thousand agents that come, go, come back and take over at random, with traffic all the while."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import struct
from collections import Counter
from pathlib import Path

import pytest
from wire import CLOSE, PING, PONG, TEXT, Agent, RawClient, close_frame, frame, upgrade_request, wait_until

from aiconexus.protocol import DIDKey, Message, PingPayload, RegisterPayload, sign_message

pytestmark = pytest.mark.soak

AGENTS = int(os.environ.get("AICONEXUS_SOAK_AGENTS", "2000"))
STEPS = int(os.environ.get("AICONEXUS_SOAK_STEPS", "6000"))


class Peer:
    """One agent on asyncio; it remembers what it sent and what came."""

    def __init__(self, port: int, key: DIDKey) -> None:
        self.port = port
        self.key = key
        self.did = key.did
        self.token: str | None = None
        self.writer: asyncio.StreamWriter | None = None
        self.reading: asyncio.Task[None] | None = None
        self.ready = asyncio.Event()
        self.sent: Counter[str] = Counter()
        self.got: list[tuple[str, str]] = []  # sender, id
        self.errors: Counter[str] = Counter()
        self.pongs: asyncio.Queue[str] = asyncio.Queue()
        self.resumed = 0
        self.template = b""

    @property
    def is_connected(self) -> bool:
        return self.writer is not None

    async def connect(self, *, resume: bool) -> None:
        """Connect and register; a connection that is still there is taken over."""
        before, reading = self.writer, self.reading
        reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**20)
        self.writer.write(upgrade_request(self.port))
        await reader.readuntil(b"\r\n\r\n")
        hello = json.loads((await self.read_frame(reader))[1])
        self.gateway_did = hello["from"]
        ext = {"nonce": hello["ext"]["nonce"], "aud": f"ws://127.0.0.1:{self.port}/ws"}
        if resume and self.token is not None:
            ext["resume"] = self.token
        message = Message.create(
            self.did,
            hello["from"],
            RegisterPayload(public_key=self.key.public_key_base58),
            ext=ext,  # type: ignore[arg-type]
        )
        self.writer.write(frame(TEXT, sign_message(message, self.key).wire or b""))
        answer = json.loads((await self.read_frame(reader))[1])
        assert (answer["type"], answer["correlation_id"]) == ("REGISTER", message.id), answer
        self.token = answer["ext"]["resume_token"]
        self.resumed += answer["ext"]["resumed"]
        self.reading = asyncio.create_task(self.read(reader, self.writer))
        if before is not None and reading is not None:
            await reading  # up to the CLOSE with 4504
            before.close()

    async def read_frame(self, reader: asyncio.StreamReader) -> tuple[int, bytes]:
        first, second = await reader.readexactly(2)
        size = second & 0x7F
        if size == 126:
            (size,) = struct.unpack("!H", await reader.readexactly(2))
        return first & 0xF, await reader.readexactly(size)

    async def read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                opcode, payload = await self.read_frame(reader)
                if opcode == CLOSE:
                    writer.write(frame(CLOSE, payload[:2]))
                    return
                if opcode == PING:
                    writer.write(frame(PONG, payload))
                    continue
                got = json.loads(payload)
                if got["type"] == "PONG":
                    self.pongs.put_nowait(got["correlation_id"])
                elif got["type"] == "ERROR":
                    self.errors[got["correlation_id"]] += 1
                else:
                    self.got.append((got["from"], got["id"]))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass

    def send(self, target: str, number: int) -> str:
        """Send a message; return its id."""
        assert self.writer is not None
        name = f"{number:08x}-0000-4000-8000-000000000000"
        if not self.template:
            self.template = json.dumps(
                {
                    "id": "@id",
                    "timestamp": "2026-01-12T10:00:00Z",
                    "from": self.did,
                    "to": "@to",
                    "type": "ICE_CANDIDATE",
                    "payload": {"candidate": "candidate:" + "x" * 300},
                    "version": "1.0",
                }
            ).encode()
        data = self.template.replace(b"@id", name.encode()).replace(b"@to", target.encode())
        self.writer.write(frame(TEXT, data))
        self.sent[name] += 1
        return name

    async def sync(self) -> None:
        """Wait until the gateway has dealt with everything that was sent."""
        assert self.writer is not None
        message = Message.create(self.did, self.gateway_did, PingPayload())
        self.writer.write(frame(TEXT, sign_message(message, self.key).wire or b""))
        while await self.pongs.get() != message.id:
            pass

    async def leave(self, how: str) -> None:
        """Drop the connection; everything that was sent has been dealt with, everything that came is read."""
        assert self.writer is not None
        assert self.reading is not None
        await self.sync()
        writer, self.writer = self.writer, None
        if how == "reset":
            writer.transport.abort()
        elif how == "close":
            writer.write(frame(CLOSE, struct.pack("!H", 1000)))
        else:
            writer.close()
        await self.reading
        writer.close()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("workers", "seed"), [(1, 1), (3, 2)])
async def test_every_message_is_delivered_or_comes_back(start_gateway, workers, seed):
    gateway = start_gateway("--workers", str(workers), "--message-rate", "0")
    rng = random.Random(seed)
    slots = asyncio.Semaphore(100)
    peers = [Peer(gateway.port, DIDKey.from_seed(rng.randbytes(32))) for _ in range(AGENTS)]

    async def connect(peer: Peer) -> None:
        async with slots:
            await peer.connect(resume=False)

    await asyncio.gather(*map(connect, peers))
    assert gateway.health()["sessions"] == AGENTS
    # Where an agent drops, what its own kernel had not read is lost to it, and nobody can know.
    lossy: set[str] = set()
    target_of: dict[str, str] = {}
    number = 0
    for step in range(STEPS):
        peer = rng.choice(peers)
        action = rng.random()
        if not peer.is_connected:
            await peer.connect(resume=rng.random() < 0.8)
        elif action < 0.05:
            lossy.add(peer.did)
            await peer.leave(rng.choice(["drop", "reset", "close"]))
        elif action < 0.08:
            await peer.connect(resume=rng.random() < 0.8)
        else:
            for _ in range(rng.choice([1, 1, 1, 5])):
                number += 1
                target = rng.choice(peers).did
                target_of[peer.send(target, number)] = target
        if step % 50 == 0:
            await asyncio.sleep(0)
    for peer in peers:
        if not peer.is_connected:
            await peer.connect(resume=True)
    for _ in range(2):  # the second time for what the first made others return
        await asyncio.gather(*(peer.sync() for peer in peers))

    sender_of = {name: peer for peer in peers for name in peer.sent}
    delivered = Counter(name for peer in peers for _, name in peer.got)
    errors: Counter[str] = sum((peer.errors for peer in peers), Counter())
    assert not [name for name, count in (delivered + errors).items() if count > 1], (
        "delivered or returned twice"
    )
    for peer in peers:
        assert set(peer.errors) <= set(peer.sent), "an ERROR for somebody else"
        last: dict[str, str] = {}
        for sender, name in peer.got:
            assert sender_of[name].did == sender
            assert last.get(sender, "") < name, "the order changed"
            last[sender] = name
    state = gateway.health()
    assert (state["sessions"], state["connections"], state["away"]) == (AGENTS, AGENTS, 0)
    missing = set(sender_of) - set(delivered) - set(errors)
    # Only what the kernel had for an agent that dropped: a message to it, or an ERROR for it.
    assert all(target_of[name] in lossy or sender_of[name].did in lossy for name in missing)
    assert len(missing) <= 0.002 * number
    for peer in peers:
        assert peer.writer is not None
        assert peer.reading is not None
        peer.writer.close()
        await peer.reading
    assert sum(peer.resumed for peer in peers) > 10


def usage(pid: int) -> tuple[int, int]:
    """Return bytes and open descriptors of a process; without shared memory, as the routing table is."""
    _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    return (resident - shared) * 4096, len(os.listdir(f"/proc/{pid}/fd"))


def test_connections_that_end_leave_nothing_behind(start_gateway):
    """Every kind of end, again and again: memory and descriptors stay where they were."""
    gateway = start_gateway("--workers", "1", "--away", "0", "--log-level", "error")
    (worker,) = gateway.worker_pids
    port = gateway.port
    key = DIDKey.generate()

    def cycle(number: int) -> None:
        kind = number % 8
        if kind == 0:
            Agent(port).close()
        elif kind == 1:
            Agent(port).drop()
        elif kind == 2:
            Agent(port).reset()
        elif kind == 3:
            Agent(port, register=False).drop()
        elif kind == 4:
            with RawClient(port) as client:
                client.write(b"nonsense\r\n\r\n")
                client.read_to_end()
        elif kind == 5:
            with Agent(port) as agent:
                agent.write(b"\x83\x80mask")
                agent.read_to_end()
        elif kind == 6:
            with Agent(port, key), Agent(port, key) as new:
                new.send(new.offer(new.did, 60_000), b"no JSON")
                new.read_text()
        else:
            with Agent(port, register=False) as agent:
                agent.send(b"no JSON")
                agent.write(close_frame(agent.read_close().close_code))
                agent.assert_ended()

    cycles = int(os.environ.get("AICONEXUS_SOAK_CYCLES", "1200"))
    for number in range(400):
        cycle(number)
    wait_until(lambda: gateway.health()["connections"] == 0)
    before = usage(worker)
    for number in range(cycles):
        cycle(number)
    wait_until(lambda: gateway.health()["connections"] == 0)
    gc.collect()
    wait_until(lambda: usage(worker)[1] <= before[1])
    after = usage(worker)
    # 1 KB per cycle would be a leaked connection.
    assert after[0] - before[0] < 500_000 + 400 * cycles
