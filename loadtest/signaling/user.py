"""The user that Locust spawns, and what happens around a run."""

from __future__ import annotations

import logging
import random
import resource
from typing import Any, ClassVar

import gevent
from locust import User, events, task
from locust.exception import StopUser
from locust.runners import WorkerRunner

from signaling.agent import NOTICE_MAX, Agent
from signaling.connection import Target
from signaling.exchange import Exchange
from signaling.options import Options, add_options, addresses
from signaling.swarm import Swarm

_log = logging.getLogger(__name__)


class SignalingUser(User):
    """Holds some agents and lets one after the other act, with a pause between."""

    swarm: ClassVar[Swarm | None] = None  # of this process and run
    own_addresses: ClassVar[tuple[str, ...]] = ()

    def on_start(self) -> None:
        """Register the agents, one after the other."""
        self._agents: list[Agent] = []
        if self.swarm is None:
            raise StopUser
        self._swarm = self.swarm
        for _ in range(self._swarm.options.agents_per_user):
            agent = Agent(self._swarm)
            self._agents.append(agent)
            agent.enter()

    def on_stop(self) -> None:
        """Say goodbye with all agents."""
        for agent in self._agents:
            agent.leave()
        for agent in self._agents:
            agent.wait_until_gone()

    def wait_time(self) -> float:
        """Think for a while."""
        return self._swarm.options.think_time * random.uniform(0.5, 1.5)  # noqa: S311

    @task
    def act(self) -> None:
        """Exchange, or leave and come back."""
        options = self._swarm.options
        ready = [agent for agent in self._agents if agent.is_ready]
        if not ready:
            return
        agent = random.choice(ready)  # noqa: S311
        if random.random() * 100 >= options.churn_percent:  # noqa: S311
            self._exchange(agent)
        elif random.random() * 100 >= options.resume_percent:  # noqa: S311
            agent.close_and_return()
        else:
            agent.break_and_resume()

    def _exchange(self, agent: Agent) -> None:
        partner = self._swarm.partner(agent)
        if partner is None:
            return
        exchange = Exchange(agent, partner, self._swarm.options.candidates)
        try:
            exchange.begin()
            exchange.finish()
        finally:
            exchange.close()


@events.init_command_line_parser.add_listener
def _add_options(parser: Any) -> None:
    add_options(parser)


@events.init.add_listener
def _prepare(environment: Any, **_: Any) -> None:
    """Refuse wrong options at once, and take all the descriptors that there are: Locust takes 10,000."""
    Options.read(environment.parsed_options)
    if environment.host:
        Target.find(environment.host)
    if isinstance(environment.runner, WorkerRunner):
        # The master's options replace these, but source addresses belong to a machine.
        SignalingUser.own_addresses = addresses(environment.parsed_options.source_addresses)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@events.test_start.add_listener
def _begin(environment: Any, **_: Any) -> None:
    try:
        SignalingUser.swarm = Swarm(environment, SignalingUser.own_addresses)
    except ValueError as error:  # from the web UI
        SignalingUser.swarm = None
        _log.error("%s", error)
        environment.events.request.fire(
            request_type="OPTIONS",
            name="refused",
            response_time=0,
            response_length=0,
            exception=error,
            context={},
        )
        if not isinstance(environment.runner, WorkerRunner):
            gevent.spawn_later(0.1, environment.runner.stop)


@events.test_stop.add_listener
def _end(**_: Any) -> None:
    """Wait for what is not judged yet: the final statistics are sent behind this."""
    if SignalingUser.swarm is not None:
        SignalingUser.swarm.judges.join(NOTICE_MAX + 1)
