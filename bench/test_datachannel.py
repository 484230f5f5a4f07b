"""The benchmark of the data plane measures: `python -m pytest bench/test_datachannel.py`."""

from __future__ import annotations

import pytest

from bench import datachannel


@pytest.mark.parametrize("kind", datachannel.KINDS)
def test_stream_and_round_trips_are_measured(kind: str) -> None:
    figures = datachannel.run(kind, 1)
    assert figures.mb_per_second > 0
    assert figures.round_trip_ms > 0
    is_ours = kind == "aiconexus"
    assert (figures.execute_ms > figures.signatures_ms > 0) is is_ours


def test_ratios_are_those_of_the_same_rounds() -> None:
    rounds = {
        "aiortc": [datachannel.Figures(5.0, 1.0, 0.0, 0.0, 1.0, 2.0)] * 3,
        "aiconexus": [datachannel.Figures(4.0, 1.1, 1.3, 0.2, 1.5, 2.5)] * 3,
    }
    table = datachannel.rows(rounds)
    assert all(len(row) == len(datachannel.COLUMNS) for row in table)
    assert [row[3].partition(" ")[0] for row in table] == ["0.80", "1.10", "1.30", "0.20", "", ""]
    assert [row[1].partition(" ")[0] for row in table] == ["5.0", "1.00", "", "", "1.0", "2.0"]
    assert [row[2].partition(" ")[0] for row in table] == ["4.0", "1.10", "1.30", "0.20", "1.5", "2.5"]
