"""A blocking WebSocket client (RFC 6455), as small as the benchmarks need it: connect, say a few words.

Once the handshake is over, `fileno` hands the socket on to the load client.
"""

from __future__ import annotations

import base64
import os
import socket
from urllib.parse import urlsplit, urlunsplit

HANDSHAKE_TIMEOUT = 15.0  # s, for each read; the gateway itself gives up after 10

_TEXT, _BINARY, _CLOSE = 0x1, 0x2, 0x8
_GOING_NORMALLY = 1000


class WebSocketError(Exception):
    """The server refused the handshake, closed, or sent what was not expected."""


class WebSocket:
    """One open connection, blocking."""

    def __init__(self, url: str, subprotocol: str | None = None) -> None:
        """Connect and upgrade; `url` is a ws:// URL."""
        parts = urlsplit(url)
        self._buffer = bytearray()
        self._socket = socket.create_connection((parts.hostname, parts.port or 80), HANDSHAKE_TIMEOUT)
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            target = urlunsplit(("", "", parts.path or "/", parts.query, ""))
            self._upgrade(parts.netloc, target, subprotocol)
        except BaseException:
            self._socket.close()
            raise

    def _upgrade(self, host: str, path: str, subprotocol: str | None) -> None:
        lines = [
            f"GET {path} HTTP/1.1",
            f"Host: {host}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}",
            "Sec-WebSocket-Version: 13",
        ]
        if subprotocol is not None:
            lines.append(f"Sec-WebSocket-Protocol: {subprotocol}")
        self._socket.sendall("\r\n".join([*lines, "", ""]).encode())
        head = self._read_head()
        status = head.split(b"\r\n", 1)[0].decode("latin-1")
        if status.split(" ")[1:2] != ["101"]:
            raise WebSocketError(f"no WebSocket at {host}{path}: {status}")
        if (
            subprotocol is not None
            and f"\r\nsec-websocket-protocol: {subprotocol}\r\n" not in head.decode("latin-1").lower()
        ):
            raise WebSocketError(f"{host}{path} does not speak {subprotocol}")

    def _read_head(self) -> bytes:
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            if len(self._buffer) > 16_384:
                raise WebSocketError("an HTTP response head of more than 16 KiB")
            self._fill()
        return self._take(end + 4)

    def _read(self, count: int) -> bytes:
        while len(self._buffer) < count:
            self._fill()
        return self._take(count)

    def _fill(self) -> None:
        chunk = self._socket.recv(65_536)
        if not chunk:
            raise WebSocketError("the server closed the connection")
        self._buffer += chunk

    def _take(self, count: int) -> bytes:
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        return data

    def _send(self, opcode: int, payload: bytes) -> None:
        size = len(payload)
        length = bytes([0x80 | size]) if size < 126 else b"\xfe" + size.to_bytes(2, "big")
        key = os.urandom(4)
        mask = int.from_bytes((key * (size // 4 + 1))[:size], "big")
        masked = (int.from_bytes(payload, "big") ^ mask).to_bytes(size, "big")
        self._socket.sendall(bytes([0x80 | opcode]) + length + key + masked)

    def send(self, message: bytes, *, binary: bool = False) -> None:
        """Send a message of at most 64 KiB: text, which must be UTF-8, or `binary`."""
        self._send(_BINARY if binary else _TEXT, message)

    def receive(self) -> bytes:
        """Return the next text or binary message; other frames than a close are skipped."""
        while True:
            first, size = self._read(2)
            if size == 126:
                size = int.from_bytes(self._read(2), "big")
            elif size == 127:
                size = int.from_bytes(self._read(8), "big")
            payload = self._read(size)
            opcode = first & 0x0F
            if opcode == _CLOSE:
                code = int.from_bytes(payload[:2], "big")
                raise WebSocketError(f"closed with {code} {payload[2:].decode(errors='replace')}")
            if opcode < _CLOSE:
                return payload

    def fileno(self) -> int:
        """Return the descriptor of the TCP socket.

        Raises:
            WebSocketError: Bytes were read that nobody took; whoever reads on would miss them.
        """
        if self._buffer:
            raise WebSocketError(f"unexpected message: {bytes(self._buffer[:200])!r}")
        return self._socket.fileno()

    def close(self) -> None:
        """Say goodbye and close, without waiting for the answer."""
        try:
            self._socket.setblocking(True)
            self._send(_CLOSE, _GOING_NORMALLY.to_bytes(2, "big"))
        except OSError:  # the server was faster
            pass
        finally:
            self._socket.close()
