"""A TCP proxy that delays, cuts or redirects, to make a server slow or unreachable for one client."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress


class TcpProxy:
    """Listens on a port of 127.0.0.1 and passes everything on, after `delay` seconds each way.

    It runs in a thread of its own. While `is_cut`, connections are ended and new ones refused. Where the
    bytes `held` come, they and what follows wait for `release`.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.delay = 0.0
        self.is_cut = False
        self.held = b""
        self.is_holding = threading.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._started = threading.Event()
        self._thread.start()
        self._started.wait()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._over = asyncio.Event()
        self._released = asyncio.Event()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        await self._over.wait()
        server.close()
        self._end_all()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        if self.is_cut:
            writer.transport.abort()
            return
        try:
            other_reader, other_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        self._writers.add(other_writer)
        await asyncio.gather(self._pass(reader, other_writer), self._pass(other_reader, writer))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Copy one direction; what comes later never waits less, so the order stays."""
        with suppress(OSError):
            while data := await reader.read(65_536):
                if self.held and self.held in data:
                    self.is_holding.set()
                    await self._released.wait()
                if self.delay:
                    self._loop.call_later(self.delay, writer.write, data)
                else:
                    writer.write(data)
                    await writer.drain()
        writer.close()
        self._writers.discard(writer)

    def _end_all(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()
        self._writers.clear()

    def cut(self) -> None:
        """End all connections and refuse new ones."""
        self.is_cut = True
        self._loop.call_soon_threadsafe(self._end_all)

    def mend(self) -> None:
        """Pass on again."""
        self.is_cut = False

    def release(self) -> None:
        """Hold nothing any longer."""
        self.held = b""
        self._loop.call_soon_threadsafe(self._released.set)

    def redirect(self, target: int) -> None:
        """End all connections; new ones go to another server."""
        self.target = target
        self._loop.call_soon_threadsafe(self._end_all)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()
