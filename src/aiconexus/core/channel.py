"""Messages over one RTCDataChannel, with backpressure."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from aiortc import RTCDataChannel

HIGH_WATER_BYTES: Final = 131_072  # a PING waits behind it: a second at 1 Mbit/s
LOW_WATER_BYTES: Final = 32_768


class Channel:
    """One open RTCDataChannel.

    Messages that arrive before there is a receiver wait for it: the first may come with the packet that
    opens the channel.

    Attributes:
        closed: Done when nothing more will come or go.
    """

    def __init__(self, channel: RTCDataChannel) -> None:
        self._channel = channel
        self._early: list[str | bytes] = []
        self._handed_over = 0
        self._is_closing = False
        self._receiver: Callable[[str | bytes], None] = self._early.append
        self._writable: Callable[[], None] = lambda: None
        self.closed: Final[asyncio.Future[None]] = asyncio.get_running_loop().create_future()
        channel.bufferedAmountLowThreshold = LOW_WATER_BYTES
        channel.on("message", self._message)
        channel.on("bufferedamountlow", self._became_writable)
        channel.on("close", self._closed)

    def receive(self, receiver: Callable[[str | bytes], None]) -> None:
        """Give every message to `receiver`, first those that wait. It must not raise."""
        self._receiver = receiver
        for data in self._early:
            receiver(data)
        self._early = []

    def on_writable(self, callback: Callable[[], None]) -> None:
        """Call `callback` whenever it is congested no longer (W3C: `bufferedamountlow`)."""
        self._writable = callback

    @property
    def is_open(self) -> bool:
        """Whether messages can be sent."""
        return not self._is_closing and self._channel.readyState == "open"

    @property
    def is_congested(self) -> bool:
        """Whether more waits to be sent than should: whoever can wait, waits for `on_writable`."""
        return self.buffered > HIGH_WATER_BYTES

    @property
    def buffered(self) -> int:
        """How many bytes the transport holds that have not left (W3C: `bufferedAmount`)."""
        return self._channel.bufferedAmount

    @property
    def taken(self) -> int:
        """How many bytes have left since the beginning; it grows by whole messages."""
        return self._handed_over - self.buffered

    def send(self, data: str | bytes) -> None:
        """Send one message, text or binary, whatever waits before it.

        Raises:
            ConnectionError: The channel is closed.
            ValueError: The other end takes no message of this size.
        """
        if not self.is_open:
            raise ConnectionError("the DataChannel is closed")
        before = self.buffered
        self._channel.send(data)
        self._handed_over += self.buffered - before

    def close(self) -> None:
        """Close the channel after what waits has been sent (RFC 8831 section 6.7); nothing more is taken."""
        self._is_closing = True
        # aiortc before 1.16, the last one for Python 3.10, would reset the stream before it.
        self._channel.bufferedAmountLowThreshold = 0
        self._close_if_empty()

    def _message(self, data: str | bytes) -> None:
        self._receiver(data)

    def _close_if_empty(self) -> None:
        if self.buffered == 0:
            self._channel.close()

    def _became_writable(self) -> None:
        if self._is_closing:
            self._close_if_empty()
        else:
            self._writable()

    def _closed(self) -> None:
        if not self.closed.done():
            self.closed.set_result(None)
