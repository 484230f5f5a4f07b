"""What it takes to connect two agents, beside aiortc by itself.

Usage: `python -m bench.connect --rounds 5 [--write]`. bench/README.md says how to read the result.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from aiconexus import Agent
from bench import bare, machine, report
from bench.cpu import cpu_time
from bench.report import Spread
from bench.servers import Gateway, ServerError

SECTION = "connect"
PAUSE_SECONDS = 0.05  # for both sides to be done with the last connection
WARM_UP = 5  # connections of each that do not count
COLUMNS = ("to connect", "ms", "p95 ms", "ratio to aiortc", "CPU ms")

DIFFERS = {
    "agents": "`Agent.connect`, until the channel is open: OFFER and ANSWER go through a gateway on the same "
    "cores, each signed and verified.",
    "aiortc": "Two RTCPeerConnections alone, SDP handed over by a pipe. Nobody proves who it is.",
}


@dataclass
class Sample:
    """One round of a subject: seconds until the channel was open, and CPU time of all processes."""

    seconds: list[float] = field(default_factory=list)
    cpu_ns: int = 0

    @property
    def cpu_ms(self) -> float:
        """CPU time of one connection, its end included."""
        return self.cpu_ns / len(self.seconds) / 1e6


@dataclass
class Result:
    """All rounds of a subject."""

    rounds: list[Sample] = field(default_factory=list)

    @property
    def ms(self) -> Spread:
        """The rounds' medians."""
        return Spread.of([median(sample.seconds) * 1e3 for sample in self.rounds])

    @property
    def p95_ms(self) -> float:
        """Of all rounds together."""
        return quantiles([s * 1e3 for sample in self.rounds for s in sample.seconds], n=20)[-1]

    @property
    def cpu_ms(self) -> Spread:
        """The rounds' means."""
        return Spread.of([sample.cpu_ms for sample in self.rounds])

    def ratio(self, to: Result) -> Spread:
        """The time as a multiple of that of `to` in the same round."""
        pairs = zip(self.rounds, to.rounds, strict=True)
        return Spread.of([median(ours.seconds) / median(theirs.seconds) for ours, theirs in pairs])


class Answerer:
    """The process of the other side."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    @classmethod
    @asynccontextmanager
    async def start(cls, gateway: str) -> AsyncIterator[tuple[Answerer, str]]:
        """Start it; yield it with the DID of its agent."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bench.answerer", gateway),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 20,
        )
        answerer = cls(process)
        try:
            yield answerer, await answerer.hear()
        finally:
            assert process.stdin is not None
            process.stdin.close()
            await process.wait()

    async def hear(self) -> Any:
        """Read its next line."""
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise ServerError("the answering process ended")
        return json.loads(line)

    async def ask(self, **order: object) -> Any:
        """Tell it what to do, and return what it says."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        return await self.hear()


async def measure(url: str, pid: int, rounds: int, count: int, step: Callable[[], None]) -> dict[str, Result]:
    """Connect `count` times in each round, agents and aiortc in turns; `pid` is that of the gateway."""
    results = {name: Result() for name in DIFFERS}
    async with Answerer.start(url) as (answerer, did), Agent(url, host_addresses=["127.0.0.1"]) as agent:

        async def connect_agents() -> float:
            begin = time.perf_counter()
            async with agent.connect(did):
                return time.perf_counter() - begin

        async def connect_aiortc() -> float:
            begin = time.perf_counter()
            connection, _ = await bare.offer(lambda sdp: answerer.ask(offer=sdp))
            seconds = time.perf_counter() - begin
            await asyncio.gather(connection.close(), answerer.ask(close=True))
            return seconds

        subjects = {"agents": connect_agents, "aiortc": connect_aiortc}
        pids = os.getpid(), pid  # with their children: the answering process is one
        for number in range(-1, rounds):
            samples = {name: Sample() for name in subjects}
            for _ in range(count if number >= 0 else WARM_UP):
                for name, connect in subjects.items():
                    before = sum(map(cpu_time, pids))
                    samples[name].seconds.append(await connect())
                    await asyncio.sleep(PAUSE_SECONDS)
                    samples[name].cpu_ns += sum(map(cpu_time, pids)) - before
                step()
            if number >= 0:
                for name, sample in samples.items():
                    results[name].rounds.append(sample)
    return results


# --- the command -----------------------------------------------------------------------------------


def rows(results: dict[str, Result]) -> list[list[str]]:
    """Return the table under COLUMNS."""
    return [
        [
            name,
            result.ms.text(1),
            f"{result.p95_ms:.1f}",
            "1" if name == "aiortc" else result.ratio(results["aiortc"]).text(2),
            result.cpu_ms.text(1),
        ]
        for name, result in results.items()
    ]


def as_json(results: dict[str, Result]) -> dict[str, Any]:
    """Return the medians of each, and the ratio with its range."""
    ratio = results["agents"].ratio(results["aiortc"])
    figures: dict[str, Any] = {
        name: {
            "ms": round(result.ms.median, 2),
            "p95_ms": round(result.p95_ms, 2),
            "cpu_ms": round(result.cpu_ms.median, 2),
        }
        for name, result in results.items()
    }
    return {
        **figures,
        "ratio": round(ratio.median, 4),
        "ratio_range": [round(ratio.low, 4), round(ratio.high, 4)],
    }


def draw(results: dict[str, Result]) -> Table:
    """Draw the result."""
    drawn = Table(box=SIMPLE_HEAD)
    for index, column in enumerate(COLUMNS):
        drawn.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows(results):
        drawn.add_row(*row)
    return drawn


def describe(results: dict[str, Result], conditions: str) -> str:
    """Write the result for RESULTS.md."""
    lines = [conditions, "", "| " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows(results)]
    lines += ["", "**What is not like for like**", ""]
    return "\n".join([*lines, *(f"- **{name}**: {text}" for name, text in DIFFERS.items())])


def main(
    *,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; each gives one ratio.")] = 5,
    count: Annotated[int, typer.Option("--connections", min=2, help="Of each in a round.")] = 40,
    as_json_line: Annotated[bool, typer.Option("--json", help="End with one line of JSON.")] = False,
    write: Annotated[bool, typer.Option(help="Update bench/RESULTS.md.")] = False,
) -> None:
    """Measure the time to connect two agents in two processes, and two connections of aiortc likewise."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    console, errors = Console(), Console(stderr=True, highlight=False)
    gateway = Gateway()
    try:
        gateway.start(None)
        with Progress(console=errors, transient=True) as progress:
            task = progress.add_task("connecting", total=rounds * count + WARM_UP)
            results = asyncio.run(
                measure(gateway.url, gateway.pid, rounds, count, lambda: progress.advance(task))
            )
    except (ServerError, OSError) as error:
        print(f"bench.connect: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    finally:
        gateway.stop()
    described, versions = machine.describe(), machine.versions("aiortc", "aioice")
    conditions = (
        f"Two processes and a gateway on {described['cores']} cores; {rounds} rounds of {count} connections "
        f"of each, in turns. Medians of the rounds, in parentheses their range. {described['cpu']}, Python "
        f"{versions['python']}, aiortc {versions['aiortc']}, aioice {versions['aioice']}."
    )
    console.width = max(console.width, report.TABLE_WIDTH)
    console.print(draw(results))
    console.print(conditions)
    if write:
        report.write_section(SECTION, describe(results, conditions))
    if as_json_line:
        print(json.dumps({"machine": described, "versions": versions, **as_json(results)}))


if __name__ == "__main__":
    typer.run(main)
