"""What was asked, until its answer is taken."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest

from aiconexus.core.question import LateError, Question
from aiconexus.protocol.receipts import Receipt

RECEIPT = Receipt("{}", "{}")


async def test_parts_come_in_order_before_the_answer() -> None:
    question = Question()
    for part in (1, b"two", None):
        question.add(part)
    question.succeed("the answer")
    assert [await question.next_part(1.0) for _ in range(4)] == [(1,), (b"two",), (None,), None]
    assert question.answer.result() == "the answer"


async def test_parts_come_before_the_failure() -> None:
    question = Question()
    question.add(1)
    question.fail(ValueError("no"))
    assert await question.next_part(1.0) == (1,)
    assert await question.next_part(1.0) is None
    with pytest.raises(ValueError, match="no"):
        question.answer.result()


@pytest.mark.parametrize("how", ["add", "succeed", "fail"])
async def test_who_waits_is_woken(how: str) -> None:
    question = Question()
    waiting = asyncio.ensure_future(question.next_part(60.0))
    await asyncio.sleep(0)
    assert not waiting.done()
    if how == "fail":
        question.fail(ValueError("no"))
    else:
        getattr(question, how)(1)
    assert await asyncio.wait_for(waiting, 10) == ((1,) if how == "add" else None)
    question.close()


@pytest.mark.parametrize("seconds", [0.01, 0.0, -1.0])
async def test_wait_has_an_end(seconds: float) -> None:
    question = Question()
    with pytest.raises(LateError):
        await question.next_part(seconds)
    question.add(1)
    assert await question.next_part(seconds) == (1,)  # what is there is taken, however late
    question.succeed(2)
    assert await question.next_part(seconds) is None


async def test_cancelled_wait_loses_no_part() -> None:
    question = Question()
    waiting = asyncio.ensure_future(question.next_part(60.0))
    await asyncio.sleep(0)
    question.add(1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await question.next_part(1.0) == (1,)


async def test_first_answer_counts() -> None:
    heard: list[Receipt] = []
    question = Question(on_receipt=heard.append)
    question.succeed(1, RECEIPT)
    question.succeed(2, RECEIPT)
    question.fail(ValueError("no"), RECEIPT)
    assert question.answer.result() == 1
    assert heard == [RECEIPT]


async def test_failure_has_a_receipt_only_if_it_was_signed() -> None:
    heard: list[Receipt] = []
    unsigned, signed = Question(on_receipt=heard.append), Question(on_receipt=heard.append)
    unsigned.fail(ValueError("lost"))
    assert heard == []
    signed.fail(ValueError("no"), RECEIPT)
    assert heard == [RECEIPT]
    for question in (unsigned, signed):
        question.close()


async def test_progress_is_told() -> None:
    told: list[Any] = []
    Question(told.append).progress({"step": 1})
    Question().progress({"step": 2})  # to nobody
    assert told == [{"step": 1}]


class Later:
    async def __call__(self, value: Any) -> None: ...


async def later(value: Any) -> None: ...


@pytest.mark.parametrize("callback", [later, partial(later), Later(), Later().__call__, "print", 7])
@pytest.mark.parametrize("name", ["on_progress", "on_receipt"])
async def test_callback_is_called_and_not_awaited(name: str, callback: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{name} is called, not awaited: give a plain function$"):
        Question(**{name: callback})


async def test_callback_that_fails_is_logged_and_harms_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: Any) -> None:
        raise RuntimeError("not today")

    question = Question(fail, fail)
    question.progress(1)
    question.succeed(2, RECEIPT)
    assert question.answer.result() == 2
    assert caplog.text.count("RuntimeError: not today") == 2


async def test_closed_question_takes_no_answer() -> None:
    heard: list[Receipt] = []
    question = Question(on_receipt=heard.append)
    question.close()
    question.close()
    question.succeed(1, RECEIPT)
    question.fail(ValueError("no"), RECEIPT)
    assert question.answer.cancelled()
    assert heard == []
    assert await question.next_part(1.0) is None


async def test_failure_that_nobody_waits_for_is_not_reported() -> None:
    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    question = Question()
    question.fail(ValueError("no"))
    question.close()
    del question
    await asyncio.sleep(0)
    assert reported == []
