"""A network namespace that has nothing but loopback.

Browsers, and WebRTC peers other than ours, offer every address of the machine. In here there is one, so
nothing that they send leaves it.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLONE_NEWNET = 0x40000000  # linux/sched.h


class NoNamespaceError(Exception):
    """No network namespace can be made."""


@contextmanager
def loopback_only() -> Iterator[None]:
    """Move this thread, and every thread and process that it starts from now on, to a namespace of its own.

    Raises:
        NoNamespaceError: That is not allowed, or not possible here.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    before = Path(f"/proc/self/task/{threading.get_native_id()}/ns/net").open("rb")  # noqa: SIM115 -- closed below
    try:
        try:
            entered = libc.unshare(CLONE_NEWNET)
        except AttributeError:
            raise NoNamespaceError("network namespaces are a thing of Linux") from None
        if entered != 0:
            text = os.strerror(ctypes.get_errno())
            raise NoNamespaceError(
                f"no network namespace can be made ({text}); run the tests as root"
            ) from None
        try:
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            yield
        finally:
            libc.setns(before.fileno(), CLONE_NEWNET)
    finally:
        before.close()
