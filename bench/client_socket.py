"""Which WebSocket client is under GatewayClient: picows or websockets, measured on an echo server.

    python -m bench.client_socket [--rounds 5] [--write]

The peer is an echo server of either library in a process of its own. Every round runs all four pairs; the
figures are medians over the rounds, CPU time is that of the client's process. `protocol` is what every
message costs beside the socket: sign one OFFER, verify one.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from multiprocessing.connection import Connection
from statistics import median
from typing import Any, ClassVar

import picows
import websockets.asyncio.client
import websockets.asyncio.server

from aiconexus.protocol import (
    DIDKey,
    Message,
    OfferPayload,
    ReplayGuard,
    encode,
    sign_message,
    verify_message,
)
from aiconexus.protocol.limits import MESSAGE_MAX_BYTES, SUBPROTOCOL
from bench import machine, report

MESSAGE_BYTES = 600
CONNECTIONS = 200  # of one measurement
MESSAGES = 4_000
SECTION = "client_socket"
COLUMNS = ("client", "server", "connect CPU µs", "connect ms", "CPU µs/message", "round trip µs")


class Client(ABC):
    """One open connection."""

    name: ClassVar[str]

    @abstractmethod
    async def open(self, url: str) -> None:
        """Connect, with the subprotocol, without compression."""

    @abstractmethod
    async def echo(self, text: str) -> str | bytes:
        """Send a text message and return the answer."""

    @abstractmethod
    async def close(self) -> None:
        """Close with a handshake."""


class WebsocketsClient(Client):
    name = "websockets"

    async def open(self, url: str) -> None:
        self._socket = await websockets.asyncio.client.connect(
            url,
            subprotocols=[websockets.Subprotocol(SUBPROTOCOL)],
            compression=None,
            max_size=MESSAGE_MAX_BYTES,
            proxy=None,
        )

    async def echo(self, text: str) -> str | bytes:
        await self._socket.send(text)
        return await self._socket.recv()

    async def close(self) -> None:
        await self._socket.close()


class _Inbox(picows.WSListener):  # type: ignore[misc]
    """What picows leaves to its user at least: take frames, hand messages to a coroutine."""

    def __init__(self) -> None:
        self.waiter: asyncio.Future[str] | None = None

    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        if frame.msg_type == picows.WSMsgType.TEXT:
            if self.waiter is not None:
                self.waiter.set_result(frame.get_payload_as_utf8_text())
        elif frame.msg_type == picows.WSMsgType.CLOSE:
            transport.disconnect()


class PicowsClient(Client):
    name = "picows"

    async def open(self, url: str) -> None:
        transport, listener = await picows.ws_connect(
            _Inbox,
            url,
            extra_headers={"Sec-WebSocket-Protocol": SUBPROTOCOL},
            max_frame_size=MESSAGE_MAX_BYTES,
            use_aiofastnet=False,
        )
        assert isinstance(listener, _Inbox)
        self._transport, self._inbox = transport, listener

    async def echo(self, text: str) -> str | bytes:
        self._inbox.waiter = asyncio.get_running_loop().create_future()
        self._transport.send(picows.WSMsgType.TEXT, text.encode())
        return await self._inbox.waiter

    async def close(self) -> None:
        self._transport.send_close(picows.WSCloseCode.OK)
        await self._transport.wait_disconnected()


class _Echo(picows.WSListener):  # type: ignore[misc]
    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        if frame.msg_type == picows.WSMsgType.CLOSE:
            transport.send_close(picows.WSCloseCode.OK)
            transport.disconnect()
        else:
            transport.send(frame.msg_type, frame.get_payload_as_bytes())


async def _serve_websockets(port: Connection) -> None:
    async def echo(socket: websockets.asyncio.server.ServerConnection) -> None:
        async for message in socket:
            await socket.send(message)

    async with websockets.asyncio.server.serve(
        echo, "127.0.0.1", 0, subprotocols=[websockets.Subprotocol(SUBPROTOCOL)], compression=None
    ) as server:
        port.send(next(iter(server.sockets)).getsockname()[1])
        await asyncio.get_running_loop().create_future()


async def _serve_picows(port: Connection) -> None:
    def accept(request: picows.WSUpgradeRequest) -> picows.WSUpgradeResponseWithListener:
        response = picows.WSUpgradeResponse.create_101_response({"Sec-WebSocket-Protocol": SUBPROTOCOL})
        return picows.WSUpgradeResponseWithListener(response, _Echo())

    server = await picows.ws_create_server(accept, "127.0.0.1", 0, use_aiofastnet=False)
    port.send(server.sockets[0].getsockname()[1])
    await asyncio.get_running_loop().create_future()


SERVERS: dict[str, Callable[[Connection], Any]] = {
    "picows": _serve_picows,
    "websockets": _serve_websockets,
}
CLIENTS: tuple[type[Client], ...] = (PicowsClient, WebsocketsClient)


def _run_server(name: str, port: Connection) -> None:
    asyncio.run(SERVERS[name](port))


async def measure(kind: type[Client], url: str, text: str) -> tuple[float, float, float, float]:
    """Return connect CPU in µs, connect time in ms, CPU per message and round trip in µs."""
    client = kind()
    await client.open(url)
    for _ in range(MESSAGES // 10):  # warm up both ends
        await client.echo(text)

    cpu, begin = time.process_time_ns(), time.perf_counter_ns()
    for _ in range(MESSAGES):
        await client.echo(text)
    cpu_message = (time.process_time_ns() - cpu) / 1e3 / MESSAGES
    round_trip = (time.perf_counter_ns() - begin) / 1e3 / MESSAGES
    await client.close()

    cpu_connect = elapsed = 0
    for _ in range(CONNECTIONS):
        client = kind()
        cpu, begin = time.process_time_ns(), time.perf_counter_ns()
        await client.open(url)
        cpu_connect += time.process_time_ns() - cpu
        elapsed += time.perf_counter_ns() - begin
        await client.close()
    return cpu_connect / 1e3 / CONNECTIONS, elapsed / 1e6 / CONNECTIONS, cpu_message, round_trip


class Protocol:
    """What the client does with every message beside writing and reading it."""

    def __init__(self) -> None:
        self._key, self._other = DIDKey.generate(), DIDKey.generate()
        self._guard = ReplayGuard()
        self._sdp = "v" * (MESSAGE_BYTES - len(self.sign("")))
        self.text = self.sign(self._sdp).decode()

    def sign(self, sdp: str) -> bytes:
        """Build and sign an OFFER."""
        message = Message.create(self._key.did, self._other.did, OfferPayload(sdp=sdp))
        return encode(sign_message(message, self._key))

    def measure(self) -> float:
        """Return the CPU time to sign and to verify one message, in µs."""
        begin = time.process_time_ns()
        for _ in range(1_000):
            verify_message(self.sign(self._sdp), recipient=self._other.did, guard=self._guard)
        return (time.process_time_ns() - begin) / 1e6


def main() -> None:
    """Measure, print the table, and write it to RESULTS.md if asked to."""
    parser = argparse.ArgumentParser(prog="python -m bench.client_socket", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--write", action="store_true", help="update bench/RESULTS.md")
    options = parser.parse_args()

    protocol = Protocol()
    signing = []
    spawn = multiprocessing.get_context("spawn")
    ports: dict[str, int] = {}
    servers = []
    rows: dict[tuple[str, str], list[tuple[float, float, float, float]]] = {}
    try:
        for name in SERVERS:
            ours, theirs = spawn.Pipe()
            servers.append(spawn.Process(target=_run_server, args=(name, theirs), daemon=True))
            servers[-1].start()
            ports[name] = ours.recv()
        for _ in range(options.rounds):
            signing.append(protocol.measure())
            for server, port in ports.items():
                for kind in CLIENTS:
                    figures = asyncio.run(measure(kind, f"ws://127.0.0.1:{port}/", protocol.text))
                    rows.setdefault((kind.name, server), []).append(figures)
    finally:
        for process in servers:
            process.terminate()
            process.join()

    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---|" + "---:|" * (len(COLUMNS) - 2)]
    for (client, server), figures in sorted(rows.items()):
        connect_cpu, connect, message_cpu, round_trip = (
            median(column) for column in zip(*figures, strict=True)
        )
        cells = (
            client,
            server,
            f"{connect_cpu:.0f}",
            f"{connect:.2f}",
            f"{message_cpu:.1f}",
            f"{round_trip:.0f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    where, what = machine.describe(), machine.versions()
    lines += [
        "",
        f"{where['cpu']}, {where['cores']} cores, Python {what['python']} with asyncio, "
        f"picows {what['picows']}, websockets {websockets.__version__}. "
        f"Medians of {options.rounds} interleaved rounds: {MESSAGES:,} round trips of {MESSAGE_BYTES} bytes "
        f"on one connection, then {CONNECTIONS} connections. A message here is one sent and one received; to "
        f"sign and to verify it costs {median(signing):.0f} µs besides.",
    ]
    section = "\n".join(lines)
    print(section)
    if options.write:
        report.write_section(SECTION, section)


if __name__ == "__main__":
    main()
