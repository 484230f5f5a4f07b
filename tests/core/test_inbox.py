"""What arrives in pieces: what it announces, keeps, and gives credit for."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiconexus.core.inbox import Inbox
from aiconexus.core.outbox import Outbox
from aiconexus.protocol import DIDKey, MalformedMessageError, Message
from aiconexus.protocol.attachments import RESULT, Assembly, Attachment
from aiconexus.protocol.frames import Credit, Data, parse_frame
from aiconexus.protocol.limits import (
    ATTACHED_JSON_MAX_BYTES,
    ATTACHMENTS_MAX_BYTES,
    CALL_CREDIT_BYTES,
    CALL_WINDOW_BYTES,
    CHUNK_MAX_BYTES,
)
from aiconexus.protocol.models import PingPayload

CALL, OTHER = (f"0000000{number}-0000-4000-8000-000000000000" for number in range(2))
ALICE = DIDKey.from_seed(b"\x01" * 32)
MESSAGE = Message.create(ALICE.did, ALICE.did, PingPayload())


@pytest.fixture
def inbox() -> Inbox:
    inbox = Inbox()
    inbox.open(CALL)
    return inbox


def of(size: int) -> Assembly:
    return Assembly(MESSAGE, [Attachment(at=RESULT, as_="bytes", size=size)])


def granted(inbox: Inbox, call: str = CALL) -> int | None:
    """Return what the CREDIT frame says that is due, if one is."""
    frame = inbox.credit(call)
    if frame is None:
        return None
    credit = parse_frame(frame)
    assert isinstance(credit, Credit)
    assert credit.call == call
    return credit.taken


def arrive(inbox: Inbox, size: int) -> Assembly | None:
    """Let so many bytes arrive in frames; return what is complete with the last."""
    complete = None
    while size:
        chunk = min(size, CHUNK_MAX_BYTES)
        complete = inbox.add(CALL, bytes(chunk))
        size -= chunk
    return complete


# --- attachments ---------------------------------------------------------------------------------


def test_attachments_are_complete_with_their_last_byte(inbox: Inbox) -> None:
    assembly = of(CHUNK_MAX_BYTES + 1)
    inbox.collect(CALL, assembly)
    assert inbox.completed(CALL) is None
    assert arrive(inbox, CHUNK_MAX_BYTES) is None
    assert arrive(inbox, 1) is assembly
    assert inbox.completed(CALL) is None


def test_attachments_without_a_byte_are_complete_at_once(inbox: Inbox) -> None:
    assembly = of(0)
    inbox.collect(CALL, assembly)
    assert inbox.completed(CALL) is assembly


@pytest.mark.parametrize("announced", [None, 0, 2])
def test_bytes_that_were_not_announced_are_refused(inbox: Inbox, announced: int | None) -> None:
    if announced is not None:
        inbox.collect(CALL, of(announced))
    with pytest.raises(MalformedMessageError, match="3 bytes of data that no attachment") as caught:
        inbox.add(CALL, b"abc")
    assert (caught.value.cause.name, caught.value.message_id) == ("bad_frame", CALL)


def test_bytes_after_the_last_are_refused(inbox: Inbox) -> None:
    inbox.collect(CALL, of(3))
    inbox.add(CALL, b"abc")
    with pytest.raises(MalformedMessageError):
        inbox.add(CALL, b"d")


def test_call_that_is_over_or_never_was_takes_nothing(inbox: Inbox) -> None:
    inbox.close(CALL)
    inbox.close(CALL)
    for call in (CALL, OTHER):
        assert inbox.add(call, b"x") is None
        inbox.count(call, 10**9)
        inbox.took(call)
        assert inbox.credit(call) is None


def test_what_is_announced_counts_as_kept_until_it_is_taken(inbox: Inbox) -> None:
    inbox.collect(CALL, of(1000))
    assert inbox.kept == 1000
    arrive(inbox, 1000)
    assert inbox.kept == 1000
    inbox.hold(CALL, 10, 1000)
    assert inbox.kept == 1000
    inbox.took(CALL)
    assert inbox.kept == 0
    inbox.took(CALL)  # nothing waits
    assert inbox.kept == 0


def test_what_is_given_up_is_not_kept(inbox: Inbox) -> None:
    inbox.collect(CALL, of(1000))
    arrive(inbox, 400)
    inbox.collect(CALL, of(70))
    assert inbox.kept == 70
    inbox.give_up(CALL)
    inbox.give_up(CALL)
    assert inbox.kept == 0


def test_what_waits_for_nobody_is_released(inbox: Inbox) -> None:
    inbox.collect(CALL, of(1000))
    arrive(inbox, 1000)
    inbox.release(CALL, 1000)
    assert inbox.kept == 0


def test_closed_call_keeps_nothing_and_leaves_the_others(inbox: Inbox) -> None:
    inbox.open(OTHER)
    inbox.collect(CALL, of(1000))
    inbox.collect(OTHER, of(1))
    inbox.close(CALL)
    assert inbox.kept == 1


def test_room_is_for_all_calls_together(inbox: Inbox) -> None:
    inbox.open(OTHER)
    inbox.collect(CALL, of(ATTACHMENTS_MAX_BYTES - 10))
    assert inbox.has_room(of(10))
    assert not inbox.has_room(of(11))
    inbox.close(CALL)
    assert inbox.has_room(of(ATTACHMENTS_MAX_BYTES))
    assert not inbox.has_room(of(ATTACHMENTS_MAX_BYTES + 1))


def test_json_has_less_room_than_bytes(inbox: Inbox) -> None:
    for size, has_room in ((ATTACHED_JSON_MAX_BYTES, True), (ATTACHED_JSON_MAX_BYTES + 1, False)):
        assembly = Assembly(MESSAGE, [Attachment(at=RESULT, as_="json", size=size)])
        assert inbox.could_have_room(assembly) is inbox.has_room(assembly) is has_room


# --- credit --------------------------------------------------------------------------------------


def test_credit_is_due_when_enough_has_come_together(inbox: Inbox) -> None:
    inbox.collect(CALL, of(10 * CALL_WINDOW_BYTES))
    arrive(inbox, CALL_CREDIT_BYTES - 1)
    assert granted(inbox) is None
    arrive(inbox, 1)
    assert granted(inbox) == CALL_CREDIT_BYTES
    assert granted(inbox) is None
    arrive(inbox, 3 * CALL_CREDIT_BYTES + 7)
    assert granted(inbox) == 4 * CALL_CREDIT_BYTES + 7


def test_part_gets_its_credit_when_it_is_taken(inbox: Inbox) -> None:
    for _ in range(4):
        inbox.count(CALL, CALL_CREDIT_BYTES // 2)
        inbox.hold(CALL, CALL_CREDIT_BYTES // 2, 0)
    assert granted(inbox) is None
    inbox.took(CALL)
    assert granted(inbox) is None
    inbox.took(CALL)
    assert granted(inbox) == CALL_CREDIT_BYTES
    inbox.took(CALL)
    inbox.took(CALL)
    assert granted(inbox) == 2 * CALL_CREDIT_BYTES


def test_attachment_behind_a_part_that_waits_gets_no_credit(inbox: Inbox) -> None:
    inbox.count(CALL, 100)
    inbox.hold(CALL, 100, 0)
    inbox.count(CALL, 100)
    inbox.collect(CALL, of(CALL_WINDOW_BYTES))
    arrive(inbox, CALL_WINDOW_BYTES // 2)
    assert granted(inbox) is None
    inbox.took(CALL)
    assert granted(inbox) == 200 + CALL_WINDOW_BYTES // 2


def test_part_that_is_complete_holds_up_no_credit_but_its_own(inbox: Inbox) -> None:
    size = CALL_CREDIT_BYTES
    for _ in range(3):
        inbox.collect(CALL, of(size))
        arrive(inbox, size)
        inbox.hold(CALL, 0, size)
    assert granted(inbox) is None
    for number in (1, 2, 3):
        inbox.took(CALL)
        assert granted(inbox) == number * size


def test_attachment_that_nobody_waits_before_is_granted_as_it_comes(inbox: Inbox) -> None:
    """One that is larger than the window would never be complete."""
    size = 3 * CALL_WINDOW_BYTES
    inbox.collect(CALL, of(size))
    for number in range(1, size // CALL_CREDIT_BYTES + 1):
        arrive(inbox, CALL_CREDIT_BYTES)
        assert granted(inbox) == number * CALL_CREDIT_BYTES
    inbox.hold(CALL, 0, size)
    assert granted(inbox) is None  # and not less than before
    inbox.count(CALL, CALL_CREDIT_BYTES)
    assert granted(inbox) is None
    inbox.took(CALL)
    assert granted(inbox) == size + CALL_CREDIT_BYTES


def test_what_was_given_up_gets_its_credit(inbox: Inbox) -> None:
    inbox.count(CALL, 100)
    inbox.hold(CALL, 100, 0)
    inbox.collect(CALL, of(CALL_WINDOW_BYTES))
    arrive(inbox, CALL_CREDIT_BYTES)
    assert granted(inbox) is None
    inbox.give_up(CALL)
    assert granted(inbox) == CALL_CREDIT_BYTES


@pytest.mark.parametrize("is_data", [True, False])
def test_sender_that_ignores_the_window_is_refused(inbox: Inbox, is_data: bool) -> None:
    inbox.count(CALL, 100)
    inbox.hold(CALL, 100, 0)  # it is never taken
    inbox.collect(CALL, of(3 * CALL_WINDOW_BYTES))
    arrive(inbox, 2 * CALL_WINDOW_BYTES - 100)
    assert granted(inbox) is None
    with pytest.raises(MalformedMessageError, match="more came than there was credit for") as caught:
        inbox.add(CALL, b"x") if is_data else inbox.count(CALL, 1)
    assert (caught.value.cause.name, caught.value.message_id) == ("bad_frame", CALL)


def test_calls_have_windows_of_their_own(inbox: Inbox) -> None:
    inbox.open(OTHER)
    inbox.count(CALL, 2 * CALL_WINDOW_BYTES)
    inbox.count(OTHER, 2 * CALL_WINDOW_BYTES)
    assert granted(inbox, OTHER) == 2 * CALL_WINDOW_BYTES


# --- a stream in a request -----------------------------------------------------------------------


def streaming(size: int = 0) -> Assembly:
    """Return attachments of so many bytes, and a stream after them."""
    whole = [Attachment(at="/args/a", as_="bytes", size=size)]
    return Assembly(MESSAGE, [*whole, Attachment(at="/args/b", as_="bytes")])


def test_stream_begins_after_the_attachments(inbox: Inbox) -> None:
    inbox.collect(CALL, streaming(3))
    assert not inbox.is_streaming(CALL)
    arrive(inbox, 3)
    assert inbox.is_streaming(CALL)
    assert inbox.end_input(CALL)
    assert not inbox.is_streaming(CALL)


def test_stream_needs_the_room_of_its_window(inbox: Inbox) -> None:
    most = ATTACHMENTS_MAX_BYTES - CALL_WINDOW_BYTES
    assert inbox.has_room(streaming(most))
    assert not inbox.has_room(streaming(most + 1))
    inbox.collect(CALL, streaming(5))
    assert inbox.kept == CALL_WINDOW_BYTES + 5
    inbox.give_up(CALL)
    assert inbox.kept == 0
    inbox.collect(CALL, streaming())
    inbox.completed(CALL)
    inbox.end_input(CALL)
    inbox.close(CALL)
    assert inbox.kept == 0


def test_stream_gets_credit_as_it_is_read(inbox: Inbox) -> None:
    inbox.collect(CALL, streaming())
    inbox.completed(CALL)
    for _ in range(2 * CALL_CREDIT_BYTES // CHUNK_MAX_BYTES):
        inbox.hold_input(CALL, CHUNK_MAX_BYTES)
    assert granted(inbox) is None
    inbox.took_input(CALL, CALL_CREDIT_BYTES - 1)
    assert granted(inbox) is None
    inbox.took_input(CALL, 1)
    assert granted(inbox) == CALL_CREDIT_BYTES
    inbox.close(CALL)
    inbox.took_input(CALL, CALL_CREDIT_BYTES)  # what was read after the end


def test_stream_that_ignores_the_window_is_refused(inbox: Inbox) -> None:
    inbox.collect(CALL, streaming())
    inbox.completed(CALL)
    for _ in range(2 * CALL_WINDOW_BYTES // CHUNK_MAX_BYTES):
        inbox.hold_input(CALL, CHUNK_MAX_BYTES)
    with pytest.raises(MalformedMessageError, match="more came than there was credit for"):
        inbox.hold_input(CALL, 1)


def test_end_of_no_stream_is_refused_while_the_call_is_under_way(inbox: Inbox) -> None:
    with pytest.raises(MalformedMessageError, match="no stream that could end") as caught:
        inbox.end_input(CALL)
    assert (caught.value.cause.name, caught.value.message_id) == ("bad_frame", CALL)
    assert not inbox.end_input(OTHER)
    assert not inbox.is_streaming(OTHER)


# --- both ends -----------------------------------------------------------------------------------


class Stream:
    """An Outbox at one end, an Inbox at the other, a line that holds what was sent, and a reader."""

    def __init__(self, parts: list[tuple[int, int]]) -> None:
        self.outbox, self.inbox = Outbox(), Inbox()
        self.inbox.open(CALL)
        self.line: deque[str | bytes] = deque()
        self.sizes = deque(parts)
        self.announced = (0, 0)
        self.waiting: deque[tuple[int, int]] = deque()
        self.read: list[tuple[int, int]] = []
        for text, attached in parts:
            self.outbox.put(CALL, "x" * text, [bytes(attached)], is_counted=True)

    def send(self) -> bool:
        message = self.outbox.take()
        if message is not None:
            self.line.append(message)
        return message is not None

    def arrive(self) -> bool:
        if not self.line:
            return False
        message = self.line.popleft()
        if isinstance(message, str):
            self.announced = self.sizes.popleft()
            self.inbox.count(CALL, len(message))
            self.inbox.collect(CALL, of(self.announced[1]))
            complete = self.inbox.completed(CALL)
        else:
            frame = parse_frame(message)
            assert isinstance(frame, Data)
            complete = self.inbox.add(CALL, frame.chunk)
        if complete is not None:
            self.inbox.hold(CALL, *self.announced)
            self.waiting.append(self.announced)
        self.grant()
        return True

    def take(self) -> bool:
        if not self.waiting:
            return False
        self.read.append(self.waiting.popleft())
        self.inbox.took(CALL)
        self.grant()
        return True

    def grant(self) -> None:
        taken = granted(self.inbox)
        if taken is not None:
            self.outbox.credit(CALL, taken)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(
            st.sampled_from([1, 300, 16_000, 250_000]),
            st.sampled_from([0, 1, CHUNK_MAX_BYTES, 200_000, CALL_WINDOW_BYTES, 2 * CALL_WINDOW_BYTES + 1]),
        ),
        max_size=12,
    ),
    st.lists(st.sampled_from(["send", "arrive", "take"]), max_size=200),
)
def test_stream_is_never_stuck_and_never_refused(parts: list[tuple[int, int]], steps: list[str]) -> None:
    stream = Stream(parts)
    for step in steps:
        getattr(stream, step)()
    while stream.send() or stream.arrive() or stream.take():
        pass
    assert stream.read == parts
    assert stream.inbox.kept == 0


def test_reader_that_takes_nothing_lets_a_window_and_a_part_through() -> None:
    stream = Stream([(300, 100_000)] * 100)
    while stream.send() or stream.arrive():
        pass
    came = sum(map(sum, stream.waiting))
    assert CALL_WINDOW_BYTES - 100_300 <= came < CALL_WINDOW_BYTES + CALL_CREDIT_BYTES + 100_300
