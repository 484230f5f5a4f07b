"""Compile the C parts of the benchmarks into build/bench/, again only when a source is newer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

SOURCES = Path(__file__).parent
OUTPUT = SOURCES.parent / "build" / "bench"

_FLAGS = ["-std=c11", "-O2", "-Wall", "-Wextra"]


class CompileError(Exception):
    """There is no C compiler, or it refused a source. The text is for the user."""


def program(name: str) -> Path:
    """Return the executable built from `bench/_<name>.c`."""
    return _compile(name, OUTPUT / name, [])


def library(name: str) -> Path:
    """Return the shared library built from `bench/_<name>.c`."""
    return _compile(name, OUTPUT / f"{name}.so", ["-shared", "-fPIC"])


def _compile(name: str, target: Path, flags: list[str]) -> Path:
    source = SOURCES / f"_{name}.c"
    newest = max(path.stat().st_mtime for path in (source, *SOURCES.glob("*.h")))
    if target.exists() and target.stat().st_mtime > newest:
        return target
    compiler = os.environ.get("CC", "cc")
    if shutil.which(compiler) is None:
        raise CompileError(f"there is no C compiler `{compiler}`: install gcc or clang, or set CC")
    OUTPUT.mkdir(parents=True, exist_ok=True)
    # Another run may be executing the old file: replace the name, do not write into it.
    fresh = target.with_name(f"{target.name}.{os.getpid()}")
    done = subprocess.run(
        [compiler, *_FLAGS, *flags, "-o", fresh, source], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise CompileError(f"{compiler} refused {source.name}:\n{done.stderr}")
    fresh.replace(target)
    return target
