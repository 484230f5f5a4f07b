from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from switchboard import Switchboard, Workshop


@pytest.fixture
def switchboard() -> Switchboard:
    return Switchboard()


@pytest.fixture
async def pair(switchboard: Switchboard) -> AsyncIterator[tuple[Workshop, Workshop]]:
    """Two agents that can reach each other; the first has the lower DID."""
    async with Workshop(switchboard) as one, Workshop(switchboard) as two:
        yield (one, two) if one.did < two.did else (two, one)
