"""Start a gateway, a Python agent and a web server on 127.0.0.1, and show where the page is.

python examples/browser_agent/run.py
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import threading
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

HERE = Path(__file__).parent
SECONDS = 30.0  # for anything to start or stop
# The page needs nothing from anywhere but its own folder and the gateway.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src ws: wss:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE_FILES = frozenset({"/", "/index.html", "/style.css", "/app.js", "/aiconexus.js", "/icon.svg"})


class Pages(SimpleHTTPRequestHandler):
    """Serves the page, and no other file of the folder."""

    extensions_map: ClassVar = {
        **SimpleHTTPRequestHandler.extensions_map,
        ".js": "text/javascript; charset=utf-8",
    }

    def send_head(self) -> Any:
        if self.path.partition("?")[0] not in PAGE_FILES:
            self.send_error(404)
            return None
        return super().send_head()

    def end_headers(self) -> None:
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 -- the name of the base class
        pass


@asynccontextmanager
async def serve_pages(port: int) -> AsyncIterator[str]:
    """Serve the page; yields its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", port), partial(Pages, directory=str(HERE)))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        await asyncio.to_thread(server.shutdown)
        server.server_close()


@asynccontextmanager
async def started(words: str, *command: str) -> AsyncIterator[tuple[str, Process]]:
    """Start a process, and yield what it says behind `words`, and it; it is stopped at the end."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, stdout=PIPE, env=environment, start_new_session=True
    )
    try:
        said = await asyncio.wait_for(find(process, words), SECONDS)
        rest = asyncio.ensure_future(drain(process))
        yield said, process
        rest.cancel()
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(process.wait(), SECONDS)


async def find(process: Process, words: str) -> str:
    """Read what a process says up to the line that holds `words`; return what follows them."""
    assert process.stdout is not None
    async for line in process.stdout:
        _, found, rest = line.decode().partition(words)
        if found:
            return rest.strip()
    raise SystemExit(f"a process ended before it said {words!r}")


async def drain(process: Process) -> None:
    """Read on, so that a full pipe does not stop the process."""
    assert process.stdout is not None
    async for _ in process.stdout:
        pass


async def main() -> None:
    parser = argparse.ArgumentParser(description="The browser agent, with all that it needs.")
    parser.add_argument("--port", type=int, default=0, help="of the page; default: any free one")
    options = parser.parse_args()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        gateway, gateway_process = await stack.enter_async_context(
            started(
                "listening:", "-m", "gateway.server", "--host", "127.0.0.1", "--port", "0", "--workers", "1"
            )
        )
        agent, agent_process = await stack.enter_async_context(
            started(
                "is registered as",
                str(HERE / "agent.py"),
                "--gateway",
                gateway,
                "--host-address",
                "127.0.0.1",
            )
        )
        page = await stack.enter_async_context(serve_pages(options.port))
        print(f"gateway  {gateway}")
        print(f"agent    {agent}")
        print(f"page     {page}?gateway={quote(gateway, safe=':/')}", flush=True)
        print("Open the page; Ctrl+C stops everything.", flush=True)
        ends = {
            asyncio.ensure_future(gateway_process.wait()): "the gateway",
            asyncio.ensure_future(agent_process.wait()): "the Python agent",
            asyncio.ensure_future(stop.wait()): "",
        }
        done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    dead = [name for task, name in ends.items() if name and task in done]
    if dead and not stop.is_set():
        raise SystemExit(f"{' and '.join(dead)} ended by itself, so everything was stopped")


if __name__ == "__main__":
    asyncio.run(main())
