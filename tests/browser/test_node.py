"""aiconexus.js in Node.js: against the vectors, against itself, and with Python agents in both directions.

In a network namespace with loopback alone: werift offers every address of the machine.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from javascript import ROOT, MissingError, find_node, npm_packages
from loopback import NoNamespaceError, loopback_only

from aiconexus import Agent, Intent, Quote, capability, current_call
from aiconexus.protocol.errors import (
    CallTimeoutError,
    CapabilityError,
    InvalidArgumentsError,
    PeerLostError,
    UnknownCapabilityError,
)

if TYPE_CHECKING:
    from conftest import GatewayProcess

HERE = Path(__file__).parent
SECONDS = 20.0  # for anything that must happen at all
RUN_SECONDS = 100.0


def run_node(*arguments: str, **environment: str) -> None:
    """Run node's own test runner; its whole output is the failure."""
    with subprocess.Popen(
        [find_node(), *arguments],
        cwd=ROOT,
        stdout=PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, **environment},
    ) as run:
        try:
            output, _ = run.communicate(timeout=RUN_SECONDS)
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)  # it runs each file in a process of its own
    assert run.returncode == 0, output


@pytest.fixture(scope="module")
def node() -> str:
    try:
        return find_node()
    except MissingError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def packages(node: str) -> Path:
    try:
        return npm_packages()
    except MissingError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def loopback() -> Iterator[None]:
    try:
        with loopback_only():
            yield
    except NoNamespaceError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def isolated_gateway(loopback: None, shared_gateway: GatewayProcess) -> GatewayProcess:
    """A gateway inside of the namespace: that one is entered first."""
    return shared_gateway


# --- by itself ---------------------------------------------------------------------------------


@pytest.mark.soak
def test_module_keeps_to_the_vectors(node: str) -> None:
    run_node("--test", "tests/browser/vectors.test.mjs")


@pytest.mark.soak
def test_types_of_the_module_and_the_page_are_sound(packages: Path) -> None:
    run_node(str(packages / "node_modules/typescript/bin/tsc"), "--project", "tests/browser/tsconfig.json")


@pytest.mark.soak
def test_form_of_the_sources_is_prettiers(packages: Path) -> None:
    sources = ["examples/browser_agent/*.{js,css,html}", "tests/browser/*.mjs"]
    prettier = str(packages / "node_modules/prettier/bin/prettier.cjs")
    run_node(prettier, "--config", "tests/browser/prettier.json", "--check", *sources)


@pytest.mark.soak
def test_module_registers_and_returns_as_the_protocol_says(packages: Path) -> None:
    run_node("--test", "tests/browser/gateway.test.mjs", AICONEXUS_NODE_PACKAGES=str(packages))


@pytest.mark.soak
@pytest.mark.parametrize("script", ["calls", "hostile"])
def test_two_agents_in_node_work_together(
    packages: Path, isolated_gateway: GatewayProcess, script: str
) -> None:
    run_node(
        "--test",
        f"tests/browser/{script}.test.mjs",
        AICONEXUS_NODE_PACKAGES=str(packages),
        AICONEXUS_GATEWAY=isolated_gateway.url,
    )


# --- with Python -------------------------------------------------------------------------------


class Worker(Agent):
    """Does what the agent in Node.js offers, too."""

    def __init__(self, gateway: str) -> None:
        super().__init__(gateway, host_addresses=["127.0.0.1"])
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()

    @capability
    async def double(self, value: int) -> int:
        return 2 * value

    @capability
    async def echo(self, value: bytes) -> bytes:
        return value

    @capability
    async def measure(self, data: AsyncIterator[bytes]) -> int:
        return sum([len(chunk) async for chunk in data])

    @capability
    async def hold(self) -> None:
        self.started.set()
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    @capability
    async def count(self, to: int) -> AsyncIterator[int]:
        for number in range(to):
            current_call().progress({"done": number, "total": to})
            yield number

    async def on_intent(self, intent: Intent) -> Quote:
        return Quote(status="understood", required_input=["value"], cost=f"nothing for {intent.query}")


class NodeAgent:
    """The process of `node_agent.mjs`."""

    def __init__(self, process: Process) -> None:
        self.process = process

    async def said(self) -> dict[str, Any]:
        """Return the next thing it says."""
        assert self.process.stdout is not None
        line = await asyncio.wait_for(self.process.stdout.readline(), SECONDS)
        return json.loads(line)

    async def stop(self) -> None:
        """Let it leave as it should."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert await asyncio.wait_for(self.process.wait(), SECONDS) == 0


@pytest.fixture
async def worker(isolated_gateway: GatewayProcess) -> AsyncIterator[Worker]:
    async with Worker(isolated_gateway.url) as worker:
        yield worker


@pytest_asyncio.fixture
async def theirs(packages: Path, isolated_gateway: GatewayProcess) -> AsyncIterator[tuple[NodeAgent, str]]:
    environment = {"AICONEXUS_NODE_PACKAGES": str(packages), "AICONEXUS_GATEWAY": isolated_gateway.url}
    process = await asyncio.create_subprocess_exec(
        find_node(), str(HERE / "node_agent.mjs"), stdin=PIPE, stdout=PIPE, env={**os.environ, **environment}
    )
    agent = NodeAgent(process)
    try:
        yield agent, (await agent.said())["did"]
    finally:
        if process.returncode is None:
            await agent.stop()


async def test_python_finds_and_calls_an_agent_in_node(worker: Worker, theirs: tuple[NodeAgent, str]) -> None:
    _, did = theirs
    found = [agent async for agent in worker.discover(capability="count", dids=[did])]
    assert [agent.did for agent in found] == [did]
    async with worker.connect(did) as peer:
        quote = await peer.intent("doubling")
        assert quote == Quote(status="understood", required_input=["value"], cost="nothing for doubling")
        assert await peer.execute("double", value=21) == 42
        assert await peer.execute("double", value=1.25) == 2.5
        assert await peer.execute("echo", value={"text": "ü€😀", "list": [1, None, True]}) == {
            "text": "ü€😀",
            "list": [1, None, True],
        }
        with pytest.raises(UnknownCapabilityError, match="there is: double"):
            await peer.execute("triple")
        with pytest.raises(InvalidArgumentsError, match="value: not number"):
            await peer.execute("double", value="1")
        with pytest.raises(CapabilityError, match="RangeError: there is nothing here"):
            await peer.execute("fail")


async def test_python_reads_a_stream_of_node(worker: Worker, theirs: tuple[NodeAgent, str]) -> None:
    agent, did = theirs
    async with worker.connect(did) as peer:
        progress: list[Any] = []
        parts = [part async for part in peer.stream("count", to=5, on_progress=progress.append)]
        assert parts == [0, 1, 2, 3, 4]
        assert {"done": 0, "total": 5} in progress
        assert (await agent.said()) == {"aborted": "left"}
        assert await peer.execute("count", to=3) == [0, 1, 2]
        assert (await agent.said()) == {"aborted": "left"}
        stream = peer.stream("count", to=1_000_000)
        assert await stream.__anext__() == 0
        await stream.aclose()  # cancels it over there
        assert (await agent.said()) == {"aborted": "left"}


async def test_python_cancels_what_runs_in_node(worker: Worker, theirs: tuple[NodeAgent, str]) -> None:
    agent, did = theirs
    async with worker.connect(did) as peer:
        began = asyncio.Event()
        call = asyncio.ensure_future(peer.execute("hold", on_progress=lambda _: began.set()))
        await asyncio.wait_for(began.wait(), SECONDS)
        call.cancel()
        assert (await agent.said()) == {"aborted": "cancelled"}
        with pytest.raises(CallTimeoutError):
            await peer.execute("hold", timeout=0.3)
        assert (await agent.said())["aborted"] in ("timeout", "cancelled")  # either side may be faster


async def test_bytes_of_any_size_come_back_from_node(worker: Worker, theirs: tuple[NodeAgent, str]) -> None:
    _, did = theirs
    data = os.urandom(1_500_000)
    async with worker.connect(did) as peer:
        assert await peer.execute("echo", value=data) == data
        long = ["x" * 1000] * 300
        assert await peer.execute("echo", value=long) == long
        assert await peer.execute("echo", value=b"") == b""


async def test_stream_of_bytes_goes_to_node(worker: Worker, theirs: tuple[NodeAgent, str]) -> None:
    async def source() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield bytes(50_000)

    _, did = theirs
    async with worker.connect(did) as peer:
        assert await peer.execute("measure", data=source()) == 500_000
        assert await peer.execute("measure", data=bytes(7)) == 7
        with pytest.raises(InvalidArgumentsError, match="value takes no stream"):
            await peer.execute("double", value=source())


async def test_agent_in_node_says_goodbye(worker: Worker, theirs: tuple[NodeAgent, str]) -> None:
    agent, did = theirs
    async with worker.connect(did) as peer:
        began = asyncio.Event()
        call = asyncio.ensure_future(peer.execute("hold", on_progress=lambda _: began.set()))
        await asyncio.wait_for(began.wait(), SECONDS)
        await agent.stop()
        with pytest.raises(PeerLostError, match="the agent stops"):
            await asyncio.wait_for(call, SECONDS)


async def test_agent_in_node_calls_python(
    worker: Worker, packages: Path, isolated_gateway: GatewayProcess
) -> None:
    environment = {"AICONEXUS_NODE_PACKAGES": str(packages), "AICONEXUS_GATEWAY": isolated_gateway.url}
    process = await asyncio.create_subprocess_exec(
        find_node(),
        str(HERE / "node_caller.mjs"),
        worker.did,
        stdin=PIPE,
        stderr=PIPE,
        env={**os.environ, **environment},
    )
    assert process.stdin is not None
    assert process.stderr is not None
    errors = asyncio.ensure_future(process.stderr.read())
    try:
        ended = asyncio.ensure_future(process.wait())
        started = asyncio.ensure_future(worker.started.wait())
        await asyncio.wait({ended, started}, timeout=RUN_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            raise AssertionError((await errors).decode())
        process.stdin.write(b"enough\n")
        await asyncio.wait_for(worker.cancelled.wait(), SECONDS)
        assert await asyncio.wait_for(ended, SECONDS) == 0, (await errors).decode()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await errors
        process.stdin.close()
