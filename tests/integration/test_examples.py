"""The demo and the agents it shows, as a user runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from redis_server import find_server

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.skipif(
    not Path(sys.executable).with_name("aiconexus-gateway").exists(), reason="the gateway is not installed"
)
def test_demo_shows_every_step_and_stops_everything() -> None:
    environment = {**os.environ, "PYTHONWARNINGS": "error", "COLUMNS": "110"}
    command = [sys.executable, str(EXAMPLES / "demo.py")]
    demo = subprocess.run(
        command,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        timeout=90,
    )
    assert demo.returncode == 0, demo.stdout
    path = r"over 127\.0\.0\.1:\d+ ⇄ 127\.0\.0\.1:\d+ udp host"
    steps = [
        r"gateway +listening: ws://127\.0\.0\.1:\d+/ws",
        r"notary +is registered as did:key:z6Mk",
        r"client +is registered as did:key:z6Mk",
        rf"client +is connected with did:key:z6Mk.* {path} \(\d+ ms\)",
        r"client +sends an INTENT: “Extract the non-compete clauses",
        r"client +gets a quote: understood, needs \['text', 'kinds'\], 0\.50 EUR",
        r"client +sends an EXEC_REQUEST: extract_clauses",
        r"client +gets the result, signed by the notary",
        r"client +§ 5  The employee will not work for a competitor",
        r"gateway +has routed 2 messages",
        r"notary +has stopped",
        r"gateway +has stopped",
    ]
    at = 0
    for step in steps:
        found = re.compile(r" \d+\.\d{3} s  " + step).search(demo.stdout, at)
        assert found, f"{step}\n{demo.stdout}"
        at = found.end()
    assert re.search(rf"notary +is connected with did:key:z6Mk.* {path}", demo.stdout)


def test_cluster_goes_on_when_a_node_is_killed() -> None:
    try:
        find_server()
    except LookupError as error:
        pytest.skip(str(error))
    environment = {**os.environ, "PYTHONWARNINGS": "error", "COLUMNS": "110"}
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / "cluster" / "run.py")],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        timeout=90,
    )
    assert run.returncode == 0, run.stdout
    steps = [
        r"node-1 +listens at ws://127\.0\.0\.1:\d+/ws",
        r"node-2 +listens at ws://127\.0\.0\.1:\d+/ws",
        r"client +gets the result, signed by the notary",
        r"cluster +the notary is at node-1, the client was at the other node",
        r"node-1 +was killed",
        r"cluster +the notary has come back by itself, to node-2",
        r"client +gets the result, signed by the notary",
        r"node-2 +has stopped",
        r"cluster +all have stopped",
    ]
    at = 0
    for step in steps:
        found = re.compile(r" \d+\.\d{3} s  " + step).search(run.stdout, at)
        assert found, f"{step}\n{run.stdout}"
        at = found.end()


def test_demo_that_fails_says_why(tmp_path: Path) -> None:
    # A Python beside which there is no gateway, and none on the path.
    (tmp_path / "python").symlink_to(sys.executable)
    environment = {"PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "110"}
    command = [str(tmp_path / "python"), str(EXAMPLES / "demo.py")]
    demo = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=90)
    assert demo.returncode == 1
    assert "failed: aiconexus-gateway is not installed" in demo.stdout
