"""Swarm: hold many registered agents, and say what each costs the gateway and what relay is left to them.

Usage: `python -m bench.swarm --agents 100000 --workers 8 --json`.
bench/README.md says how to read the result.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench import machine
from bench.clients import ClientError, Clients, Place, Taken, Totals
from bench.compile import CompileError
from bench.cpu import cpu_time
from bench.hold import HoldError
from bench.load import Endpoint, Load, LoadError, LoadResult
from bench.memory import Memory, memory
from bench.offers import offer
from bench.servers import Gateway, RunningGateway, ServerError

RESULTS = Path(__file__).parent / "results"

SETTLE_SECONDS = 2.0  # from the last registration until memory is read: buffers of the handshakes go
WARM_UP_SECONDS = 0.5  # of each relay: buffers reach their size; not measured
PERCENTS = (1, 2, 5, *range(10, 95, 5), 95, 96, 97, 98, 99, 99.5, 99.8, 99.9, 99.95, 99.99)
MAX_CONNECTIONS_SPARE = 1000  # connections beside those of the agents: health checks, late closes


class SwarmError(Exception):
    """The swarm cannot be measured. The text is for the user."""


@dataclass(frozen=True)
class Plan:
    """What is held, how long (in s), and what is relayed meanwhile.

    `rate` is in messages/s over all pairs; 0: closed loop, as much as goes.
    """

    agents: int
    clients: int = 8
    capability_bytes: int = 100
    hold: float = 30.0
    pairs: int = 1000
    rate: int = 20_000
    relay: float = 10.0


class SwarmGateway(Gateway):
    """AIConexus with several workers, and with limits that let a swarm in."""

    def __init__(self, workers: int, agents: int) -> None:
        self.workers = workers
        self.options = {
            **Gateway.options,
            "--workers": workers,
            "--max-connections": agents + MAX_CONNECTIONS_SPARE,
        }

    def is_ready(self) -> bool:
        """Wait for the last worker too: agents go to those that listen already."""
        seen = set()
        for _ in range(50 * self.workers):  # the kernel chooses who answers
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2) as answer:
                    health = json.load(answer)
            except OSError:
                return False
            seen.add(health.get("worker", {}).get("number", 0))
            if len(seen) >= self.workers:
                return True
        return False


class Display:
    """What a person sees meanwhile: one line per phase, on the standard error stream."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<16}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            console=console,
        )

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def phase(self, name: str, total: float) -> Callable[[float, str], None]:
        """Begin a phase; the function returned takes what is done of `total`, and a text."""
        task = self._progress.add_task(name, total=total or 1, text="")

        def update(done: float, text: str) -> None:
            self._progress.update(task, completed=done, text=text)

        return update


# --- measuring -------------------------------------------------------------------------------------


def measure(url: str, pid: int | None, plan: Plan, display: Display) -> dict[str, Any]:
    """Connect a swarm, hold it, let a sample of it talk, and disconnect.

    Args:
        url: Of the gateway.
        pid: Its process, or its supervisor's; without one there are no figures of memory and CPU.
        plan: What to do.
        display: Where to show it.
    """
    memories: dict[str, Memory] = {}

    def note_memory(when: str) -> None:
        if pid is not None:
            memories[when] = memory(pid)

    with ExitStack() as stack:
        show = display.phase("starting", 1)
        clients = stack.enter_context(Clients(url, plan.agents, plan.clients, plan.capability_bytes))
        show(1, f"{min(plan.clients, plan.agents)} client processes")
        note_memory("before")
        cpu = cpu_time(pid) if pid is not None else 0
        places, connect_seconds = _connect(clients, plan, display)
        cpu = cpu_time(pid) - cpu if pid is not None else 0
        clients.hold(SETTLE_SECONDS, lambda totals: None)
        note_memory("connected")
        held = _hold(clients, pid, plan, display)
        note_memory("held")
        relay, ended = _relay_all(clients, places, pid, plan, display, stack)
        final = clients.call_roll()
        note_memory("talked")
        private = {when: found.private for when, found in memories.items()}
        shared = {when: found.shared for when, found in memories.items()}
        return {
            "agents": plan.agents,
            "capability_bytes": plan.capability_bytes,
            "clients": min(plan.clients, plan.agents),
            "agents_per_worker": _count(places),
            "registered": len(places),
            "lost": final.lost + final.silent + ended,
            "first_failure": clients.first_failure or final.first_loss,
            "connect_seconds": round(connect_seconds, 3),
            "registrations_per_second": round(len(places) / connect_seconds, 1),
            "us_per_registration": round(cpu / 1e3 / len(places), 1) if pid is not None else None,
            "private_kib": private,
            "shared_kib": shared,
            "private_kib_per_connection": _per_connection(private, len(places)),
            "shared_kib_per_connection": _per_connection(shared, len(places)),
            **held,
            "messages_unasked": final.messages,
            "relay": relay,
        }


def _connect(clients: Clients, plan: Plan, display: Display) -> tuple[list[Place], float]:
    show = display.phase("connecting", plan.agents)
    begin = time.monotonic()

    def on_progress(totals: Totals) -> None:
        rate = totals.registered / (time.monotonic() - begin)
        failed = f", {totals.failed:,} failed" if totals.failed else ""
        show(totals.registered, f"{totals.registered:,}/{plan.agents:,} agents, {rate:,.0f}/s{failed}")

    places = clients.connect(on_progress)
    if not places:
        raise SwarmError(f"no agent could register: {clients.first_failure}")
    return places, time.monotonic() - begin


def _hold(clients: Clients, pid: int | None, plan: Plan, display: Display) -> dict[str, Any]:
    show = display.phase("holding", plan.hold)
    begin, first = time.monotonic(), clients.totals()
    cpu = cpu_time(pid) if pid is not None else 0

    def on_progress(totals: Totals) -> None:
        passed = time.monotonic() - begin
        left = max(plan.hold - passed, 0)
        pings = totals.pings - first.pings
        show(passed, f"{left:.0f} s left, {totals.lost:,} lost, {pings:,} pings answered")

    clients.hold(plan.hold, on_progress)
    cpu = cpu_time(pid) - cpu if pid is not None else 0
    seconds, last = time.monotonic() - begin, clients.totals()
    return {
        "hold_seconds": round(seconds, 1),
        "idle_cores": round(cpu / 1e9 / seconds, 4) if pid is not None and plan.hold else None,
        "client_idle_cores": round((last.cpu_seconds - first.cpu_seconds) / seconds, 4)
        if plan.hold
        else None,
        "pings_answered": last.pings - first.pings,
    }


def _count(places: Sequence[Place]) -> dict[str, int]:
    counts: dict[int, int] = defaultdict(int)
    for place in places:
        counts[place.worker] += 1
    return {str(worker): counts[worker] for worker in sorted(counts)}


def _per_connection(kib: dict[str, int], connections: int) -> float | None:
    return round((kib["connected"] - kib["before"]) / connections, 3) if kib else None


# --- the relay -------------------------------------------------------------------------------------


def sample(places: Sequence[Place], pairs: int) -> list[Place]:
    """Choose the agents of `pairs` pairs, or of as many as can be: worker by worker, as many of each."""
    of_worker: dict[int, list[Place]] = defaultdict(list)
    # By number first: all client processes give some.
    for place in sorted(places, key=lambda place: (place.number, place.client)):
        of_worker[place.worker].append(place)
    each = min(2 * pairs // len(of_worker), *map(len, of_worker.values()))
    each -= each % 2
    return [place for worker in sorted(of_worker) for place in of_worker[worker][:each]]


def pair_up(chosen: Sequence[Place]) -> dict[str, list[tuple[Place, Place]]]:
    """Pair a sample twice: partners at one worker, and partners at two.

    As each worker has as many agents, who is half the sample away is at another one.
    """
    half = len(chosen) // 2
    within = list(zip(chosen[::2], chosen[1::2], strict=True))
    across = list(zip(chosen[:half], chosen[half:], strict=True))
    return {"within": within, "across": across if len({place.worker for place in chosen}) > 1 else []}


def _relay_all(
    clients: Clients,
    places: Sequence[Place],
    pid: int | None,
    plan: Plan,
    display: Display,
    stack: ExitStack,
) -> tuple[dict[str, Any], int]:
    """Relay within and across workers; return the figures, and how many agents of the sample were lost."""
    figures: dict[str, Any] = {"within": None, "across": None}
    chosen = sample(places, plan.pairs) if plan.relay else []
    if not chosen:
        return figures, 0
    taken = {agent.place: agent for agent in clients.take(chosen)}
    for agent in taken.values():
        stack.callback(agent.connection.close)
    ended = 0
    for name, pairs in pair_up(chosen).items():
        # A pair of which one was lost while held says nothing.
        alive = [(taken[a], taken[b]) for a, b in pairs if a in taken and b in taken]
        if alive:
            figures[name], gone = _relay(name, alive, clients, pid, plan, display)
            # The same agents talk both times: who is gone stays so.
            ended = max(ended, gone)
    return figures, ended


def _relay(
    name: str,
    pairs: Sequence[tuple[Taken, Taken]],
    clients: Clients,
    pid: int | None,
    plan: Plan,
    display: Display,
) -> tuple[dict[str, Any], int]:
    show = display.phase(f"relay {name}", plan.relay)
    show(0, f"{len(pairs):,} pairs")
    endpoints = []
    for first, second in pairs:
        asks, answers = offer(first.key, second.key), offer(second.key, first.key)
        endpoints.append(Endpoint(first.connection, sends=asks, receives=answers))
        endpoints.append(Endpoint(second.connection, sends=answers, receives=asks))
    with Load(endpoints, count_faults=plan.rate > 0) as load:
        warm_up = drive(load, WARM_UP_SECONDS, plan.rate, clients, lambda passed: None)
        cpu = cpu_time(pid) if pid is not None else 0

        def on_progress(passed: float) -> None:
            show(passed, f"{load.received:,} messages, {load.received / passed:,.0f}/s")

        result = drive(load, plan.relay, plan.rate, clients, on_progress)
        cpu = cpu_time(pid) - cpu if pid is not None else 0
        percentiles = {f"{percent:g}": round(load.percentile_ms(percent), 4) for percent in PERCENTS}
    per_second = result.messages / result.seconds if result.seconds else 0.0
    show(plan.relay, f"{result.messages:,} messages, {per_second:,.0f}/s")
    return {
        "pairs": len(pairs),
        "rate": plan.rate,
        "seconds": round(result.seconds, 3),
        "messages": result.messages,
        "messages_per_second": round(per_second, 1),
        "p50_ms": round(result.p50_ms, 4),
        "p99_ms": round(result.p99_ms, 4),
        "percentiles_ms": percentiles,
        # What goes wrong while it warms up is wrong, too.
        "undelivered": warm_up.undelivered + result.undelivered,
        "reordered": warm_up.reordered + result.reordered,
        "repeated": warm_up.repeated + result.repeated,
        "foreign": warm_up.foreign + result.foreign,
        "first_fault": warm_up.fault or result.fault,
        "us_per_message": round(cpu / 1e3 / result.messages, 3)
        if pid is not None and result.messages
        else None,
        "client_busy": round(result.client_cpu_seconds / result.seconds, 3) if result.seconds else None,
    }, warm_up.ended + result.ended


def drive(
    load: Load,
    seconds: float,
    rate: int,
    clients: Clients,
    on_progress: Callable[[float], None],
    pause: float = 0.1,
) -> LoadResult:
    """Run the load in a thread of its own, which is in C and leaves this one to the reports.

    `on_progress` is called again and again, with a `pause` in s.
    """
    results: list[LoadResult] = []
    errors: list[LoadError] = []

    def run() -> None:
        try:
            results.append(load.run(seconds, rate))
        except LoadError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    begin = time.monotonic()
    thread.start()
    try:
        while thread.is_alive():
            clients.hold(pause, lambda totals: None)
            on_progress(time.monotonic() - begin)
    finally:
        thread.join()  # `load` must not be freed under it
    if errors:
        raise errors[0]
    return results[0]


# --- the command -----------------------------------------------------------------------------------


def run(plan: Plan, workers: int, url: str | None, pid: int | None, console: Console) -> dict[str, Any]:
    """Measure a gateway that runs, or one that is started for it; return the result."""
    with ExitStack() as stack:
        display = Display(console)
        if url is not None:
            workers = 0  # as many as the agents see
            if pid is not None:
                RunningGateway(url, pid).start(None)
        else:
            gateway = SwarmGateway(workers, plan.agents)
            gateway.start(None)
            stack.callback(gateway.stop)
            url, pid = gateway.url, gateway.pid
        stack.enter_context(display)
        figures = measure(url, pid, plan, display)
    return {
        "machine": machine.describe(),
        "versions": machine.versions(),
        "workers": workers or len(figures["agents_per_worker"]),
        **figures,
    }


def is_clean(figures: dict[str, Any]) -> bool:
    """Tell whether every agent registered and stayed, and every message arrived once and in order."""
    relays = [relay for relay in figures["relay"].values() if relay is not None]
    return (
        figures["registered"] == figures["agents"]
        and figures["lost"] == 0
        and not any(
            relay[fault] for relay in relays for fault in ("undelivered", "reordered", "repeated", "foreign")
        )
    )


def summary(figures: dict[str, Any]) -> str:
    """Say the result in a few lines."""

    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:,.{digits}f}"

    lines = [
        f"{figures['registered']:,} of {figures['agents']:,} agents registered in "
        f"{figures['connect_seconds']:,.1f} s, {figures['registrations_per_second']:,.0f}/s; "
        f"{figures['lost']:,} lost",
        f"{number(figures['private_kib_per_connection'], 2)} KiB private memory per connection, "
        f"{number(figures['shared_kib_per_connection'], 2)} KiB shared; "
        f"{number(figures['idle_cores'], 3)} cores while idle for {figures['hold_seconds']:g} s "
        f"({figures['pings_answered']:,} pings)",
    ]
    for name, relay in figures["relay"].items():
        if relay is not None:
            lines.append(
                f"{name} workers: {relay['messages_per_second']:,.0f} messages/s, "
                f"p50 {relay['p50_ms']:.2f} ms, p99 {relay['p99_ms']:.2f} ms, "
                f"{number(relay['us_per_message'], 1)} µs CPU each; "
                f"{relay['undelivered']:,} undelivered, {relay['reordered']:,} reordered"
            )
    relays = [relay for relay in figures["relay"].values() if relay is not None]
    faults = [figures["first_failure"], *(relay["first_fault"] for relay in relays)]
    lines += [f"first fault: {fault}" for fault in faults if fault]
    return "\n".join(lines)


def save(figures: dict[str, Any], folder: Path) -> Path:
    """Write a result where bench.plot finds it; a later one of the same kind replaces it."""
    folder.mkdir(parents=True, exist_ok=True)
    relays = [relay for relay in figures["relay"].values() if relay is not None]
    loop = "closed" if relays and not relays[0]["rate"] else "paced" if relays else "idle"
    path = folder / f"swarm-{figures['workers']}-workers-{figures['agents']}-agents-{loop}.json"
    path.write_text(json.dumps(figures, indent=1) + "\n")
    return path


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part.replace("_", "")) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of numbers such as 1000,10000") from None
    if min(counts) < 1:
        raise typer.BadParameter("at least one agent")
    return counts


def main(
    *,
    agents: Annotated[int, typer.Option(min=1, help="Agents to hold.")] = 10_000,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes of the gateway.")] = 1,
    hold: Annotated[float, typer.Option(min=0, help="Seconds to hold all of them idle.")] = 30.0,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of them that then talk.")] = 1000,
    rate: Annotated[
        int,
        typer.Option(min=0, help="Messages/s over all pairs, open loop; 0: closed loop, as fast as it goes."),
    ] = 20_000,
    relay_seconds: Annotated[
        float, typer.Option(min=0, help="Seconds to talk, within and across workers each; 0: not at all.")
    ] = 10.0,
    capability_bytes: Annotated[int, typer.Option(min=0, max=1000, help="Capabilities of each agent.")] = 100,
    clients: Annotated[int, typer.Option(min=1, max=250, help="Client processes.")] = 8,
    sweep: Annotated[
        str | None, typer.Option(help="Numbers of agents, as in 1000,10000: one run each, saved.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="Measure a running gateway at this ws:// URL.")] = None,
    pid: Annotated[
        int | None, typer.Option(help="Its process (the supervisor), for memory and CPU; with --url.")
    ] = None,
    save_result: Annotated[
        bool, typer.Option("--save", help="Write the result to --results, for bench.plot.")
    ] = False,
    results: Annotated[Path, typer.Option(help="Folder of saved results.")] = RESULTS,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line of JSON.")] = False,
) -> None:
    """Hold many registered agents, and say what each costs the gateway and what relay is left to them."""
    if pid is not None and url is None:
        raise typer.BadParameter("--pid goes with --url")
    counts = [agents] if sweep is None else _counts(sweep)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    errors = Console(stderr=True, highlight=False)
    clean, found = True, []
    try:
        for count in counts:
            figures = run(
                Plan(count, clients, capability_bytes, hold, pairs, rate, relay_seconds),
                workers,
                url,
                pid,
                errors,
            )
            print(summary(figures), flush=True)
            if save_result or sweep is not None:
                errors.print(f"saved {save(figures, results)}")
            clean = is_clean(figures) and clean
            found.append(figures)
    except (ClientError, CompileError, HoldError, LoadError, ServerError, SwarmError) as error:
        print(f"bench.swarm: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps(found[0] if sweep is None else {"sweep": found}))
    raise typer.Exit(0 if clean else 1)


if __name__ == "__main__":
    typer.run(main)
