"""Two agents meet through a gateway and work together, each in a process of its own.

    make demo

Starts the installed `aiconexus-gateway` on a free port of 127.0.0.1, then the agents in `hello_world`, and
shows what each of them says, with the time. Ends with exit status 0 if all went well and all have stopped.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import urllib.request
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path
from time import perf_counter

from rich.console import Console
from rich.text import Text

AGENTS = Path(__file__).parent / "hello_world"
SECONDS = 60.0  # for each step; on an idle machine the whole demo takes five
COLORS = {"gateway": "magenta", "notary": "green", "client": "cyan", "demo": "yellow"}

console = Console(highlight=False, soft_wrap=True)
begin = perf_counter()


class DemoError(Exception):
    """Something did not go as it should."""


def show(who: str, what: str) -> None:
    """Print one step: when, who, what."""
    line = Text(f"{perf_counter() - begin:7.3f} s  ", style="dim")
    line.append(f"{who:<8} ", style=COLORS[who])
    console.print(line.append(what, style="bold" if who == "client" else ""))


class Actor:
    """One process of the demo, and what it says."""

    def __init__(self, name: str, process: Process) -> None:
        self.name = name
        self.process = process
        assert process.stderr is not None
        self.errors = asyncio.ensure_future(process.stderr.read())

    @classmethod
    async def start(cls, name: str, *command: str) -> Actor:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
        return cls(
            name, await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE, env=environment)
        )

    async def lines(self) -> AsyncIterator[str]:
        """Yield what it says, line by line, until it ends."""
        assert self.process.stdout is not None
        while line := await asyncio.wait_for(self.process.stdout.readline(), SECONDS):
            yield line.decode().strip("\n")

    async def until(self, words: str) -> str:
        """Show what it says up to the line that holds `words`; return what follows them."""
        async for line in self.lines():
            show(self.name, line)
            if words in line:
                return line.partition(words)[2].strip()
        raise DemoError(f"the {self.name} ended too early")

    async def rest(self) -> None:
        """Show all it still says, and see that it ends well."""
        async for line in self.lines():
            show(self.name, line)
        status = await asyncio.wait_for(self.process.wait(), SECONDS)
        if status != 0:
            raise DemoError(f"the {self.name} ended with exit status {status}")

    async def stop(self) -> None:
        """Send SIGTERM and see that it ends well."""
        self.process.send_signal(signal.SIGTERM)
        await self.rest()
        show(self.name, "has stopped")

    async def kill(self) -> str:
        """End it in any case; return what it wrote to stderr."""
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()
        return (await self.errors).decode(errors="replace")


def installed_gateway() -> str:
    """Return the path of `aiconexus-gateway`, preferring the one beside this Python."""
    beside = Path(sys.executable).with_name("aiconexus-gateway")
    found = str(beside) if beside.exists() else shutil.which("aiconexus-gateway")
    if found is None:
        raise DemoError("aiconexus-gateway is not installed: run `make demo`, or `pip install .` first")
    return found


def routed(health: str) -> int:
    """Ask the gateway how many messages it has routed between agents."""
    with urllib.request.urlopen(health, timeout=SECONDS) as response:  # noqa: S310 -- our own gateway
        return int(json.load(response)["counters"]["messages_routed"])


async def play(actors: list[Actor]) -> None:
    """Run the demo; every process that is started is added to `actors`."""

    async def enter(name: str, *command: str) -> Actor:
        actors.append(await Actor.start(name, *command))
        return actors[-1]

    gateway = await enter("gateway", installed_gateway(), "--host", "127.0.0.1", "--port", "0")
    url, health = await gateway.until("listening:"), await gateway.until("health:")
    await gateway.until("workers:")

    local = ("--gateway", url, "--host-address", "127.0.0.1")
    notary = await enter("notary", sys.executable, str(AGENTS / "notary.py"), *local)
    did = await notary.until("is registered as")

    show("demo", "the client is told this DID and nothing else")
    client = await enter("client", sys.executable, str(AGENTS / "client.py"), *local, did)
    await asyncio.gather(client.rest(), notary.until("is no longer connected"))

    count = await asyncio.to_thread(routed, health)
    show("gateway", f"has routed {count} messages, an offer and an answer; the rest went past it")
    await notary.stop()
    await gateway.stop()


async def main() -> int:
    console.rule("[bold]AIConexus[/]: two agents meet and work together")
    actors: list[Actor] = []
    failure = errors = ""
    try:
        await play(actors)
    except (DemoError, OSError, asyncio.TimeoutError) as error:
        failure = str(error) or f"a step took longer than {SECONDS:g} s"
    finally:
        for actor in actors:
            errors += await actor.kill()
    if failure:
        console.print(errors, markup=False)
        console.print(f"[bold red]failed:[/] {failure}")
        return 1
    console.rule(f"[bold green]done[/] in {perf_counter() - begin:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
