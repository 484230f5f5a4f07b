"""Node.js and what the tests need of npm; both are things that a user may lack."""

from __future__ import annotations

import fcntl
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "tests" / "browser"
PACKAGES = ROOT / "build" / "node"
INSTALL_SECONDS = 300.0
NODE_MIN = 18


class MissingError(Exception):
    """Says what is missing and how to get it."""


def find_node() -> str:
    """Return the path of Node.js.

    Raises:
        MissingError: There is none, or it is too old.
    """
    node = shutil.which("node")
    if node is None:
        raise MissingError(f"Node.js is missing: install nodejs {NODE_MIN} or newer")
    version = subprocess.run([node, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.match(r"v(\d+)", version)
    if found is None or int(found[1]) < NODE_MIN:
        raise MissingError(f"Node.js {version.strip()} is too old: install {NODE_MIN} or newer")
    return node


def npm_packages() -> Path:
    """Return the folder with the packages of tests/browser/package.json, installed at the first time.

    Raises:
        MissingError: npm is missing, or its registry cannot be reached.
    """
    find_node()
    PACKAGES.mkdir(parents=True, exist_ok=True)
    lock = SOURCES / "package-lock.json"
    with (PACKAGES / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # test files run side by side
        installed = PACKAGES / ".installed"
        if installed.exists() and installed.read_text() == lock.read_text():
            return PACKAGES
        npm = shutil.which("npm")
        if npm is None:
            raise MissingError("npm is missing: install it, it comes with Node.js or as Debian's `npm`")
        for name in ("package.json", "package-lock.json"):
            shutil.copy(SOURCES / name, PACKAGES / name)
        run = subprocess.run(
            [npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts"],
            cwd=PACKAGES,
            check=False,
            capture_output=True,
            text=True,
            timeout=INSTALL_SECONDS,
        )
        if run.returncode != 0:
            raise MissingError(f"npm could not install what the tests need: {run.stderr.strip()[-300:]}")
        installed.write_text(lock.read_text())
    return PACKAGES


def find_chromium() -> str:
    """Return the path of Chromium.

    Raises:
        MissingError: There is none.
    """
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if (found := shutil.which(name)) is not None:
            return found
    raise MissingError("Chromium is missing: apt-get install chromium")
