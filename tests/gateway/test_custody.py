"""Who answers for what waits at another node: the notes of two workers, with a stand-in for their streams."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import orjson
import pytest
from offer_bytes import A, B, message, name

from gateway._ledger import LEDGER_RECORDS, Ledger
from gateway._mesh import NODE_WORKERS
from gateway.custody import ANSWERS_PER_TICK, NOTED_MAX, Custody
from gateway.kinds import ACCOUNT, FREED, HELLO, KEPT


def lost(*numbers: int) -> list[tuple[str, str, str]]:
    return [(A, B, name(number)) for number in numbers]


class FakeRouter:
    """What Custody uses of a router: it says things, to those that can be reached."""

    def __init__(self, life: int) -> None:
        self.life = life
        self.said: deque[tuple[int, int, bytes]] = deque()
        self.links: set[int] = set()
        self.known: dict[int, int] = {}
        self.is_full = False

    def account(self, link: int, kind: int, data: bytes) -> bool:
        if link not in self.links or self.is_full:
            return False
        self.said.append((link, kind, data))
        return True

    def know(self, link: int, source: int) -> None:
        self.known[link] = source

    def linked_workers(self) -> list[int]:
        return list(self.links)


@dataclass
class Worker:
    """The only worker of a node; it is also what Custody uses of a cluster."""

    node: int
    instance: str
    life: int = 1
    others: dict[int, str] = field(default_factory=dict)
    answered: list[tuple[str, str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ledger = Ledger(1)
        self.ledger.begin(0, 0)
        self.router = FakeRouter(self.life)
        self.custody = Custody(self.instance, self.router, self.ledger, self, self.answer)

    @property
    def number(self) -> int:
        return self.node * NODE_WORKERS

    def answer(self, *message: str) -> None:
        self.answered.append(message)

    def instance_of(self, number: int) -> str | None:
        return self.others.get(number)

    def reach(self, link: int) -> bool:
        if link not in self.router.links:
            self.router.links.add(link)
            self.custody.on_stream(link, True)
        return True

    def begin_anew(self, link: int) -> None:
        self.router.is_full = False
        self.router.said = deque(item for item in self.router.said if item[0] != link)
        self.custody.on_stream(link, False)

    def keep(self, other: Worker, *numbers: int) -> list[int]:
        """Let messages wait here that came from another."""
        self.ledger.source = self.router.known[other.number]
        places = [self.ledger.add(message(number)) for number in numbers]
        self.ledger.source = 0
        self.custody.on_news(*self.ledger.take_news(True))
        return places

    def free(self, *places: int) -> None:
        for place in places:
            self.ledger.strike(place)
        self.custody.on_news(*self.ledger.take_news(True))
        self.ledger.settle()

    def tick(self) -> None:
        self.custody.answer_some()


def talk(*workers: Worker) -> None:
    """Let all hear what they say to each other, until they have nothing more to say."""
    by_number = {worker.number: worker for worker in workers}
    while any(worker.router.said for worker in workers):
        for worker in workers:
            while worker.router.said:
                link, kind, data = worker.router.said.popleft()
                if link in by_number:
                    by_number[link].reach(worker.number)
                    by_number[link].custody.on_record(worker.number, kind, data)


def alive(*workers: Worker) -> dict[str, int]:
    return {worker.instance: worker.node for worker in workers}


@pytest.fixture
def pair() -> tuple[Worker, Worker]:
    """A worker whose agents send, and one that keeps what they have sent."""
    sender, keeper = Worker(1, "one"), Worker(2, "two")
    sender.reach(keeper.number)
    talk(sender, keeper)
    return sender, keeper


def test_what_waits_elsewhere_is_noted_until_it_does_no_longer(pair):
    sender, keeper = pair
    places = keeper.keep(sender, 1, 2, 3)
    talk(*pair)
    assert len(sender.custody) == 3
    keeper.free(places[1])
    talk(*pair)
    assert len(sender.custody) == 2
    keeper.free(places[0], places[2])
    talk(*pair)
    assert len(sender.custody) == len(keeper.custody) == 0
    sender.custody.look_after({}, True)
    sender.custody.look_after({}, True)
    sender.tick()
    assert sender.answered == []


def test_senders_are_told_once_when_a_node_is_gone(pair):
    sender, keeper = pair
    keeper.keep(sender, 1, 2)
    talk(*pair)
    sender.custody.look_after(alive(keeper), True)
    sender.custody.look_after({}, False)  # just back from Redis: perhaps the other is not yet
    sender.tick()
    assert (sender.answered, len(sender.custody)) == ([], 2)
    for _ in range(3):
        sender.custody.look_after({}, True)
        sender.tick()
    assert sorted(sender.answered) == lost(1, 2)
    assert len(sender.custody) == 0


def test_a_node_that_was_heard_before_it_was_met_is_not_gone(pair):
    sender, keeper = pair
    keeper.keep(sender, 1)
    talk(*pair)
    sender.custody.look_after({}, True)
    sender.custody.look_after(alive(keeper), True)
    sender.tick()
    assert (sender.answered, len(sender.custody)) == ([], 1)


def test_senders_are_told_when_the_next_process_says_hello_and_it_does_when_it_is_asked(pair):
    sender, keeper = pair
    keeper.keep(sender, 1)
    talk(*pair)
    new = Worker(2, "two", life=9)
    sender.custody.look_after(alive(keeper), True)
    talk(sender, new)
    sender.tick()
    assert sender.answered == lost(1)
    sender.begin_anew(new.number)  # for what it said to the last one is not followed
    talk(sender, new)
    new.keep(sender, 2)
    talk(sender, new)
    assert len(sender.custody) == 1


def test_nobody_is_asked_who_keeps_nothing(pair):
    sender, keeper = pair
    sender.custody.look_after(alive(keeper), True)
    assert not sender.router.said


def test_a_stream_that_begins_anew_tells_all_there_is(pair):
    """What was told with the last one may not have arrived."""
    sender, keeper = pair
    places = keeper.keep(sender, 1, 2)
    talk(*pair)
    keeper.free(places[0])
    keeper.keep(sender, 3)
    keeper.router.said.clear()
    assert len(sender.custody) == 2
    keeper.begin_anew(sender.number)
    talk(*pair)
    sender.custody.look_after({}, True)
    sender.custody.look_after({}, True)
    sender.tick()
    assert sorted(sender.answered) == lost(2, 3)


def test_a_full_stream_begins_anew_before_anything_is_untold(pair):
    sender, keeper = pair
    keeper.router.is_full = True
    keeper.keep(sender, 1)
    assert [kind for _, kind, _ in keeper.router.said] == [HELLO, ACCOUNT, KEPT]
    talk(*pair)
    assert len(sender.custody) == 1


def test_what_waits_while_there_is_no_stream_is_told_with_the_next(pair):
    sender, keeper = pair
    keeper.router.links.clear()  # Redis is lost
    places = keeper.keep(sender, 1, 2)
    keeper.free(places[0])
    assert not keeper.router.said
    keeper.reach(sender.number)
    sender.begin_anew(keeper.number)
    talk(*pair)
    assert len(sender.custody) == 1


def test_a_node_that_has_another_number_since_redis_came_back_is_the_same(pair):
    sender, keeper = pair
    keeper.keep(sender, 1)
    talk(*pair)
    for worker, number in ((sender, 2), (keeper, 1)):
        worker.node = number
        worker.router.links.clear()
    sender.reach(keeper.number)
    talk(*pair)
    assert len(sender.custody) == 1
    assert keeper.router.known[sender.number] == 1
    sender.custody.look_after({keeper.instance: 1}, True)
    sender.custody.look_after({}, True)
    sender.tick()
    assert sender.answered == lost(1)


def test_a_message_that_two_workers_of_a_node_hold_for_a_moment_is_answered_for_once(pair):
    """It was on its way from one to the other with the session of its target when the node died."""
    sender, keeper = pair
    keeper.keep(sender, 1)
    talk(*pair)
    entry = keeper.ledger.waiting_from(1)[0]
    sibling = keeper.number + 1
    sender.reach(sibling)
    sender.custody.on_record(sibling, HELLO, orjson.dumps({"instance": "two", "life": 5}))
    sender.custody.on_record(sibling, KEPT, entry)
    assert len(sender.custody) == 2
    sender.custody.look_after({}, True)
    sender.custody.look_after({}, True)
    sender.tick()
    assert sender.answered == lost(1)


def test_what_moves_to_a_third_node_is_answered_for_by_the_first(pair):
    sender, keeper = pair
    third = Worker(3, "three", others={1: "one"})
    keeper.reach(third.number)
    talk(sender, keeper, third)
    places = keeper.keep(sender, 1)
    talk(sender, keeper, third)
    origin = keeper.custody.origin_of(message(1))
    assert origin == sender.number
    third.ledger.source = third.custody.source_of(origin, keeper.number)
    third.ledger.add(message(1))
    third.custody.on_news(*third.ledger.take_news(True))
    keeper.free(*places)
    talk(sender, keeper, third)
    assert keeper.custody.origin_of(message(1)) is None
    assert len(sender.custody) == 1
    sender.custody.look_after(alive(keeper), True)
    sender.custody.look_after(alive(keeper), True)
    sender.tick()
    assert sender.answered == lost(1)


def test_where_nothing_is_known_of_the_first_the_second_answers(pair):
    sender, keeper = pair
    assert keeper.custody.source_of(9 * NODE_WORKERS, sender.number) == keeper.router.known[sender.number]
    assert keeper.custody.source_of(3, sender.number) == 0  # of this node


def test_what_cannot_be_noted_is_answered_at_once(pair):
    """So notes are bounded, and nobody waits for an answer that will not come."""
    sender, keeper = pair
    keeper.keep(sender, *range(LEDGER_RECORDS))
    talk(*pair)
    assert len(sender.custody) == NOTED_MAX == LEDGER_RECORDS
    more = Worker(3, "three")
    more.reach(sender.number)
    talk(sender, more)
    more.keep(sender, 1_000_000)
    talk(sender, more)
    assert sender.answered == lost(1_000_000)
    assert len(sender.custody) == NOTED_MAX
    sender.answered.clear()
    sender.custody.look_after(alive(keeper, more), True)
    sender.custody.look_after(alive(more), True)
    sender.tick()
    assert len(sender.answered) == ANSWERS_PER_TICK
    while len(sender.custody):
        sender.tick()
    assert len(set(sender.answered)) == len(sender.answered) == NOTED_MAX


def test_peers_that_are_gone_are_forgotten_once_nothing_of_theirs_waits(pair):
    sender, keeper = pair
    places = keeper.keep(sender, 1)
    keeper.router.links.clear()
    for _ in range(3):
        keeper.custody.look_after({}, True)
    assert keeper.custody.origin_of(message(1)) == sender.number
    keeper.free(*places)
    keeper.custody.look_after({}, True)
    new = Worker(1, "later")
    new.reach(keeper.number)
    talk(new, keeper)
    assert keeper.router.known[new.number] == 1
    keeper.keep(new, 2)
    talk(new, keeper)
    assert len(new.custody) == 1


def test_what_is_freed_or_kept_by_a_stranger_is_ignored(pair):
    sender, _ = pair
    sender.custody.on_record(9 * NODE_WORKERS, KEPT, bytes(152))
    sender.custody.on_record(9 * NODE_WORKERS, FREED, bytes(4))
    assert len(sender.custody) == 0
