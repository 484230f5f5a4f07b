"""STUN and TURN servers that the gateway names, and names anew before they expire."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from scripted_gateway import ScriptedGateway

from aiconexus.client import GatewayClient
from aiconexus.protocol import ErrorPayload

SECONDS = 10.0


def turn(username: str) -> list[dict[str, Any]]:
    return [{"urls": ["turn:turn.example"], "username": username, "credential": "c"}]


async def renewed(client: GatewayClient, username: str) -> None:
    async def is_there() -> None:
        while client.session is None or client.session.ice_servers != turn(username):  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    await asyncio.wait_for(is_there(), SECONDS)


async def test_client_asks_for_new_ones_in_time_and_shows_the_same(
    gateway: ScriptedGateway, client: GatewayClient
) -> None:
    gateway.extra = {"ice_servers_ttl_ms": 500, "ice_servers": turn("first")}
    session = await client.register(["echo"], hidden=True)
    assert (session.ice_servers, session.ice_servers_ttl) == (turn("first"), 0.5)
    visit = await gateway.visit()
    for username in ("second", "third"):
        asked = await gateway.message()
        assert asked.type.value == "REGISTER"
        assert asked.ext["card"] == visit.register_ext["card"]
        assert asked.ext["hidden"] is True
        gateway.extra["ice_servers"] = turn(username)
        await visit.answer(asked)
        await renewed(client, username)
    assert client.session is not None
    assert client.session.id == session.id


async def test_client_asks_again_where_it_is_refused(
    gateway: ScriptedGateway, client: GatewayClient, caplog: pytest.LogCaptureFixture
) -> None:
    gateway.extra = {"ice_servers_ttl_ms": 500, "ice_servers": turn("first")}
    await client.register()
    visit = await gateway.visit()
    await visit.send_unsigned(ErrorPayload.for_cause("rate_limited"), (await gateway.message()).id)
    asked = await gateway.message()
    assert "no new TURN credentials" in caplog.text
    gateway.extra["ice_servers"] = turn("second")
    await visit.answer(asked)
    await renewed(client, "second")


async def test_update_brings_new_ones_too_if_the_gateway_names_them(
    gateway: ScriptedGateway, client: GatewayClient
) -> None:
    await client.register()
    visit = await gateway.visit()
    for ext, expected in (
        ({"ice_servers": turn("new")}, turn("new")),
        ({}, turn("new")),  # as a gateway that knows of no such thing
    ):
        updating = asyncio.ensure_future(client.update(["echo"]))
        asked = await gateway.message()
        await visit.send(asked.reply(visit.challenge().payload, ext=ext))
        await asyncio.wait_for(updating, SECONDS)
        assert client.session is not None
        assert client.session.ice_servers == expected


@pytest.mark.parametrize("ttl", [0, -1, True, 1.5, "1", None])
async def test_time_that_is_none_is_left_out(
    gateway: ScriptedGateway, client: GatewayClient, ttl: object
) -> None:
    gateway.extra = {"ice_servers_ttl_ms": ttl}
    assert (await client.register()).ice_servers_ttl is None
