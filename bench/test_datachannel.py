"""The benchmark of the data plane measures: `python -m pytest bench/test_datachannel.py`."""

from __future__ import annotations

import pytest

from bench import datachannel


@pytest.mark.parametrize("kind", datachannel.KINDS)
def test_stream_and_round_trips_are_measured(kind: str) -> None:
    figures = datachannel.run(kind, 1)
    assert figures.mb_per_second > 0
    assert figures.round_trip_ms > 0
    assert (figures.execute_ms > 0) is (kind == "aiconexus")


def test_ratios_are_those_of_the_same_rounds() -> None:
    rounds = {
        "aiortc": [datachannel.Figures(5.0, 1.0, 0.0, 0.0, 0.0)] * 3,
        "aiconexus": [datachannel.Figures(4.0, 1.1, 1.3, 0.0, 0.0)] * 3,
    }
    bare, ours = datachannel.rows(rounds)
    assert len(bare) == len(ours) == len(datachannel.COLUMNS)
    assert ours[2].startswith("0.80")
    assert ours[4].startswith("1.10")
    assert ours[6].startswith("1.30")
