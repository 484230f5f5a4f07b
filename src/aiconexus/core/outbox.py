"""What waits to be sent over one DataChannel: the calls take turns, and each keeps within its credit.

No I/O: the channel takes one message after the other as long as it has room. A turn is one text or one DATA
frame, so a call with 1 GB to send holds up the others by 16 KiB at a time.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from aiconexus.protocol.frames import data_frame
from aiconexus.protocol.limits import CALL_WINDOW_BYTES, CHUNK_MAX_BYTES

_NOBODY: Final = lambda: None  # noqa: E731


@dataclass
class _Item:
    """An envelope and what is attached to it.

    Attributes:
        text: The envelope, or an END frame; None once it was sent.
        attached: Bytes that follow it.
        is_counted: Whether the text counts in the window.
        is_progress: Whether a later one may take its place.
        sent: Called when all of it was sent, or dropped.
    """

    text: str | bytes | None
    attached: deque[memoryview]
    is_counted: bool = False
    is_progress: bool = False
    sent: Callable[[], None] = _NOBODY

    @property
    def size(self) -> int:
        """How many bytes of it wait."""
        text = self.text.encode() if isinstance(self.text, str) else self.text or b""
        return len(text) + sum(map(len, self.attached))


class _Lane:
    """What waits of one call, in its order.

    Attributes:
        counted: How many bytes were sent that need credit.
        taken: For how many of them there was credit.
        is_ending: Whether nothing more comes.
    """

    def __init__(self) -> None:
        self.items: deque[_Item] = deque()
        self.counted = 0
        self.taken = 0
        self.is_ending = False

    @property
    def has_turn(self) -> bool:
        """Whether its next message may be sent now."""
        if not self.items:
            return False
        item = self.items[0]
        is_free = item.text is not None and not item.is_counted
        return is_free or self.counted - self.taken < CALL_WINDOW_BYTES


class Outbox:
    """The messages of all calls of one connection that were not handed to its channel yet.

    Attributes:
        ready: Called when there is something to take.
    """

    def __init__(self) -> None:
        self.ready: Callable[[], None] = _NOBODY
        # In the order of their turns. Blocked ones and those without anything are not in it.
        self._turns: OrderedDict[str, _Lane] = OrderedDict()
        self._lanes: dict[str, _Lane] = {}
        self._grants: dict[str, bytes] = {}  # CREDIT; a later one of a call takes the place of an earlier one

    def put(
        self,
        call: str,
        text: str,
        attached: Sequence[bytes] = (),
        *,
        is_counted: bool = False,
        is_progress: bool = False,
    ) -> None:
        """Add a message of a call behind those that wait of it.

        Args:
            call: Its id.
            text: The envelope.
            attached: The bytes that follow it.
            is_counted: Whether the text needs credit, too.
            is_progress: Whether it tells how far the call is: then only the latest is of interest.
        """
        lane = self._lanes.get(call)
        last = lane.items[-1] if lane is not None and lane.items else None
        if is_progress and last is not None and last.is_progress and last.text is not None:
            last.text = text
            return
        views = deque(memoryview(data) for data in attached if data)
        self._add(call, _Item(text, views, is_counted, is_progress))

    def put_data(self, call: str, data: bytes) -> None:
        """Add the next bytes of the stream in a request."""
        self._add(call, _Item(None, deque([memoryview(data)])))

    def put_end(self, call: str, frame: bytes) -> None:
        """Add the END frame of the stream in a request."""
        self._add(call, _Item(frame, deque()))

    def _add(self, call: str, item: _Item) -> None:
        lane = self._lanes.setdefault(call, _Lane())
        lane.items.append(item)
        self._give_turn(call, lane)
        self.ready()

    def take(self) -> str | bytes | None:
        """Return the next message to send; None while nothing waits that may be sent."""
        if self._grants:
            return self._grants.pop(next(iter(self._grants)))
        if not self._turns:
            return None
        call, lane = self._turns.popitem(last=False)
        item = lane.items[0]
        message: str | bytes
        if item.text is not None:
            message, item.text = item.text, None
            lane.counted += len(message.encode()) if item.is_counted and isinstance(message, str) else 0
        else:
            view = item.attached[0]
            chunk = view[:CHUNK_MAX_BYTES]
            message = data_frame(call, chunk)
            lane.counted += len(chunk)
            if len(chunk) == len(view):
                item.attached.popleft()
            else:
                item.attached[0] = view[CHUNK_MAX_BYTES:]
        if item.text is None and not item.attached:
            lane.items.popleft()
            item.sent()
            self._forget_ended(call, lane)
        self._give_turn(call, lane)
        return message

    def grant(self, call: str, frame: bytes) -> None:
        """Send the CREDIT frame of a call before everything else: somebody may wait for it."""
        self._grants[call] = frame
        self.ready()

    def credit(self, call: str, taken: int) -> None:
        """Take note of how many bytes of a call the other side has taken by now."""
        lane = self._lanes.get(call)
        if lane is not None and lane.taken < taken <= lane.counted:
            lane.taken = taken
            self._give_turn(call, lane)
            self.ready()

    def when_sent(self, call: str, callback: Callable[[], None]) -> None:
        """Call `callback` once all that waits of a call was taken, or dropped; at once if nothing does."""
        lane = self._lanes.get(call)
        if lane is None or not lane.items:
            callback()
        else:
            lane.items[-1].sent = callback

    def size(self, call: str) -> int:
        """Return how many bytes wait of a call."""
        lane = self._lanes.get(call)
        return 0 if lane is None else sum(item.size for item in lane.items)

    def holds(self, call: str) -> bool:
        """Tell whether anything waits of a call."""
        lane = self._lanes.get(call)
        return lane is not None and bool(lane.items)

    def is_unsent(self, call: str) -> bool:
        """Tell whether the first envelope of a call still waits."""
        lane = self._lanes.get(call)
        return lane is not None and bool(lane.items) and isinstance(lane.items[0].text, str)

    def drop(self, call: str) -> None:
        """Forget what waits of a call."""
        lane = self._lanes.get(call)
        if lane is None:
            return
        self._turns.pop(call, None)
        items, lane.items = lane.items, deque()
        for item in items:
            item.sent()
        self._forget_ended(call, lane)

    def cut(self, call: str) -> None:
        """Forget what waits of a call that nobody reads any more, but for its final response's envelope."""
        lane = self._lanes.get(call)
        if lane is None:
            return
        final = [item.text for item in lane.items if isinstance(item.text, str) and not item.is_counted]
        is_ending, lane.is_ending = lane.is_ending, False
        self.drop(call)
        for text in final:
            self.put(call, text)
        lane.is_ending = is_ending
        self._forget_ended(call, lane)

    def clear(self) -> None:
        """Forget everything: nothing can be sent any more."""
        self._grants.clear()
        for call in list(self._lanes):
            self.drop(call)

    def end(self, call: str) -> None:
        """Forget a call, once what waits of it was sent: nothing is put for it any more."""
        lane = self._lanes.get(call)
        if lane is not None:
            lane.is_ending = True
            self._forget_ended(call, lane)

    def _forget_ended(self, call: str, lane: _Lane) -> None:
        if lane.is_ending and not lane.items:
            del self._lanes[call]

    def _give_turn(self, call: str, lane: _Lane) -> None:
        if call not in self._turns and lane.has_turn:
            self._turns[call] = lane
