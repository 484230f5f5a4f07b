"""One WebSocket to the gateway: dial, REGISTER, and how it ended. Everything of `websockets` is in here."""

from __future__ import annotations

import asyncio
import logging
import ssl as tls
from typing import Any, Final
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Subprotocol

from aiconexus.client import handshake
from aiconexus.client.backoff import RETRY_AFTER_MAX_SECONDS, retry_after, retry_after_http
from aiconexus.client.deadline import within
from aiconexus.client.handshake import Resume, Session, Shown
from aiconexus.protocol import CloseCode, DIDKey, MessageError, ReplayGuard, encode
from aiconexus.protocol.errors import (
    GatewayClosedError,
    GatewayError,
    GatewayIdentityError,
    GatewayUnreachableError,
    RegistrationError,
    close_code,
)
from aiconexus.protocol.limits import (
    MESSAGE_MAX_BYTES,
    PING_INTERVAL_SECONDS,
    PONG_TIMEOUT_SECONDS,
    SUBPROTOCOL,
)

CLOSE_TIMEOUT_SECONDS: Final = 2.0  # for the closing handshake, and for a CLOSE that must follow

_LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
_CONNECTING: Final = "connecting"
_NO_TLS: Final = "the port may not speak TLS: dial ws://, or the proxy in front of it that does"
_BROKEN: Final = close_code(1006)
_ADVICE: Final = {
    4500: "upgrade this package or the gateway",
    4502: "check the key, the clock of this machine and the URL",
    4503: "ask the gateway's operator",
    4504: "a second client runs with the same key, end one of them",
    4505: "upgrade this package or the gateway",
}

_wire_log = logging.getLogger("aiconexus.client.websocket")  # what `websockets` logs: silent like the rest


class ConnectionEnded(Exception):  # noqa: N818 -- how every connection ends; it never leaves the client
    """A connection ended, or none came about.

    Attributes:
        error: What users are told.
        close: The close code; 1006 where there was no CLOSE frame.
        retry_after: Earliest next attempt, in seconds from now.
    """

    def __init__(self, error: GatewayError, close: CloseCode = _BROKEN, retry_after: float = 0.0) -> None:
        self.error = error
        self.close = close
        self.retry_after = retry_after
        super().__init__(str(error))


def closed_for_good(url: str, reason: str, close: CloseCode) -> GatewayClosedError:
    """Build the error of a terminal close code, with what to do next."""
    advice = _ADVICE.get(close.number, "make a new client to come back")
    return GatewayClosedError(f"{url} closed the connection for good: {reason}; {advice}", close)


def _is_no_tls(error: Exception) -> bool:
    """Tell whether a port that does not speak TLS may be what a TLS handshake failed for."""
    is_tls = isinstance(error, tls.SSLError) and not isinstance(error, tls.SSLCertVerificationError)
    return is_tls or isinstance(error, ConnectionResetError)


class Connection:
    """One WebSocket to the gateway.

    Args:
        dialled_url: As the user gave it.
        ssl: For `wss`; the system's certificates if None.

    Attributes:
        url: The dialled URL without userinfo, to show and to sign.
        session: What the gateway granted; set by `open`.
        resume: For the next connection; set by `open`.
    """

    session: Session
    resume: Resume | None

    def __init__(self, dialled_url: str, ssl: tls.SSLContext | None = None) -> None:
        self.url: Final = handshake.audience(dialled_url)
        self._dialled_url = dialled_url
        self._ssl = ssl
        self._socket: ClientConnection | None = None
        self._is_secure = self.url.startswith("wss:")
        self._stage = _CONNECTING

    async def open(
        self,
        key: DIDKey,
        *,
        gateway_did: str | None,
        shown: Shown,
        resume: Resume | None,
        guard: ReplayGuard,
        timeout: float,
    ) -> None:
        """Dial and register within `timeout` seconds. See `handshake` for the other arguments.

        Raises:
            ConnectionEnded: It did not succeed; nothing is left open. Neither is after a cancellation.
        """
        try:
            await within(self._register(key, gateway_did, shown, resume, guard), timeout)
        except BaseException as error:
            self.abort()
            if isinstance(error, asyncio.TimeoutError):
                unreachable = f"{self.url} did not answer within {timeout:g} s ({self._stage})"
                if self._stage == _CONNECTING and self._is_secure:
                    unreachable = f"{unreachable}; {_NO_TLS}"
                raise ConnectionEnded(GatewayUnreachableError(unreachable)) from None
            raise

    async def _register(
        self,
        key: DIDKey,
        gateway_did: str | None,
        shown: Shown,
        resume: Resume | None,
        guard: ReplayGuard,
    ) -> None:
        await self._dial()
        try:
            self._stage = "waiting for its REGISTER"
            challenge = handshake.read_challenge(await self.receive(), gateway_did)
            register = handshake.answer_challenge(key, challenge, self.url, shown, resume)
            self._stage = "waiting for its answer to REGISTER"
            await self.send(encode(register))
            answer = await self.receive()
            self.session, self.resume = handshake.read_answer(answer, register, challenge, guard)
        except RegistrationError as error:
            if error.cause is None:
                raise ConnectionEnded(error) from error
            # Only the close code that follows tells whether to come back.
            end = await self._next_close()
            asked = min((error.cause.retry_after_ms or 0) / 1000, RETRY_AFTER_MAX_SECONDS)
            raise ConnectionEnded(error, end.close, max(end.retry_after, asked)) from error
        except GatewayError as error:
            raise ConnectionEnded(error) from error
        except MessageError as error:  # a nonce as large as a message
            fault = GatewayIdentityError(f"the gateway asks for what cannot be sent: {error}")
            raise ConnectionEnded(fault) from error

    async def _dial(self) -> None:
        options: dict[str, Any] = {} if self._ssl is None else {"ssl": self._ssl}
        if urlsplit(self._dialled_url).hostname in _LOOPBACK:
            options["proxy"] = None  # one that the environment names would look for it on its own machine
        try:
            self._socket = await connect(
                self._dialled_url,
                subprotocols=[Subprotocol(SUBPROTOCOL)],
                compression=None,  # signatures and keys do not compress; its buffers cost 64 KiB
                max_size=MESSAGE_MAX_BYTES,
                open_timeout=None,  # the deadline of `open` holds
                ping_interval=PING_INTERVAL_SECONDS,
                ping_timeout=PONG_TIMEOUT_SECONDS,
                close_timeout=CLOSE_TIMEOUT_SECONDS,
                logger=_wire_log,
                **options,
            )
        except InvalidStatus as error:
            status = error.response.status_code
            advice, temporary = "check the URL, also its path", status == 429 or status >= 500
            if status in (429, 503):
                advice = "it is full or stops, or a balancer has no gateway behind it"
            text = f"{self.url} answered HTTP {status} instead of a WebSocket: {advice}"
            wait = retry_after_http(error.response.headers.get("Retry-After"))
            unreachable = GatewayUnreachableError(text, temporary=temporary)
            raise ConnectionEnded(unreachable, retry_after=wait) from error
        except Exception as error:  # DNS, TCP, TLS, proxy, HTTP: whatever it is, there is no connection
            text = f"{self.url} cannot be reached: {str(error) or type(error).__name__}"
            advice = "is the gateway running, and is this its address?"
            if self._is_secure and _is_no_tls(error):
                advice = _NO_TLS
            temporary = not isinstance(error, tls.SSLCertVerificationError)
            raise ConnectionEnded(
                GatewayUnreachableError(f"{text}; {advice}", temporary=temporary)
            ) from error
        if self._socket.subprotocol != SUBPROTOCOL:
            text = f"{self.url} does not speak {SUBPROTOCOL}: it is not a gateway"
            raise ConnectionEnded(GatewayUnreachableError(text, temporary=False))

    async def _next_close(self) -> ConnectionEnded:
        """Wait for the CLOSE frame that follows a refusal."""

        async def discard() -> None:
            while True:
                await self.receive()

        try:
            await within(discard(), CLOSE_TIMEOUT_SECONDS)
        except ConnectionEnded as end:
            return end
        except asyncio.TimeoutError:
            pass
        return ConnectionEnded(GatewayUnreachableError(f"{self.url} did not close what it refused"))

    async def receive(self) -> str | bytes:
        """Return the next message: str of a text frame, bytes of a binary one.

        Raises:
            ConnectionEnded: There is none.
        """
        assert self._socket is not None
        try:
            return await self._socket.recv()
        except ConnectionClosed as closed:
            raise self._ended(closed) from closed

    async def send(self, data: bytes) -> None:
        """Send a text frame; wait while the write buffer is full.

        Raises:
            ConnectionEnded: It was not sent, or it is not known whether it arrived.
        """
        assert self._socket is not None
        try:
            await self._socket.send(data, text=True)
        except ConnectionClosed as closed:
            raise self._ended(closed) from closed

    async def close(self) -> None:
        """Close with code 1000 and wait for the gateway's answer, for at most CLOSE_TIMEOUT_SECONDS."""
        assert self._socket is not None
        await self._socket.close()

    def abort(self) -> None:
        """Drop the connection at once; without effect where it is closed."""
        if self._socket is not None:
            self._socket.transport.abort()

    def _ended(self, closed: ConnectionClosed) -> ConnectionEnded:
        """Read what to do from a close code."""
        frame = closed.rcvd or closed.sent  # sent: `websockets` refused a frame, or a ping found no pong
        close = _BROKEN if frame is None else close_code(frame.code)
        reason = f"{close.meaning} ({close.number} {close.name})"
        if not close.reconnect:
            return ConnectionEnded(closed_for_good(self.url, reason, close), close)
        wait = retry_after(close, closed.rcvd.reason if closed.rcvd is not None else "")
        return ConnectionEnded(
            GatewayUnreachableError(f"the connection to {self.url} ended: {reason}"), close, wait
        )
