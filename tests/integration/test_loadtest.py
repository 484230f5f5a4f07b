"""The load test runs under Locust, finds no fault in a gateway, and finds those that are there."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from ports import free_port
from relay import Relay

if TYPE_CHECKING:
    from conftest import GatewayProcess

ROOT = Path(__file__).parents[2]
LOCUSTFILE = ROOT / "loadtest" / "signal.py"
SECONDS = 60.0  # for a run of some seconds, on a busy machine
REFUSED = {("REGISTER", "returned"), ("REGISTER", "resumed")}
COMPLETE = {
    ("REGISTER", "new"),
    ("REGISTER", "returned"),
    ("REGISTER", "resumed"),
    ("OFFER", "answered"),
    ("OFFER", "answered after resume"),
    ("ICE_CANDIDATE", "delivered"),
}
BUSY = ("--think-time", "0.2", "--churn-percent", "40")

pytestmark = pytest.mark.soak


class Run:
    """A headless run of Locust that has ended: exit status, output, statistics by type and name."""

    def __init__(self, url: str, *options: str, cwd: Path = ROOT, users: int = 6, seconds: int = 6) -> None:
        command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--json"]
        command += ["--host", url.removesuffix("/ws")]
        command += ["-u", str(users), "-r", str(users), "-t", f"{seconds}s"]
        port = str(free_port())  # for --processes
        command += ["--master-port", port, "--master-bind-port", port]
        ended = subprocess.run(
            [*command, *options], cwd=cwd, capture_output=True, text=True, timeout=SECONDS, check=False
        )
        self.status = ended.returncode
        self.output = ended.stdout + ended.stderr
        # Each process prints its list; those of workers are empty.
        entries: list[dict[str, Any]] = []
        if ended.stdout.find("[\n    {") >= 0:
            entries, _ = json.JSONDecoder().raw_decode(ended.stdout, ended.stdout.find("[\n    {"))
        self.entries = {(entry["method"], entry["name"]): entry for entry in entries}

    @property
    def failures(self) -> dict[tuple[str, str], int]:
        return {key: entry["num_failures"] for key, entry in self.entries.items() if entry["num_failures"]}


class Web:
    """Locust with its web UI: a run that lasts until a test has seen what it waits for."""

    def __init__(self, url: str, *options: str) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self._host = url.removesuffix("/ws")
        port = self.url.rsplit(":", 1)[1]
        command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--host", self._host]
        self._process = subprocess.Popen(
            [*command, "--web-host", "127.0.0.1", "--web-port", port, *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ,
        )
        self.wait_for(lambda: self.page() != "")

    def __enter__(self) -> Web:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait(SECONDS)

    def end(self) -> int:
        """Let the users stop, then Locust; return its exit status."""
        urllib.request.urlopen(f"{self.url}/stop", b"", timeout=SECONDS).close()
        self.wait_for(lambda: self.statistics()["state"] == "stopped")
        self._process.terminate()
        return self._process.wait(SECONDS)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert self._process.poll() is None
            assert time.monotonic() < deadline, self.statistics()
            time.sleep(0.1)

    def page(self) -> str:
        try:
            with urllib.request.urlopen(self.url, timeout=10) as response:
                text: str = response.read().decode()
                return text
        except urllib.error.URLError:
            return ""

    def swarm(self, users: int, **options: str) -> None:
        fields = {"user_count": str(users), "spawn_rate": str(users), "host": self._host, **options}
        data = urllib.parse.urlencode(fields).encode()
        with urllib.request.urlopen(f"{self.url}/swarm", data, timeout=10) as response:
            assert json.load(response)["success"]

    def statistics(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/stats/requests", timeout=10) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def seen(self) -> dict[tuple[str, str], int]:
        """Requests by type and name."""
        entries = self.statistics()["stats"]
        return {(each["method"], each["name"]): each["num_requests"] for each in entries}

    def requests(self, kind: str, name: str) -> int:
        return self.seen().get((kind, name), 0)

    def failures(self) -> list[dict[str, Any]]:
        errors: list[dict[str, Any]] = self.statistics()["errors"]
        return errors

    def failed(self) -> set[tuple[str, str]]:
        """Type and name of what has failed."""
        return {(error["method"], error["name"]) for error in self.failures()}


def test_users_exchange_leave_and_resume_without_a_failure(
    start_gateway: Callable[..., GatewayProcess],
) -> None:
    gateway = start_gateway("--workers", "2")
    with Web(gateway.url, *BUSY) as web:
        web.swarm(6)
        web.wait_for(lambda: web.seen().keys() >= COMPLETE)
        # Users leave while others send to their agents.
        seen = {(kind, name) for kind, name in web.seen() if kind and "partner had left" not in name}
        assert seen == COMPLETE
        assert web.failures() == []
        assert web.end() == 0
    state = gateway.health()
    assert state["sessions"] == state["away"], "every agent that was connected said goodbye"


def test_processes_source_addresses_and_a_ping_while_thinking(
    start_gateway: Callable[..., GatewayProcess], tmp_path: Path
) -> None:
    # Whoever answers no ping is closed after four seconds of silence, and that would be a failure.
    gateway = start_gateway("--ping-interval", "1", "--pong-timeout", "3")
    options = ("--processes", "2", "--think-time", "5", "--churn-percent", "0")
    options += ("--source-addresses", "127.0.0.2-127.0.0.4")
    run = Run(gateway.url, *options, cwd=tmp_path, users=4, seconds=9)
    assert run.status == 0, run.output
    assert run.failures == {}
    assert run.entries["REGISTER", "new"]["num_requests"] == 8
    state = gateway.health()
    assert state["counters"]["pings_sent"] > 0
    assert state["sessions"] == 0


def test_standard_module_signal_is_not_shadowed_in_the_folder_of_the_locustfile(
    start_gateway: Callable[..., GatewayProcess],
) -> None:
    # `python -m locust` puts this folder on sys.path before gevent imports `signal`.
    run = Run(start_gateway().url, *BUSY, "--processes", "2", cwd=LOCUSTFILE.parent, users=2, seconds=5)
    assert run.status == 0, run.output

    code = "import signal, gevent, multiprocessing.util; print(signal.__file__, signal.SIGCHLD.name)"
    command = [sys.executable, "-W", "error", "-c", code]
    printed = subprocess.run(
        command, cwd=LOCUSTFILE.parent, capture_output=True, text=True, check=True
    ).stdout
    assert printed.split() == [signal.__file__, "SIGCHLD"]


def test_agents_sent_away_by_a_drain_come_back(
    start_gateway: Callable[..., GatewayProcess], tmp_path: Path
) -> None:
    port = str(free_port())
    options = ("--workers", "2", "--identity", str(tmp_path / "gateway.key"), "--drain-seconds", "2")
    old = start_gateway("--port", port, *options)
    with Web(old.url, *BUSY) as web:
        web.swarm(6)
        web.wait_for(lambda: web.requests("OFFER", "answered") > 10)
        assert old.stop() == 0
        new = start_gateway("--port", port, *options)
        web.wait_for(lambda: web.requests("CLOSE", "draining") >= 1 and new.health()["sessions"] == 12)
        before = web.requests("OFFER", "answered")
        web.wait_for(lambda: web.requests("OFFER", "answered") > before + 10)
        # Only that for a moment nobody listened is a fault.
        assert web.failed() <= REFUSED
        assert [error for error in web.failures() if "Connection" not in error["error"]] == []


class Fault:
    """Does something to one ANSWER or candidate in ten that passes a relay."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._count = 0
        self._held: list[dict[str, Any]] = []

    def __call__(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        if message["type"] not in ("ANSWER", "ICE_CANDIDATE"):
            return [message]
        held, self._held = self._held, []
        self._count += 1
        if held:
            return [message, *held]
        if self._count % 10:
            return [message]
        match self.kind:
            case "lost":
                return []
            case "repeated":
                return [message, message]
            case "altered":
                return [{**message, "timestamp": "2026-01-12T10:00:00Z"}]
        self._held = [message]  # "reordered": goes behind the next one
        return []


def run_until_failure(url: str, text: str) -> set[tuple[str, str]]:
    """Run until a failure says `text`; return what has failed."""
    # Two agents, so that what is reordered is between the same two.
    with Web(url, "--think-time", "0.1", "--churn-percent", "0") as web:
        web.swarm(1)
        web.wait_for(lambda: any(text in failure["error"] for failure in web.failures()))
        failed = web.failed()
        assert web.end() == 1
    return failed


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("lost", "lost, or overtaken"),
        ("repeated", "ReplayedMessageError"),
        ("altered", "InvalidSignatureError"),
        ("reordered", "lost, or overtaken"),
    ],
)
async def test_message_that_is_not_delivered_as_it_was_sent_is_a_failure(
    start_gateway: Callable[..., GatewayProcess], kind: str, text: str
) -> None:
    async with Relay() as relay:
        relay.upstream = start_gateway("--public-url", relay.url).url
        relay.tamper = Fault(kind)
        failed = await asyncio.to_thread(run_until_failure, relay.url, text)
    assert failed <= {("OFFER", "answered"), ("ICE_CANDIDATE", "delivered")}


def test_gateway_that_is_full_is_a_failure(start_gateway: Callable[..., GatewayProcess]) -> None:
    with Web(start_gateway("--max-connections", "3").url) as web:
        web.swarm(2)
        web.wait_for(lambda: web.failures() != [])
        assert web.failed() == {("REGISTER", "turned away")}
        assert web.end() == 1


def test_rate_limit_is_a_failure_with_its_name(start_gateway: Callable[..., GatewayProcess]) -> None:
    gateway = start_gateway("--message-rate", "2", "--message-burst", "4")
    with Web(gateway.url, "--think-time", "0.1", "--churn-percent", "0") as web:
        web.swarm(2)
        web.wait_for(lambda: ("ERROR", "rate_limited") in web.failed())
        assert web.end() == 1


@pytest.mark.parametrize(
    ("option", "value"), [("--churn-percent", "101"), ("--source-addresses", "here"), ("--host", "http://x")]
)
def test_wrong_option_ends_the_run_at_once(option: str, value: str) -> None:
    run = Run("ws://127.0.0.1:1", option, value, seconds=30)
    assert run.status == 1
    assert "ValueError" in run.output


@pytest.fixture
def web(start_gateway: Callable[..., GatewayProcess]) -> Iterator[Web]:
    with Web(start_gateway().url) as web:
        yield web


def test_web_ui_shows_the_options_and_runs_with_what_is_entered(web: Web) -> None:
    page = web.page()
    for option in ("agents_per_user", "think_time", "churn_percent", "resume_percent", "source_addresses"):
        assert option in page
    web.swarm(2, agents_per_user="3", think_time="0.2")
    web.wait_for(lambda: web.requests("OFFER", "answered") > 5)
    assert web.requests("REGISTER", "new") == 6
    assert web.failures() == []


def test_web_ui_refuses_a_wrong_option(web: Web) -> None:
    web.swarm(2, churn_percent="200")
    web.wait_for(lambda: web.failures() != [])
    assert "churn percent must be between" in web.failures()[0]["error"]
    assert web.requests("REGISTER", "new") == 0
