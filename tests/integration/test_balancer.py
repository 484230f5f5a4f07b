"""Gateways behind a load balancer: a real HAProxy with deploy/haproxy.cfg as it is shipped."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from name_server import NameServer
from ports import free_port
from wire import Agent, wait_until

from aiconexus.client import Backoff, ClientState, GatewayClient
from aiconexus.protocol import AnswerPayload, DIDKey, Message, MessageType, OfferPayload
from aiconexus.protocol.errors import GatewayUnreachableError

ROOT = Path(__file__).parent.parent.parent
CONFIGURATION = ROOT / "deploy" / "haproxy.cfg"
ALIVE_PATH = "/alive"
AGENTS_MAX = 8  # until both gateways have one; each gets every second
SECONDS = 20.0


@pytest.fixture
def haproxy() -> str:
    found = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
    if found is None:
        pytest.skip("needs HAProxy: apt-get install haproxy")
    return found


@pytest.fixture
def name_server() -> Iterator[NameServer]:
    server = NameServer()
    yield server
    server.stop()


def is_alive(port: int) -> bool:
    """Tell whether HAProxy answers for itself."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{ALIVE_PATH}", timeout=10) as response:
            return bool(response.status == 200)
    except OSError:
        return False


@pytest.fixture
def balance(haproxy: str, name_server: NameServer, tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Start HAProxy before two gateways, each `host:port`; return its own port."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(*gateways: str) -> int:
        port = free_port()
        text = CONFIGURATION.read_text()
        changes = {
            "bind :8000": f"bind 127.0.0.1:{port}",
            "maxconn 60000": "maxconn 1000",  # whoever runs the tests may have few descriptors
            "nameserver dns 127.0.0.11:53": f"nameserver dns 127.0.0.1:{name_server.port}",
            "init-addr libc,none": "init-addr none",  # asks nobody but that name server
            **{f" gateway-{number}:8000": f" {gateway}" for number, gateway in enumerate(gateways, 1)},
        }
        for before, after in changes.items():
            assert text.count(before) == 1, before
            text = text.replace(before, after)
        path = tmp_path / "haproxy.cfg"
        path.write_text(text)
        log_path = tmp_path / "haproxy.log"
        with log_path.open("w") as log:
            process = subprocess.Popen([haproxy, "-f", str(path), "-db"], stdout=log, stderr=log)
        processes.append(process)
        wait_until(lambda: process.poll() is not None or is_alive(port))
        assert process.poll() is None, log_path.read_text()
        return port

    yield start
    for process in processes:
        process.terminate()
        process.wait(30)


def is_accepted(port: int) -> bool:
    """Tell whether an agent can register."""
    try:
        with Agent(port):
            return True
    except (AssertionError, OSError, EOFError):
        return False


def test_the_configuration_as_it_is_has_no_fault(haproxy: str) -> None:
    run = subprocess.run(
        [haproxy, "-c", "-f", str(CONFIGURATION)], capture_output=True, text=True, timeout=30, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_health_check_of_the_balancer_asks_what_it_answers() -> None:
    assert f'"http://127.0.0.1:8000{ALIVE_PATH}"' in (ROOT / "docker-compose.yml").read_text()


async def assert_answered(asker: GatewayClient, other: GatewayClient) -> None:
    """An OFFER gets there, and its ANSWER back."""

    async def answer(message: Message) -> None:
        await other.send(message.reply(AnswerPayload(sdp="v=1")))

    forget = other.on(MessageType.OFFER, answer)
    reply = await asker.request(Message.create(asker.did, other.did, OfferPayload(sdp="v=0")))
    assert (reply.from_, reply.payload) == (other.did, AnswerPayload(sdp="v=1"))
    forget()


async def test_agents_are_balanced_and_come_back_at_the_other_gateway_when_one_stops(
    pair: tuple[Any, Any], balance: Callable[..., int]
) -> None:
    port = balance(*(f"127.0.0.1:{node.port}" for node in pair))
    async with AsyncExitStack() as stack:
        agents: list[GatewayClient] = []

        async def dial() -> None:
            client = GatewayClient(f"ws://127.0.0.1:{port}/ws", DIDKey.generate(), backoff=Backoff(0.05, 0.5))
            agents.append(await stack.enter_async_context(client))
            await client.register(["echo"])

        async def assert_all_are_one_network() -> None:
            dids = {found.did async for found in agents[0].discover(capability="echo")}
            assert dids >= {agent.did for agent in agents[1:]}
            for agent in agents[1:]:
                await assert_answered(agents[0], agent)
                await assert_answered(agent, agents[0])

        async def sessions() -> list[int]:
            return [(await asyncio.to_thread(node.health))["sessions"] for node in pair]

        while not agents or 0 in await sessions():
            assert len(agents) < AGENTS_MAX, "one of them gets all"
            await dial()
        await assert_all_are_one_network()
        assert await asyncio.to_thread(pair[0].stop) == 0
        await asyncio.to_thread(wait_until, lambda: pair[1].health()["sessions"] == len(agents), SECONDS)
        for agent in agents:
            await agent.wait_for(ClientState.REGISTERED, timeout=SECONDS)
        await assert_all_are_one_network()
        await dial()
        assert pair[1].health()["sessions"] == len(agents)
        await assert_answered(agents[0], agents[-1])


async def test_an_agent_is_told_that_the_balancer_may_have_no_gateway(balance: Callable[..., int]) -> None:
    port = balance("gateway-1:8000", "gateway-2:8000")  # names that nobody knows
    async with GatewayClient(f"ws://127.0.0.1:{port}/ws", DIDKey.generate()) as client:
        with pytest.raises(GatewayUnreachableError, match=r"HTTP 503.*a balancer has no gateway behind it"):
            await client.register()
    assert is_alive(port)  # it is not HAProxy that is amiss


def test_a_gateway_is_found_when_its_name_is_known_and_where_it_is_then(
    start_gateway: Callable[..., Any], balance: Callable[..., int], name_server: NameServer
) -> None:
    first = start_gateway()
    port = balance(f"gateway-1:{first.port}", f"gateway-2:{first.port}")
    assert not is_accepted(port)
    name_server.addresses["gateway-1"] = "127.0.0.1"
    wait_until(lambda: is_accepted(port), SECONDS)
    assert first.stop() == 0
    start_gateway("--host", "127.0.0.2", "--port", str(first.port))
    name_server.addresses["gateway-1"] = "127.0.0.2"
    wait_until(lambda: is_accepted(port), SECONDS)
