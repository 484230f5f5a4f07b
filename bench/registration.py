"""How an agent registers without blocking its process: one of thousands that do so at once."""

from __future__ import annotations

import base64
import os
import select
import socket
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from aiconexus.protocol import DIDKey, Message, MessageType, RegisterPayload, decode, encode, sign_message
from aiconexus.protocol.cards import sign_card
from aiconexus.protocol.limits import SUBPROTOCOL

_IP_BIND_ADDRESS_NO_PORT = 24  # Linux 4.2; in `socket` from Python 3.12 on
_HEAD_MAX_BYTES = 16_384
_TEXT, _CLOSE = 0x1, 0x8


class RegistrationError(Exception):
    """The gateway did not register an agent. The text is for the user."""


@dataclass(frozen=True)
class Dialer:
    """Where the agents of one process dial, and from which address.

    Args:
        url: What they dial, and sign as the audience.
        source: Address to dial from; None: what the system chooses. One address has some 28,000 ports.
    """

    url: str
    source: str | None = None

    def dial(self) -> socket.socket:
        """Begin to connect."""
        parts = urlsplit(self.url)
        connection = socket.socket()
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            if self.source is not None:
                # The port is chosen in connect(), which knows that another gateway may have it too.
                connection.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
                connection.bind((self.source, 0))
            with suppress(BlockingIOError):
                connection.connect((parts.hostname, parts.port or 80))
        except BaseException:
            connection.close()
            raise
        return connection


def prove(greeting: Message, key: DIDKey, url: str, capabilities: list[Any]) -> Message:
    """Build the signed REGISTER that answers the gateway's."""
    return sign_message(
        Message.create(
            key.did,
            greeting.from_,
            RegisterPayload(public_key=key.public_key_base58),
            ext={"nonce": greeting.ext["nonce"], "aud": url, "card": sign_card(capabilities, key)},
        ),
        key,
    )


def register(
    connection: socket.socket, key: DIDKey, dialer: Dialer, capabilities: list[Any]
) -> Generator[int, None, int]:
    """Upgrade a connection that `Dialer.dial` began, and register an agent on it.

    Yields:
        The epoll event to wait for.

    Returns:
        The number of the worker that the agent is at.

    Raises:
        RegistrationError: The gateway refused.
        OSError: The connection failed.
    """
    parts = urlsplit(dialer.url)
    yield select.EPOLLOUT
    if error := connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        raise OSError(error, os.strerror(error))
    connection.send(
        f"GET {parts.path or '/'} HTTP/1.1\r\n"
        f"Host: {parts.netloc}\r\n"
        "Upgrade: websocket\r\n"
        "Connection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}\r\n"
        "Sec-WebSocket-Version: 13\r\n"
        f"Sec-WebSocket-Protocol: {SUBPROTOCOL}\r\n\r\n".encode()
    )
    buffer = bytearray()
    while (end := buffer.find(b"\r\n\r\n")) < 0:
        yield from _receive(connection, buffer)
        if len(buffer) > _HEAD_MAX_BYTES:
            raise RegistrationError("an HTTP response head of more than 16 KiB")
    status = bytes(buffer).split(b"\r\n", 1)[0].decode("latin-1")
    if status.split(" ")[1:2] != ["101"]:
        raise RegistrationError(f"no WebSocket at {dialer.url}: {status}")
    del buffer[: end + 4]

    message = prove((yield from _message(connection, buffer)), key, dialer.url, capabilities)
    connection.send(_masked(encode(message)))
    answer = yield from _message(connection, buffer)
    if answer.type is not MessageType.REGISTER or answer.correlation_id != message.id:
        raise RegistrationError(f"the gateway refused an agent: {encode(answer).decode()}")
    if buffer:
        raise RegistrationError(f"bytes after the answer to REGISTER: {bytes(buffer[:200])!r}")
    worker = answer.ext.get("worker", 0)
    return worker if isinstance(worker, int) else 0


def _receive(connection: socket.socket, buffer: bytearray) -> Generator[int, None, None]:
    yield select.EPOLLIN
    chunk = connection.recv(65_536)
    if not chunk:
        raise RegistrationError("the gateway dropped a connection before its agent was registered")
    buffer += chunk


def _message(connection: socket.socket, buffer: bytearray) -> Generator[int, None, Message]:
    """Take one text frame from `buffer`; the handshake is over in less than the first ping takes."""
    while True:
        header = 4 if len(buffer) > 1 and buffer[1] == 126 else 2
        size = int.from_bytes(buffer[2:4], "big") if header == 4 else buffer[1] if len(buffer) > 1 else 0
        if len(buffer) > 3 and len(buffer) >= header + size:
            break
        yield from _receive(connection, buffer)
    opcode, payload = buffer[0] & 0x0F, bytes(buffer[header : header + size])
    del buffer[: header + size]
    if opcode == _CLOSE:
        code, reason = int.from_bytes(payload[:2], "big"), payload[2:].decode(errors="replace")
        raise RegistrationError(f"the gateway closed before the agent was registered: {code} {reason}")
    if opcode != _TEXT:
        raise RegistrationError(f"a frame of opcode {opcode} before the agent was registered")
    return decode(payload)


def _masked(payload: bytes) -> bytes:
    """Return a text frame of 126 to 65,535 bytes; its mask is of zeros (RFC 6455 section 5.3)."""
    return bytes([0x80 | _TEXT, 0x80 | 126]) + len(payload).to_bytes(2, "big") + bytes(4) + payload
