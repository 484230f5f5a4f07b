"""What waits to be sent: turns, windows, and what becomes of it when its call is over."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiconexus.core.outbox import Outbox
from aiconexus.protocol.frames import Data, credit_frame, data_frame, end_frame, parse_frame
from aiconexus.protocol.limits import CALL_WINDOW_BYTES, CHUNK_MAX_BYTES

A, B, C = (f"0000000{number}-0000-4000-8000-000000000000" for number in range(3))


@pytest.fixture
def outbox() -> Outbox:
    return Outbox()


def shown(message: str | bytes | None) -> Any:
    """Return a text as it is, and of a frame the call and how many bytes it carries."""
    if not isinstance(message, bytes):
        return message
    frame = parse_frame(message)
    assert isinstance(frame, Data)
    return frame.call, len(frame.chunk)


def drain(outbox: Outbox) -> list[Any]:
    messages = []
    while (message := outbox.take()) is not None:
        messages.append(shown(message))
    return messages


def counted(outbox: Outbox, call: str) -> int:
    """Let everything go that may; return how many bytes of data of the call did."""
    return sum(message[1] for message in drain(outbox) if message[0] == call)


# --- turns ---------------------------------------------------------------------------------------


def test_nothing_waits_at_first(outbox: Outbox) -> None:
    assert outbox.take() is None
    assert (outbox.texts, outbox.attached) == (0, 0)


def test_messages_of_a_call_keep_their_order(outbox: Outbox) -> None:
    outbox.put(A, "one", [b"x"])
    outbox.put(A, "two", [b"", b"yy", b"zzz"])
    outbox.put(A, "three")
    assert drain(outbox) == ["one", (A, 1), "two", (A, 2), (A, 3), "three"]


def test_attachments_are_cut_into_chunks_that_are_whole(outbox: Outbox) -> None:
    data = bytes(number % 251 for number in range(2 * CHUNK_MAX_BYTES + 1))
    outbox.put(A, "one", [data])
    assert outbox.take() == "one"
    chunks = [parse_frame(frame).chunk for frame in iter(outbox.take, None)]  # type: ignore[union-attr, arg-type]
    assert [len(chunk) for chunk in chunks] == [CHUNK_MAX_BYTES, CHUNK_MAX_BYTES, 1]
    assert b"".join(chunks) == data


def test_calls_take_turns(outbox: Outbox) -> None:
    outbox.put(A, "a", [bytes(3 * CHUNK_MAX_BYTES)])
    outbox.put(B, "b", [bytes(CHUNK_MAX_BYTES)])
    outbox.put(C, "c1")
    outbox.put(C, "c2")
    whole = CHUNK_MAX_BYTES
    assert drain(outbox) == ["a", "b", "c1", (A, whole), (B, whole), "c2", (A, whole), (A, whole)]


def test_call_that_comes_later_waits_for_one_message_of_each_other(outbox: Outbox) -> None:
    outbox.put(A, "a", [bytes(CALL_WINDOW_BYTES)])
    outbox.put(B, "b", [bytes(CALL_WINDOW_BYTES)])
    for _ in range(10):
        outbox.take()
    outbox.put(C, "c")
    assert [shown(outbox.take()) for _ in range(3)][-1] == "c"


def test_blocked_call_holds_up_nobody(outbox: Outbox) -> None:
    outbox.put(A, "a", [bytes(2 * CALL_WINDOW_BYTES)])
    drain(outbox)
    outbox.put(B, "b", [bytes(10)])
    assert drain(outbox) == ["b", (B, 10)]


def test_what_waits_is_counted(outbox: Outbox) -> None:
    outbox.put(A, "four", [bytes(CHUNK_MAX_BYTES), b"xx"])
    assert (outbox.texts, outbox.attached) == (4, CHUNK_MAX_BYTES + 2)
    outbox.take()
    assert (outbox.texts, outbox.attached) == (0, CHUNK_MAX_BYTES + 2)
    outbox.take()
    assert outbox.attached == 2
    outbox.put(B, "b", [b"y"])
    outbox.drop(A)
    assert (outbox.texts, outbox.attached) == (1, 1)
    outbox.clear()
    assert (outbox.texts, outbox.attached) == (0, 0)


def test_ready_is_called_when_something_can_be_taken(outbox: Outbox) -> None:
    calls = 0

    def ready() -> None:
        nonlocal calls
        calls += 1

    outbox.ready = ready
    outbox.put(A, "a", [bytes(CALL_WINDOW_BYTES + 1)])
    outbox.grant(B, credit_frame(B, 1))
    assert calls == 2
    assert outbox.take() == credit_frame(B, 1)
    drain(outbox)
    outbox.credit(A, 1)
    assert calls == 3
    outbox.credit(A, 1)  # nothing new
    outbox.credit(B, 1)  # never heard of
    assert calls == 3


# --- credit --------------------------------------------------------------------------------------


def test_credit_goes_before_everything_and_the_latest_counts(outbox: Outbox) -> None:
    outbox.put(A, "a")
    outbox.grant(A, credit_frame(A, 1))
    outbox.grant(B, credit_frame(B, 5))
    outbox.grant(A, credit_frame(A, 2))
    assert [outbox.take() for _ in range(4)] == [credit_frame(A, 2), credit_frame(B, 5), "a", None]


def test_window_lets_so_much_through(outbox: Outbox) -> None:
    outbox.put(A, "a", [bytes(3 * CALL_WINDOW_BYTES)])
    assert counted(outbox, A) == CALL_WINDOW_BYTES
    outbox.credit(A, CHUNK_MAX_BYTES)
    assert counted(outbox, A) == CHUNK_MAX_BYTES
    outbox.credit(A, CHUNK_MAX_BYTES + 1)  # a frame is begun while a single byte is free
    assert counted(outbox, A) == CHUNK_MAX_BYTES
    outbox.credit(A, CALL_WINDOW_BYTES + 2 * CHUNK_MAX_BYTES)
    assert counted(outbox, A) == CALL_WINDOW_BYTES
    assert outbox.attached == CALL_WINDOW_BYTES - 2 * CHUNK_MAX_BYTES


@pytest.mark.parametrize("taken", [0, CALL_WINDOW_BYTES + 1, 2**53 - 1])
def test_credit_for_what_was_not_sent_is_none(outbox: Outbox, taken: int) -> None:
    outbox.put(A, "a", [bytes(2 * CALL_WINDOW_BYTES)])
    drain(outbox)
    outbox.credit(A, taken)
    assert outbox.take() is None


def test_credit_that_comes_late_takes_nothing_back(outbox: Outbox) -> None:
    outbox.put(A, "a", [bytes(3 * CALL_WINDOW_BYTES)])
    drain(outbox)
    outbox.credit(A, CALL_WINDOW_BYTES)
    outbox.credit(A, 1)
    assert counted(outbox, A) == CALL_WINDOW_BYTES


def test_parts_count_with_their_texts_in_bytes(outbox: Outbox) -> None:
    text = "é" * (CALL_WINDOW_BYTES // 4)
    for _ in range(3):
        outbox.put(A, text, is_counted=True)
    assert drain(outbox) == [text, text]
    outbox.credit(A, 1)
    assert drain(outbox) == [text]


def test_final_response_needs_no_credit_but_its_turn(outbox: Outbox) -> None:
    outbox.put(A, "part", [bytes(CALL_WINDOW_BYTES)], is_counted=True)
    outbox.put(A, "another part", is_counted=True)
    outbox.put(A, "final")
    outbox.end(A)
    drained = drain(outbox)
    assert drained[-1] != "final"
    outbox.credit(A, CALL_WINDOW_BYTES)
    assert drain(outbox) == ["another part", "final"]


def test_final_response_alone_is_never_blocked(outbox: Outbox) -> None:
    outbox.put(A, "part", [bytes(CALL_WINDOW_BYTES)], is_counted=True)
    drain(outbox)
    outbox.put(A, "final")
    assert drain(outbox) == ["final"]


# --- progress ------------------------------------------------------------------------------------


def progress(outbox: Outbox, call: str, text: str) -> None:
    outbox.put(call, text, is_counted=True, is_progress=True)


def test_latest_progress_takes_the_place_of_the_one_that_waits(outbox: Outbox) -> None:
    progress(outbox, A, "10 %")
    progress(outbox, B, "x")
    progress(outbox, A, "100 %")
    assert outbox.texts == len("100 %") + 1
    assert drain(outbox) == ["100 %", "x"]
    assert outbox.texts == 0


def test_progress_never_overtakes_a_part(outbox: Outbox) -> None:
    progress(outbox, A, "1")
    outbox.put(A, "part", is_counted=True)
    progress(outbox, A, "2")
    progress(outbox, A, "3")
    assert drain(outbox) == ["1", "part", "3"]


def test_progress_that_was_sent_is_not_replaced(outbox: Outbox) -> None:
    progress(outbox, A, "1")
    assert outbox.take() == "1"
    progress(outbox, A, "2")
    assert drain(outbox) == ["2"]


# --- ends ----------------------------------------------------------------------------------------


def test_when_sent_is_called_after_the_last_byte(outbox: Outbox) -> None:
    sent: list[str] = []
    outbox.when_sent(A, lambda: sent.append("nothing waits"))
    assert sent.pop() == "nothing waits"
    outbox.put(A, "a", [b"x"])
    outbox.when_sent(A, lambda: sent.append("a"))
    outbox.put(B, "b")
    assert outbox.take() == "a"
    assert outbox.take() == "b"
    assert sent == []
    assert shown(outbox.take()) == (A, 1)
    assert sent == ["a"]


@pytest.mark.parametrize("how", ["drop", "cut", "clear"])
def test_when_sent_is_called_also_if_it_never_will_be(outbox: Outbox, how: str) -> None:
    sent: list[str] = []
    outbox.put(A, "part", [b"x"], is_counted=True)
    outbox.when_sent(A, lambda: sent.append("a"))
    if how == "clear":
        outbox.clear()
    else:
        getattr(outbox, how)(A)
    assert sent == ["a"]


def test_dropped_call_sends_nothing(outbox: Outbox) -> None:
    outbox.put(A, "a", [b"x"])
    outbox.put(B, "b")
    outbox.drop(A)
    outbox.drop(A)
    outbox.drop(C)
    assert drain(outbox) == ["b"]


def test_window_of_a_dropped_call_stays_what_it_was(outbox: Outbox) -> None:
    outbox.put(A, "part", [bytes(CALL_WINDOW_BYTES + 1)], is_counted=True)
    drain(outbox)
    outbox.drop(A)
    outbox.put(A, "another part", is_counted=True)
    assert outbox.take() is None
    outbox.credit(A, CALL_WINDOW_BYTES)
    assert drain(outbox) == ["another part"]


def test_ended_call_is_forgotten_once_all_is_sent(outbox: Outbox) -> None:
    outbox.put(A, "a", [b"x"])
    outbox.end(A)
    assert outbox.holds(A)
    assert drain(outbox) == ["a", (A, 1)]
    outbox.end(A)
    outbox.end(B)
    assert not outbox.holds(A)
    assert not outbox._lanes


def test_ended_call_that_is_dropped_is_forgotten(outbox: Outbox) -> None:
    outbox.put(A, "a", [b"x"])
    outbox.end(A)
    outbox.drop(A)
    assert drain(outbox) == []
    assert not outbox._lanes


def test_cut_leaves_the_final_response_without_what_is_attached(outbox: Outbox) -> None:
    outbox.put(A, "part", [b"x"], is_counted=True)
    progress(outbox, A, "50 %")
    outbox.put(A, "final", [b"y"])
    outbox.end(A)
    outbox.cut(A)
    assert (outbox.texts, outbox.attached) == (5, 0)
    assert drain(outbox) == ["final"]
    assert not outbox._lanes


def test_cut_of_a_final_response_that_is_on_its_way_drops_the_rest(outbox: Outbox) -> None:
    outbox.put(A, "final", [bytes(2 * CALL_WINDOW_BYTES)])
    outbox.end(A)
    drain(outbox)
    outbox.cut(A)
    assert outbox.take() is None
    assert not outbox._lanes
    outbox.cut(A)


def test_cleared_outbox_has_nothing(outbox: Outbox) -> None:
    outbox.put(A, "a", [b"x"])
    outbox.put(B, "b")
    outbox.end(B)
    outbox.grant(C, credit_frame(C, 1))
    outbox.clear()
    assert outbox.take() is None


def test_request_is_unsent_until_its_text_has_gone(outbox: Outbox) -> None:
    assert not outbox.is_unsent(A)
    outbox.put(A, "a", [b"x"])
    assert outbox.is_unsent(A)
    outbox.take()
    assert not outbox.is_unsent(A)
    outbox.take()
    assert not outbox.is_unsent(A)


def test_stream_follows_its_request_and_counts(outbox: Outbox) -> None:
    end = end_frame(A, bytes(32))
    outbox.put(A, "request", [b"x"])
    outbox.put_data(A, bytes(CALL_WINDOW_BYTES + 1))
    outbox.put_end(A, end)
    assert outbox.attached == CALL_WINDOW_BYTES + 2
    assert counted(outbox, A) == CALL_WINDOW_BYTES + 1  # a frame more than the one byte left was begun
    outbox.credit(A, CALL_WINDOW_BYTES)
    assert outbox.take() == data_frame(A, bytes(1))
    assert outbox.take() == end
    assert (outbox.texts, outbox.attached) == (0, 0)


def test_end_of_a_stream_is_no_request_that_waits(outbox: Outbox) -> None:
    outbox.put(A, "request")
    assert outbox.take() == "request"
    outbox.put_end(A, end_frame(A, bytes(32)))
    assert not outbox.is_unsent(A)


def test_cut_leaves_nothing_of_a_stream(outbox: Outbox) -> None:
    outbox.put_data(A, b"x")
    outbox.put_end(A, end_frame(A, bytes(32)))
    outbox.cut(A)
    assert outbox.take() is None


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(
            st.sampled_from([A, B, C]),
            st.integers(0, 3) | st.sampled_from([CHUNK_MAX_BYTES, 300_000]),
            st.booleans(),
        ),
        max_size=20,
    ),
    st.data(),
)
def test_everything_comes_once_in_order_within_the_window(
    puts: list[tuple[str, int, bool]], data: st.DataObject
) -> None:
    outbox = Outbox()
    expected: dict[str, list[Any]] = {A: [], B: [], C: []}
    for number, (call, size, is_counted) in enumerate(puts):
        outbox.put(call, f"{call} {number}", [bytes(size)], is_counted=is_counted)
        expected[call].append((f"{call} {number}", size, is_counted))
    came: dict[str, list[Any]] = {A: [], B: [], C: []}
    open_bytes: Counter[str] = Counter()
    taken: Counter[str] = Counter()
    for _ in range(10_000):
        message = outbox.take()
        if message is None:
            blocked = [call for call in open_bytes if open_bytes[call] >= CALL_WINDOW_BYTES]
            if not blocked:
                break
            call = data.draw(st.sampled_from(blocked))
            amount = data.draw(st.sampled_from([1, CALL_WINDOW_BYTES // 4, open_bytes[call]]))
            taken[call] += amount
            open_bytes[call] -= amount
            outbox.credit(call, taken[call])
            continue
        if isinstance(message, str):
            call = message.split()[0]
            is_counted = expected[call][len(came[call])][2]
            came[call].append((message, 0, is_counted))
            size = len(message) if is_counted else 0
        else:
            call, size = shown(message)
            text, before, is_counted = came[call][-1]
            came[call][-1] = (text, before + size, is_counted)
        if size:
            assert open_bytes[call] < CALL_WINDOW_BYTES
        open_bytes[call] += size
    assert came == expected
    assert (outbox.texts, outbox.attached) == (0, 0)
