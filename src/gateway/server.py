"""The command `aiconexus-gateway`, also `python -m gateway.server`: can be stopped before it has loaded."""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Entry point of the console script."""
    # To load takes most of a second. Until the supervisor has its own handlers there is nobody to send away.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
    from gateway.cli import app

    app(prog_name="aiconexus-gateway")


if __name__ == "__main__":
    main()
