"""Child processes: those of a test that share its memory, and those of others."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path


def forked(work: Callable[[], object]) -> int:
    """Run `work` in a child process; return its pid. It must be waited for."""
    with warnings.catch_warnings():
        # Python 3.12 warns of threads that hold locks. The child uses none of what they may hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(1)
    return pid


def children(pid: int) -> list[int]:
    """Return the processes that the main thread of one has started, oldest first."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def process_state(pid: int) -> str:
    """Return the letter of proc(5): "T" is stopped, "Z" has ended and is not waited for."""
    # It follows the name, which may hold spaces and brackets.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def send_signal(pid: int, number: signal.Signals) -> None:
    """Send a signal; after SIGSTOP, wait until every thread stands still: others may go on for a moment."""
    os.kill(pid, number)
    deadline = time.monotonic() + 10
    while number is signal.SIGSTOP and any(
        process_state(int(thread.name)) != "T" for thread in Path(f"/proc/{pid}/task").iterdir()
    ):
        assert time.monotonic() < deadline, f"process {pid} does not stop"
        time.sleep(0.001)
