"""What can be set: on the command line, in the environment and in the web UI."""

from __future__ import annotations

import argparse
import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ADDRESSES_MAX = 65_536  # of one range; more is a slip of the pen


@dataclass(frozen=True)
class Options:
    """The options of one run.

    Attributes:
        agents_per_user: Registered agents that one user holds.
        think_time: Seconds between two actions of a user, on average.
        churn_percent: Share of actions in which an agent leaves and comes back; the others are exchanges.
        resume_percent: Share of those in which its connection breaks and the session is resumed.
        candidates: ICE candidates that each side of an exchange sends before its end-of-candidates.
        source_addresses: Local addresses to dial from, in turn; any if empty.
    """

    agents_per_user: int
    think_time: float
    churn_percent: float
    resume_percent: float
    candidates: int
    source_addresses: tuple[str, ...]

    @classmethod
    def read(cls, parsed: argparse.Namespace) -> Options:
        """Check what Locust has parsed; from the web UI anything may come.

        Raises:
            ValueError: An option is out of its range. The text is for the user.
        """
        return cls(
            agents_per_user=int(_within(parsed, "agents_per_user", 1, 100_000)),
            think_time=_within(parsed, "think_time", 0, 86_400),
            churn_percent=_within(parsed, "churn_percent", 0, 100),
            resume_percent=_within(parsed, "resume_percent", 0, 100),
            candidates=int(_within(parsed, "candidates", 0, 50)),
            source_addresses=addresses(parsed.source_addresses),
        )


def _within(parsed: argparse.Namespace, name: str, least: float, most: float) -> float:
    value = float(getattr(parsed, name))
    if not least <= value <= most:
        raise ValueError(f"{name.replace('_', ' ')} must be between {least} and {most}, not {value:g}")
    return value


def addresses(text: str) -> tuple[str, ...]:
    """Read a list such as `127.0.0.2-127.0.0.5,127.0.1.1`.

    Raises:
        ValueError: It is not one.
    """
    found: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, _, last = part.partition("-")
        begin = ipaddress.ip_address(first.strip())
        end = ipaddress.ip_address(last.strip()) if last else begin
        count = int(end) - int(begin) + 1
        if end.version != begin.version or not 1 <= count <= ADDRESSES_MAX:
            raise ValueError(f"{part} is no range of addresses")
        found += [str(begin + offset) for offset in range(count)]
    return tuple(found)


def add_options(parser: Any) -> None:
    """Add the options to Locust's parser; its web UI shows them all."""

    # Not as a group: the web UI would not know them.
    def add(name: str, default: object, type: Callable[[str], Any], help: str) -> None:  # noqa: A002
        parser.add_argument(
            f"--{name}",
            default=default,
            type=type,
            metavar=f"<{type.__name__}>",
            env_var=f"LOADTEST_{name.upper().replace('-', '_')}",
            help=help,
        )

    add("agents-per-user", 2, int, "Registered agents that one user holds")
    add("think-time", 5.0, float, "Seconds between two actions of a user: on average, +-50%%")
    add("churn-percent", 10.0, float, "Actions in which an agent leaves and comes back; the others exchange")
    add("resume-percent", 50.0, float, "Of those, how many break the connection and resume the session")
    add("candidates", 3, int, "ICE candidates of each side of an exchange")
    add(
        "source-addresses",
        "",
        str,
        "Local addresses to dial from, in turn, such as 127.0.0.2-127.0.0.5; empty for any",
    )
