"""The HTTP side of the public port: the WebSocket upgrade (RFC 6455 section 4.2), and who asks how it is."""

from __future__ import annotations

import asyncio
import os
import re
import struct
from collections.abc import Callable
from http import HTTPStatus
from typing import cast

import orjson
from multidict import CIMultiDict
from picows import (
    WSAutoPingStrategy,
    WSFrame,
    WSListener,
    WSTransport,
    WSUpgradeRequest,
    WSUpgradeResponse,
    WSUpgradeResponseWithListener,
)
from picows.picows import WSProtocol  # type: ignore[attr-defined]  # not in its stubs

from aiconexus.protocol.limits import ENDPOINT_PATH, MESSAGE_MAX_BYTES, SUBPROTOCOL
from gateway._connection import Connection
from gateway.log import PicowsLog

HEALTH_PATH = "/health"
READY_PATH = "/ready"
_KEY = re.compile(r"[A-Za-z0-9+/]{22}==")
# picows grows it up to 16 KiB.
REQUEST_BUFFER_BYTES = 2048
# To a client that is not heard at all.
TOO_MANY_REQUESTS = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nConnection: close\r\n"
    b"Content-Type: text/plain\r\nContent-Length: 29\r\n\r\ntoo many unfinished requests\n"
)
_HTTP_1_0 = b" HTTP/1.0"
# A TLS record of the handshake begins with it (RFC 8446 section 5.1), and no HTTP request.
_TLS_HANDSHAKE = 0x16
# TLS clients call such an answer a wrong version number, and give up at once.
NO_TLS = (
    b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Type: text/plain\r\n"
    b"Content-Length: 44\r\n\r\nthis port does not speak TLS: dial ws://...\n"
)


class HandedOver(WSListener):
    """Takes the socket away from picows once the upgrade is accepted.

    picows reads and checks the request; from the 101 response on a `Connection` has the socket to itself.

    Args:
        connection: It.
    """

    def __init__(self, connection: Connection, response: AcceptedResponse) -> None:
        self._connection = connection
        self._response = response

    def on_ws_connected(self, transport: WSTransport) -> None:
        """Duplicate the descriptor, for uvloop will close its own."""
        handle = transport.underlying_transport
        # Counted as a connection from here on, and not twice.
        cast(RequestProtocol, handle.get_protocol()).end_request()
        fd = os.dup(handle.get_extra_info("socket").fileno())
        handle.abort()
        self._connection.open(fd, self._response.data)

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        """Refuse a client that spoke before it was answered (RFC 6455 section 4.1)."""
        self._connection.refuse_early_frame()


class AcceptedResponse(WSUpgradeResponse):
    """A 101 response with the server's first text frame behind it, kept for the connection to send."""

    __slots__ = ("data", "first_message")
    data: bytes
    first_message: bytes

    def to_bytes(self) -> bytearray:
        """Keep the response and the frame (unmasked, RFC 6455 section 5.2); give picows nothing to write."""
        size = len(self.first_message)
        header = bytes((0x81, size)) if size < 126 else struct.pack("!BBH", 0x81, 126, size)
        self.data = b"".join((super().to_bytes(), header, self.first_message))
        return bytearray()


class RequestProtocol(WSProtocol):  # type: ignore[misc]
    """Reads one HTTP request of a new connection, and knows where it comes from.

    Args:
        on_request: Answers it: (request, IP address of the client).
        timeout: Seconds for the whole request.
        on_accepted: Told the address of a new connection; False ends it at once.
        on_tls: Told the address of a client that speaks TLS, which this port does not.
        on_over: Told the address when the request has been answered, or will not come.
    """

    def __init__(
        self,
        on_request: Callable[[WSUpgradeRequest, str], WSUpgradeResponseWithListener],
        timeout: float,
        on_accepted: Callable[[str], bool],
        on_tls: Callable[[str], None],
        on_over: Callable[[str], None],
    ) -> None:
        self._on_accepted = on_accepted
        self._on_tls = on_tls
        self._on_over = on_over
        self._is_heard = False
        self._is_over = False
        self._request_line = b""
        # Lists, so that `answer` need not refer to self: every refused request would be work for the garbage
        # collector.
        self._address = address = [""]
        self._version = version = [b"HTTP/1.1"]

        def answer(request: WSUpgradeRequest) -> WSUpgradeResponseWithListener:
            request.version = version[0]
            return on_request(request, address[0])

        super().__init__(
            host_port=None,
            ws_path=None,
            is_client_side=False,
            ws_listener_factory=answer,
            logger=PicowsLog(),
            disconnect_on_exception=True,
            websocket_handshake_timeout=timeout,
            enable_auto_ping=False,
            auto_ping_idle_timeout=None,
            auto_ping_reply_timeout=None,
            auto_ping_strategy=WSAutoPingStrategy.PING_WHEN_IDLE,
            enable_auto_pong=False,
            max_frame_size=MESSAGE_MAX_BYTES,  # of what is sent too early, see HandedOver
            extra_headers=None,
            read_buffer_init_size=REQUEST_BUFFER_BYTES,
        )

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Note the address before the request is read."""
        peer = transport.get_extra_info("peername")
        if peer:
            self._address[0] = peer[0]
        super().connection_made(transport)
        if not self._on_accepted(self._address[0]):
            transport.write(TOO_MANY_REQUESTS)
            transport.close()

    def get_buffer(self, size_hint: int) -> memoryview:
        """Keep what is read into, to look at the first line before picows does."""
        buffer: memoryview = super().get_buffer(size_hint)
        self._buffer = buffer
        return buffer

    def buffer_updated(self, size: int) -> None:
        """Read on, unless it is TLS: picows would wait for the end of a request that is none."""
        if not self._is_heard and self._buffer[0] == _TLS_HANDSHAKE:
            self._on_tls(self._address[0])
            handle = self.transport.underlying_transport
            handle.write(NO_TLS)
            handle.close()
        else:
            if b"\r\n" not in self._request_line:
                self._read_request_line(size)
            super().buffer_updated(size)
        self._is_heard = True

    def _read_request_line(self, size: int) -> None:
        """Let picows take HTTP/1.0 for the HTTP/1.1 that it insists on: health checkers speak it."""
        before = len(self._request_line)
        line, end, _ = (self._request_line + bytes(self._buffer[:size])).partition(b"\r\n")
        self._request_line = line + end
        head, found, _ = line.partition(_HTTP_1_0)
        digit = len(head) + len(_HTTP_1_0) - 1
        if found and digit >= before:
            self._buffer[digit - before] = ord("1")
            self._version[0] = b"HTTP/1.0"

    def connection_lost(self, error: Exception | None) -> None:
        """The request has been answered, or will not come."""
        super().connection_lost(error)
        self.end_request()

    def end_request(self) -> None:
        """Tell, once, that the request is over."""
        if not self._is_over:
            self._is_over = True
            self._on_over(self._address[0])


def response(status: HTTPStatus, text: str, **headers: str) -> WSUpgradeResponse:
    """Build a refusal with a sentence for the person who reads it."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    refusal: WSUpgradeResponse = WSUpgradeResponse.create_error_response(status, text.encode() + b"\n", named)
    return refusal


def health(state: dict[str, object], is_well: bool = True) -> WSUpgradeResponse:
    """Build the answer to `GET /health` or `GET /ready`."""
    body = orjson.dumps(state) + b"\n"
    headers = {"Content-Type": "application/json", "Cache-Control": "no-store"}
    answer: WSUpgradeResponse
    if is_well:
        answer = WSUpgradeResponse.create_ok_response(body, headers)
    else:
        answer = WSUpgradeResponse.create_error_response(HTTPStatus.SERVICE_UNAVAILABLE, body, headers)
    return answer


def printable(text: str) -> str:
    """Escape what a terminal might obey."""
    return text.encode("ascii", "backslashreplace").decode() if text.isprintable() else ascii(text)[1:-1]


def path_of(request: WSUpgradeRequest) -> str:
    """Return the path without its query."""
    return request.path.partition(b"?")[0].decode("latin-1")


def _tokens(headers: CIMultiDict[str], name: str) -> list[str]:
    """Split the list in all headers of a name (RFC 9110 section 5.6.1)."""
    return [
        token.strip() for value in headers.getall(name, ()) for token in value.split(",") if token.strip()
    ]


def refuse(request: WSUpgradeRequest) -> WSUpgradeResponse | None:
    """Check what picows does not, and mend what it is too strict about; None if the upgrade may go on."""
    headers = request.headers
    if path_of(request) != ENDPOINT_PATH:
        return response(HTTPStatus.NOT_FOUND, f"the WebSocket endpoint is {ENDPOINT_PATH}")
    if request.version != b"HTTP/1.1":
        return response(HTTPStatus.BAD_REQUEST, "WebSocket needs HTTP/1.1")
    if len(headers.getall("Host", ())) != 1:
        return response(HTTPStatus.BAD_REQUEST, "exactly one Host header is required")
    if "websocket" not in (token.lower() for token in _tokens(headers, "Upgrade")):
        return response(
            HTTPStatus.UPGRADE_REQUIRED,
            "this is a WebSocket endpoint",
            Upgrade="websocket",
            Sec_WebSocket_Version="13",
        )
    if "upgrade" not in (token.lower() for token in _tokens(headers, "Connection")):
        return response(HTTPStatus.BAD_REQUEST, "the Connection header does not name Upgrade")
    if headers.get("Sec-WebSocket-Version") != "13":
        return response(
            HTTPStatus.UPGRADE_REQUIRED, "only WebSocket version 13 is spoken", Sec_WebSocket_Version="13"
        )
    if _KEY.fullmatch(headers.get("Sec-WebSocket-Key", "")) is None:
        return response(HTTPStatus.BAD_REQUEST, "Sec-WebSocket-Key is not the base64 of 16 bytes")
    offered = _tokens(headers, "Sec-WebSocket-Protocol")
    if offered and SUBPROTOCOL not in offered:
        return response(HTTPStatus.BAD_REQUEST, f"the subprotocol is {SUBPROTOCOL}")
    # Firefox and many proxies send "keep-alive, Upgrade"; picows compares the whole header.
    headers["Connection"] = "Upgrade"
    headers["Upgrade"] = "websocket"
    return None


def accept(
    request: WSUpgradeRequest, first_message: bytes, connection: Connection
) -> WSUpgradeResponseWithListener:
    """Accept the upgrade for `connection`, which begins with `first_message`."""
    accepted = AcceptedResponse()
    accepted.version = b"HTTP/1.1"
    accepted.status = HTTPStatus.SWITCHING_PROTOCOLS
    # picows adds Sec-WebSocket-Accept.
    accepted.headers = CIMultiDict({"Upgrade": "websocket", "Connection": "Upgrade"})
    if _tokens(request.headers, "Sec-WebSocket-Protocol"):
        accepted.headers["Sec-WebSocket-Protocol"] = SUBPROTOCOL
    accepted.body = None
    accepted.first_message = first_message
    return WSUpgradeResponseWithListener(accepted, HandedOver(connection, accepted))
