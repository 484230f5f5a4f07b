"""The directory of one worker: who can do what is asked for, page by page."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from aiconexus.protocol import Capability, DiscoverPayload
from gateway.directory import SLICE, Directory, Offer, Query


def offers(*capabilities: Capability) -> tuple[Offer, ...]:
    return tuple(Offer.of(capability) for capability in capabilities)


def find(directory: Directory, limit: int = 1_000, cursor: str = "", **query: object) -> list[str]:
    search = directory.search(Query.of(DiscoverPayload(**query)), cursor, limit)
    while True:
        try:
            next(search)
        except StopIteration as found:
            return found.value


ADD = Capability(name="add", description="Adds Numbers.", tags=["math", "fast"])
SUB = Capability(name="sub", description="Takes one from another.", tags=["math"])
SLOW_ADD = Capability(name="add", description="Adds slowly.", tags=["math"])


def filled() -> Directory:
    directory = Directory()
    for number, capabilities in enumerate([(ADD,), (SUB,), (SLOW_ADD, SUB), (), (ADD, SUB)]):
        directory.put(f"did-{number}", offers(*capabilities))
    return directory


def test_agents_are_found_by_each_condition():
    directory = filled()
    assert find(directory) == [f"did-{number}" for number in range(5)]
    assert find(directory, capability="add") == ["did-0", "did-2", "did-4"]
    assert find(directory, tag="fast") == ["did-0", "did-4"]
    assert find(directory, text="NUMBERS") == ["did-0", "did-4"]
    assert find(directory, text="su") == ["did-1", "did-2", "did-4"]
    assert find(directory, text="nothing") == []


def test_all_conditions_hold_for_one_capability():
    directory = filled()
    assert find(directory, capability="add", tag="fast") == ["did-0", "did-4"]
    assert find(directory, capability="add", text="slow") == ["did-2"]
    assert find(directory, capability="sub", tag="fast") == [], "the tag is that of another capability"


def test_an_agent_that_has_gone_or_changed_is_not_found_by_what_it_was():
    directory = Directory()
    first = directory.put("did-0", offers(ADD, SUB))
    second = directory.put("did-1", offers(ADD))
    directory.remove("did-0", first)
    directory.put("did-0", offers(SUB))
    assert find(directory, capability="add") == ["did-1"]
    assert find(directory, capability="sub") == ["did-0"]
    directory.remove("did-1", second)
    assert find(directory, capability="add") == find(directory, tag="fast") == []
    assert len(directory) == 1


def test_agents_that_offer_the_same_share_it():
    directory = Directory()
    first = directory.put("did-0", offers(ADD))
    second = directory.put("did-1", offers(ADD))
    assert first[0] is second[0]


def test_a_long_search_lets_others_have_their_turn():
    directory = Directory()
    for number in range(3 * SLICE):
        directory.put(f"did-{number:05}", offers(Capability(name=f"c{number}")))
    assert len(list(directory.search(Query(text="c1"), "", 10))) >= 2
    assert find(directory, 10, text="c1") == [f"did-{number:05}" for number in [1, *range(10, 19)]]
    assert len(find(directory, limit=10_000, text="c")) == 3 * SLICE


@settings(max_examples=200, deadline=None)
@given(
    lasting=st.sets(st.integers(0, 99), min_size=1),
    changes=st.lists(st.tuples(st.booleans(), st.integers(100, 199)), max_size=60),
    limit=st.integers(1, 7),
    query=st.sampled_from([{}, {"capability": "add"}, {"tag": "math"}, {"text": "numbers"}]),
)
def test_paging_finds_who_stays_exactly_once_while_others_come_and_go(lasting, changes, limit, query):
    directory = Directory()
    present = {}
    names = {number: f"did-{number * 7919 % 200:03}" for number in range(200)}  # in between each other
    for number in lasting:
        directory.put(names[number], offers(ADD))
    found: list[str] = []
    cursor, waiting = "", iter(changes)
    while True:
        page = find(directory, limit, cursor, **query)
        found.extend(page)
        if len(page) < limit:
            break
        cursor = page[-1]
        for comes, number in [change for change in [next(waiting, None)] if change is not None]:
            if comes and number not in present:
                present[number] = directory.put(names[number], offers(ADD))
            elif not comes and number in present:
                directory.remove(names[number], present.pop(number))
    assert found == sorted(set(found))
    assert {names[number] for number in lasting} <= set(found)
