"""One WebSocket to the gateway, on a source address of choice, with the REGISTER handshake of the SDK."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
from dataclasses import dataclass
from urllib.parse import urlsplit

import websocket
from websocket import (
    ABNF,
    WebSocketBadStatusException,
    WebSocketConnectionClosedException,
    WebSocketException,
)

from aiconexus.client.backoff import retry_after, retry_after_http
from aiconexus.client.handshake import (
    Resume,
    Shown,
    answer_challenge,
    audience,
    read_answer,
    read_challenge,
)
from aiconexus.protocol import DIDKey, ReplayGuard, encode
from aiconexus.protocol.errors import close_code
from aiconexus.protocol.limits import ENDPOINT_PATH, PING_INTERVAL_SECONDS, SUBPROTOCOL

DIAL_TIMEOUT = 15.0  # s, for each read and write of the handshake; the gateway itself gives up after 10
# The gateway pings who is silent; who hears nothing for two intervals gives up (PROTOCOL_DESIGN.md, 7).
SILENCE_MAX = 2 * PING_INTERVAL_SECONDS
NO_STATUS, ABNORMAL = 1005, 1006  # RFC 6455 section 7.1.5: never on the wire
DRAINING = 4001  # PROTOCOL_DESIGN.md, 11
STOPPING = "the gateway is being stopped"  # the text of its HTTP 503 then

# Linux: choose the port when connecting, not when binding. So a port serves many targets; without it the
# ports of an address are used up for all of them together (ip(7)). `socket` knows it since Python 3.12.
_IP_BIND_ADDRESS_NO_PORT = 24

NETWORK_ERRORS = (OSError, WebSocketException)


class TurnedAwayError(Exception):
    """HTTP 503 instead of the upgrade, or a drain before the answer to REGISTER.

    Attributes:
        retry_after: Earliest return, in seconds.
        is_drain: Whether it is known to be a drain.
    """

    def __init__(self, text: str, retry_after: float, *, is_drain: bool = False) -> None:
        self.retry_after = retry_after
        self.is_drain = is_drain
        super().__init__(text)


@dataclass(frozen=True)
class Target:
    """Where the gateway is.

    Attributes:
        url: What is dialled and signed.
        address: Its IP address and port, looked up once: thousands of agents need not ask again.
    """

    url: str
    host: str
    family: int
    address: tuple[str, int]

    @classmethod
    def find(cls, host: str | None) -> Target:
        """Read Locust's `--host`; the path may be left out.

        Raises:
            ValueError: It is no WebSocket URL, or the name has no address. The text is for the user.
        """
        parts = urlsplit(host or "")
        if parts.scheme not in ("ws", "wss") or not parts.hostname:
            raise ValueError(
                f"--host must look like ws://127.0.0.1:8000 or wss://gateway.example, not {host!r}"
            )
        path = parts.path if parts.path not in ("", "/") else ENDPOINT_PATH
        url = audience(f"{parts.scheme}://{parts.netloc}{path}")
        port = parts.port or (443 if parts.scheme == "wss" else 80)
        try:
            family, _, _, _, address = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)[0]
        except socket.gaierror as error:
            raise ValueError(f"{parts.hostname} has no address: {error.strerror}") from None
        return cls(url, parts.hostname, family, (str(address[0]), port))

    def connect(self, source: str | None) -> socket.socket:
        """Open a TCP, or for wss a TLS connection, from the address `source` if it is given."""
        connection = socket.socket(self.family, socket.SOCK_STREAM)
        try:
            connection.settimeout(DIAL_TIMEOUT)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if source is not None:
                connection.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
                connection.bind((source, 0))
            connection.connect(self.address)
            if self.url.startswith("wss:"):
                return ssl.create_default_context().wrap_socket(connection, server_hostname=self.host)
        except BaseException:
            connection.close()
            raise
        return connection


class _WebSocket(websocket.WebSocket):
    def send_close(self, status: int = 1000, reason: str | bytes = b"") -> None:
        # Reading a CLOSE answers it. That the other side is gone by then must not hide its code.
        with contextlib.suppress(*NETWORK_ERRORS):
            super().send_close(status, reason)


class Connection:
    """A registered agent's connection. One greenlet reads; any may write.

    Attributes:
        gateway: The DID that the gateway has proven.
        resumed: Whether the session before goes on.
        resume: What resumes it, for the next connection.
        received_close: Code and reason of the gateway's CLOSE frame, once it came.
    """

    def __init__(
        self,
        target: Target,
        key: DIDKey,
        *,
        source: str | None,
        gateway: str | None,
        resume: Resume | None,
    ) -> None:
        """Dial and register.

        Args:
            target: Where.
            key: Who.
            source: Address to dial from.
            gateway: The DID that the gateway must prove; any if None.
            resume: What resumes the last session.

        Raises:
            TurnedAwayError: The gateway takes nobody now.
            OSError, WebSocketException, AIConexusError: It did not work out.
        """
        self.received_close: tuple[int, str] | None = None
        self._websocket = _WebSocket(skip_utf8_validation=True)  # the parser looks at it
        self._websocket.settimeout(DIAL_TIMEOUT)
        try:
            self._websocket.connect(
                target.url,
                socket=target.connect(source),
                subprotocols=[SUBPROTOCOL],
                suppress_origin=True,
            )
            challenge = read_challenge(self.read(), expected_did=gateway)
            request = answer_challenge(key, challenge, target.url, Shown(), resume)
            self.write(encode(request))
            session, self.resume = read_answer(self.read(), request, challenge, ReplayGuard())
        except WebSocketBadStatusException as error:
            self.abandon()
            if error.status_code != 503:
                raise
            text = (error.resp_body or b"").decode(errors="replace").strip()
            raise TurnedAwayError(
                text,
                retry_after_http((error.resp_headers or {}).get("retry-after")),
                is_drain=text == STOPPING,
            ) from None
        except WebSocketConnectionClosedException as error:
            self.abandon()
            code, reason = self.received_close or (ABNORMAL, "")
            if code != DRAINING:
                raise
            raise TurnedAwayError(str(error), retry_after(close_code(code), reason), is_drain=True) from None
        except BaseException:
            self.abandon()
            raise
        self.gateway = challenge.gateway_did
        self.resumed = session.resumed
        self._websocket.settimeout(SILENCE_MAX)

    def write(self, message: bytes) -> None:
        """Send a text message."""
        self._websocket.send(message, ABNF.OPCODE_TEXT)

    def read(self) -> bytes:
        """Wait for the next message, and answer pings meanwhile.

        Raises:
            WebSocketConnectionClosedException: It ended; `received_close` tells if a CLOSE frame came.
            OSError, WebSocketException: It broke.
        """
        opcode, frame = self._websocket.recv_data_frame()
        if opcode == ABNF.OPCODE_CLOSE:
            data = frame.data
            code = struct.unpack("!H", data[:2])[0] if len(data) >= 2 else NO_STATUS
            self.received_close = code, data[2:].decode(errors="replace")
            raise WebSocketConnectionClosedException(f"closed with {code}")
        return bytes(frame.data)

    def say_goodbye(self) -> None:
        """Send a CLOSE frame of code 1000: the session is over. The reader gets the answer."""
        self._websocket.send_close(1000)

    def break_off(self) -> None:
        """Drop the connection without a CLOSE frame, so that the session can be resumed.

        Only the way out is closed: the reader still gets all that the gateway had written. Once it finds the
        end, the gateway knows that the agent is away.
        """
        with contextlib.suppress(OSError):
            assert self._websocket.sock is not None
            self._websocket.sock.shutdown(socket.SHUT_WR)

    def abandon(self) -> None:
        """Close the socket."""
        self._websocket.shutdown()
