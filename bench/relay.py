"""Relay benchmark: what one routed message costs the gateway, beside the least that it could cost.

All servers run at once on one core and take turns; the load client has the other core. Usage:
`python -m bench.relay [--all]`; bench/README.md says how to read the result.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from aiconexus.protocol import DIDKey
from bench import machine, report
from bench.compile import CompileError
from bench.cpu import Cores, choose_cores, cpu_time, pin
from bench.load import Load, LoadError
from bench.report import Comparison, Figures
from bench.rivals import RIVALS
from bench.servers import Floor, Gateway, RunningGateway, Server, ServerError
from bench.websocket import WebSocketError

WARM_UP_SECONDS = 0.3  # sockets and buffers reach their size; not measured


@dataclass(frozen=True)
class Mode:
    """A traffic pattern. `rate` is in messages/s over all pairs; 0 is a closed loop."""

    name: str
    pairs: int
    burst: int = 1
    rate: int = 0

    @property
    def title(self) -> str:
        """What it is, for the head of a table."""
        if self.rate:
            return f"{self.name}: {self.rate:,} messages/s over {self.pairs:,} pairs, open loop"
        how = "one message" if self.burst == 1 else f"{self.burst} messages for one target"
        return f"{self.name}: {how} per write, {self.pairs:,} pairs, closed loop"


FEW_PAIRS, MANY_PAIRS = 100, 1000

MODES = (
    Mode("single", FEW_PAIRS),  # one frame per read: what OFFER and ANSWER look like
    Mode("burst", FEW_PAIRS, burst=8),  # eight frames in one read: trickle ICE
    Mode("paced", MANY_PAIRS, rate=10_000),  # a load that leaves the server idle half of the time
    Mode("crowd", MANY_PAIRS),  # as single: what a message costs more because many are connected
)
QUICK_MODES = ("single", "burst", "paced")  # without other servers, `crowd` is only on demand


@dataclass(frozen=True)
class Plan:
    """How often, how long (in s, per mode, server and round), and where."""

    rounds: int
    seconds: float
    cores: Cores

    @property
    def conditions(self) -> str:
        """What a reader of the figures must know."""
        where = (
            f"Server on core {self.cores.server}, load client on core {self.cores.client}"
            if self.cores.server is not None
            else "Server and load client share one core, so latency and throughput say little"
        )
        return f"{where}; {self.rounds} interleaved rounds of {self.seconds:g} s."


def measure(server: Server, mode: Mode, plan: Plan, agents: Sequence[DIDKey]) -> Figures:
    """Connect the mode's pairs, run it once, and disconnect.

    Raises:
        LoadError: A message was lost, reordered or altered.
    """
    with ExitStack() as stack:
        endpoints = []
        for first in range(0, 2 * mode.pairs, 2):
            for endpoint in server.pair(agents[first], agents[first + 1]):
                stack.callback(endpoint.connection.close)
                endpoints.append(endpoint)
        load = stack.enter_context(Load(endpoints, mode.burst, spin=plan.cores.client is not None))
        load.run(WARM_UP_SECONDS, mode.rate)
        before = cpu_time(server.pid)
        result = load.run(plan.seconds, mode.rate)
        cpu = cpu_time(server.pid) - before
    return Figures(
        us_per_message=cpu / 1e3 / result.messages,
        messages_per_second=result.messages / result.seconds,
        p50_ms=result.p50_ms,
        p99_ms=result.p99_ms,
        server_busy=cpu / 1e9 / result.seconds,
        client_busy=result.client_cpu_seconds / result.seconds,
    )


def compare(
    servers: Sequence[Server], modes: Sequence[Mode], plan: Plan, console: Console
) -> list[Comparison]:
    """Run every mode against every server in turn, round by round, so that noise hits all alike."""
    agents = [DIDKey.generate() for _ in range(2 * max(mode.pairs for mode in modes))]
    comparisons = [Comparison(mode.title, closed_loop=not mode.rate) for mode in modes]
    schedule = [
        (turn, mode, comparison, server)
        for turn, (mode, comparison), server in product(
            range(plan.rounds), zip(modes, comparisons, strict=True), servers
        )
        if server.keeps_up or not mode.rate
    ]
    with ExitStack() as stack:
        for server in servers:
            stack.callback(server.stop)
            server.start(plan.cores.server)
        pin(plan.cores.client)
        progress = stack.enter_context(Progress(console=console, transient=True))
        task = progress.add_task("", total=len(schedule))
        for turn, mode, comparison, server in schedule:
            progress.update(task, description=f"round {turn + 1}: {mode.name}, {server.name}")
            try:
                figures = measure(server, mode, plan, agents)
            except (LoadError, WebSocketError, OSError) as error:
                raise ServerError(f"{mode.name}, {server.name}: {error}") from error
            comparison.add(server.name, figures)
            progress.advance(task)
    return comparisons


def as_json(modes: Sequence[Mode], comparisons: Sequence[Comparison], subject: str) -> dict[str, Any]:
    """Return the figures of `subject` by mode; those of the other servers stand in them by name."""
    return {
        mode.name: {
            **comparison.medians(subject, subject),
            **{name: comparison.medians(name, subject) for name in comparison.rounds if name != subject},
        }
        for mode, comparison in zip(modes, comparisons, strict=True)
    }


def main(
    *,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 3,
    seconds: Annotated[float, typer.Option(min=0.1, max=600, help="Per mode, server and round.")] = 3.0,
    mode: Annotated[list[str] | None, typer.Option(help="Only this mode; may be repeated.")] = None,
    against: Annotated[
        list[str] | None, typer.Option(help=f"Also: {', '.join(RIVALS)}; may be repeated.")
    ] = None,
    against_all: Annotated[bool, typer.Option("--all", help="Against all of these.")] = False,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of agents in single and burst.")] = FEW_PAIRS,
    paced_pairs: Annotated[int, typer.Option(min=1, help="Pairs of agents in paced and crowd.")] = MANY_PAIRS,
    rate: Annotated[int, typer.Option(min=1, help="Messages/s in the open loop.")] = 10_000,
    url: Annotated[str | None, typer.Option(help="Measure a running gateway at this ws:// URL.")] = None,
    pid: Annotated[int | None, typer.Option(help="Its process, for the CPU time; with --url.")] = None,
    as_json_line: Annotated[bool, typer.Option("--json", help="End with one line of JSON.")] = False,
    write: Annotated[bool, typer.Option(help="Update bench/RESULTS.md.")] = False,
) -> None:
    """Measure what one routed message costs the gateway, beside a relay in C and what others would take."""
    rivals = list(RIVALS) if against_all else list(dict.fromkeys(against or []))
    all_modes = {
        known.name: replace(
            known, pairs=paced_pairs if known.pairs == MANY_PAIRS else pairs, rate=rate if known.rate else 0
        )
        for known in MODES
    }
    names = mode or (all_modes if rivals else QUICK_MODES)
    for given, there in ((names, all_modes), (rivals, RIVALS)):
        if unknown := set(given) - set(there):
            raise typer.BadParameter(f"{', '.join(sorted(unknown))}; there are {', '.join(there)}")
    if (url is None) != (pid is None):
        raise typer.BadParameter("--url and --pid go together")
    modes = [all_modes[name] for name in all_modes if name in names]

    console, errors = Console(), Console(stderr=True)
    console.width = max(console.width, report.TABLE_WIDTH)
    plan = Plan(rounds, seconds, choose_cores())
    described, versions = machine.describe(), machine.versions()
    gateway = Gateway() if url is None or pid is None else RunningGateway(url, pid)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    servers: list[Server] = [Floor(), gateway, *(RIVALS[name]() for name in rivals)]
    try:
        for server in servers:
            versions |= server.versions()
        comparisons = compare(servers, modes, plan, errors)
    except (CompileError, ServerError) as error:
        print(f"bench.relay: {error}", file=sys.stderr)
        raise typer.Exit(1) from None

    for comparison in comparisons:
        console.print(report.table(comparison, gateway.name))
        if note := comparison.note():
            console.print(note)
    console.print(plan.conditions)
    if write:
        section = report.markdown(
            comparisons,
            gateway.name,
            machine=described,
            versions=versions,
            conditions=plan.conditions,
            differences={server.name: server.differs for server in servers},
        )
        report.write_section("relay", section)
    if as_json_line:
        figures = as_json(modes, comparisons, gateway.name)
        print(json.dumps({"machine": described, "versions": versions, "modes": figures}))


if __name__ == "__main__":
    typer.run(main)
