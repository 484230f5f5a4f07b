"""Relay between nodes: what a message costs within a worker, across workers, and across nodes through Redis.

Beside it NATS, as one server and as two in a cluster, on the same work. All servers and the load client share
the machine's cores, unpinned: here more than two processes work on one message. Usage:
`python -m bench.nodes [--write]`; bench/README.md says how to read the result.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Annotated, ClassVar

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from aiconexus.protocol import DIDKey
from bench import compile as build
from bench import machine, report
from bench.compile import CompileError
from bench.cpu import cpu_time
from bench.load import Endpoint, Load, LoadError
from bench.redis_server import RedisServer
from bench.relay import WARM_UP_SECONDS, Mode
from bench.report import Comparison, Figures
from bench.rivals import Nats
from bench.servers import Gateway, Server, ServerError, free_port
from bench.websocket import WebSocket, WebSocketError

MODES = (
    Mode("burst", 100, burst=8),
    Mode("paced", 100, rate=1_000),
)
MEET_SECONDS = 20.0


class Relay:
    """One or several servers, and how two agents are spread over them. `redis` is not one of the servers."""

    name: ClassVar[str]
    differs: ClassVar[str]
    # For NATS: one server tells the other of a subscription, and says nothing when it has.
    settle_seconds: ClassVar[float] = 0.0

    def __init__(self) -> None:
        self.servers: list[Server] = []
        self.redis: RedisServer | None = None

    def start(self, stack: ExitStack) -> None:
        """Start everything, and wait until a message gets through; `stack` ends it."""
        for server in self.make():
            stack.callback(server.stop)
            server.start(None)
            self.servers.append(server)
        deadline = time.monotonic() + MEET_SECONDS
        agents = DIDKey.generate(), DIDKey.generate()
        while True:
            ends = self.pair(*agents)
            time.sleep(self.settle_seconds)
            try:
                with Load(ends) as load:
                    load.run(0.1)
                return
            except LoadError:
                if time.monotonic() > deadline:
                    raise
            finally:
                for end in ends:
                    end.connection.close()

    def make(self) -> list[Server]:
        """Return the servers."""
        raise NotImplementedError

    def pair(self, first: DIDKey, second: DIDKey) -> tuple[Endpoint, Endpoint]:
        """Connect two agents, the first with the first server and the second with the last."""
        ends = []
        for server, agent, partner in (
            (self.servers[0], first, second),
            (self.servers[-1], second, first),
        ):
            ends.append(
                Endpoint(
                    server.connect(agent),
                    sends=server.sends(agent, partner),
                    receives=server.delivers(partner, agent),
                    opcode=server.opcode,
                    stream=server.stream,
                )
            )
        return ends[0], ends[1]

    def cpu(self) -> int:
        """CPU time in ns of everything that serves."""
        total = sum(cpu_time(server.pid) for server in self.servers)
        return total + (cpu_time(self.redis.pid) if self.redis is not None else 0)


class Within(Relay):
    """Both agents at one worker."""

    name = "within"
    differs = "One gateway with one worker."

    def make(self) -> list[Server]:
        """One gateway."""
        return [Gateway()]


class TwoWorkers(Gateway):
    """A gateway with two workers; who is at the wrong one connects again."""

    name = "two-workers"
    options: Mapping[str, object] = {**Gateway.options, "--workers": 2}

    def connect_at(self, worker: int, agent: DIDKey) -> WebSocket:
        """Register at one of them; the kernel chooses, so it may take a few attempts."""
        while True:
            connection = self.connect(agent)
            if self.worker == worker:
                return connection
            connection.close()


class Across(Relay):
    """The agents of a pair at different workers."""

    name = "workers"
    differs = "One gateway with two workers, the agents of a pair at different ones."

    def make(self) -> list[Server]:
        """One gateway."""
        return [TwoWorkers()]

    def pair(self, first: DIDKey, second: DIDKey) -> tuple[Endpoint, Endpoint]:
        """Put one at each."""
        server = self.servers[0]
        assert isinstance(server, TwoWorkers)
        ends = [
            Endpoint(
                server.connect_at(worker, agent),
                server.sends(agent, partner),
                server.delivers(partner, agent),
            )
            for worker, (agent, partner) in enumerate(((first, second), (second, first)))
        ]
        return ends[0], ends[1]


class Node(Gateway):
    """One of two gateways that share a Redis."""

    def __init__(self, name: str, redis: str, identity: Path) -> None:
        self.name = name  # type: ignore[misc]
        self.options = {**Gateway.options, "--redis": redis, "--identity": identity, "--node-name": name}


class Nodes(Relay):
    """The agents of a pair at different nodes."""

    name = "nodes"
    differs = (
        "Two gateways with one worker each and a Redis, on the same two cores. CPU is that of all three. A "
        "message is published in a batch and confirmed; one that nobody got comes back as ERROR."
    )

    def start(self, stack: ExitStack) -> None:
        """Start Redis first."""
        self.redis = stack.enter_context(RedisServer())
        super().start(stack)

    def make(self) -> list[Server]:
        """Two gateways."""
        assert self.redis is not None
        return [
            Node(name, self.redis.url, self.redis.folder / "gateway.pem") for name in ("node-1", "node-2")
        ]


class OneNats(Relay):
    """NATS as it is."""

    name = "nats"
    differs = "One NATS server over WebSocket, GOMAXPROCS=1; see above for what it does and does not do."

    def make(self) -> list[Server]:
        """One server."""
        return [Nats()]


class NatsNode(Nats):
    """One of two NATS servers in a cluster."""

    def __init__(self, name: str, own: int, other: int) -> None:
        self.name = name  # type: ignore[misc]
        self._own, self._other = own, other

    def command(self, port: int) -> list[str]:
        """Add the route to the other one."""
        command = super().command(port)
        configuration = Path(command[-1])
        mine = configuration.with_name(f"{self.name}.conf")
        mine.write_text(
            configuration.read_text() + f'server_name: "{self.name}"\n'
            f'cluster {{\n  name: "bench"\n  host: "127.0.0.1"\n  port: {self._own}\n'
            f'  routes: ["nats://127.0.0.1:{self._other}"]\n}}\n'
        )
        return [*command[:-1], str(mine)]


class TwoNats(Relay):
    """NATS as a cluster."""

    name = "nats-nodes"
    settle_seconds = 0.2
    differs = "Two NATS servers in a cluster, GOMAXPROCS=1 each, the agents of a pair at different ones."

    def make(self) -> list[Server]:
        """Two servers."""
        ports = free_port(), free_port()
        return [NatsNode("nats-1", *ports), NatsNode("nats-2", *reversed(ports))]


RELAYS = (Within, Across, Nodes, OneNats, TwoNats)


def measure(relay: Relay, mode: Mode, seconds: float, agents: Sequence[DIDKey]) -> Figures:
    """Connect the mode's pairs, run it once, and disconnect.

    Raises:
        LoadError: A message was lost, reordered or altered.
    """
    with ExitStack() as stack:
        endpoints = []
        for first in range(0, 2 * mode.pairs, 2):
            for endpoint in relay.pair(agents[first], agents[first + 1]):
                stack.callback(endpoint.connection.close)
                endpoints.append(endpoint)
        time.sleep(relay.settle_seconds)
        load = stack.enter_context(Load(endpoints, mode.burst))
        load.run(WARM_UP_SECONDS, mode.rate)
        before = relay.cpu()
        result = load.run(seconds, mode.rate)
        cpu = relay.cpu() - before
    return Figures(
        us_per_message=cpu / 1e3 / result.messages,
        messages_per_second=result.messages / result.seconds,
        p50_ms=result.p50_ms,
        p99_ms=result.p99_ms,
        server_busy=cpu / 1e9 / result.seconds,
        client_busy=result.client_cpu_seconds / result.seconds,
    )


def main(
    *,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.1, max=600, help="Per mode, relay and round.")] = 3.0,
    as_json_line: Annotated[bool, typer.Option("--json", help="End with one line of JSON.")] = False,
    write: Annotated[bool, typer.Option(help="Update bench/RESULTS.md.")] = False,
) -> None:
    """Measure what a message costs within a worker, across workers and across nodes."""
    console, errors = Console(), Console(stderr=True)
    console.width = max(console.width, report.TABLE_WIDTH)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    described, versions = machine.describe(), machine.versions()
    comparisons = [Comparison(mode.title, closed_loop=not mode.rate) for mode in MODES]
    agents = [DIDKey.generate() for _ in range(2 * max(mode.pairs for mode in MODES))]
    relays = [kind() for kind in RELAYS]
    try:
        versions |= Nats().versions()
        with ExitStack() as stack:
            for relay in relays:
                relay.start(stack)
            progress = stack.enter_context(Progress(console=errors, transient=True))
            schedule = list(product(range(rounds), zip(MODES, comparisons, strict=True), relays))
            task = progress.add_task("", total=len(schedule))
            for turn, (mode, comparison), relay in schedule:
                progress.update(task, description=f"round {turn + 1}: {mode.name}, {relay.name}")
                try:
                    comparison.add(relay.name, measure(relay, mode, seconds, agents))
                except (LoadError, WebSocketError, OSError) as error:
                    raise ServerError(f"{mode.name}, {relay.name}: {error}") from error
                progress.advance(task)
    except (CompileError, ServerError) as error:
        print(f"bench.nodes: {error}", file=sys.stderr)
        raise typer.Exit(1) from None

    conditions = (
        f"All servers and the load client on {os.cpu_count()} cores; {rounds} interleaved rounds of "
        f"{seconds:g} s."
    )
    for comparison in comparisons:
        console.print(draw(comparison))
    console.print(conditions)
    if write:
        section = describe(comparisons, relays, f"{machine_line(described, versions)}\n\n{conditions}")
        report.write_section("nodes", section)
    if as_json_line:
        print(json.dumps({"machine": described, "versions": versions, "modes": as_json(comparisons)}))


COLUMNS = ("relay", "CPU µs/message", "ratio to within", "messages/s", "p50 ms", "p99 ms", "cores busy")


def row(comparison: Comparison, name: str) -> list[str]:
    """Return the cells of one relay under COLUMNS."""
    return [
        name,
        comparison.spread(name, "us_per_message").text(1),
        "1" if name == Within.name else comparison.ratio(name, Within.name).text(2),
        f"{comparison.spread(name, 'messages_per_second').median:,.0f}",
        f"{comparison.spread(name, 'p50_ms').median:.2f}",
        f"{comparison.spread(name, 'p99_ms').median:.2f}",
        f"{comparison.spread(name, 'server_busy').median:.2f}",
    ]


def draw(comparison: Comparison) -> Table:
    """Draw one mode."""
    drawn = Table(title=comparison.title, title_justify="left", box=SIMPLE_HEAD)
    for index, column in enumerate(COLUMNS):
        drawn.add_column(column, justify="right" if index else "left", no_wrap=True)
    for name in comparison.rounds:
        drawn.add_row(*row(comparison, name))
    return drawn


def describe(comparisons: Sequence[Comparison], relays: Sequence[Relay], conditions: str) -> str:
    """Write all modes for RESULTS.md."""
    lines = [f"{conditions} Medians, in parentheses the range over the rounds."]
    for comparison in comparisons:
        lines += ["", f"**{comparison.title}**", "", "| " + " | ".join(COLUMNS) + " |"]
        lines.append("|---" + "|---:" * (len(COLUMNS) - 1) + "|")
        lines += ["| " + " | ".join(row(comparison, name)) + " |" for name in comparison.rounds]
    lines += ["", "**What is not like for like**", ""]
    lines += [f"- **{relay.name}**: {relay.differs}" for relay in relays]
    return "\n".join(lines)


def machine_line(described: Mapping[str, str | int], versions: Mapping[str, str]) -> str:
    """Say on what it was measured."""
    parts = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{described['cpu']}, {described['cores']} cores, Linux {described['kernel']}; {parts}."


def as_json(comparisons: Sequence[Comparison]) -> dict[str, dict[str, dict[str, float]]]:
    """Return the medians by mode and relay."""
    return {
        mode.name: {
            name: {
                field: round(comparison.spread(name, field).median, 4)
                for field in Figures.__dataclass_fields__
            }
            for name in comparison.rounds
        }
        for mode, comparison in zip(MODES, comparisons, strict=True)
    }


if __name__ == "__main__":
    build.OUTPUT.mkdir(parents=True, exist_ok=True)
    typer.run(main)
