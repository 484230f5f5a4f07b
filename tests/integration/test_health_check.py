"""The health check of the image, as it stands in the Dockerfile."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

DOCKERFILE = Path(__file__).parent.parent.parent / "Dockerfile"


def check(port: int) -> int:
    """Run it for a gateway on this port; return its exit status."""
    found = re.search(r"^HEALTHCHECK .*\\\n +CMD (\[.*\])$", DOCKERFILE.read_text(), re.MULTILINE)
    assert found is not None
    python, *arguments = json.loads(found[1])
    assert python == "python"
    # A proxy, which Docker may set for all containers, is not for this.
    environment = {**os.environ, "AICONEXUS_GATEWAY_PORT": str(port), "http_proxy": "http://127.0.0.1:1"}
    run = subprocess.run(
        [sys.executable, *arguments], env=environment, stderr=subprocess.DEVNULL, timeout=30, check=False
    )
    return run.returncode


def test_it_finds_the_gateway_at_the_port_that_the_environment_names(gateway: Any) -> None:
    assert check(gateway.port) == 0


def test_it_fails_where_there_is_none() -> None:
    with socket.socket() as nobody:  # who has the port and does not listen
        nobody.bind(("127.0.0.1", 0))
        assert check(nobody.getsockname()[1]) != 0
