"""Fixtures for networks of nodes: a real Redis, and gateways that share it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from redis_server import RedisServer, find_server
from tcp_proxy import TcpProxy
from wire import wait_until

NODE_WORKERS = 2


@pytest.fixture(scope="session")
def need_redis() -> None:
    try:
        find_server()
    except LookupError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def redis_server(need_redis: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis for all tests that leave it alone; each has a prefix of its own."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture
def own_redis(need_redis: None, tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis that the test may kill."""
    server = RedisServer(tmp_path)
    yield server
    server.kill()


@pytest.fixture
def make_proxy() -> Iterator[Callable[[int], TcpProxy]]:
    proxies: list[TcpProxy] = []

    def make(target: int) -> TcpProxy:
        proxies.append(TcpProxy(target))
        return proxies[-1]

    yield make
    for proxy in proxies:
        proxy.stop()


@pytest.fixture
def start_node(
    start_gateway: Callable[..., Any], redis_server: RedisServer, tmp_path: Path
) -> Callable[..., Any]:
    """Start nodes of one network; each waits until it has met those before it."""
    prefix = f"test-{uuid4()}"
    nodes: list[Any] = []

    def start(*options: str, url: str = redis_server.url, **keywords: Any) -> Any:
        network = ["--redis", url, "--redis-prefix", prefix, "--identity", str(tmp_path / "gateway.pem")]
        own = ["--node-name", f"node-{len(nodes)}", "--workers", str(NODE_WORKERS), "--message-rate", "0"]
        node = start_gateway(*network, *own, *options, **keywords)
        nodes.append(node)
        for each in nodes:
            wait_until(lambda each=each: len(each.health()["cluster"]["others"]) == len(nodes) - 1)
        return node

    return start


@pytest.fixture
def pair(start_node: Callable[..., Any]) -> tuple[Any, Any]:
    return start_node(), start_node()


@pytest.fixture
def run_gateway() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a gateway that is to end by itself."""

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "gateway.server", "--port", "0", *options],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run
