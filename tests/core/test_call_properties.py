"""Whatever a transport loses or repeats, a call runs at most once and ends exactly once."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import AsyncIterator
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aiconexus.core.answers import Answers
from aiconexus.core.calls import Calls
from aiconexus.core.events import (
    Answered,
    ArgumentsArrived,
    CancelArrived,
    Event,
    ExecutionArrived,
    Failed,
    InputArrived,
    InputEnded,
    PartArrived,
    Refused,
    Reply,
)
from aiconexus.protocol import DIDKey
from aiconexus.protocol.limits import ATTACHMENTS_MAX_BYTES, CALL_WINDOW_BYTES

KEYS = tuple(DIDKey.from_seed(bytes([seed]) * 32) for seed in (1, 2))
FINAL = {"success", "error", "cancelled"}


async def nothing() -> AsyncIterator[bytes]:
    """Stand for the stream among the arguments; what it has is fed by hand."""
    return
    yield b""


def draw_one(data: st.DataObject, items: list[str]) -> str:
    """Draw by number: ids are random, and hypothesis wants the same choices every time."""
    return items[data.draw(st.integers(0, len(items) - 1))]


class Line:
    """One direction of the transport, and what one end has seen of the other."""

    def __init__(self, sender: Calls) -> None:
        self.sender = sender
        self.messages: deque[str | bytes] = deque()
        self.finals: Counter[str] = Counter()
        self.texts: dict[str, set[str]] = {}
        self.ended: set[str] = set()

    def fill(self) -> None:
        """Put on the line what the sender has ready, and look at it."""
        while (message := self.sender.outbox.take()) is not None:
            self.messages.append(message)
            if isinstance(message, str):
                self.look(json.loads(message))

    def look(self, envelope: dict[str, Any]) -> None:
        if envelope["type"] != "EXEC_RESPONSE":
            return
        call = envelope["correlation_id"]
        if envelope["payload"]["status"] in FINAL:
            self.texts.setdefault(call, set()).add(json.dumps(envelope))
            self.ended.add(call)
        else:
            assert call not in self.ended, "a part or progress after the final response"


class LossyCalls(RuleBasedStateMachine):
    """Two agents that call each other over a transport that loses, repeats and reorders nothing."""

    @initialize()
    def connect(self) -> None:
        self.sides = [
            Calls(KEYS[0], KEYS[1].did, answers=Answers()),
            Calls(KEYS[1], KEYS[0].did, answers=Answers()),
        ]
        self.lines = [Line(side) for side in self.sides]
        self.asked: list[dict[str, bool]] = [{}, {}]  # by id: whether a stream was asked for
        self.ends: list[Counter[str]] = [Counter(), Counter()]
        self.begun: list[Counter[str]] = [Counter(), Counter()]
        self.accepted: list[set[str]] = [set(), set()]
        self.running: list[list[str]] = [[], []]
        self.feeding: list[list[str]] = [[], []]
        self.streams: list[set[str]] = [set(), set()]
        self.spoilt: list[set[str]] = [set(), set()]  # by a frame that belongs nowhere
        self.given_up: list[set[str]] = [set(), set()]  # by who asked, before the end

    # --- what the two agents do ---

    @rule(side=st.integers(0, 1), size=st.sampled_from([0, 10, 20_000]), is_stream=st.booleans())
    def execute(self, side: int, size: int, is_stream: bool) -> None:
        args = {"data": bytes(size)} if size else {}
        id_ = self.sides[side].execute("work", args, 60.0, is_stream=is_stream)
        self.asked[side][id_] = is_stream

    @rule(side=st.integers(0, 1))
    def execute_with_a_stream(self, side: int) -> None:
        id_ = self.sides[side].execute("work", {"data": nothing()}, 60.0)
        self.asked[side][id_] = False
        self.feeding[side].append(id_)

    @precondition(lambda self: any(self.feeding))
    @rule(data=st.data(), size=st.sampled_from([0, 1, 40_000]))
    def feed(self, data: st.DataObject, size: int) -> None:
        side = data.draw(st.sampled_from([side for side in (0, 1) if self.feeding[side]]))
        id_ = draw_one(data, self.feeding[side])
        if not self.sides[side].feed(id_, bytes(size)) or not size:
            self.sides[side].end_feed(id_)
            self.feeding[side].remove(id_)

    @precondition(lambda self: any(self.running))
    @rule(data=st.data(), how=st.sampled_from(["succeed", "finish", "fail", "cancelled", "part", "progress"]))
    def serve(self, data: st.DataObject, how: str) -> None:
        side = data.draw(st.sampled_from([side for side in (0, 1) if self.running[side]]))
        id_ = draw_one(data, self.running[side])
        calls = self.sides[side]
        if how == "part":
            calls.part(id_, data.draw(st.sampled_from([1, b"xyz", bytes(40_000), "y" * 30_000])))
        elif how == "progress":
            calls.progress(id_, 0.5)
        else:
            self.end(side, id_, how)

    def end(self, side: int, id_: str, how: str) -> None:
        calls = self.sides[side]
        self.running[side].remove(id_)
        if how == "succeed" and id_ not in self.streams[side]:
            calls.succeed(id_, bytes(30_000), 0.1)
        elif how in ("succeed", "finish"):
            calls.finish(id_, 0.1)
        else:
            calls.fail(id_, "cancelled" if how == "cancelled" else "capability_error", "no")

    @precondition(lambda self: any(self.asked))
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        side = data.draw(st.sampled_from([side for side in (0, 1) if self.asked[side]]))
        id_ = draw_one(data, list(self.asked[side]))
        cancel = self.sides[side].abandon(id_)
        self.given_up[side].add(id_)
        if id_ not in self.ends[side]:
            self.ends[side][id_] += 1
        if cancel is not None:
            self.lines[side].messages.append(cancel)

    # --- what the transport does ---

    @rule(side=st.integers(0, 1), fate=st.sampled_from(["arrives", "arrives", "arrives", "lost", "twice"]))
    def carry(self, side: int, fate: str) -> None:
        line = self.lines[side]
        line.fill()
        if not line.messages:
            return
        message = line.messages.popleft()
        for _ in range({"lost": 0, "arrives": 1, "twice": 2}[fate]):
            self.arrive(1 - side, message)

    def arrive(self, side: int, message: str | bytes) -> None:
        self.handle(side, self.sides[side].receive(message))

    def handle(self, side: int, event: Event | None) -> None:
        calls = self.sides[side]
        match event:
            case ExecutionArrived(id_, _, args, _, is_stream, _):
                self.begun[side][id_] += 1
                self.accepted[side].add(id_)
                if is_stream:
                    self.streams[side].add(id_)
                if args is not None:
                    self.start(side, id_)
            case ArgumentsArrived(id_, _, fault):
                if fault:
                    calls.fail(id_, "invalid_arguments", fault)
                else:
                    self.start(side, id_)
            case CancelArrived(id_):
                if id_ in self.running[side]:
                    self.running[side].remove(id_)
                calls.fail(id_, "cancelled", "cancelled")
            case Answered(id_) | Failed(id_):
                self.ends[side][id_] += 1
            case PartArrived(id_) | InputArrived(id_):
                calls.took(id_)
            case InputEnded(id_, fault):
                if not fault:
                    calls.has_read_input(id_)
            case Reply(text):
                self.lines[side].messages.append(text)
            case Refused():
                if event.reply is not None:
                    self.lines[side].messages.append(event.reply)
                if event.cancelled is not None:
                    self.spoilt[side].add(event.cancelled)
                if event.cancelled in self.running[side]:
                    self.running[side].remove(event.cancelled)
                self.handle(side, event.failed)

    def start(self, side: int, id_: str) -> None:
        self.sides[side].start(id_)
        self.running[side].append(id_)

    # --- what must hold ---

    @invariant()
    def runs_at_most_once(self) -> None:
        for begun in getattr(self, "begun", ()):
            assert max(begun.values(), default=0) <= 1

    @invariant()
    def ends_at_most_once(self) -> None:
        for ends in getattr(self, "ends", ()):
            assert max(ends.values(), default=0) <= 1
        for line in getattr(self, "lines", ()):
            assert all(len(texts) == 1 for texts in line.texts.values())

    def teardown(self) -> None:
        """Let everybody give up, or finish, and look whether anything is left."""
        if not hasattr(self, "sides"):
            return
        for side in (0, 1):
            for id_ in list(self.running[side]):
                self.end(side, id_, "finish" if id_ in self.streams[side] else "succeed")
        self.carry_all()
        for side in (0, 1):
            for id_ in self.asked[side]:  # the deadline of whoever asked
                cancel = self.sides[side].abandon(id_)
                if id_ not in self.ends[side]:
                    self.ends[side][id_] += 1
                if cancel is not None:
                    self.lines[side].messages.append(cancel)
            for id_ in self.accepted[side]:  # the deadline of whoever executes
                self.sides[side].fail(id_, "timeout", "too late")
        self.carry_all()
        for side in (0, 1):
            calls = self.sides[side]
            assert set(self.ends[side]) == set(self.asked[side])
            assert calls.open == 0
            assert self.accepted[side] - self.spoilt[side] <= self.lines[side].ended
            assert not calls._served
            assert not calls._inbox._calls
            assert calls._inbox.kept == 0
            assert not self.blocked(side)
        self.ends_at_most_once()

    def carry_all(self) -> None:
        """Let everything arrive that waits, and what comes of it."""
        while True:
            for line in self.lines:
                line.fill()
            if not any(line.messages for line in self.lines):
                return
            for side in (0, 1):
                if self.lines[side].messages:
                    self.arrive(1 - side, self.lines[side].messages.popleft())

    def blocked(self, side: int) -> list[str]:
        """Return the calls of which something waits, though nobody has lost the word that they are over."""
        lanes = self.sides[side].outbox._lanes
        return [call for call in lanes if call not in self.given_up[1 - side]]


LossyCalls.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
test_lossy_calls = LossyCalls.TestCase


def test_window_is_what_a_reader_that_takes_nothing_lets_through() -> None:
    caller, callee = Calls(KEYS[0], KEYS[1].did), Calls(KEYS[1], KEYS[0].did)
    id_ = caller.execute("parts", {}, 60.0, is_stream=True)
    text = caller.outbox.take()
    assert text is not None
    callee.receive(text)
    callee.start(id_)
    for _ in range(100):
        assert callee.part(id_, bytes(50_000))
    sent, arrived = 0, 0
    while (message := callee.outbox.take()) is not None:
        sent += len(message)
        arrived += isinstance(caller.receive(message), PartArrived)
    assert CALL_WINDOW_BYTES <= sent < CALL_WINDOW_BYTES + 100_000
    for _ in range(arrived):
        caller.took(id_)
    credit = caller.outbox.take()
    assert isinstance(credit, bytes)
    callee.receive(credit)
    assert callee.outbox.take() is not None
    assert caller._inbox.kept < ATTACHMENTS_MAX_BYTES
