"""Agents that are connected without a gateway: a switchboard hands their signed messages over.

Everything else is the product: signing, verifying, signaling, aiortc on 127.0.0.1.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from aiconexus.core import Agent, Intent, Quote, capability, current_call
from aiconexus.protocol import (
    DIDKey,
    ErrorPayload,
    Message,
    MessageError,
    ReplayGuard,
    sign_message,
    verify_message,
)


class Switchboard:
    """Delivers between the agents that it knows, each message in a loop pass of its own.

    `alter` may change the bytes of a message, or drop it by returning None. While `held` is a list,
    messages wait in it for `release`.
    """

    def __init__(self) -> None:
        self.agents: dict[str, Agent] = {}
        self.guards: dict[str, ReplayGuard] = {}
        self.sent: list[Message] = []
        self.key = DIDKey.generate()
        self.alter: Callable[[Message], bytes | None] = lambda message: message.wire
        self.held: list[tuple[Message, bytes]] | None = None
        self.waiting: list[tuple[int, asyncio.Event]] = []

    def add(self, agent: Agent) -> None:
        self.agents[agent.did] = agent
        self.guards[agent.did] = ReplayGuard()

    async def send(self, key: DIDKey, message: Message) -> None:
        message = sign_message(message, key)
        self.sent.append(message)
        for count, reached in self.waiting:
            if len(self.sent) >= count:
                reached.set()
        data = self.alter(message)
        if data is not None and self.held is not None:
            self.held.append((message, data))
        elif data is not None:
            asyncio.get_running_loop().call_soon(self.deliver, message, data)

    async def sent_count(self, count: int) -> None:
        """Wait until `count` messages were sent since the beginning."""
        reached = asyncio.Event()
        self.waiting.append((count, reached))
        if len(self.sent) < count:
            await asyncio.wait_for(reached.wait(), 10)

    def release(self, sender: str) -> None:
        """Deliver the held messages of `sender`."""
        assert self.held is not None
        for message, data in self.held:
            if message.from_ == sender:
                self.deliver(message, data)
        self.held = [(message, data) for message, data in self.held if message.from_ != sender]

    async def status_of(self, did: str, timeout: float) -> str:
        return "online" if did in self.agents else "offline"

    def deliver(self, message: Message, data: bytes) -> None:
        receiver = self.agents.get(message.to)
        if receiver is None:
            refusal = ErrorPayload.for_cause("not_online")
            reply = Message.create(self.key.did, message.from_, refusal, correlation_id=message.id)
            self.agents[message.from_]._signaling.receive(reply)
            return
        try:
            verified = verify_message(data, recipient=receiver.did, guard=self.guards[receiver.did])
        except MessageError as error:
            receiver._signaling.rejected(error, data)
        else:
            receiver._signaling.receive(verified)


class Local(Agent):
    """An agent at a switchboard instead of a gateway."""

    def __init__(self, switchboard: Switchboard, **options: Any) -> None:
        options.setdefault("host_addresses", ["127.0.0.1"])
        super().__init__("ws://127.0.0.1:1/ws", **options)
        self._switchboard = switchboard
        self._signaling._send = self._hand_over
        self._signaling._gateway_did = lambda: switchboard.key.did
        self._signaling._has_gateway = lambda: True
        self._signaling._status_of = switchboard.status_of
        switchboard.add(self)

    async def _hand_over(self, message: Message) -> None:
        await self._switchboard.send(self._key, message)

    async def _connect(self, did: str, timeout: float) -> Any:
        # GatewayClient.state would be DISCONNECTED.
        peer = self._peers.get(did)
        if peer is None or (await peer.settled()).value != "open":
            peer = await self._signaling.connect(did, timeout=timeout)
        return peer

    async def start(self) -> None:
        """There is no gateway to register with."""


class Workshop(Local):
    """Has a capability for each way a call can go."""

    def __init__(self, switchboard: Switchboard, **options: Any) -> None:
        super().__init__(switchboard, **options)
        self.started = asyncio.Event()
        self.release = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.counted = 0
        self.made = 0
        self.lost: asyncio.Queue[str] = asyncio.Queue()

    @capability
    async def add(self, a: int, b: int = 1) -> int:
        return a + b

    @capability
    async def echo(self, value: object) -> Any:
        return value

    @capability
    async def fail(self, text: str) -> None:
        raise ValueError(text)

    @capability
    async def wait(self) -> str:
        self.started.set()
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return "released"

    @capability
    async def count(self) -> int:
        self.counted += 1
        return self.counted

    @capability
    async def numbers(self, until: int, fail_at: int = -1) -> AsyncIterator[int]:
        try:
            for number in range(until):
                if number == fail_at:
                    raise ValueError("out of numbers")
                self.made = number + 1
                yield number
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise

    @capability
    async def blocks(self, count: int, size: int) -> AsyncIterator[bytes]:
        for number in range(count):
            self.made = number + 1
            yield bytes([number % 256]) * size

    @capability
    async def reverse(self, data: bytes) -> bytes:
        return data[::-1]

    @capability
    async def measure(self, data: AsyncIterator[bytes], unit: str) -> str:
        size = 0
        async for chunk in data:
            size += len(chunk)
        return f"{size / 1e3} {unit}"

    @capability
    async def flip(self, data: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for chunk in data:
            yield bytes(255 - byte for byte in chunk)

    @capability
    async def leave_it(self, data: AsyncIterator[bytes]) -> str:
        await anext(data)
        self.started.set()
        await self.release.wait()
        return "enough"

    @capability
    async def work(self, steps: int) -> str:
        for step in range(steps):
            current_call().progress({"step": step})
            await asyncio.sleep(0)
        return current_call().caller

    @capability
    async def ask_on(self, did: str, capability: str, seconds: float | None = None) -> float:
        self.remaining = current_call().remaining
        async with self.connect(did) as peer:
            await peer.execute(capability, timeout=seconds)
        return self.remaining

    async def on_intent(self, intent: Intent) -> Quote:
        if intent.query == "fail":
            raise RuntimeError("no idea")
        return Quote(status=f"{intent.query or intent.task}", required_input=["text"], cost="0.50 EUR")

    async def on_peer_lost(self, peer: object, reason: str) -> None:
        self.lost.put_nowait(reason)
