"""A WebSocket client down to the bytes, and an agent on top of it, for tests of the gateway.

Blocking sockets with a timeout: a test that waits for something that does not come fails, it does not
hang. What the gateway must refuse no decent client library lets you send; this one sends anything.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from aiconexus.protocol import (
    DIDKey,
    IceCandidatePayload,
    Message,
    OfferPayload,
    Payload,
    PingPayload,
    RegisterPayload,
    UnregisterPayload,
    decode,
    sign_message,
    verify_envelope,
)

TIMEOUT_SECONDS = 10.0
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
KEY = b64encode(b"0123456789abcdef").decode()


@dataclass(frozen=True)
class Frame:
    """One WebSocket frame as it arrived."""

    opcode: int
    payload: bytes
    fin: bool = True
    rsv: int = 0

    @property
    def close_code(self) -> int:
        return struct.unpack("!H", self.payload[:2])[0] if self.payload else 1005

    @property
    def close_reason(self) -> dict[str, Any]:
        return json.loads(self.payload[2:])


def frame(
    opcode: int,
    payload: bytes = b"",
    *,
    fin: bool = True,
    rsv: int = 0,
    masked: bool = True,
    length: int = -1,
) -> bytes:
    """Encode a frame; `length` is a lie about the size of the payload."""
    size = len(payload) if length < 0 else length
    first = fin << 7 | rsv << 4 | opcode
    mask_bit = masked << 7
    if size < 126:
        header = struct.pack("!BB", first, mask_bit | size)
    elif size < 65_536:
        header = struct.pack("!BBH", first, mask_bit | 126, size)
    else:
        header = struct.pack("!BBQ", first, mask_bit | 127, size)
    if not masked:
        return header + payload
    mask = os.urandom(4)
    repeated = int.from_bytes((mask * (len(payload) // 4 + 1))[: len(payload)], "big")
    return header + mask + (int.from_bytes(payload, "big") ^ repeated).to_bytes(len(payload), "big")


def close_frame(code: int | None = None, reason: bytes = b"") -> bytes:
    return frame(CLOSE, b"" if code is None else struct.pack("!H", code) + reason)


def upgrade_request(port: int, *, path: str = "/ws", without: str = "", **changed: str) -> bytes:
    """Build an upgrade request; keywords change or add headers (`_` for `-`)."""
    headers = {
        "Host": f"127.0.0.1:{port}",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": KEY,
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Protocol": "ioap.v1",
    }
    headers.update({name.replace("_", "-"): value for name, value in changed.items()})
    headers.pop(without, None)
    lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1")


class RawClient:
    """One TCP connection to the gateway.

    Args:
        port: The gateway's.
        receive_buffer: SO_RCVBUF in bytes, to be a slow reader with; 0 for the system's.
    """

    def __init__(self, port: int, *, receive_buffer: int = 0) -> None:
        self.port = port
        self.buffer = b""
        self.socket = socket.socket()
        self.socket.settimeout(TIMEOUT_SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        with self._closed_on_failure():
            self.socket.connect(("127.0.0.1", port))

    @contextmanager
    def _closed_on_failure(self) -> Iterator[None]:
        """Who gets an exception from a constructor has nothing to close."""
        try:
            yield
        except BaseException:
            self.socket.close()
            raise

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()

    def drop(self) -> None:
        """End the TCP connection without a CLOSE frame."""
        self.socket.close()

    def reset(self) -> None:
        """End the TCP connection with a reset."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def write(self, data: bytes) -> None:
        self.socket.sendall(data)

    def write_frame(self, opcode: int, payload: bytes = b"", **options: Any) -> None:
        self.write(frame(opcode, payload, **options))

    def _more(self) -> None:
        data = self.socket.recv(65_536)
        if not data:
            raise EOFError(f"the gateway ended the connection; {len(self.buffer)} bytes were left")
        self.buffer += data

    def read_bytes(self, size: int) -> bytes:
        while len(self.buffer) < size:
            self._more()
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    def read_head(self) -> tuple[int, dict[str, str]]:
        """Return status and headers (names in lower case) of an HTTP response."""
        while b"\r\n\r\n" not in self.buffer:
            self._more()
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        return int(status.split(" ")[1]), {name.lower(): value for name, value in headers.items()}

    def read_to_end(self) -> bytes:
        """Return everything up to the end of the connection."""
        try:
            while True:
                self._more()
        except (EOFError, ConnectionResetError):
            data, self.buffer = self.buffer, b""
            return data

    def request(self, data: bytes) -> tuple[int, dict[str, str], bytes]:
        """Send a request that is not upgraded; return status, headers and body."""
        self.write(data)
        status, headers = self.read_head()
        return status, headers, self.read_to_end()

    def read_frame(self) -> Frame:
        first, second = self.read_bytes(2)
        assert not second & 0x80, "a server's frames are not masked"
        size = second & 0x7F
        if size == 126:
            (size,) = struct.unpack("!H", self.read_bytes(2))
        elif size == 127:
            (size,) = struct.unpack("!Q", self.read_bytes(8))
        return Frame(first & 0xF, self.read_bytes(size), bool(first & 0x80), first >> 4 & 7)

    def read_text(self) -> bytes:
        """Return the next message. Pings are not answered."""
        while True:
            got = self.read_frame()
            if got.opcode == TEXT:
                return got.payload
            assert got.opcode in (PING, PONG), f"a message was expected: {got}"

    def read_close(self) -> Frame:
        """Return the CLOSE frame; whatever stands before it is skipped."""
        while True:
            got = self.read_frame()
            if got.opcode == CLOSE:
                return got

    def assert_ended(self) -> None:
        assert self.read_to_end() == b""

    def upgrade(self, **changed: str) -> dict[str, Any]:
        """Go through the upgrade; return the gateway's first message."""
        self.write(upgrade_request(self.port, **changed))
        status, headers = self.read_head()
        assert status == 101, (status, headers)
        first: dict[str, Any] = json.loads(self.read_text())
        return first


class Agent(RawClient):
    """An agent with a key. It is upgraded, and registered unless `register` is False.

    Its clock is `clock` seconds ahead.
    """

    def __init__(
        self,
        port: int,
        key: DIDKey | None = None,
        *,
        register: bool = True,
        resume: str | None = None,
        receive_buffer: int = 0,
        clock: float = 0.0,
    ) -> None:
        super().__init__(port, receive_buffer=receive_buffer)
        self.clock = timedelta(seconds=clock)
        self.key = key or DIDKey.generate()
        self.did = self.key.did
        self.url = f"ws://127.0.0.1:{port}/ws"
        self.register_answer: dict[str, Any] = {}
        self.session = ""
        self.resume_token = ""
        self.resumed = False
        with self._closed_on_failure():
            self.hello = self.upgrade()
            self.gateway_did: str = self.hello["from"]
            self.nonce: str = self.hello["ext"]["nonce"]
            if register:
                self.register(resume)

    def __enter__(self) -> Agent:
        return self

    # --- messages ------------------------------------------------------------------------------

    def message(self, to: str, payload: Payload, **changed: Any) -> bytes:
        """Sign a message."""
        return self.signed(Message.create(self.did, to, payload, **changed))

    def offer(self, to: str, size: int = 0, sdp: str = "v=0\r\n") -> bytes:
        """Sign an OFFER; with `size` the message has that many bytes."""
        data = self.message(to, OfferPayload(sdp=sdp))
        if size:
            data = self.message(to, OfferPayload(sdp=sdp + "a" * (size - len(data))))
            assert len(data) == size
        return data

    def candidate(self, to: str, number: int) -> bytes:
        return self.message(to, IceCandidatePayload(candidate=f"candidate:{number}"))

    def envelope(self, to: str, /, **changed: Any) -> dict[str, Any]:
        """Return an OFFER's envelope to spoil: `changed` replaces fields, `...` removes them."""
        envelope = json.loads(self.offer(to))
        envelope.update({name.rstrip("_"): value for name, value in changed.items()})
        return {name: value for name, value in envelope.items() if value is not ...}

    def registration(
        self, *, payload: RegisterPayload | None = None, to: str = "", ext: dict[str, Any] | None = None
    ) -> Message:
        """Return the unsigned REGISTER; `ext` replaces its keys, `...` removes them."""
        full = {"nonce": self.nonce, "aud": self.url, **(ext or {})}
        return Message.create(
            self.did,
            to or self.gateway_did,
            payload or RegisterPayload(public_key=self.key.public_key_base58),
            ext={name: value for name, value in full.items() if value is not ...},
        )

    def signed(self, message: Message) -> bytes:
        if self.clock:
            message = message.model_copy(update={"timestamp": message.timestamp + self.clock})
        wire = sign_message(message, self.key).wire
        assert wire is not None
        return wire

    # --- conversation --------------------------------------------------------------------------

    def send(self, *messages: bytes) -> None:
        """Send text messages, all in one write."""
        self.write(b"".join(frame(TEXT, data) for data in messages))

    def receive(self) -> dict[str, Any]:
        """Return the next message as a dict, checked against the models."""
        data = self.read_text()
        decode(data)
        envelope: dict[str, Any] = json.loads(data)
        return envelope

    def receive_error(self, name: str, correlation_id: str | None) -> dict[str, Any]:
        """Return the payload of the next message, which must be that ERROR."""
        got = self.receive()
        assert got["type"] == "ERROR", got
        assert (got["payload"]["details"]["name"], got["correlation_id"]) == (name, correlation_id), got
        assert got["from"] == self.gateway_did
        payload: dict[str, Any] = got["payload"]
        return payload

    def register(self, resume: str | None = None) -> dict[str, Any]:
        message = self.registration(ext={} if resume is None else {"resume": resume})
        self.send(self.signed(message))
        answer = self.receive()
        assert (answer["type"], answer["correlation_id"]) == ("REGISTER", message.id), answer
        verify_envelope(answer)
        self.register_answer = answer
        self.session = answer["ext"]["session"]
        self.resume_token = answer["ext"]["resume_token"]
        self.resumed = answer["ext"]["resumed"]
        return answer

    def ping(self) -> None:
        """Send a PING and read up to its PONG: its worker has dealt with everything sent before."""
        data = self.message(self.gateway_did, PingPayload())
        self.send(data)
        got = self.receive()
        assert (got["type"], got["correlation_id"]) == ("PONG", json.loads(data)["id"]), got

    def unregister(self) -> None:
        self.send(self.message(self.gateway_did, UnregisterPayload()))

    def close(self, code: int | None = 1000) -> int:
        """Close with the handshake of RFC 6455 section 7.1; return the code that came back."""
        self.write(close_frame(code))
        answer = self.read_close().close_code
        self.assert_ended()
        self.drop()
        return answer


def agents_at(port: int, worker: int, count: int) -> list[Agent]:
    """Some agents at one worker."""
    agents: list[Agent] = []
    while len(agents) < count:
        agent = Agent(port)
        if agent.register_answer["ext"]["worker"] == worker:
            agents.append(agent)
        else:
            agent.close()
    return agents


def assert_exchange(a: Agent, b: Agent) -> None:
    """Both agents send and get one message, byte for byte."""
    for sender, receiver in ((a, b), (b, a)):
        data = sender.offer(receiver.did)
        sender.send(data)
        assert receiver.read_text() == data


def wait_until(condition: Any, seconds: float = TIMEOUT_SECONDS) -> None:
    """Poll, for what sends no event: a process's state, a counter in /health."""
    import time

    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
