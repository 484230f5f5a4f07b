"""Measurements of interleaved rounds to medians, a table, JSON and a section of RESULTS.md."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

RESULTS = Path(__file__).parent / "RESULTS.md"
BASELINE = "floor"

_TIE = 1.3  # the same binary varies by more than that on a shared machine
_SATURATED = 0.9  # a server that is less busy in a closed loop waited for something else than itself


@dataclass(frozen=True)
class Figures:
    """One run of one mode against one server."""

    us_per_message: float  # CPU time of the server
    messages_per_second: float
    p50_ms: float
    p99_ms: float
    server_busy: float  # share of the elapsed time that its CPU time makes up; over 1: several cores
    client_busy: float


@dataclass(frozen=True)
class Spread:
    """Median, least and largest of the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarize the values of all rounds."""
        return cls(median(values), min(values), max(values))

    def text(self, digits: int) -> str:
        """Write median and range, as in `9.1 (8.8-9.9)`."""
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f}-{self.high:,.{digits}f})"


class Comparison:
    """All rounds of one mode: for each server its figures, in the order of the rounds."""

    def __init__(self, title: str, *, closed_loop: bool) -> None:
        self.title = title
        self.closed_loop = closed_loop
        self.rounds: dict[str, list[Figures]] = {}

    def add(self, server: str, figures: Figures) -> None:
        """Note the next round of a server."""
        self.rounds.setdefault(server, []).append(figures)

    def spread(self, server: str, field: str) -> Spread:
        """Summarize one field of `Figures`."""
        return Spread.of([getattr(figures, field) for figures in self.rounds[server]])

    def ratio(self, server: str, to: str = BASELINE) -> Spread:
        """Summarize CPU time per message as a multiple of that of `to` in the same round."""
        pairs = zip(self.rounds[server], self.rounds[to], strict=True)
        return Spread.of([ours.us_per_message / theirs.us_per_message for ours, theirs in pairs])

    def has_idled(self, server: str) -> bool:
        """Tell whether a closed loop did not find the server's limit."""
        return self.closed_loop and self.spread(server, "server_busy").median < _SATURATED

    def medians(self, server: str, subject: str) -> dict[str, Any]:
        """Return the medians of a server for JSON, with the range of CPU time and its ratio to others."""
        figures: dict[str, Any] = {
            field: round(self.spread(server, field).median, 4) for field in Figures.__dataclass_fields__
        }
        cpu = self.spread(server, "us_per_message")
        figures["us_per_message_range"] = [round(cpu.low, 4), round(cpu.high, 4)]
        for other in (BASELINE, subject):
            if server != other:
                ratio = self.ratio(server, other)
                figures[f"ratio_to_{other}"] = round(ratio.median, 4)
                figures[f"ratio_to_{other}_range"] = [round(ratio.low, 4), round(ratio.high, 4)]
        return figures

    def row(self, server: str, subject: str) -> list[str]:
        """Return the cells of a server under `columns`."""
        return [
            server,
            self.spread(server, "us_per_message").text(1),
            *("1" if server == other else self.ratio(server, other).text(2) for other in (BASELINE, subject)),
            f"{self.spread(server, 'messages_per_second').median:,.0f}",
            f"{self.spread(server, 'p50_ms').median:.2f}",
            f"{self.spread(server, 'p99_ms').median:.2f}",
            f"{self.spread(server, 'server_busy').median:.0%}{'*' if self.has_idled(server) else ''}, "
            f"{self.spread(server, 'client_busy').median:.0%}",
        ]

    def note(self) -> str:
        """Say what the asterisks mean, if there are any."""
        if not any(self.has_idled(server) for server in self.rounds):
            return ""
        return (
            f"* Below {_SATURATED:.0%}: it waited, for the client or for a core that others used too. "
            "Its messages/s are not its limit; its CPU time per message holds."
        )


def columns(subject: str) -> list[str]:
    """Return the head of a table."""
    ratios = [f"ratio to {other}" for other in (BASELINE, subject)]
    return ["server", "CPU µs/message", *ratios, "messages/s", "p50 ms", "p99 ms", "busy"]


TABLE_WIDTH = 130  # characters


def table(comparison: Comparison, subject: str) -> Table:
    """Draw one mode."""
    drawn = Table(title=comparison.title, title_justify="left", box=SIMPLE_HEAD)
    for index, column in enumerate(columns(subject)):
        drawn.add_column(column, justify="right" if index else "left", no_wrap=True)
    for server in comparison.rounds:
        drawn.add_row(*comparison.row(server, subject))
    return drawn


def markdown(
    comparisons: Sequence[Comparison],
    subject: str,
    *,
    machine: dict[str, str | int],
    versions: dict[str, str],
    conditions: str,
    differences: dict[str, str],
) -> str:
    """Write all modes for RESULTS.md; `differences` has for each server what it does and does not do."""
    lines = [
        f"{datetime.now(timezone.utc):%Y-%m-%d}, {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, Linux {machine['kernel']}, TCP {machine['congestion_control']}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
        "",
        f"{conditions} Medians, in parentheses the range over the rounds. A ratio is the median of the "
        f"rounds' ratios; below {_TIE} it is a tie. Busy: server, client.",
    ]
    for comparison in comparisons:
        head = columns(subject)
        lines += ["", f"**{comparison.title}**", ""]
        lines.append("| " + " | ".join(head) + " |")
        lines.append("|---" + "|---:" * (len(head) - 1) + "|")
        lines += ["| " + " | ".join(comparison.row(server, subject)) + " |" for server in comparison.rounds]
        if note := comparison.note():
            lines += ["", note.replace("*", "\\*", 1)]
    lines += [
        "",
        "**What is not like for like**",
        "",
        "The same signed OFFER of 600 bytes goes through all of them, each sent in a WebSocket frame of its "
        "own, without TLS and compression, by the same client. They do not do the same for it:",
        "",
        *(f"- **{server}**: {difference}" for server, difference in differences.items()),
        "",
        "Every server has the one core for all its threads and children, and all their CPU time counts. The "
        "others wait on that core meanwhile; their timers take a little of it. In a closed loop latencies "
        "grow with the time that a message takes: compare those of the open loop.",
    ]
    return "\n".join(lines)


def write_section(name: str, text: str, path: Path = RESULTS) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->`, or append it with its marks."""
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    section = f"{opening}\n{text}\n{closing}"
    before = path.read_text() if path.exists() else "# Results\n"
    marked = re.compile(f"{re.escape(opening)}.*?{re.escape(closing)}", re.DOTALL)
    if marked.search(before):
        after = marked.sub(lambda _: section, before, count=1)
    else:
        after = f"{before.rstrip()}\n\n## {name.capitalize()}\n\n{section}\n"
    path.write_text(after)
