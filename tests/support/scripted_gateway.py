"""A gateway that plays scripts: a real WebSocket server with a real key, honest unless told otherwise."""

from __future__ import annotations

import asyncio
from base64 import urlsafe_b64encode
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta, timezone
from ssl import SSLContext
from typing import Any

import orjson
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from aiconexus.protocol import (
    DIDKey,
    ErrorPayload,
    Message,
    Payload,
    PongPayload,
    RegisterPayload,
    decode,
    encode,
    sign_message,
    verify_envelope,
)
from aiconexus.protocol.errors import close_code
from aiconexus.protocol.limits import SUBPROTOCOL

NONCE = urlsafe_b64encode(bytes(range(32))).rstrip(b"=").decode()
SECONDS = 10.0  # for anything that must happen at all


class Visit:
    """One connection, seen from the gateway."""

    def __init__(self, gateway: ScriptedGateway, socket: ServerConnection) -> None:
        self.gateway = gateway
        self.key = gateway.key
        self.socket = socket
        self.agent = ""
        self.register_ext: dict[str, Any] = {}

    def challenge(self, age: float = 0.0, **changes: Any) -> Message:
        """Build the first message, `age` seconds old."""
        fields: dict[str, Any] = {
            "from_": self.key.did,
            "to": self.key.did,
            "type": "REGISTER",
            "payload": RegisterPayload(public_key=self.key.public_key_base58),
            "timestamp": datetime.now(timezone.utc) - timedelta(seconds=age),
            "ext": {
                "nonce": NONCE,
                "features": ["resume"],
                "limits": {"message_max_bytes": 65_536},
                "ping_interval_ms": 25_000,
                "time": 0,
            },
        }
        return Message(**{**fields, **changes})

    async def send(self, message: Message, key: DIDKey | None = None) -> None:
        """Sign a message and send it."""
        await self.send_raw(encode(sign_message(message, key or self.key)))

    async def send_raw(self, data: bytes) -> None:
        """Send any bytes as a text frame."""
        await self.socket.send(data, text=True)

    async def send_unsigned(self, payload: Payload, correlation_id: str | None = None) -> None:
        """Send what a gateway sends of its own."""
        message = Message.create(self.key.did, self.agent, payload, correlation_id=correlation_id)
        await self.send_raw(encode(message))

    async def read(self) -> Message:
        """Return the agent's next message; its signature must verify."""
        data = await self.socket.recv()
        assert isinstance(data, str)
        verify_envelope(orjson.loads(data))
        return decode(data)

    async def welcome(self, *, resumed: bool = False, key: DIDKey | None = None, **changes: Any) -> None:
        """Do the whole handshake."""
        await self.send(self.challenge())
        await self.answer(await self.read(), resumed=resumed, key=key, **changes)

    async def play_honest(self) -> None:
        """Register the agent, resume it if its token is the last one, and serve it."""
        await self.send(self.challenge())
        register = await self.read()
        is_known = register.ext.get("resume") == f"token-{self.gateway.registered}"
        await self.answer(register, resumed=is_known and self.gateway.remembers)
        self.gateway.visits.put_nowait(self)
        await self.serve()

    async def answer(
        self, register: Message, *, resumed: bool = False, key: DIDKey | None = None, **changes: Any
    ) -> None:
        """Answer a REGISTER."""
        self.agent = register.from_
        self.register_ext = dict(register.ext)
        self.gateway.registered += 1
        number = self.gateway.registered
        ext: dict[str, Any] = {
            "session": f"session-{number}",
            "resume_token": f"token-{number}",
            "ice_servers": [{"urls": "stun:127.0.0.1:3478"}],
            "resumed": resumed,
            **self.gateway.extra,
        }
        payload = RegisterPayload(public_key=self.key.public_key_base58)
        reply = register.reply(payload, ext=ext).model_copy(update=changes)
        if key is not None:
            reply = reply.model_copy(update={"from_": key.did})
        await self.send(reply, key)

    async def refuse(self, cause: str, code: int, *, retry_after_ms: int | None = None) -> None:
        """Answer a REGISTER with an ERROR and a close code."""
        await self.send(self.challenge())
        register = await self.read()
        self.agent = register.from_
        await self.send_unsigned(ErrorPayload.for_cause(cause), register.id)
        await self.close(code, retry_after_ms=retry_after_ms)

    async def close(self, code: int, *, retry_after_ms: int | None = None) -> None:
        """Close as a gateway does."""
        reason: dict[str, Any] = {"n": close_code(code).name}
        if retry_after_ms is not None:
            reason["r"] = retry_after_ms
        await self.socket.close(code, orjson.dumps(reason).decode())

    async def closed(self) -> int | None:
        """Wait for the end; return the close code that the client sent."""
        await self.socket.wait_closed()
        return self.socket.protocol.close_code

    def abort(self) -> None:
        """Cut the connection without a word."""
        self.socket.transport.abort()

    async def serve(self) -> None:
        """Answer PING and UNREGISTER, put the rest into the gateway's inbox, until the end."""
        while True:
            message = await self.read()
            if message.type.value == "PING":
                await self.send_unsigned(PongPayload(), message.id)
            elif message.type.value == "UNREGISTER":
                self.gateway.unregistered.append(message)
                await self.socket.close(1000)
            else:
                self.gateway.inbox.put_nowait(message)


Script = Callable[[Visit], Awaitable[None]]


class ScriptedGateway:
    """Plays `scripts` in turn, one for each connection; after that it is honest.

    `visits` gets every connection that was registered honestly, `inbox` what agents send on it.
    """

    def __init__(self) -> None:
        self.key = DIDKey.generate()
        self.scripts: list[Script] = []
        self.extra: dict[str, Any] = {}  # `ext` of every answer to REGISTER
        self.remembers = True  # sessions, so that they can be resumed
        self.connections = 0
        self.registered = 0
        self.visits: asyncio.Queue[Visit] = asyncio.Queue()
        self.inbox: asyncio.Queue[Message] = asyncio.Queue()
        self.unregistered: list[Message] = []
        self.faults: list[BaseException] = []
        self.port = 0
        self.ssl: SSLContext | None = None
        self._server: Server | None = None

    @property
    def url(self) -> str:
        scheme = "ws" if self.ssl is None else "wss"
        return f"{scheme}://127.0.0.1:{self.port}/ws"

    async def start(self) -> None:
        self._server = await serve(
            self._play,
            "127.0.0.1",
            self.port,
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            compression=None,
            ssl=self.ssl,
        )
        self.port = next(iter(self._server.sockets)).getsockname()[1]

    async def stop(self) -> None:
        """Close all connections with 1001, and the port."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
            self._server = None

    async def _play(self, socket: ServerConnection) -> None:
        self.connections += 1
        script = self.scripts.pop(0) if self.scripts else Visit.play_honest
        try:
            await script(Visit(self, socket))
            await socket.wait_closed()
        except ConnectionClosed:
            pass
        except BaseException as fault:
            self.faults.append(fault)
            raise

    async def visit(self) -> Visit:
        """Wait for the next connection that is registered."""
        return await asyncio.wait_for(self.visits.get(), SECONDS)

    async def message(self) -> Message:
        """Wait for the next message from an agent."""
        return await asyncio.wait_for(self.inbox.get(), SECONDS)
