"""What a figure was measured on: machine and versions."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path

_PACKAGES = ("aiconexus", "picows", "uvloop", "orjson", "PyNaCl")


def describe() -> dict[str, str | int]:
    """Return processor, cores this process may use, memory, kernel and TCP congestion control."""
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model[1] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30),
        "kernel": platform.release(),
        "congestion_control": Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip(),
    }


def versions(*more: str) -> dict[str, str]:
    """Return the versions of Python, of the gateway's parts, of `more` packages and of the C compiler."""
    found = {"python": platform.python_version()}
    for package in (*_PACKAGES, *more):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    compiler = os.environ.get("CC", "cc")
    done = subprocess.run([compiler, "-dumpfullversion"], capture_output=True, text=True, check=False)
    found[compiler] = done.stdout.strip()
    return found
