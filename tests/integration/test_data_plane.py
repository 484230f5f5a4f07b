"""The data plane at its limits, by way of the real gateway, in real processes."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from aiconexus import Agent, capability
from aiconexus.protocol.errors import CallCancelledError, CallTimeoutError

if TYPE_CHECKING:
    from conftest import GatewayProcess

HOST = Path(__file__).parent.parent / "support" / "stream_host.py"
STREAM_BYTES = 64_000_000
MEMORY_MB = 100  # at each end, interpreter and aiortc included
SECONDS = 120.0  # for anything that must happen at all


def test_stream_of_64_mb_takes_less_than_100_mb_of_memory_at_each_end(shared_gateway: GatewayProcess) -> None:
    command = [sys.executable, str(HOST)]
    with subprocess.Popen(
        [*command, "serve", shared_gateway.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as source:
        assert source.stdin is not None
        assert source.stdout is not None
        did = json.loads(source.stdout.readline())["did"]
        reader = [*command, "read", shared_gateway.url, did, str(STREAM_BYTES)]
        figures = json.loads(subprocess.run(reader, check=True, capture_output=True, timeout=SECONDS).stdout)
        source.stdin.close()
        assert source.wait(SECONDS) == 0
    assert figures["received"] == STREAM_BYTES
    assert figures["own_mb"] < MEMORY_MB
    assert figures["peer_mb"] < MEMORY_MB


class Sleeper(Agent):
    """Counts how its calls end."""

    def __init__(self, gateway: str) -> None:
        super().__init__(gateway, host_addresses=["127.0.0.1"])
        self.ends = {"begun": 0, "cancelled": 0}

    @capability
    async def nap(self, seconds: float) -> float:
        self.ends["begun"] += 1
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self.ends["cancelled"] += 1
            raise
        return seconds

    @capability
    async def count_up(self) -> AsyncIterator[int]:
        number = 0
        while True:
            yield number
            number += 1


@pytest.fixture
async def pair(shared_gateway: GatewayProcess) -> AsyncIterator[tuple[Sleeper, Sleeper]]:
    async with Sleeper(shared_gateway.url) as one, Sleeper(shared_gateway.url) as two:
        yield one, two


async def test_thousand_calls_at_once_complete_both_ways(pair: tuple[Sleeper, Sleeper]) -> None:
    one, two = pair
    async with one.connect(two.did) as there, two.connect(one.did) as back:
        calls = [side.execute("nap", seconds=0.0001 * n) for n in range(500) for side in (there, back)]
        results = await asyncio.gather(*calls)
    assert results == [0.0001 * n for n in range(500) for _ in range(2)]
    assert one.ends == two.ends == {"begun": 500, "cancelled": 0}


async def test_every_cancelled_call_is_answered(pair: tuple[Sleeper, Sleeper]) -> None:
    one, two = pair
    async with one.connect(two.did) as peer:
        calls = [asyncio.ensure_future(peer.execute("nap", seconds=60.0)) for _ in range(100)]
        answers = []
        receive = peer._calls.receive
        peer._calls.receive = lambda data, **more: (answers.append(data), receive(data, **more))[1]
        await asyncio.wait_for(_until(lambda: two.ends["begun"] == 100), SECONDS)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await asyncio.wait_for(_until(lambda: len(finals(answers, "cancelled")) == 100), SECONDS)
        assert two.ends == {"begun": 100, "cancelled": 100}
        # And what the deadline ends, and what the callee ends itself.
        with pytest.raises(CallTimeoutError):
            await peer.execute("nap", seconds=60.0, timeout=0.2)
        stream = peer.stream("count_up")
        assert await anext(stream) == 0
        for execution in two.peers[one.did]._executions.values():
            execution.end("cancelled")
        with pytest.raises(CallCancelledError):
            async for _ in stream:
                pass
        assert await peer.execute("nap", seconds=0.0) == 0.0


def finals(answers: list[str | bytes], status: str) -> set[str]:
    """Return which calls were answered with this status."""
    envelopes = [json.loads(answer) for answer in answers if isinstance(answer, str)]
    return {
        envelope["correlation_id"]
        for envelope in envelopes
        if envelope["type"] == "EXEC_RESPONSE" and envelope["payload"]["status"] == status
    }


async def _until(condition: object) -> None:
    while not condition():  # type: ignore[operator]  # noqa: ASYNC110 -- loop passes until it holds
        await asyncio.sleep(0.005)
