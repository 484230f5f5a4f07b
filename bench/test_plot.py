"""The pictures: `python -m pytest bench/test_plot.py`."""

from __future__ import annotations

import pytest

from bench.swarm import save

plot = pytest.importorskip("bench.plot")  # it needs matplotlib


def relay(rate):
    percentiles = {"1": 0.1, "50": 0.2, "99": 3.0, "99.9": 9.0}
    figures = {
        "pairs": 10,
        "messages_per_second": 900.0,
        "us_per_message": 9.0,
        "percentiles_ms": percentiles,
    }
    return {**figures, "rate": rate, "p50_ms": 0.2, "p99_ms": 3.0}


def result(agents, workers, rate):
    return {
        "machine": {"cpu": "a processor", "cores": 2},
        "workers": workers,
        "agents": agents,
        "registered": agents,
        "capability_bytes": 100,
        "private_kib": {"before": 10_000, "connected": 10_000 + 6 * agents, "held": 10_000 + 6 * agents},
        "private_kib_per_connection": 6.0,
        "idle_cores": agents / 1e6,
        "relay": {"within": relay(rate), "across": relay(rate) if workers > 1 else None},
    }


@pytest.fixture
def results(tmp_path):
    for agents in (1000, 5000):
        save(result(agents, 2, 20_000), tmp_path)
    for workers in (1, 2):
        save(result(100, workers, 0), tmp_path)
    return plot.read(tmp_path)


def test_saved_results_come_back_in_order(results):
    assert [each["agents"] for each in results] == [100, 100, 1000, 5000]


def test_every_picture_is_drawn_for_light_and_for_dark_pages(results, tmp_path):
    names = [path.name for path in plot.write(results, tmp_path)]
    assert names == [f"{name}-{theme}.svg" for name in plot.PICTURES for theme in ("light", "dark")]


def test_the_same_results_give_the_same_bytes(results, tmp_path):
    first = [path.read_bytes() for path in plot.write(results, tmp_path / "first")]
    assert first == [path.read_bytes() for path in plot.write(results, tmp_path / "second")]


def test_a_picture_without_figures_is_left_out(results, tmp_path):
    # One number of agents is no line; without a process there are no figures of memory and CPU.
    some = [result(1000, 2, 20_000), {**result(5000, 2, 20_000), "private_kib": {}, "idle_cores": None}]
    names = [path.name for path in plot.write(some, tmp_path)]
    assert names == ["latency-light.svg", "latency-dark.svg"]
    assert plot.write([], tmp_path) == []
