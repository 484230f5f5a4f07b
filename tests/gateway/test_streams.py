"""The stream between workers of two nodes: which is the newer one, and what has to be confirmed."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from offer_bytes import A, B, message

from gateway._addresses import Addresses
from gateway._connection import Router
from gateway._counters import Counters
from gateway._ledger import Ledger
from gateway._mesh import FIRST_OTHER_KIND, NODE_WORKERS
from gateway._routing import RoutingTable

KIND = FIRST_OTHER_KIND


@dataclass
class End:
    """One worker of a node, as far as its streams are concerned: what it says waits in `pieces`."""

    node: int
    pieces: list[bytes] = field(default_factory=list)
    got: list[bytes] = field(default_factory=list)
    lost: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ledger = Ledger(1)
        self.ledger.begin(0, 0)
        self.router = Router(
            self,
            table=RoutingTable(16),
            counters=Counters(1),
            ledger=self.ledger,
            addresses=Addresses(1),
            worker=0,
            message_max=65_536,
            frame_max=262_144,
            write_queue_max=1_048_576,
            message_rate=0,
            message_burst=0,
            ping_interval=25,
            pong_timeout=10,
            idle_timeout=0,
            close_timeout=2,
        )

    @property
    def number(self) -> int:
        return self.node * NODE_WORKERS

    def reach(self, other: End) -> None:
        self.router.add_remote_link(other.number, self.node, lambda _, piece: self.pieces.append(piece))

    def say(self, other: End, data: bytes) -> None:
        assert self.router.tell(other.number, KIND, 0, 0, data)
        self.router.settle()

    def hear(self, other: End, pieces: list[bytes]) -> None:
        """Take what another has said, as `Cluster` does."""
        for piece in pieces:
            if not self.router.take(other.number, piece):
                self.router.begin_anew(other.number)
        self.router.settle()

    def on_stream(self, worker: int, is_new: bool) -> None:
        pass

    def on_record(self, worker: int, kind: int, origin: int, epoch: int, data: bytes) -> None:
        self.got.append(data)

    def on_link_lost(self, worker: int, records: list[tuple[int, int, int, bytes]]) -> None:
        self.lost.extend(data for *_, data in records)


def talk(*ends: End) -> None:
    """Let two ends hear each other until they have nothing more to say, and time pass meanwhile."""
    one, other = ends
    for tick in range(1, 10):
        for end, speaker in ((one, other), (other, one)):
            pieces, speaker.pieces = speaker.pieces, []
            end.hear(speaker, pieces)
        for end in ends:
            end.router.advance(tick / 10)
        if not any(end.pieces for end in ends):
            return
    raise AssertionError("they never stop")


@pytest.fixture
def pair() -> tuple[End, End]:
    ends = End(1), End(2)
    ends[0].reach(ends[1])
    ends[1].reach(ends[0])
    return ends


def reborn(end: End, other: End, *, is_greater: bool) -> End:
    """Return the next process with the number of one, whose life is a greater or a smaller number."""
    for _ in range(100_000):
        new = End(end.node)
        if (new.router.life > end.router.life) is is_greater:
            new.reach(other)
            return new
    raise AssertionError("a life is not random")


def test_what_is_said_arrives_and_is_confirmed(pair):
    one, other = pair
    one.say(other, b"hello")
    other.say(one, b"hello yourself")
    assert one.router.progress(other.number)[1] > 0
    talk(*pair)
    assert (one.got, other.got) == ([b"hello yourself"], [b"hello"])
    # A confirmation alone waits for nothing.
    assert one.router.progress(other.number)[1] == other.router.progress(one.number)[1] == 0


@pytest.mark.parametrize("is_greater", [True, False])
def test_the_next_process_is_heard_at_once_whatever_the_number_of_its_life(pair, is_greater):
    one, other = pair
    other.say(one, b"before")
    talk(*pair)
    new = reborn(other, one, is_greater=is_greater)
    new.say(one, b"after")
    talk(one, new)
    assert one.got == [b"before", b"after"]
    assert (one.lost, new.lost) == ([], [])


@pytest.mark.parametrize("lives", [1, 2])
def test_what_is_left_of_a_process_that_is_gone_does_not_end_the_stream_of_the_next(lives, pair):
    """Redis hands over late what it had read from a connection that is closed."""
    one, other = pair
    other.say(one, b"before")
    late = list(other.pieces)
    talk(*pair)
    new = other
    for _ in range(lives):
        new = reborn(new, one, is_greater=False)
        new.say(one, b"after")
        talk(one, new)
    one.hear(other, late)
    new.say(one, b"and on")
    talk(one, new)
    assert one.got == [b"before", *lives * [b"after"], b"and on"]
    assert (one.lost, new.lost) == ([], [])


def test_what_is_left_of_an_older_stream_of_the_same_process_is_not_followed(pair):
    one, other = pair
    other.say(one, b"first")
    late = list(other.pieces)
    talk(*pair)
    other.router.begin_anew(one.number)
    other.say(one, b"second")
    talk(*pair)
    one.hear(other, late)
    other.say(one, b"third")
    talk(*pair)
    assert one.got == [b"first", b"second", b"third"]


def test_a_piece_that_is_missing_lets_the_stream_begin_anew_and_comes_back(pair):
    one, other = pair
    other.say(one, b"first")
    talk(*pair)
    other.say(one, b"missing")
    other.pieces.clear()
    other.say(one, b"behind it")
    talk(*pair)
    assert one.got == [b"first"]
    assert other.lost == [b"missing", b"behind it"]
    other.say(one, b"anew")
    talk(*pair)
    assert one.got == [b"first", b"anew"]


def test_nothing_is_said_to_who_does_not_listen_but_what_comes_is_heard(pair):
    one, other = pair
    one.say(other, b"first")
    other.say(one, b"heard")
    talk(*pair)
    one.say(other, b"arrives")
    one.router.fall_silent(other.number)
    assert not one.router.tell(other.number, KIND, 0, 0, b"refused")
    other.say(one, b"heard, too")
    talk(*pair)
    assert one.got == [b"heard", b"heard, too"]
    assert one.router.progress(other.number)[1] == 0  # also that something has arrived was heard
    assert other.router.progress(one.number)[1] > 0
    one.router.begin_anew(other.number)
    one.say(other, b"anew, with a confirmation")
    talk(*pair)
    assert other.got == [b"first", b"arrives", b"anew, with a confirmation"]
    assert other.router.progress(one.number)[1] == 0
    assert (one.lost, other.lost) == ([], [])


def test_what_is_passed_on_waits_until_it_is_confirmed(pair):
    one, other = pair
    assert one.router.pass_on(other.number, KIND, 0, 0, message(1))
    one.router.settle()
    assert one.ledger.read(0, 0) == [(A, B, "00000001-0000-4000-8000-000000000000", 0)]
    one.router.advance(0.1)
    assert one.ledger.size == 1
    talk(*pair)
    assert other.got == [message(1)]
    one.router.advance(2)
    assert one.ledger.size == 0


def test_what_is_passed_on_and_comes_back_waits_no_longer(pair):
    one, other = pair
    assert one.router.pass_on(other.number, KIND, 0, 0, message(1))
    one.router.begin_anew(other.number)
    assert one.lost == [message(1)]
    one.router.advance(0.1)
    assert one.ledger.size == 0
