"""An agent on asyncio, for tests with thousands of them: it remembers what it sent and what came."""

from __future__ import annotations

import asyncio
import json
import select
import struct
from collections import Counter

from wire import CLOSE, PING, PONG, TEXT, frame, upgrade_request

from aiconexus.protocol import DIDKey, Message, PingPayload, RegisterPayload, sign_message
from aiconexus.protocol.cards import sign_card


class AsyncAgent:
    """One agent, which announces `capabilities`; `generation` counts its connections."""

    def __init__(self, port: int, key: DIDKey, capabilities: list[dict[str, object]] | None = None) -> None:
        self.card = None if capabilities is None else sign_card(capabilities, key)
        self.port = port
        self.key = key
        self.did = key.did
        self.token: str | None = None
        self.writer: asyncio.StreamWriter | None = None
        self.reading: asyncio.Task[None] | None = None
        self.ready = asyncio.Event()
        self.sent: Counter[str] = Counter()
        self.got: list[tuple[str, str]] = []  # sender, id
        self.errors: Counter[str] = Counter()
        self.seen: set[str] = set()  # ids of ERRORs
        self.pongs: asyncio.Queue[str] = asyncio.Queue()
        self.resumed = 0
        self.generation = 0
        self.worker = 0
        self.error_names: Counter[str] = Counter()
        self.close_codes: Counter[int] = Counter()
        self.template = b""

    @property
    def is_connected(self) -> bool:
        return self.writer is not None

    async def connect(self, *, resume: bool) -> None:
        """Connect and register; a connection that is still there is taken over."""
        before, reading = self.writer, self.reading
        reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**20)
        self.writer.write(upgrade_request(self.port))
        await reader.readuntil(b"\r\n\r\n")
        hello = json.loads((await self.read_frame(reader))[1])
        self.gateway_did = hello["from"]
        ext = {"nonce": hello["ext"]["nonce"], "aud": f"ws://127.0.0.1:{self.port}/ws"}
        if resume and self.token is not None:
            ext["resume"] = self.token
        if self.card is not None:
            ext["card"] = self.card
        message = Message.create(
            self.did,
            hello["from"],
            RegisterPayload(public_key=self.key.public_key_base58),
            ext=ext,  # type: ignore[arg-type]
        )
        self.writer.write(frame(TEXT, sign_message(message, self.key).wire or b""))
        answer = json.loads((await self.read_frame(reader))[1])
        assert (answer["type"], answer["correlation_id"]) == ("REGISTER", message.id), answer
        self.token = answer["ext"]["resume_token"]
        self.worker = answer["ext"]["worker"]
        self.generation += 1
        self.resumed += answer["ext"]["resumed"]
        self.reading = asyncio.create_task(self.read(reader, self.writer))
        if before is not None and reading is not None:
            await reading  # up to the CLOSE with 4504
            before.close()

    async def read_frame(self, reader: asyncio.StreamReader) -> tuple[int, bytes]:
        first, second = await reader.readexactly(2)
        size = second & 0x7F
        if size == 126:
            (size,) = struct.unpack("!H", await reader.readexactly(2))
        return first & 0xF, await reader.readexactly(size)

    async def read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                opcode, payload = await self.read_frame(reader)
                if opcode == CLOSE:
                    self.close_codes[int.from_bytes(payload[:2], "big")] += 1
                    writer.write(frame(CLOSE, payload[:2]))
                    return
                if opcode == PING:
                    writer.write(frame(PONG, payload))
                    continue
                got = json.loads(payload)
                if got["type"] == "PONG":
                    self.pongs.put_nowait(got["correlation_id"])
                elif got["type"] == "ERROR" and got["id"] in self.seen:
                    pass  # sent once more, for it was not known whether it had arrived
                elif got["type"] == "ERROR":
                    self.seen.add(got["id"])
                    self.errors[got["correlation_id"]] += 1
                    self.error_names[got["payload"]["details"]["name"]] += 1
                else:
                    self.got.append((got["from"], got["id"]))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass

    def send(self, target: str, number: int) -> str:
        """Send a message; return its id."""
        assert self.writer is not None
        name = f"{number:08x}-0000-4000-8000-000000000000"
        if not self.template:
            self.template = json.dumps(
                {
                    "id": "@id",
                    "timestamp": "2026-01-12T10:00:00Z",
                    "from": self.did,
                    "to": "@to",
                    "type": "ICE_CANDIDATE",
                    "payload": {"candidate": "candidate:" + "x" * 300},
                    "version": "1.0",
                }
            ).encode()
        data = self.template.replace(b"@id", name.encode()).replace(b"@to", target.encode())
        if not self.is_reset():
            self.writer.write(frame(TEXT, data))
        self.sent[name] += 1
        return name

    def is_reset(self) -> bool:
        """Tell whether the connection was reset: a write that fails would drop what is not read yet."""
        if self.writer is None:
            return True
        if self.writer.is_closing():
            return True
        poll = select.poll()
        poll.register(self.writer.get_extra_info("socket").fileno(), 0)
        return bool(poll.poll(0))

    async def sync(self) -> None:
        """Wait until the gateway has dealt with everything that was sent."""
        assert self.writer is not None
        message = Message.create(self.did, self.gateway_did, PingPayload())
        self.writer.write(frame(TEXT, sign_message(message, self.key).wire or b""))
        while await self.pongs.get() != message.id:
            pass

    async def leave(self, how: str) -> None:
        """Drop the connection; everything that was sent has been dealt with, everything that came is read."""
        assert self.writer is not None
        assert self.reading is not None
        await self.sync()
        writer, self.writer = self.writer, None
        if how == "reset":
            writer.transport.abort()
        elif how == "close":
            writer.write(frame(CLOSE, struct.pack("!H", 1000)))
        else:
            writer.close()
        await self.reading
        writer.close()
