"""Memory of a process tree."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bench.cpu import tree

_ENDED = (FileNotFoundError, ProcessLookupError)


@dataclass(frozen=True)
class Memory:
    """In KiB.

    `private` is what no other process has: it would be free if the tree ended. `shared` is the tree's part of
    the pages that several processes have mapped, as shared memory or since a fork.
    """

    private: int
    shared: int


def memory(pid: int) -> Memory:
    """Add up /proc/PID/smaps_rollup of a process and its descendants."""
    sums: dict[str, int] = {}
    for member in tree(pid):
        with suppress(*_ENDED):
            for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines()[1:]:
                name, _, rest = line.partition(":")
                sums[name] = sums.get(name, 0) + int(rest.split()[0])
    private = sums.get("Private_Clean", 0) + sums.get("Private_Dirty", 0)
    # Pss counts a page that n processes have as 1/n in each of them.
    return Memory(private, sums.get("Pss", 0) - private)
