"""The demo and the agents it shows, as a user runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
        r"gateway +agents dial: ws://127\.0\.0\.1:\d+/ws",
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


def test_demo_that_fails_says_why(tmp_path: Path) -> None:
    # A Python beside which there is no gateway, and none on the path.
    (tmp_path / "python").symlink_to(sys.executable)
    environment = {"PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "110"}
    command = [str(tmp_path / "python"), str(EXAMPLES / "demo.py")]
    demo = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=90)
    assert demo.returncode == 1
    assert "failed: aiconexus-gateway is not installed" in demo.stdout
