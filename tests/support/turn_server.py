"""A private TURN server for tests: coturn on 127.0.0.1, which shares a secret with the gateway."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from processes import send_signal

START_SECONDS = 10.0
SECRET = "the secret of the tests"

# RFC 8489 section 6: a Binding request with the transaction id of zeros.
_BINDING = b"\x00\x01\x00\x00\x21\x12\xa4\x42" + bytes(12)


def find_server() -> str:
    """Return the path of coturn; raise LookupError with what to do if it is not there."""
    found = shutil.which("turnserver")
    if found is None:
        raise LookupError("needs coturn: apt-get install coturn (or brew install coturn)")
    return found


def _free_port() -> int:
    """Return a port that is free for UDP and TCP."""
    while True:
        with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
            tcp.bind(("127.0.0.1", 0))
            try:
                udp.bind(tcp.getsockname())
            except OSError:
                continue
            return int(tcp.getsockname()[1])


class TurnServer:
    """One coturn; it can be stopped and started again on its port."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.port = _free_port()
        self._folder = folder
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"turn:127.0.0.1:{self.port}?transport=udp"

    @property
    def tcp_url(self) -> str:
        return f"turn:127.0.0.1:{self.port}?transport=tcp"

    @property
    def gateway_options(self) -> tuple[str, ...]:
        """What makes a gateway name this server."""
        return ("--turn-url", self.url, "--turn-secret", SECRET)

    @property
    def log(self) -> str:
        return (self._folder / "turn.log").read_text()

    def start(self) -> None:
        """Start it and wait until it answers."""
        # No agent has the address of the relays.
        where = ["--listening-ip=127.0.0.1", "--relay-ip=127.0.0.2", f"--listening-port={self.port}"]
        auth = ["--use-auth-secret", f"--static-auth-secret={SECRET}", "--realm=test"]
        alone = ["-n", "--no-tls", "--no-dtls", "--no-cli", "--allow-loopback-peers", "--relay-threads=1"]
        files = [f"--userdb={self._folder / 'turndb'}", f"--pidfile={self._folder / 'pid'}"]
        with (self._folder / "turn.log").open("ab") as log:
            self._process = subprocess.Popen(
                [find_server(), *alone, *where, *auth, *files, "--log-file=stdout", "-v", *self._options],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            assert self._process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log

    def _answers(self) -> bool:
        with socket.socket(type=socket.SOCK_DGRAM) as probe:
            probe.settimeout(0.05)
            probe.connect(("127.0.0.1", self.port))
            try:
                probe.send(_BINDING)
                return bool(probe.recv(2048))
            except ConnectionRefusedError:
                time.sleep(0.01)
                return False
            except TimeoutError:
                return False

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        send_signal(self._process.pid, number)

    def kill(self) -> None:
        """SIGKILL: all relays are gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
