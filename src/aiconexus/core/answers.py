"""The last answers to one agent, so that a request that comes twice is executed once and answered alike.

They outlive the connection: whoever lost it with a call under way may ask again over the next one.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from aiconexus.protocol.limits import CLOCK_SKEW_SECONDS

# After that a request is stale by its timestamp, which may have been as far ahead as it may be behind.
KEEP_SECONDS: Final = 2 * CLOCK_SKEW_SECONDS
KEEP_MAX: Final = 8_192  # requests of one agent: twice as many as it may have accepted
KEEP_MAX_BYTES: Final = 1_048_576  # of their answers; an answer with attachments is not kept


@dataclass
class Answer:
    """What became of a request.

    Attributes:
        id: Of the request.
        signature: Of the request: the same id with another one is another request.
        since: When the request came, in seconds of a monotonic clock.
        is_over: Whether there was a final response.
        text: That response, as long as it is kept.
        listeners: Called with the id and that response, or None if it is not kept, once it is there.
    """

    id: str
    signature: str
    since: float
    is_over: bool = False
    text: str | None = None
    listeners: set[Callable[[str, str | None], None]] = field(default_factory=set)


class Answers:
    """The last requests of one agent and their final responses."""

    def __init__(self) -> None:
        self._answers: OrderedDict[str, Answer] = OrderedDict()
        self._kept: deque[Answer] = deque()
        self._size = 0

    def __len__(self) -> int:
        return len(self._answers)

    def find(self, request: str, now: float) -> Answer | None:
        """Return what is known of a request; None if it is new, or was forgotten."""
        while self._answers and now - next(iter(self._answers.values())).since >= KEEP_SECONDS:
            self._answers.popitem(last=False)
        return self._answers.get(request)

    def begin(self, request: str, signature: str, now: float) -> Answer:
        """Take note of a request that is about to be executed."""
        if len(self._answers) >= KEEP_MAX:
            self._answers.popitem(last=False)
        answer = self._answers[request] = Answer(request, signature, now)
        return answer

    def end(self, answer: Answer, text: str | None) -> None:
        """Take note of the final response; None if it cannot be repeated.

        Whoever waits for it is told, also if the request itself was forgotten while it ran.
        """
        answer.is_over = True
        if text is not None and len(text) <= KEEP_MAX_BYTES:
            answer.text = text
            self._kept.append(answer)
            self._size += len(text)
        while self._size > KEEP_MAX_BYTES:
            dropped = self._kept.popleft()
            self._size -= len(dropped.text or "")
            dropped.text = None
        listeners, answer.listeners = answer.listeners, set()
        for listener in listeners:
            listener(answer.id, answer.text)
