"""The data plane beside a bare aiortc DataChannel: throughput, round trips and memory.

Two processes on 127.0.0.1, connected by the same aiortc; the one pair has what the SDK puts on top of it, the
other nothing. Usage: `python -m bench.datachannel [--megabytes 64] [--rounds 5] [--json] [--write]`.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from aiconexus.protocol import DIDKey
from aiconexus.protocol.limits import CHUNK_MAX_BYTES
from bench import machine, report

SECTION = "data channel"
PART_BYTES = 262_144  # of a stream, as a capability would read a file
ROUND_TRIPS = 500
MESSAGE_BYTES = 300  # of a bare round trip: what a PING has, and its PONG
SIGNED_BYTES = 600  # what a signed EXEC_REQUEST has, and its EXEC_RESPONSE
HIGH_WATER_BYTES, LOW_WATER_BYTES = 131_072, 32_768  # for both
KEYS = tuple(DIDKey.from_seed(bytes([seed]) * 32) for seed in (1, 2))


@dataclass(frozen=True)
class Figures:
    """One round of one of them.

    Attributes:
        mb_per_second: What came of a stream.
        round_trip_ms: Median of the round trips of a message, or of a PING.
        execute_ms: Median of an execution that returns its argument; 0 where there is none.
        signatures_ms: What two signatures and two verifications take of that; 0 where there are none.
        sender_mib: By how much the sender's memory grew at most, for the stream.
        receiver_mib: The same of the receiver.
    """

    mb_per_second: float
    round_trip_ms: float
    execute_ms: float
    signatures_ms: float
    sender_mib: float
    receiver_mib: float


def peak_mib() -> float:
    """Return the most memory that this process has had, in MiB; `getrusage` would count its parent's, too."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


async def timed(ask: Callable[[], Awaitable[object]]) -> float:
    """Return the median of many round trips in ms, after some to warm up."""
    times = []
    for _ in range(ROUND_TRIPS + 50):
        begin = time.perf_counter()
        await ask()
        times.append((time.perf_counter() - begin) * 1e3)
    return median(times[50:])


# --- bare aiortc -------------------------------------------------------------------------------


async def serve_bare(pipe: Connection, megabytes: int) -> None:
    """Send every message back; on "stream" send that many megabytes, as fast as they leave."""
    from bench import bare

    pc, answer = await bare.answer(pipe.recv())
    opened = asyncio.get_running_loop().create_future()
    pc.on("datachannel", opened.set_result)
    pipe.send(answer)
    channel = await opened
    channel.bufferedAmountLowThreshold = LOW_WATER_BYTES
    writable, wanted, over = asyncio.Event(), asyncio.Event(), asyncio.Event()
    channel.on("bufferedamountlow", writable.set)
    channel.on("close", over.set)

    @channel.on("message")
    def receive(message: str) -> None:
        wanted.set() if message == "stream" else channel.send(message)

    await wanted.wait()
    before, chunk = peak_mib(), bytes(CHUNK_MAX_BYTES)
    for _ in range(megabytes * 1_000_000 // CHUNK_MAX_BYTES):
        while channel.bufferedAmount > HIGH_WATER_BYTES:
            writable.clear()
            await writable.wait()
        channel.send(chunk)
    channel.send("end")
    await over.wait()
    pipe.send(peak_mib() - before)
    await pc.close()


async def measure_bare(pipe: Connection, megabytes: int) -> Figures:
    """Measure a DataChannel with nothing on top."""
    from bench import bare

    async def exchange(offer: str) -> str:
        pipe.send(offer)
        answer: str = pipe.recv()
        return answer

    pc, channel = await bare.offer(exchange)
    loop = asyncio.get_running_loop()
    text, back, received = "x" * MESSAGE_BYTES, loop.create_future(), 0
    ended: asyncio.Future[None] = loop.create_future()

    @channel.on("message")
    def receive(message: str | bytes) -> None:
        nonlocal received
        if isinstance(message, bytes):
            received += len(message)
        elif message == "end":
            ended.set_result(None)
        else:
            back.set_result(None)

    async def round_trip() -> None:
        nonlocal back
        back = loop.create_future()
        channel.send(text)
        await back

    round_trip_ms = await timed(round_trip)
    before, begin = peak_mib(), time.perf_counter()
    channel.send("stream")
    await ended
    seconds, grown = time.perf_counter() - begin, peak_mib() - before
    channel.close()
    sender = await loop.run_in_executor(None, pipe.recv)
    await pc.close()
    return Figures(received / seconds / 1e6, round_trip_ms, 0.0, 0.0, sender, grown)


# --- the SDK -----------------------------------------------------------------------------------


async def connect_peer(pipe: Connection, own: int, on_execute: Any, on_closed: Any) -> Any:
    """Return a Peer; the first of KEYS offers."""
    from aiconexus.core.peer import Peer
    from aiconexus.core.peer_connection import PeerConnection

    pc = PeerConnection(host_addresses=["127.0.0.1"])
    if own == 0:
        pipe.send(await pc.create_offer())
        await pc.accept_answer(pipe.recv())
    else:
        pipe.send(await pc.create_answer(pipe.recv()))
    channel = await pc.opened
    return Peer(
        KEYS[own],
        KEYS[1 - own].did,
        pc,
        channel,
        on_intent=lambda intent: None,  # type: ignore[arg-type, return-value]  # nobody asks
        on_execute=on_execute,
        on_closed=on_closed,
    )


async def serve_peer(pipe: Connection, megabytes: int) -> None:
    """Offer `echo`, and `blocks`, a stream of that many megabytes."""
    before, over = 0.0, asyncio.Event()

    async def echo(value: Any) -> Any:
        return value

    async def blocks() -> AsyncIterator[bytes]:
        nonlocal before
        before = peak_mib()
        for _ in range(megabytes * 1_000_000 // PART_BYTES):
            yield bytes(PART_BYTES)

    def execute(name: str, args: dict[str, Any]) -> Any:
        return blocks() if name == "blocks" else echo(args["value"])

    peer = await connect_peer(pipe, 1, execute, lambda *_: over.set())
    await over.wait()
    pipe.send(peak_mib() - before)
    await peer.close()


async def sign_and_verify() -> None:
    """Do what both ends of an execution do: sign the request and the response, and verify them."""
    data = bytes(SIGNED_BYTES)
    for key in KEYS:
        assert key.verify(data, key.sign(data))


async def measure_peer(pipe: Connection, megabytes: int) -> Figures:
    """Measure the SDK's calls."""
    peer = await connect_peer(pipe, 0, None, lambda *_: None)
    round_trip_ms = await timed(peer.ping)
    execute_ms = await timed(lambda: peer.execute("echo", value="x" * 100))
    signatures_ms = await timed(sign_and_verify)
    received, before, begin = 0, peak_mib(), time.perf_counter()
    async for part in peer.stream("blocks"):
        received += len(part)
    seconds, grown = time.perf_counter() - begin, peak_mib() - before
    await peer.close()
    sender = await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
    return Figures(received / seconds / 1e6, round_trip_ms, execute_ms, signatures_ms, sender, grown)


KINDS = {"aiortc": (serve_bare, measure_bare), "aiconexus": (serve_peer, measure_peer)}


def serve(kind: str, pipe: Connection, megabytes: int) -> None:
    """Run the one end."""
    asyncio.run(KINDS[kind][0](pipe, megabytes))


def measure(kind: str, pipe: Connection, results: Connection, megabytes: int) -> None:
    """Run the other end."""
    results.send(asyncio.run(KINDS[kind][1](pipe, megabytes)))


def run(kind: str, megabytes: int) -> Figures:
    """Measure one of them once, in two processes of its own."""
    context = multiprocessing.get_context("spawn")
    (here, there), (result, answer) = context.Pipe(), context.Pipe(duplex=False)
    ends = [
        context.Process(target=serve, args=(kind, there, megabytes)),
        context.Process(target=measure, args=(kind, here, answer, megabytes)),
    ]
    for end in ends:
        end.start()
    answer.close()
    figures: Figures = result.recv()
    for end in ends:
        end.join()
    return figures


# --- results -----------------------------------------------------------------------------------

COLUMNS = ("", "aiortc", "aiconexus", "ratio")
# Title, figure, its digits, and the figure of aiortc that the ratio is to.
ROWS = (
    ("stream, MB/s", "mb_per_second", 1, "mb_per_second"),
    ("round trip of a message, of PING and PONG, ms", "round_trip_ms", 2, "round_trip_ms"),
    ("round trip of an execution, ms", "execute_ms", 2, "round_trip_ms"),
    ("… its two signatures, made and verified, ms", "signatures_ms", 2, "round_trip_ms"),
    ("memory for the stream at its sender, MiB", "sender_mib", 1, ""),
    ("… at its receiver, MiB", "receiver_mib", 1, ""),
)


def spread(rounds: Sequence[Figures], field: str, digits: int) -> str:
    """Return the median and the range of a figure."""
    return report.Spread.of([getattr(figures, field) for figures in rounds]).text(digits)


def ratio(rounds: dict[str, list[Figures]], field: str, to: str) -> str:
    """Return a figure of the SDK as a multiple of one of aiortc in the same rounds."""
    pairs = zip(rounds["aiconexus"], rounds["aiortc"], strict=True)
    return report.Spread.of([getattr(ours, field) / getattr(theirs, to) for ours, theirs in pairs]).text(2)


def rows(rounds: dict[str, list[Figures]]) -> list[list[str]]:
    """Return the medians under COLUMNS."""
    bare, ours = rounds["aiortc"], rounds["aiconexus"]
    return [
        [
            title,
            spread(bare, field, digits) if to in ("", field) else "",
            spread(ours, field, digits),
            ratio(rounds, field, to) if to else "",
        ]
        for title, field, digits, to in ROWS
    ]


def conditions(megabytes: int, rounds: Sequence[Any]) -> str:
    """Say what was measured."""
    return (
        f"A stream of {megabytes} MB, in messages of 16 KiB over the bare channel and in parts of 256 KiB "
        f"over the SDK, which signs, checks and bounds them; {ROUND_TRIPS} round trips of {MESSAGE_BYTES} "
        "bytes over the bare channel, of PING and PONG and of an execution over the SDK; all their ratios "
        "are to the first. Memory: what the stream added to the peak. Two processes on 127.0.0.1, asyncio; "
        f"{len(rounds)} interleaved rounds. {machine.describe()['cpu']}, {machine.describe()['cores']} cores."
    )


def main(
    *,
    megabytes: Annotated[int, typer.Option(min=1, help="Of the stream.")] = 64,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line of JSON.")] = False,
    write: Annotated[bool, typer.Option(help="Update bench/RESULTS.md.")] = False,
) -> None:
    """Measure the data plane beside a bare aiortc DataChannel."""
    console = Console(width=report.TABLE_WIDTH)
    found: dict[str, list[Figures]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind in KINDS:
            found[kind].append(run(kind, megabytes))
    drawn = Table(box=SIMPLE_HEAD)
    for index, column in enumerate(COLUMNS):
        drawn.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows(found):
        drawn.add_row(*row)
    console.print(drawn)
    said = conditions(megabytes, found["aiortc"])
    console.print(said)
    if write:
        head = ["| " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
        lines = [said, "", *head, *("| " + " | ".join(row) + " |" for row in rows(found))]
        report.write_section(SECTION, "\n".join(lines))
    if as_json:
        print(json.dumps({kind: [asdict(figures) for figures in each] for kind, each in found.items()}))


if __name__ == "__main__":
    typer.run(main)
