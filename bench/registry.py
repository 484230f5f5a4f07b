"""The shared registry: what an agent costs Redis, in CPU time and in memory.

The gateway's own scripts, sent as a worker sends them, on a Redis of its own.
Usage: `python -m bench.registry [--agents 100000] [--write]`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from statistics import median
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from aiconexus.protocol import DIDKey
from bench import holders, machine, report
from bench.cpu import cpu_time
from bench.discover import encode_card
from bench.redis_server import RedisServer
from bench.servers import ServerError

CAPABILITY_BYTES = 100
KINDS = 1_000
TOGETHER = 1_000  # under way at once
SECTION = "registry"


async def measure(redis: RedisServer, agents: int, progress: Progress) -> dict[str, Any]:
    """Register agents, look for them, let them be away and go; return the costs of each in µs."""
    from gateway.cluster import offers_of
    from gateway.redis_line import RedisLine, make_client
    from gateway.shared_registry import Entry, SharedRegistry

    client = make_client(redis.url)
    line = RedisLine(client, lambda: None)
    serving = asyncio.create_task(line.serve())
    registry = SharedRegistry(
        line, line, prefix="bench", instance="bench", did="did", name="bench", workers=1, worker=0
    )
    registry.number = (await registry.heartbeat()).number
    entries = []
    for number in progress.track(range(agents), description="cards"):
        key = DIDKey.generate()
        card = encode_card(holders.capabilities(CAPABILITY_BYTES, number, KINDS), key)
        offers = offers_of(card)
        terms = ("all", *sorted({f"cap:{offer.name}" for offer in offers}), f"tag:{holders.TAG}")
        text = "\n".join(offer.text for offer in offers)
        entries.append(Entry(key.did, number, number + 1, 1, False, card, False, terms, text))
    found: dict[str, Any] = {}

    async def cost(name: str, run: Callable[[Entry, Callable[[Any], None]], None]) -> None:
        loop = asyncio.get_running_loop()
        before, began = cpu_time(redis.pid), time.perf_counter()
        for start in progress.track(range(0, agents, TOGETHER), description=name):
            part = entries[start : start + TOGETHER]
            futures = [loop.create_future() for _ in part]
            for entry, future in zip(part, futures, strict=True):
                run(entry, future.set_result)
            for answer in await asyncio.gather(*futures):
                if isinstance(answer, Exception):
                    raise answer
        found[name] = {
            "redis_us": (cpu_time(redis.pid) - before) / 1e3 / agents,
            "per_second": agents / (time.perf_counter() - began),
        }

    async def memory() -> int:
        return int((await client.info("memory"))["used_memory"])

    empty = await memory()
    await cost("register", lambda entry, done: registry.register(entry, 2**52, done))
    found["bytes_per_agent"] = (await memory() - empty) / agents
    await cost("locate", lambda entry, done: registry.locate(entry.did, done))
    await cost("register elsewhere", lambda entry, done: registry.register(entry, 2**52, done))
    await cost(
        "away",
        lambda entry, done: (registry.set_away(entry.did, entry.epoch), line.send("PING", done=done))[1],
    )
    before = cpu_time(redis.pid)
    for _ in range(100):
        await registry.heartbeat()
    found["heartbeat"] = {"redis_us": (cpu_time(redis.pid) - before) / 1e3 / 100, "per_second": 0.0}
    await cost("unregister", lambda entry, done: registry.unregister(entry.did, entry.epoch, done))
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    await client.aclose()
    return found


COLUMNS = ("operation", "Redis µs", "per second")


def rows(rounds: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the medians under COLUMNS."""
    found = []
    for name in rounds[0]:
        if name != "bytes_per_agent":
            cost = report.Spread.of([each[name]["redis_us"] for each in rounds])
            rate = median(each[name]["per_second"] for each in rounds)
            found.append([name, cost.text(1), f"{rate:,.0f}" if rate else "-"])
    return found


def conditions(rounds: Sequence[dict[str, Any]], agents: int, version: str) -> str:
    """Say what was measured."""
    size = report.Spread.of([each["bytes_per_agent"] for each in rounds])
    return (
        f"{agents:,} agents with a capability of {CAPABILITY_BYTES} bytes, {KINDS:,} different ones; Redis "
        f"{version}, a worker that asks {TOGETHER:,} things at a time; {len(rounds)} rounds. An agent takes "
        f"{size.median:,.0f} bytes of Redis. {machine.describe()['cpu']}."
    )


def main(
    *,
    agents: Annotated[int, typer.Option(min=TOGETHER)] = 100_000,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line of JSON.")] = False,
    write: Annotated[bool, typer.Option(help="Update bench/RESULTS.md.")] = False,
) -> None:
    """Measure what an agent costs Redis."""
    console, errors = Console(), Console(stderr=True)
    try:
        with ExitStack() as stack:
            redis = stack.enter_context(RedisServer())
            progress = stack.enter_context(Progress(console=errors, transient=True))
            found = [asyncio.run(measure(redis, agents, progress)) for _ in range(rounds)]
            version = redis.version()
    except ServerError as error:
        print(f"bench.registry: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    drawn = Table(box=SIMPLE_HEAD)
    for index, column in enumerate(COLUMNS):
        drawn.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows(found):
        drawn.add_row(*row)
    console.print(drawn)
    console.print(conditions(found, agents, version))
    if write:
        lines = [conditions(found, agents, version), "", "| " + " | ".join(COLUMNS) + " |", "|---|---:|---:|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows(found)]
        report.write_section(SECTION, "\n".join(lines))
    if as_json:
        print(json.dumps(found))


if __name__ == "__main__":
    typer.run(main)
