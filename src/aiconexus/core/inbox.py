"""What arrives of calls in pieces: their attachments, and the credit for what was taken of them.

No I/O. Whoever reads the parts of a stream slowly grants no credit for those that wait, so the sender stops;
an attachment that is being collected and waits for nobody is granted as it comes, or one that is larger than
the window would never be complete.
"""

from __future__ import annotations

from collections import deque

from aiconexus.protocol.attachments import Assembly
from aiconexus.protocol.errors import MalformedMessageError
from aiconexus.protocol.frames import credit_frame
from aiconexus.protocol.limits import (
    ATTACHED_JSON_MAX_BYTES,
    ATTACHMENTS_MAX_BYTES,
    CALL_CREDIT_BYTES,
    CALL_WINDOW_BYTES,
)


class _Arrival:
    """What has come of one call.

    Attributes:
        assembly: The attachments that are being collected.
        is_streaming: Whether a stream of bytes follows them.
        arrived: How many bytes have come that need credit.
        granted: For how many of them the sender was given credit.
        collected: How many of them belong to the assembly.
        parts: Bytes of each part that its reader has not taken.
        held: All of these together, and the bytes of a stream in a request that its reader has not taken.
        kept: How many bytes of attachments are in memory, or announced.
    """

    def __init__(self) -> None:
        self.assembly: Assembly | None = None
        self.is_streaming = False
        self.arrived = 0
        self.granted = 0
        self.collected = 0
        self.parts: deque[tuple[int, int]] = deque()
        self.held = 0
        self.kept = 0

    @property
    def grantable(self) -> int:
        waits_behind = self.collected if self.held else 0
        return self.arrived - self.held - waits_behind


class Inbox:
    """The incoming side of all calls of one connection.

    Attributes:
        kept: How many bytes of attachments are in memory, or announced.
    """

    def __init__(self) -> None:
        self._calls: dict[str, _Arrival] = {}
        self.kept = 0

    def open(self, call: str) -> None:
        """Expect something of a call."""
        self._calls[call] = _Arrival()

    def close(self, call: str) -> None:
        """Expect nothing more of a call; what comes nevertheless has crossed its end."""
        arrival = self._calls.pop(call, None)
        if arrival is not None:
            self.kept -= arrival.kept

    @staticmethod
    def could_have_room(assembly: Assembly) -> bool:
        """Tell whether these attachments may come at any time."""
        return _room(assembly) <= ATTACHMENTS_MAX_BYTES and assembly.json_size <= ATTACHED_JSON_MAX_BYTES

    def has_room(self, assembly: Assembly) -> bool:
        """Tell whether these attachments may come now."""
        return self.could_have_room(assembly) and self.kept + _room(assembly) <= ATTACHMENTS_MAX_BYTES

    def collect(self, call: str, assembly: Assembly) -> None:
        """Collect the attachments of a call's last envelope; those of an earlier one are given up."""
        arrival = self._calls[call]
        self.give_up(call)
        arrival.assembly = assembly
        arrival.kept += _room(assembly)
        self.kept += _room(assembly)

    def give_up(self, call: str) -> None:
        """Forget attachments that are not complete: another envelope has come, or this one is refused."""
        arrival = self._calls[call]
        if arrival.assembly is not None:
            self._release(arrival, _room(arrival.assembly))
            arrival.assembly, arrival.collected = None, 0

    def add(self, call: str, chunk: bytes) -> Assembly | None:
        """Take the bytes of a DATA frame; return the attachments if they are complete now.

        Raises:
            MalformedMessageError: Nothing of this size was announced, or there is no credit for it.
        """
        arrival = self._calls.get(call)
        if arrival is None:
            return None
        assembly = arrival.assembly
        if assembly is None or assembly.missing < len(chunk):
            text = f"{len(chunk)} bytes of data that no attachment has announced"
            raise MalformedMessageError(text, name="bad_frame", message_id=call)
        self._arrived(call, arrival, len(chunk))
        arrival.collected += len(chunk)
        assembly.add(chunk)
        return self._completed(arrival)

    def completed(self, call: str) -> Assembly | None:
        """Return the attachments if they are complete without a single byte."""
        return self._completed(self._calls[call])

    def _completed(self, arrival: _Arrival) -> Assembly | None:
        assembly = arrival.assembly
        if assembly is None or assembly.missing:
            return None
        arrival.assembly, arrival.collected = None, 0
        arrival.is_streaming = assembly.stream is not None
        return assembly

    def is_streaming(self, call: str) -> bool:
        """Tell whether what comes of a call are the bytes of a stream in its request."""
        arrival = self._calls.get(call)
        return arrival is not None and arrival.is_streaming

    def hold_input(self, call: str, size: int) -> None:
        """Take note of the next bytes of a stream in a request; they wait for its reader.

        Raises:
            MalformedMessageError: There is no credit for them.
        """
        self.count(call, size)
        self._calls[call].held += size

    def took_input(self, call: str, size: int) -> None:
        """Take note that the reader of a stream in a request has taken so many bytes."""
        arrival = self._calls.get(call)
        if arrival is not None:
            arrival.held -= size

    def end_input(self, call: str) -> bool:
        """Take note that the stream in a request is complete; tell whether the call is under way.

        Raises:
            MalformedMessageError: There is none.
        """
        arrival = self._calls.get(call)
        if arrival is None:
            return False
        if not arrival.is_streaming:
            raise MalformedMessageError("no stream that could end", name="bad_frame", message_id=call)
        arrival.is_streaming = False
        return True

    def count(self, call: str, size: int) -> None:
        """Take note of a text that needs credit.

        Raises:
            MalformedMessageError: There was none for it.
        """
        arrival = self._calls.get(call)
        if arrival is not None:
            self._arrived(call, arrival, size)

    def hold(self, call: str, text: int, attached: int) -> None:
        """Take note of a part that is complete and waits for its reader."""
        arrival = self._calls[call]
        arrival.parts.append((text + attached, attached))
        arrival.held += text + attached

    def release(self, call: str, attached: int) -> None:
        """Take note that what came with so many bytes of attachments waits for nobody."""
        self._release(self._calls[call], attached)

    def took(self, call: str) -> None:
        """Take note that the reader has taken the first part that waited."""
        arrival = self._calls.get(call)
        if arrival is not None and arrival.parts:
            size, attached = arrival.parts.popleft()
            arrival.held -= size
            self._release(arrival, attached)

    def credit(self, call: str) -> bytes | None:
        """Return the CREDIT frame that is due, if one is."""
        arrival = self._calls.get(call)
        if arrival is None or arrival.grantable - arrival.granted < CALL_CREDIT_BYTES:
            return None
        arrival.granted = arrival.grantable
        return credit_frame(call, arrival.granted)

    def _arrived(self, call: str, arrival: _Arrival, size: int) -> None:
        arrival.arrived += size
        # Twice the window, for the sender may not have counted as exactly.
        if arrival.arrived - arrival.granted > 2 * CALL_WINDOW_BYTES:
            raise MalformedMessageError(
                "more came than there was credit for", name="bad_frame", message_id=call
            )

    def _release(self, arrival: _Arrival, size: int) -> None:
        arrival.kept -= size
        self.kept -= size


def _room(assembly: Assembly) -> int:
    """Return how many bytes may have to be kept: of a stream, those that its reader has not taken."""
    return assembly.size + (0 if assembly.stream is None else CALL_WINDOW_BYTES)
