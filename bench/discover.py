"""DISCOVER: what a search takes, and whether messages wait for it.

First the code of a worker by itself, with all agents at one; then a gateway that runs, while messages are
relayed. Usage: `python -m bench.discover --agents 100000 --workers 8 [--write]`.
bench/README.md says how to read the result.
"""

from __future__ import annotations

import asyncio
import json
import random
import resource
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from aiconexus.protocol import DIDKey, DiscoverPayload, Message, encode
from aiconexus.protocol.cards import sign_card
from bench import holders, machine, report
from bench.clients import ClientError, Clients, Taken
from bench.compile import CompileError
from bench.load import Endpoint, Load, LoadError, LoadResult
from bench.offers import offer
from bench.servers import ServerError
from bench.swarm import Display, SwarmGateway, drive, pair_up, sample
from bench.websocket import WebSocket

PAGE = 50
PAIRS = 200
CAPABILITY_BYTES = 100
SECTION = "discover"


@dataclass
class Times:
    """Durations in ms."""

    all: list[float] = field(default_factory=list)

    def percentile(self, percent: int) -> float:
        """Return the time that `percent` of them did not exceed."""
        if len(self.all) < 2:
            return max(self.all, default=0.0)
        return quantiles(self.all, n=100, method="inclusive")[percent - 1]


def queries(kinds: int, dids: Sequence[str], rng: random.Random) -> dict[str, Callable[[], DiscoverPayload]]:
    """Return what makes questions of each sort; half of them are for a later page."""

    def query(**conditions: Any) -> DiscoverPayload:
        cursor = rng.choice(dids) if rng.random() < 0.5 else None
        return DiscoverPayload(limit=PAGE, cursor=cursor, **conditions)

    def skill() -> str:
        return holders.skill(rng.randrange(kinds))

    return {
        "one capability": lambda: query(capability=skill()),
        "the tag of all": lambda: query(tag=holders.TAG),
        "text that all have": lambda: query(text=holders.SKILL),
        "text that one capability has": lambda: query(text=skill()),
        "text that nobody has": lambda: query(text=f"no {skill()}"),
        "no condition": query,
        "50 DIDs": lambda: DiscoverPayload(limit=PAGE, dids=rng.sample(dids, min(PAGE, len(dids)))),
    }


# --- in one worker ---------------------------------------------------------------------------------


class _Connection:
    """What the registry needs of a connection."""

    def __init__(self, index: int) -> None:
        self.index = index


async def search_one_worker(agents: int, kinds: int, count: int, progress: Progress) -> dict[str, Any]:
    """Ask a worker's Discovery, one question after the other; return for each sort its times in ms.

    `turn_ms` is the longest pass of the event loop meanwhile: what a message waits at most.
    """
    from gateway._ledger import Ledger
    from gateway._routing import RoutingTable
    from gateway.cluster import offers_of
    from gateway.discovery import Discovery, Page
    from gateway.registry import Registry, Shown

    ledger = Ledger(1)
    ledger.begin(0, 0)
    registry = Registry(RoutingTable(), ledger, worker=0, away=30)
    dids = []
    for number in progress.track(range(agents), description="cards"):
        key = DIDKey.generate()
        dids.append(key.did)
        card = encode_card(holders.capabilities(CAPABILITY_BYTES, number, kinds), key)
        connection: Any = _Connection(number)
        registry.register(key.did, connection, Shown(card, offers_of(card)), "token", None)
    answered: asyncio.Queue[tuple[float, Page]] = asyncio.Queue()
    discovery = Discovery(
        0,
        registry.directory,
        registry,
        None,
        others=list,
        tell=lambda *_: True,
        reply=lambda session, id_, page, partial: answered.put_nowait((time.perf_counter(), page)),
        settle=lambda: None,
    )
    asker = registry.get(dids[0])
    assert asker is not None
    rng = random.Random(1)
    loop = asyncio.get_running_loop()
    passes = _Passes(loop)
    found = {}
    for name, make in queries(kinds, dids, rng).items():
        times = Times()
        passes.begin()
        for _ in progress.track(range(count), description=name):
            payload = make()
            before = time.perf_counter()
            discovery.ask(asker, "id", payload)
            at, _ = await answered.get()
            times.all.append((at - before) * 1e3)
        found[name] = {
            "p50_ms": round(times.percentile(50), 3),
            "p99_ms": round(times.percentile(99), 3),
            "turn_p99_ms": round(passes.end().percentile(99), 3),
        }
    return found


class _Passes:
    """How long each pass of an event loop takes."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._times: Times | None = None

    def begin(self) -> None:
        self._times = Times()
        self._loop.call_soon(self._note, time.perf_counter())

    def _note(self, before: float) -> None:
        if self._times is not None:
            now = time.perf_counter()
            self._times.all.append((now - before) * 1e3)
            self._loop.call_soon(self._note, now)

    def end(self) -> Times:
        times, self._times = self._times, None
        assert times is not None
        return times


def encode_card(capabilities: list[Any], key: DIDKey) -> bytes:
    """Return a card as the gateway keeps it."""
    return json.dumps(sign_card(capabilities, key), separators=(",", ":")).encode()


# --- a gateway that runs ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What is registered, asked and relayed meanwhile."""

    agents: int
    kinds: int
    clients: int
    rounds: int
    seconds: float
    rate: int  # messages/s
    searches: int  # per second


def search_gateway(gateway: SwarmGateway, plan: Plan, display: Display) -> dict[str, Any]:
    """Register agents, relay messages between some, and search meanwhile, in every other run."""
    with ExitStack() as stack:
        clients = stack.enter_context(
            Clients(gateway.url, plan.agents, plan.clients, CAPABILITY_BYTES, plan.kinds)
        )
        show = display.phase("connecting", plan.agents)
        places = clients.connect(lambda totals: show(totals.registered, f"{totals.registered:,} agents"))
        if len(places) < plan.agents:
            raise ServerError(f"only {len(places):,} agents could register: {clients.first_failure}")
        taken = {agent.place: agent for agent in clients.take(sample(places, PAIRS))}
        for agent in taken.values():
            stack.callback(agent.connection.close)
        pairs = [(taken[a], taken[b]) for a, b in pair_up(list(taken))["within"]]
        asker = DIDKey.generate()
        connection = gateway.connect(asker)
        stack.callback(connection.close)
        dids = [agent.key.did for agent in taken.values()]
        search = _Search(connection, asker, gateway.did, queries(plan.kinds, dids, random.Random(2)))
        runs: dict[str, list[LoadResult]] = defaultdict(list)
        load = stack.enter_context(Load(_endpoints(pairs)))
        drive(load, 1.0, plan.rate, clients, lambda passed: None)  # buffers reach their size
        show = display.phase("searching", plan.rounds)
        for turn in range(plan.rounds):
            runs["without"].append(drive(load, plan.seconds, plan.rate, clients, lambda passed: None))
            search.begin(plan.searches)
            runs["with"].append(drive(load, plan.seconds, plan.rate, clients, search.go_on, pause=0.0))
            show(turn + 1, f"{search.count:,} answers")
    return {
        "searches": {
            name: {"p50_ms": round(times.percentile(50), 3), "p99_ms": round(times.percentile(99), 3)}
            for name, times in search.times.items()
        },
        "routing": {
            name: {
                "p50_ms": round(median(run.p50_ms for run in results), 4),
                "p99_ms": round(median(run.p99_ms for run in results), 4),
            }
            for name, results in runs.items()
        },
    }


def _endpoints(pairs: Sequence[tuple[Taken, Taken]]) -> list[Endpoint]:
    endpoints = []
    for first, second in pairs:
        asks, answers = offer(first.key, second.key), offer(second.key, first.key)
        endpoints.append(Endpoint(first.connection, sends=asks, receives=answers))
        endpoints.append(Endpoint(second.connection, sends=answers, receives=asks))
    return endpoints


class _Search:
    """Asks at a steady rate, all sorts of questions in turn, each when the one before is answered."""

    def __init__(
        self,
        connection: WebSocket,
        key: DIDKey,
        gateway: str,
        sorts: dict[str, Callable[[], DiscoverPayload]],
    ) -> None:
        self._connection = connection
        self._key = key
        self._gateway = gateway
        self._sorts = list(sorts.items())
        self._interval = self._next = 0.0
        self.times: dict[str, Times] = {name: Times() for name in sorts}
        self.count = 0

    def begin(self, rate: int) -> None:
        """Start anew, with so many questions per second."""
        self._interval, self._next = 1 / rate, time.monotonic()

    def go_on(self, _: float) -> None:
        """Wait until it is time, and ask."""
        time.sleep(max(self._next - time.monotonic(), 0))
        self._next += self._interval
        name, make = self._sorts[self.count % len(self._sorts)]
        question = Message.create(self._key.did, self._gateway, make())
        before = time.perf_counter()
        self._connection.send(encode(question))
        while True:
            answer = json.loads(self._connection.receive())
            if answer["correlation_id"] == question.id:
                break
        if answer["type"] != "PRESENCE" or answer["payload"].get("partial"):
            raise ServerError(f"{name}: {json.dumps(answer)[:500]}")
        self.times[name].all.append((time.perf_counter() - before) * 1e3)
        self.count += 1


# --- the command -----------------------------------------------------------------------------------

COLUMNS = ("DISCOVER", "worker p50 ms", "p99 ms", "loop pass p99 ms", "gateway p50 ms", "p99 ms")


def rows(figures: dict[str, Any]) -> list[list[str]]:
    """Return the table of both parts under COLUMNS."""
    found = []
    for name, worker in figures["worker"].items():
        served = figures["gateway"]["searches"].get(name, {})
        found.append(
            [
                name,
                *(f"{worker[key]:.2f}" for key in ("p50_ms", "p99_ms", "turn_p99_ms")),
                *(f"{served[key]:.2f}" if served else "-" for key in ("p50_ms", "p99_ms")),
            ]
        )
    return found


def routing(figures: dict[str, Any]) -> str:
    """Say what the messages noticed."""
    plan, runs = figures["plan"], figures["gateway"]["routing"]
    return (
        f"{plan['rate']:,} messages/s meanwhile: p50 {runs['with']['p50_ms']:.2f} ms, p99 "
        f"{runs['with']['p99_ms']:.2f} ms; in turns with them, without any search: p50 "
        f"{runs['without']['p50_ms']:.2f} ms, p99 {runs['without']['p99_ms']:.2f} ms."
    )


def conditions(figures: dict[str, Any]) -> str:
    """Say what was measured."""
    plan = figures["plan"]
    described = figures["machine"]
    return (
        f"{plan['agents']:,} agents with {plan['kinds']:,} capabilities, pages of {PAGE}. Worker: all agents "
        f"at one, without sockets. Gateway: round trips of {plan['searches']} searches/s at "
        f"{figures['workers']} workers, medians of {plan['rounds']} runs of {plan['seconds']:g} s. "
        f"{described['cpu']}, {described['cores']} cores, Python {figures['versions']['python']}."
    )


def draw(figures: dict[str, Any]) -> Table:
    """Draw the result."""
    drawn = Table(box=SIMPLE_HEAD)
    for index, column in enumerate(COLUMNS):
        drawn.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows(figures):
        drawn.add_row(*row)
    return drawn


def describe(figures: dict[str, Any]) -> str:
    """Write the result for RESULTS.md."""
    lines = [conditions(figures), "", "| " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * 5 + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows(figures)]
    return "\n".join([*lines, "", routing(figures)])


def main(
    *,
    agents: Annotated[int, typer.Option(min=PAIRS * 4, help="Agents that are registered.")] = 10_000,
    kinds: Annotated[int, typer.Option("--capabilities", min=1, help="That differ.")] = 1_000,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes of the gateway.")] = 2,
    clients: Annotated[int, typer.Option(min=1, max=250, help="Client processes.")] = 8,
    count: Annotated[int, typer.Option(min=2, help="Searches of each sort in the worker.")] = 1_000,
    rounds: Annotated[int, typer.Option(min=1, help="Runs with and without searches, in turn.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each run.")] = 10.0,
    rate: Annotated[int, typer.Option(min=1, help="Messages/s that are relayed meanwhile.")] = 5_000,
    searches: Annotated[int, typer.Option(min=1, help="Per second.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line of JSON.")] = False,
    write: Annotated[bool, typer.Option(help="Update bench/RESULTS.md.")] = False,
) -> None:
    """Measure searches in a worker and at a gateway, and what messages notice of them."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    console, errors = Console(), Console(stderr=True, highlight=False)
    plan = Plan(agents, kinds, clients, rounds, seconds, rate, searches)
    try:
        with Progress(console=errors, transient=True) as progress:
            worker = asyncio.run(search_one_worker(agents, kinds, count, progress))
        gateway = SwarmGateway(workers, agents)
        with ExitStack() as stack:
            gateway.start(None)
            stack.callback(gateway.stop)
            display = stack.enter_context(Display(errors))
            served = search_gateway(gateway, plan, display)
    except (ClientError, CompileError, LoadError, ServerError, OSError) as error:
        print(f"bench.discover: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    figures = {
        "machine": machine.describe(),
        "versions": machine.versions(),
        "plan": plan.__dict__,
        "workers": workers,
        "worker": worker,
        "gateway": served,
    }
    console.width = max(console.width, report.TABLE_WIDTH)
    console.print(draw(figures))
    console.print(f"{routing(figures)}\n\n{conditions(figures)}")
    if write:
        report.write_section(SECTION, describe(figures))
    if as_json:
        print(json.dumps(figures))


if __name__ == "__main__":
    typer.run(main)
