"""The checks of an upgrade request, and the 101 response with a frame behind it."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

import pytest
from multidict import CIMultiDict
from picows import WSUpgradeRequest, WSUpgradeResponseWithListener

from gateway import upgrade


def request(path: str = "/ws", **changed: str | None) -> WSUpgradeRequest:
    headers = {
        "Host": "gateway.example",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    headers.update({name.replace("_", "-"): value for name, value in changed.items()})
    made = WSUpgradeRequest()
    made.method = b"GET"
    made.path = path.encode("latin-1")
    made.version = b"HTTP/1.1"
    made.headers = CIMultiDict((name, value) for name, value in headers.items() if value is not None)
    return made


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"Connection": "keep-alive, Upgrade"},  # Firefox
        {"Connection": "UPGRADE"},
        {"Upgrade": "websocket, h2c"},
        {"Sec_WebSocket_Protocol": "ioap.v1"},
        {"Sec_WebSocket_Protocol": "other , ioap.v1"},
        {"path": "/ws?x=1"},
    ],
    ids=str,
)
def test_an_upgrade_goes_on_and_is_written_as_picows_wants_it(changed):
    made = request(**changed)
    assert upgrade.refuse(made) is None
    assert (made.headers["Connection"], made.headers["Upgrade"]) == ("Upgrade", "websocket")


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({"path": "/"}, HTTPStatus.NOT_FOUND),
        ({"path": "/wsx"}, HTTPStatus.NOT_FOUND),
        ({"path": "ws://gateway.example/ws"}, HTTPStatus.NOT_FOUND),
        ({"Host": None}, HTTPStatus.BAD_REQUEST),
        ({"Connection": None}, HTTPStatus.BAD_REQUEST),
        ({"Connection": "close"}, HTTPStatus.BAD_REQUEST),
        ({"Connection": "notupgrade"}, HTTPStatus.BAD_REQUEST),
        ({"Upgrade": None}, HTTPStatus.UPGRADE_REQUIRED),
        ({"Upgrade": "websockets"}, HTTPStatus.UPGRADE_REQUIRED),
        ({"Sec_WebSocket_Version": None}, HTTPStatus.UPGRADE_REQUIRED),
        ({"Sec_WebSocket_Version": "8"}, HTTPStatus.UPGRADE_REQUIRED),
        ({"Sec_WebSocket_Version": "13, 8"}, HTTPStatus.UPGRADE_REQUIRED),
        ({"Sec_WebSocket_Protocol": "chat"}, HTTPStatus.BAD_REQUEST),
        ({"Sec_WebSocket_Protocol": "IOAP.V1"}, HTTPStatus.BAD_REQUEST),
    ],
    ids=str,
)
def test_a_refusal_has_a_status_and_a_sentence(changed, status):
    refusal = upgrade.refuse(request(**changed))
    assert refusal.status == status
    assert len(refusal.body) > 10
    if status == HTTPStatus.UPGRADE_REQUIRED:
        assert refusal.headers["Sec-WebSocket-Version"] == "13"


def test_two_hosts_are_refused():
    made = request()
    made.headers.add("host", "evil.example")
    assert upgrade.refuse(made).status == HTTPStatus.BAD_REQUEST


@pytest.mark.parametrize(
    ("size", "header"),
    [
        (0, b"\x81\x00"),
        (125, b"\x81\x7d"),
        (126, b"\x81\x7e\x00\x7e"),
        (65_535, b"\x81\x7e\xff\xff"),
    ],
)
def test_the_first_frame_stands_behind_the_response(size, header):
    accepted = upgrade.accept(request(), b"x" * size, None).response
    assert accepted.to_bytes() == b"", "picows has nothing to write: the connection does"
    head, _, frame = accepted.data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 ")
    assert frame == header + b"x" * size


def test_the_subprotocol_is_answered_only_if_it_was_offered():
    assert "Sec-WebSocket-Protocol" not in upgrade.accept(request(), b"", None).response.headers
    accepted = upgrade.accept(request(Sec_WebSocket_Protocol="a, ioap.v1"), b"", None).response
    assert accepted.headers["Sec-WebSocket-Protocol"] == "ioap.v1"


class InReads(upgrade.RequestProtocol):
    """Tells what it has read, in bytes."""

    def __init__(self, reads: asyncio.Queue[int], *arguments: object) -> None:
        super().__init__(*arguments)
        self.reads = reads

    def buffer_updated(self, size: int) -> None:
        super().buffer_updated(size)
        self.reads.put_nowait(size)


async def versions_of(requests: list[list[bytes]]) -> list[tuple[bytes, str]]:
    """Send requests, each in pieces that are read one by one; return the version and the path of each."""
    got: list[tuple[bytes, str]] = []
    reads: asyncio.Queue[int] = asyncio.Queue()

    def answer(request: WSUpgradeRequest, address: str) -> WSUpgradeResponseWithListener:
        got.append((request.version, upgrade.path_of(request)))
        return WSUpgradeResponseWithListener(upgrade.health({}), None)

    def protocol() -> InReads:
        return InReads(reads, answer, 10.0, lambda _: True, lambda _: None, lambda _: None)

    server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0)
    async with server:
        for pieces in requests:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            for piece in pieces:
                writer.write(piece)
                assert await asyncio.wait_for(reads.get(), 10) == len(piece)
            assert (await asyncio.wait_for(reader.read(), 10)).startswith(b"HTTP/1.1 200 ")
            writer.close()
            await writer.wait_closed()
    return got


@pytest.mark.parametrize("version", [b"HTTP/1.0", b"HTTP/1.1"])
async def test_the_version_is_told_wherever_the_request_is_cut(version):
    whole = b"GET /ready " + version + b"\r\nX: GET / HTTP/1.0\r\n\r\n"
    cuts = [[whole[:at], whole[at:]] for at in range(1, len(whole))]
    cuts.append([whole[at : at + 1] for at in range(len(whole))])
    assert await versions_of([[whole], *cuts]) == [(version, "/ready")] * (len(cuts) + 1)
