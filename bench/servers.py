"""The servers under test. A new one is one class: how it starts, how an agent registers, what it relays."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from aiconexus.protocol import DIDKey, MessageType, decode, encode
from aiconexus.protocol.limits import ENDPOINT_PATH, SUBPROTOCOL
from bench import compile as build
from bench.cpu import pin
from bench.load import TEXT, Endpoint, Stream, Template
from bench.offers import offer
from bench.registration import prove
from bench.websocket import WebSocket

START_TIMEOUT = 20.0  # s
STOP_TIMEOUT = 10.0  # s; then SIGKILL

_PR_SET_PDEATHSIG = 1


class ServerError(Exception):
    """A server did not start, or does not answer as it should. The text is for the user."""


class Server(ABC):
    """A relay that pairs of agents talk through, on a port of 127.0.0.1.

    `url` and `pid` are valid between `start` and `stop`.
    """

    name: ClassVar[str]
    differs: ClassVar[str]  # what it does for a message and what it does not: a reader must not guess
    path: ClassVar[str] = ENDPOINT_PATH
    environment: ClassVar[dict[str, str]] = {}  # beside ours
    opcode: ClassVar[int] = TEXT
    stream: ClassVar[Stream | None] = None
    keeps_up: ClassVar[bool] = True  # False: it cannot carry the open loop's load
    url: str
    pid: int
    _process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self, port: int) -> list[str]:
        """Return the command line that serves 127.0.0.1:`port`."""

    @abstractmethod
    def connect(self, agent: DIDKey) -> WebSocket:
        """Open a connection and register `agent` on it."""

    def sends(self, sender: DIDKey, target: DIDKey) -> Template:
        """Return what one agent sends to another."""
        return offer(sender, target)

    def delivers(self, sender: DIDKey, target: DIDKey) -> Template:
        """Return what arrives of it."""
        return self.sends(sender, target)

    def pair(self, first: DIDKey, second: DIDKey) -> tuple[Endpoint, Endpoint]:
        """Connect two agents for a conversation."""
        return self._endpoint(first, second), self._endpoint(second, first)

    def _endpoint(self, agent: DIDKey, partner: DIDKey) -> Endpoint:
        return Endpoint(
            self.connect(agent),
            sends=self.sends(agent, partner),
            receives=self.delivers(partner, agent),
            opcode=self.opcode,
            stream=self.stream,
        )

    def versions(self) -> dict[str, str]:
        """Return the versions of its parts, beside those that `machine.versions` knows.

        Raises:
            ServerError: It is not installed.
        """
        return {}

    def is_ready(self) -> bool:
        """Tell whether it takes connections."""
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def start(self, core: int | None) -> None:
        """Start the process, bound to `core`, and wait until it is ready."""
        self.port = free_port()
        self.url = f"ws://127.0.0.1:{self.port}{self.path}"
        command = self.command(self.port)
        build.OUTPUT.mkdir(parents=True, exist_ok=True)
        log = build.OUTPUT / f"{self.name}.log"

        def before_exec() -> None:
            # Nothing may outlive a benchmark that was killed (prctl(2)).
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            pin(core)

        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | self.environment,
                preexec_fn=before_exec,  # noqa: PLW1509  (no thread has been started yet)
            )
        self.pid = self._process.pid
        deadline = time.monotonic() + START_TIMEOUT
        while not self.is_ready():
            status = self._process.poll()
            if status is not None or time.monotonic() > deadline:
                self.stop()
                what = "is not ready" if status is None else f"ended with status {status}"
                raise ServerError(f"{self.name} {what}: {' '.join(command)}\n{log.read_text()[-2000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """End the process that `start` started, if it did."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Floor(Server):
    """C and epoll, no checks: bench/_floor.c."""

    name = "floor"
    differs = (
        "C. Searches each message for its `to` and checks nothing: neither JSON nor UTF-8, nor who sent it. "
        "Collects what goes to one target until the end of the loop pass."
    )

    def command(self, port: int) -> list[str]:
        """Compile it first, if need be."""
        return [str(build.program("floor")), str(port)]

    def connect(self, agent: DIDKey) -> WebSocket:
        """Say who is there; the floor believes it."""
        connection = WebSocket(self.url, SUBPROTOCOL)
        connection.send(b'{"type":"REGISTER","from":"%s"}' % agent.did.encode())
        connection.receive()
        return connection


class Gateway(Server):
    """AIConexus, one worker."""

    name = "gateway"
    differs = (
        "AIConexus, one worker. An agent proves its key when it registers. For each message: a strict scan "
        "of the whole JSON, UTF-8 included, `from` compared with the session, limits, counters; forwards "
        "the bytes as they came. What cannot be delivered comes back as ERROR. Signatures are the "
        "receiver's to verify."
    )
    # The limit is on, but out of the way: here a few sessions carry the traffic of many.
    options: Mapping[str, object] = {
        "--workers": 1,
        "--message-rate": 1_000_000,
        "--message-burst": 1_000_000,
    }

    def command(self, port: int) -> list[str]:
        """Refuse to measure anything but a release build."""
        _check_extensions()
        options = {"--host": "127.0.0.1", "--port": port, **self.options}
        words = [str(word) for option in options.items() for word in option]
        return [sys.executable, "-m", "gateway.server", *words]

    def is_ready(self) -> bool:
        """Ask GET /health."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def connect(self, agent: DIDKey) -> WebSocket:
        """Prove the key: the gateway speaks first, its nonce and the URL dialled come back signed."""
        connection = WebSocket(self.url, SUBPROTOCOL)
        greeting = decode(connection.receive())
        register = prove(greeting, agent, self.url, [])
        connection.send(encode(register))
        answer = decode(connection.receive())
        if answer.type is not MessageType.REGISTER or answer.correlation_id != register.id:
            raise ServerError(f"{self.name} refused to register an agent: {encode(answer).decode()}")
        # Of the agent that was connected last.
        self.worker, self.did = answer.ext["worker"], answer.from_
        return connection


class RunningGateway(Gateway):
    """A gateway that somebody else started and will stop."""

    def __init__(self, url: str, pid: int) -> None:
        self.url, self.pid = url, pid

    def start(self, core: int | None) -> None:
        """Bind it to `core`; a port of the wrong server shows at the first connection."""
        if not Path(f"/proc/{self.pid}").exists():
            raise ServerError(f"there is no process {self.pid}")
        pin(core, self.pid)


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _check_extensions() -> None:
    for source in sorted((build.SOURCES.parent / "ext" / "gateway").glob("*.pyx")):
        try:
            spec = importlib.util.find_spec(f"gateway.{source.stem}")
        except ModuleNotFoundError:
            spec = None
        if spec is None or spec.origin is None:
            raise ServerError(
                f"gateway.{source.stem} is not built: run `AICONEXUS_EXTENSIONS=required pip install .`"
            )
        # Release builds carry no debug information (-g0 in setup.py), test builds do.
        if b".debug_info" in Path(spec.origin).read_bytes():
            raise ServerError(
                f"gateway.{source.stem} is a test build, with checks that cost time: "
                "run `AICONEXUS_BUILD=release AICONEXUS_EXTENSIONS=required pip install .`"
            )
