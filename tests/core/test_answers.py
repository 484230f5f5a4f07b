"""What is known of earlier requests, and for how long."""

from __future__ import annotations

from aiconexus.core.answers import KEEP_MAX, KEEP_MAX_BYTES, KEEP_SECONDS, Answers
from aiconexus.protocol.limits import CLOCK_SKEW_SECONDS


def test_request_is_known_from_its_begin_on() -> None:
    answers = Answers()
    assert answers.find("one", 0.0) is None
    answer = answers.begin("one", "signature", 0.0)
    assert answers.find("one", 0.0) is answer
    assert (answer.signature, answer.is_over, answer.text) == ("signature", False, None)
    answers.end(answer, "the answer")
    assert (answer.is_over, answer.text) == (True, "the answer")


def test_request_is_forgotten_when_its_timestamp_is_stale() -> None:
    assert KEEP_SECONDS == 2 * CLOCK_SKEW_SECONDS
    answers = Answers()
    for number in range(3):
        answers.end(answers.begin(str(number), "", float(number)), "text")
    assert answers.find("0", KEEP_SECONDS - 0.1) is not None
    assert answers.find("0", KEEP_SECONDS) is None
    assert answers.find("1", KEEP_SECONDS) is not None
    assert answers.find("nothing", KEEP_SECONDS + 2) is None
    assert len(answers) == 0


def test_requests_of_one_agent_are_bounded() -> None:
    answers = Answers()
    for number in range(KEEP_MAX + 1):
        assert len(answers) == min(number, KEEP_MAX)
        answers.begin(str(number), "", 0.0)
    assert answers.find("0", 0.0) is None
    assert answers.find("1", 0.0) is not None


def test_question_for_a_request_makes_nobody_forget_one() -> None:
    answers = Answers()
    for number in range(KEEP_MAX):
        answers.begin(str(number), "", 0.0)
    assert answers.find("0", 0.0) is not None
    assert len(answers) == KEEP_MAX


def test_texts_of_one_agent_are_bounded_and_the_oldest_go_first() -> None:
    answers = Answers()
    size = KEEP_MAX_BYTES // 4
    known = [answers.begin(str(number), "", 0.0) for number in range(6)]
    for answer in known:
        answers.end(answer, "x" * size)
    assert [answer.text is not None for answer in known] == [False, False, True, True, True, True]
    assert all(answer.is_over for answer in known)
    assert answers.find("0", 0.0) is known[0]


def test_text_that_is_longer_than_all_may_be_is_not_kept() -> None:
    answers = Answers()
    short, long = answers.begin("short", "", 0.0), answers.begin("long", "", 0.0)
    answers.end(short, "x")
    answers.end(long, "x" * (KEEP_MAX_BYTES + 1))
    assert (short.text, long.text, long.is_over) == ("x", None, True)


def test_answer_that_cannot_be_repeated_is_over_without_a_text() -> None:
    answers = Answers()
    answer = answers.begin("one", "", 0.0)
    answers.end(answer, None)
    assert (answer.is_over, answer.text) == (True, None)


def test_listeners_hear_the_end_once() -> None:
    answers, heard = Answers(), []

    def listener(id_: str, text: str | None) -> None:
        heard.append((id_, text))

    kept, other = answers.begin("kept", "", 0.0), answers.begin("other", "", 0.0)
    for answer in (kept, other):
        answer.listeners.add(listener)
        answer.listeners.add(listener)
    answers.end(kept, "text")
    answers.end(other, None)
    assert heard == [("kept", "text"), ("other", None)]
    assert not kept.listeners


def test_listener_of_a_request_that_runs_for_long_hears_its_end() -> None:
    answers, heard = Answers(), []
    long = answers.begin("long", "", 0.0)
    long.listeners.add(lambda _, text: heard.append(text))
    assert answers.find("long", KEEP_SECONDS) is None
    answers.end(long, "at last")
    assert heard == ["at last"]
