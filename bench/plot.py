"""Pictures of what bench.swarm saved: `python -m bench.plot`.

Each is written twice, for light and for dark pages, with a transparent background. The same results give the
same bytes, so that a picture in the repository changes only when a figure does.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from bench.swarm import RESULTS

OUTPUT = Path(__file__).parent / "plots"

WIDTH = 7.2  # inches; at 100 dots each it fits a README

Result = dict[str, Any]


@dataclass(frozen=True)
class Theme:
    """Colours that are readable on one kind of page; `series` can be told apart without seeing colours."""

    name: str
    text: str
    faint: str
    series: tuple[str, ...]


# Blue and orange differ in lightness, too, and for most kinds of colour blindness.
LIGHT = Theme("light", "#1f2328", "#d0d7de", ("#0550ae", "#e16f24", "#57606a"))
DARK = Theme("dark", "#e6edf3", "#3d444d", ("#79c0ff", "#f0883e", "#9198a1"))
MARKERS = ("o", "s", "^", "D", "v")
NAMES = {"within": "within a worker", "across": "across workers"}


# --- what is drawn ---------------------------------------------------------------------------------


def read(folder: Path) -> list[Result]:
    """Return all saved results, the fewest agents first."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("swarm-*.json"))]
    return sorted(results, key=lambda result: (result["agents"], result["workers"]))


def _paced(result: Result) -> bool:
    within = result["relay"]["within"]
    return within is not None and within["rate"] > 0


def draw_latency(results: Sequence[Result], theme: Theme) -> Figure | None:
    """Draw the latency distribution of the largest swarm's relay."""
    paced = [result for result in results if _paced(result)]
    if not paced:
        return None
    result = max(paced, key=lambda result: (result["agents"], result["workers"]))
    figure, [axes] = _figure(theme, 1, 3.6)
    for place, name in enumerate(NAMES):
        relay = result["relay"][name]
        if relay is None:
            continue
        points = [(float(percent), value) for percent, value in relay["percentiles_ms"].items()]
        points = sorted(point for point in points if point[0] <= 99.9)
        axes.plot(
            [_nines(percent) for percent, _ in points],
            [value for _, value in points],
            color=theme.series[place],
            linestyle=("-", "--")[place],
            label=f"{NAMES[name]}: p50 {_ms(relay['p50_ms'])}, p99 {_ms(relay['p99_ms'])}",
        )
    ticks = (1, 50, 75, 90, 95, 99, 99.5, 99.9)
    axes.xaxis.set_major_locator(FixedLocator([_nines(percent) for percent in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda _, place: f"{ticks[place]:g}"))
    axes.set_xlim(_nines(1), _nines(99.9))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("percentile of messages, %")
    axes.set_ylabel("latency, ms")
    axes.legend(loc="upper left")
    rate = result["relay"]["within"]["rate"]
    _title(
        figure,
        theme,
        "Latency of a routed message",
        f"{rate:,} messages/s of 600 bytes between {2 * result['relay']['within']['pairs']:,} of "
        f"{result['registered']:,} connected agents, {_workers(result['workers'])}.\n{_machine(result)}",
    )
    return figure


def draw_connections(results: Sequence[Result], theme: Theme) -> Figure | None:
    """Draw private memory and idle CPU against the number of connections."""
    known = [result for result in results if result["private_kib"] and result["idle_cores"] is not None]
    # Runs in a closed loop are short and hold few.
    known = [result for result in known if result["relay"]["within"] is None or _paced(result)]
    series: dict[int, list[Result]] = {}
    for result in known:
        series.setdefault(result["workers"], []).append(result)
    series = {workers: points for workers, points in sorted(series.items()) if len(points) > 1}
    if not series:
        return None
    figure, [top, bottom] = _figure(theme, 2, 5.4)
    for place, (workers, points) in enumerate(series.items()):
        style = {
            "color": theme.series[place % len(theme.series)],
            "marker": MARKERS[place % len(MARKERS)],
            "label": _workers(workers),
        }
        counts = [point["registered"] for point in points]
        top.plot(counts, [point["private_kib"]["held"] / 1024 for point in points], **style)
        bottom.plot(counts, [point["idle_cores"] for point in points], **style)
        largest = points[-1]
        top.annotate(
            f"{largest['private_kib_per_connection']:.1f} KiB per connection",
            (counts[-1], largest["private_kib"]["held"] / 1024),
            (-10, 0),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color=theme.text,
        )
    for axes in (top, bottom):
        axes.set_xlim(0)
        axes.set_ylim(0, 1.2 * axes.dataLim.y1)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    top.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    top.tick_params(labelbottom=False)
    top.set_ylabel("private memory, MiB")
    bottom.set_ylabel("CPU while idle, cores")
    bottom.set_xlabel("connected agents")
    if len(series) > 1:
        top.legend(loc="upper left")
    only = f", {_workers(next(iter(series)))}" if len(series) == 1 else ""
    _title(
        figure,
        theme,
        "What idle agents cost the gateway",
        f"All processes of the gateway{only}; pings on, {known[-1]['capability_bytes']} bytes of "
        f"capabilities each.\n{_machine(known[-1])}",
    )
    return figure


def draw_throughput(results: Sequence[Result], theme: Theme) -> Figure | None:
    """Draw messages per second, and what each costs, against the number of workers."""
    closed = {
        result["workers"]: result
        for result in results
        if result["relay"]["within"] is not None and not _paced(result)
    }
    if not closed:
        return None
    figure, [top, bottom] = _figure(theme, 2, 5.0)
    order = sorted(closed)
    for place, name in enumerate(NAMES):
        shift = (place - 0.5) * 0.38
        for axes, field, scale in ((top, "messages_per_second", 1e3), (bottom, "us_per_message", 1)):
            bars = [
                (position + shift, closed[workers]["relay"][name][field] / scale)
                for position, workers in enumerate(order)
                if closed[workers]["relay"][name] and closed[workers]["relay"][name][field] is not None
            ]
            if not bars:
                continue
            drawn = axes.bar(
                [x for x, _ in bars],
                [height for _, height in bars],
                0.36,
                color=theme.series[place],
                label=NAMES[name],
            )
            axes.bar_label(
                drawn, fmt="{:.0f}" if axes is top else "{:.1f}", padding=2, fontsize=8, color=theme.text
            )
    for axes in (top, bottom):
        axes.xaxis.set_major_locator(FixedLocator(range(len(order))))
        axes.set_xlim(-0.6, len(order) - 0.4)
        axes.margins(y=0.2)
        axes.grid(visible=False, axis="x")
        axes.yaxis.set_major_locator(MaxNLocator(5))
    top.tick_params(labelbottom=False)
    bottom.set_xticklabels([str(workers) for workers in order])
    top.set_ylabel("thousand messages/s")
    bottom.set_ylabel("gateway CPU, µs/message")
    bottom.set_xlabel("workers")
    handles = dict(zip(*reversed(top.get_legend_handles_labels()), strict=True))
    top.legend(handles.values(), handles, loc="upper center", ncols=2, bbox_to_anchor=(0.5, 1.14))
    largest = closed[order[-1]]
    _title(
        figure,
        theme,
        "Throughput against workers",
        f"{largest['relay']['within']['pairs']:,} pairs in a closed loop, one message of 600 bytes a write. "
        f"{_machine(largest)}",
    )
    return figure


PICTURES: dict[str, Callable[[Sequence[Result], Theme], Figure | None]] = {
    "latency": draw_latency,
    "connections": draw_connections,
    "throughput": draw_throughput,
}


# --- how it is drawn -------------------------------------------------------------------------------


def _nines(percent: float) -> float:
    """Return where a percentile stands: 90, 99 and 99.9 are equally far from each other."""
    return -math.log10(1 - percent / 100)


def _ms(value: float) -> str:
    return f"{value:.2f} ms" if value < 10 else f"{value:.0f} ms"


def _workers(count: int) -> str:
    return f"{count} worker{'s' if count != 1 else ''}"


def _machine(result: Result) -> str:
    """Say where it was measured: agents and gateway share the machine, which a reader must know."""
    machine = result["machine"]
    return f"Gateway and agents on one machine: {machine['cpu']}, {machine['cores']} cores."


def _figure(theme: Theme, panels: int, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure((WIDTH, height), layout="constrained")
    figure.patch.set_alpha(0)
    all_axes = list(figure.subplots(panels, 1, squeeze=False)[:, 0])
    for axes in all_axes:
        axes.patch.set_alpha(0)
        axes.grid(color=theme.faint, linewidth=0.7)
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(theme.faint)
        axes.tick_params(which="both", length=0, colors=theme.text)
        axes.xaxis.label.set_color(theme.text)
        axes.yaxis.label.set_color(theme.text)
    return figure, all_axes


def _title(figure: Figure, theme: Theme, title: str, conditions: str) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", color=theme.text)
    figure.supxlabel(conditions, x=0.01, ha="left", fontsize=7.5, color=theme.text, wrap=True)
    for axes in figure.axes:
        if (legend := axes.get_legend()) is not None:
            legend.get_frame().set_alpha(0)
            for text in legend.get_texts():
                text.set_color(theme.text)


def write(results: Sequence[Result], folder: Path, kind: str = "svg") -> list[Path]:
    """Draw every picture that the results have figures for; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    # Without these an SVG has random names and the time in it. Text as paths looks the same everywhere.
    settings = {"svg.hashsalt": "aiconexus", "svg.fonttype": "path", "font.size": 9, "lines.linewidth": 1.8}
    with mpl.rc_context({**settings, "lines.markersize": 4.5, "legend.fontsize": 8.5}):
        for name, draw in PICTURES.items():
            for theme in (LIGHT, DARK):
                figure = draw(results, theme)
                if figure is None:
                    continue
                path = folder / f"{name}-{theme.name}.{kind}"
                metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
                figure.savefig(path, metadata=metadata, dpi=200)
                written.append(path)
    return written


def main(
    *,
    results: Annotated[Path, typer.Option(help="Folder of saved results.")] = RESULTS,
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = OUTPUT,
    kind: Annotated[str, typer.Option("--format", help="svg or png.")] = "svg",
) -> None:
    """Draw latency, memory, CPU and throughput from what bench.swarm saved."""
    if kind not in ("svg", "png"):
        raise typer.BadParameter(f"--format is svg or png, not {kind}")
    written = write(read(results), output, kind)
    if not written:
        print(
            f"bench.plot: nothing to draw in {results}: run bench.swarm with --save or --sweep",
            file=sys.stderr,
        )
        raise typer.Exit(1)
    for path in written:
        print(path)


if __name__ == "__main__":
    typer.run(main)
