"""All agents of one Locust process."""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING, Any

from gevent.pool import Group

from signaling.connection import Target
from signaling.ledger import Ledger
from signaling.options import Options
from signaling.statistics import Statistics

if TYPE_CHECKING:
    from signaling.agent import Agent


class Swarm:
    """Knows who can be talked to. Agents of other processes are strangers: their ids could not be checked.

    Attributes:
        judges: Greenlets that find out whether an ERROR had to be.
        drained_at: When the gateway last sent an agent away, by the monotonic clock.
    """

    def __init__(self, environment: Any, own_addresses: tuple[str, ...] = ()) -> None:
        """Read the options.

        Args:
            environment: Locust's.
            own_addresses: Source addresses set for this process; they win over those of Locust's master.

        Raises:
            ValueError: One of them is wrong. The text is for the user.
        """
        self.options = Options.read(environment.parsed_options)
        self.target = Target.find(environment.host)
        self.statistics = Statistics(environment)
        self.ledger = Ledger()
        self.agents: dict[str, Agent] = {}
        self.judges = Group()
        self.drained_at = float("-inf")
        self._present: list[Agent] = []
        self._places: dict[Agent, int] = {}
        sources: list[str | None] = [*(own_addresses or self.options.source_addresses)] or [None]
        # Processes start at different addresses.
        random.shuffle(sources)
        self._sources = itertools.cycle(sources)

    def next_source(self) -> str | None:
        """Choose the address for the next connection."""
        return next(self._sources)

    def add(self, agent: Agent) -> None:
        """Let others choose `agent` as their partner."""
        self._places[agent] = len(self._present)
        self._present.append(agent)

    def remove(self, agent: Agent) -> None:
        """Keep others from choosing `agent`, if they could."""
        place = self._places.pop(agent, None)
        if place is None:
            return
        last = self._present.pop()
        if last is not agent:
            self._present[place] = last
            self._places[last] = place

    def partner(self, agent: Agent) -> Agent | None:
        """Choose somebody else at random; nobody if `agent` is alone."""
        others = len(self._present) - (agent in self._places)
        if others < 1:
            return None
        while True:
            chosen = random.choice(self._present)  # noqa: S311
            if chosen is not agent:
                return chosen
