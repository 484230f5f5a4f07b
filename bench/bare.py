"""aiortc by itself: what an application does to open a DataChannel that knows both sides already."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import aioice.ice
from aiortc import RTCConfiguration, RTCDataChannel, RTCPeerConnection, RTCSessionDescription

# As both subjects do it: aioice leaves out this one address, the only one that a benchmark is to use.
aioice.ice.get_host_addresses = lambda use_ipv4, use_ipv6: ["127.0.0.1"]


def _connection() -> RTCPeerConnection:
    return RTCPeerConnection(RTCConfiguration(iceServers=[]))


async def offer(exchange: Callable[[str], Awaitable[str]]) -> tuple[RTCPeerConnection, RTCDataChannel]:
    """Open a channel; `exchange` takes the offer to the other side and returns its answer."""
    connection = _connection()
    opened = asyncio.get_running_loop().create_future()
    channel = connection.createDataChannel("ioap")
    channel.on("open", lambda: opened.set_result(None))
    await connection.setLocalDescription(await connection.createOffer())
    answer = await exchange(connection.localDescription.sdp)
    await connection.setRemoteDescription(RTCSessionDescription(answer, "answer"))
    await opened
    return connection, channel


async def answer(sdp: str) -> tuple[RTCPeerConnection, str]:
    """Answer an offer."""
    connection = _connection()
    await connection.setRemoteDescription(RTCSessionDescription(sdp, "offer"))
    await connection.setLocalDescription(await connection.createAnswer())
    return connection, connection.localDescription.sdp
