"""Two nodes behind a load balancer: a real HAProxy with deploy/haproxy.cfg as it is shipped."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ports import free_port
from wire import Agent, assert_exchange, wait_until

CONFIGURATION = Path(__file__).parent.parent.parent / "deploy" / "haproxy.cfg"


@pytest.fixture
def haproxy() -> str:
    found = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
    if found is None:
        pytest.skip("needs HAProxy: apt-get install haproxy")
    return found


@pytest.fixture
def balance(haproxy: str, tmp_path: Path) -> Iterator[Callable[[list[int]], int]]:
    """Start HAProxy before gateways on these ports; return its own."""
    processes: list[subprocess.Popen[str]] = []

    def start(gateways: list[int]) -> int:
        port = free_port()
        text = CONFIGURATION.read_text()
        changes = {
            "bind :8000": f"bind 127.0.0.1:{port}",
            "maxconn 40000": "maxconn 1000",  # whoever runs the tests may have few descriptors
            **{
                f"gateway-{number}:8000": f"127.0.0.1:{gateway}" for number, gateway in enumerate(gateways, 1)
            },
        }
        for before, after in changes.items():
            assert text.count(before) == 1, before
            text = text.replace(before, after)
        path = tmp_path / "haproxy.cfg"
        path.write_text(text)
        log = (tmp_path / "haproxy.log").open("w")
        processes.append(
            subprocess.Popen([haproxy, "-f", str(path), "-db"], stdout=log, stderr=log, text=True)
        )
        log.close()
        return port

    yield start
    for process in processes:
        process.terminate()
        process.wait(30)


def arrive(port: int) -> Agent:
    """Register an agent as soon as the balancer has found a gateway."""
    agents: list[Agent] = []

    def is_accepted() -> bool:
        try:
            agents.append(Agent(port))
        except (AssertionError, OSError, EOFError):
            return False
        return True

    wait_until(is_accepted)
    return agents[0]


def test_the_configuration_as_it_is_has_no_fault(haproxy: str) -> None:
    run = subprocess.run(
        [haproxy, "-c", "-f", str(CONFIGURATION)], capture_output=True, text=True, timeout=30, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_agents_are_balanced_and_come_back_at_the_other_gateway_when_one_stops(
    pair: tuple[Any, Any], balance: Callable[[list[int]], int]
) -> None:
    port = balance([node.port for node in pair])
    agents = [arrive(port)]
    while not all(node.health()["sessions"] for node in pair):
        assert len(agents) < 50, "one of them gets all"
        agents.append(Agent(port))
    for agent in agents[1:]:
        assert_exchange(agents[0], agent)
        assert_exchange(agent, agents[0])
    assert pair[0].stop() == 0
    back = [arrive(port) for _ in range(4)]
    assert pair[1].health()["sessions"] >= len(back)
    assert_exchange(back[0], back[1])
    for agent in (*agents, *back):
        agent.socket.close()
