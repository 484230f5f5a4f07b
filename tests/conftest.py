"""Fixtures for all tests: real gateway processes on free ports of 127.0.0.1."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import pytest
from processes import children, send_signal
from turn_server import TurnServer, find_server
from wire import wait_until

START_SECONDS = 30.0


def pytest_sessionfinish(session: pytest.Session) -> None:
    """On CI everything is installed, so a skipped test is a test that should have run."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


class GatewayProcess:
    """One gateway with the log it writes; it can be stopped, killed and started again on its port."""

    def __init__(
        self, options: tuple[str, ...], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self._options = options
        self._environment = {**os.environ, **(environment or {})}
        self._log = log
        self._process: subprocess.Popen[str] | None = None
        self._stderr: IO[str] | None = None
        self._forgiven: tuple[str, ...] = ()
        self._killed: set[int] = set()
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/ws"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def worker_pids(self) -> list[int]:
        """Its worker processes in the order in which they were started, without those killed."""
        return [pid for pid in children(self.pid) if pid not in self._killed]

    def kill_worker(self, pid: int) -> None:
        """SIGKILL to one of its workers, which the supervisor then logs."""
        self.forgive("worker died")
        self._killed.add(pid)
        os.kill(pid, signal.SIGKILL)

    def signal_workers(self, number: signal.Signals) -> None:
        """Send a signal to every worker; after SIGSTOP, wait until each stands still."""
        for pid in self.worker_pids:
            send_signal(pid, number)

    def start(self) -> None:
        """Start it and wait until it listens."""
        assert self._process is None
        self._stderr = self._log.open("a")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gateway.server", "--port", str(self.port), *self._options],
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=self._environment,
        )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                self.port = urlsplit(json.loads(line)["listening"]).port or 0
                return
            name, _, value = line.strip().partition(": ")
            if name == "listening":
                self.port = urlsplit(value).port or 0
            if name == "workers":  # the last line of the banner
                return
        raise AssertionError(f"the gateway did not start:\n{self.log}")

    def stop(self) -> int:
        """SIGTERM; return its exit status."""
        if self._process is not None and self._killed:
            # A death that it hears of only now would be one during its drain, which is a fault.
            wait_until(lambda: self._killed.isdisjoint(children(self.pid)))
        return self._end(signal.SIGTERM)

    def kill(self) -> int:
        """SIGKILL: no goodbye to anybody."""
        return self._end(signal.SIGKILL)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal and do not wait."""
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self) -> int:
        """Wait for its end, which something else caused; return its exit status."""
        return self._end(None)

    def _end(self, number: signal.Signals | None) -> int:
        if self._process is None:
            return 0
        process, self._process = self._process, None
        if number is not None:
            process.send_signal(number)
        try:
            return process.wait(START_SECONDS)
        finally:
            assert process.stdout is not None
            assert self._stderr is not None
            process.stdout.close()
            self._stderr.close()

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return self._log.read_text()

    def log_lines(self) -> list[dict[str, Any]]:
        """Return what it has logged so far, if its log format is json."""
        return [json.loads(line) for line in self.log.splitlines() if line.startswith("{")]

    def forgive(self, *events: str) -> None:
        """Expect faults that the test has caused."""
        self._forgiven += events

    def assert_no_faults(self) -> None:
        """Fail if it has logged a fault of its own."""
        faults = [
            line
            for line in self.log.splitlines()
            if ('"level": "error"' in line or "Traceback" in line)
            and not any(f'"event": "{event}"' in line for event in self._forgiven)
        ]
        assert not faults, self.log

    def health(self) -> dict[str, Any]:
        """Return what GET /health says."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=10) as response:
            state: dict[str, Any] = json.load(response)
        return state


@pytest.fixture
def start_gateway(tmp_path: Path) -> Iterator[Callable[..., GatewayProcess]]:
    """Start gateways with options; each is stopped, and none may have logged a fault."""
    started: list[GatewayProcess] = []

    def start(*options: str, environment: Mapping[str, str] | None = None) -> GatewayProcess:
        log = tmp_path / f"gateway-{len(started)}.log"
        started.append(GatewayProcess(("--log-format", "json", *options), log, environment))
        return started[-1]

    yield start
    for gateway in started:
        gateway.stop()
    for gateway in started:
        gateway.assert_no_faults()


@pytest.fixture(scope="module")
def shared_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """A gateway with default settings for all tests of a file that leave it as they found it."""
    gateway = GatewayProcess(("--log-format", "json"), tmp_path_factory.mktemp("gateway") / "gateway.log")
    yield gateway
    gateway.stop()
    gateway.assert_no_faults()


@pytest.fixture
def gateway(start_gateway: Callable[..., GatewayProcess]) -> GatewayProcess:
    """A gateway with default settings."""
    return start_gateway()


@pytest.fixture(scope="session")
def start_turn_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., TurnServer]]:
    """Start TURN servers with options."""
    try:
        find_server()
    except LookupError as error:
        pytest.skip(str(error))
    started: list[TurnServer] = []

    def start(*options: str) -> TurnServer:
        started.append(TurnServer(tmp_path_factory.mktemp("turn"), *options))
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture(scope="session")
def turn_server(start_turn_server: Callable[..., TurnServer]) -> TurnServer:
    """A TURN server for all tests that leave it alone."""
    return start_turn_server()
