"""The directory of one worker: who can do what is asked for, page by page."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiconexus.protocol import Capability, DiscoverPayload
from gateway import directory
from gateway.directory import Directory, Offer, Query


class Agents:
    """Some agents, and the directory that they are listed in."""

    def __init__(self) -> None:
        self.offers: dict[str, tuple[Offer, ...]] = {}
        self.directory = Directory(self.offers.__getitem__)

    def put(self, did: str, *capabilities: Capability) -> None:
        offers = tuple(Offer.of(capability) for capability in capabilities)
        before = self.offers.get(did)
        if before is None:
            self.offers[did] = self.directory.put(did, offers)
        else:
            self.offers[did] = self.directory.replace(did, before, offers)

    def remove(self, did: str) -> None:
        self.directory.remove(did, self.offers.pop(did))

    def find(
        self, limit: int = 1_000, cursor: str = "", *, meanwhile: Callable[[], object] = int, **query: object
    ) -> list[str]:
        """Search; call `meanwhile` whenever others may have their turn."""
        search = self.directory.search(Query.of(DiscoverPayload(**query)), cursor, limit)
        while True:
            try:
                next(search)
            except StopIteration as found:
                return found.value
            meanwhile()


@pytest.fixture(params=["look up", "probe", "probe and look up"], autouse=True)
def plan(request, monkeypatch):
    """Make a few agents be enough for each way of searching."""
    monkeypatch.setattr(directory, "STEP", 2)
    size = {"look up": 0, "probe": 1_000, "probe and look up": 4}[request.param]
    monkeypatch.setattr(directory, "probe_size", lambda offers: size)


ADD = Capability(name="add", description="Adds Numbers.", tags=["math", "fast"])
SUB = Capability(name="sub", description="Takes one from another.", tags=["math"])
SLOW_ADD = Capability(name="add", description="Adds slowly.", tags=["math"])


def filled() -> Agents:
    agents = Agents()
    for number, capabilities in enumerate([(ADD,), (SUB,), (SLOW_ADD, SUB), (), (ADD, SUB)]):
        agents.put(f"did-{number}", *capabilities)
    return agents


def test_agents_are_found_by_each_condition():
    agents = filled()
    assert agents.find() == [f"did-{number}" for number in range(5)]
    assert agents.find(capability="add") == ["did-0", "did-2", "did-4"]
    assert agents.find(tag="fast") == ["did-0", "did-4"]
    assert agents.find(text="NUMBERS") == ["did-0", "did-4"]
    assert agents.find(text="su") == ["did-1", "did-2", "did-4"]
    assert agents.find(text="nothing") == []


def test_all_conditions_hold_for_one_capability():
    agents = filled()
    assert agents.find(capability="add", tag="fast") == ["did-0", "did-4"]
    assert agents.find(capability="add", text="slow") == ["did-2"]
    assert agents.find(capability="sub", tag="fast") == [], "the tag is that of another capability"


def test_an_agent_that_has_gone_or_changed_is_not_found_by_what_it_was():
    agents = Agents()
    agents.put("did-0", ADD, SUB)
    agents.put("did-1", ADD)
    agents.put("did-0", SUB)
    assert agents.find(capability="add") == ["did-1"]
    assert agents.find(capability="sub") == ["did-0"]
    agents.remove("did-1")
    assert agents.find(capability="add") == agents.find(tag="fast") == []
    assert len(agents.directory) == 1


def test_agents_that_offer_the_same_share_it():
    agents = filled()
    assert agents.offers["did-0"][0] is agents.offers["did-4"][0]


def test_an_agent_that_registers_again_is_listed_once():
    agents = filled()
    agents.put("did-0", ADD)
    assert agents.find() == [f"did-{number}" for number in range(5)]
    agents.remove("did-0")
    assert agents.find(text="a") == ["did-1", "did-2", "did-4"]


def test_an_agent_that_resumes_during_a_search_is_found():
    agents = Agents()
    cards = {f"did-{number:02}": Capability(name=f"c{number}") for number in range(20)}
    for did, card in cards.items():
        agents.put(did, card)
    turns = []

    def resume_all():
        turns.append(1)
        for did, card in cards.items():
            agents.put(did, card)

    assert agents.find(text="c", meanwhile=resume_all) == sorted(cards)
    assert turns, "others have had their turn"


CAPABILITIES = st.builds(
    Capability,
    name=st.sampled_from(["add", "sub", "mul"]),
    description=st.sampled_from(["", "Of two.", "Of many."]),
    tags=st.lists(st.sampled_from(["math", "fast"]), max_size=2),
)
QUERIES = st.fixed_dictionaries(
    {},
    optional={
        "capability": st.sampled_from(["add", "sub"]),
        "tag": st.sampled_from(["math", "fast"]),
        "text": st.sampled_from(["OF", "many", "u"]),
    },
)


@settings(max_examples=300, deadline=None)
@given(
    cards=st.lists(st.lists(CAPABILITIES, max_size=3), max_size=30), query=QUERIES, limit=st.integers(1, 40)
)
def test_a_search_finds_what_looking_at_every_agent_finds(cards, query, limit):
    agents = Agents()
    for number, card in enumerate(cards):
        agents.put(f"did-{number * 7 % 30:02}", *card)
    wanted = Query.of(DiscoverPayload(**query))
    fitting = sorted(did for did, offers in agents.offers.items() if wanted.matches(did, offers))
    assert agents.find(limit, **query) == fitting[:limit]
    assert agents.find(limit, "did-10", **query) == [did for did in fitting if did > "did-10"][:limit]


@settings(max_examples=200, deadline=None)
@given(
    lasting=st.sets(st.integers(0, 99), min_size=1),
    changes=st.lists(st.tuples(st.booleans(), st.integers(100, 199)), max_size=60),
    limit=st.integers(1, 7),
    query=st.sampled_from([{}, {"capability": "add"}, {"tag": "math"}, {"text": "numbers"}]),
)
def test_paging_finds_who_stays_exactly_once_while_others_come_and_go(lasting, changes, limit, query):
    agents = Agents()
    names = {number: f"did-{number * 7919 % 200:03}" for number in range(200)}  # in between each other
    for number in lasting:
        agents.put(names[number], ADD)
    waiting = iter(changes)

    def change() -> None:
        comes, number = next(waiting, (False, -1))
        if comes:
            agents.put(names[number], ADD)
        elif names.get(number) in agents.offers:
            agents.remove(names[number])

    found: list[str] = []
    cursor = ""
    while True:
        page = agents.find(limit, cursor, meanwhile=change, **query)
        found.extend(page)
        if len(page) < limit:
            break
        cursor = page[-1]
        change()
    assert found == sorted(set(found))
    assert {names[number] for number in lasting} <= set(found)
