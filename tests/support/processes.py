"""Child processes of a test that share its memory."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable


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
