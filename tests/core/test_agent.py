"""The class that agents derive from, as far as it needs no gateway."""

from __future__ import annotations

import asyncio
import gc
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from aiortc import RTCPeerConnection
from switchboard import Local, Switchboard, Workshop

import aiconexus
from aiconexus import Agent, DIDKey, Intent, Peer, Quote, capability
from aiconexus.client import Backoff
from aiconexus.protocol.errors import (
    CapabilityError,
    DIDError,
    GatewayUnreachableError,
    KeyFilePassphraseError,
    NotConnectedError,
    PeerConnectError,
    PeerLostError,
    RemoteError,
)

GATEWAY = "ws://127.0.0.1:1/ws"  # where nobody listens


def test_identity_is_new_or_given_or_kept_in_a_file(tmp_path: Path) -> None:
    assert Agent(GATEWAY).did != Agent(GATEWAY).did
    key = DIDKey.generate()
    assert Agent(GATEWAY, key).did == key.did
    path = tmp_path / "agent.key"
    assert Agent(GATEWAY, path, passphrase="x").did == Agent(GATEWAY, str(path), passphrase="x").did
    with pytest.raises(KeyFilePassphraseError):
        Agent(GATEWAY, path)


def test_name_is_that_of_the_class() -> None:
    class Notary(Agent):
        """Reads contracts."""

    assert Notary(GATEWAY).name == "Notary"
    assert repr(Notary(GATEWAY)).endswith(" at ws://127.0.0.1:1/ws>")


def test_did_is_no_identity() -> None:
    with pytest.raises(ValueError, match="a DID does not prove itself"):
        Agent(GATEWAY, DIDKey.generate().did)


@pytest.mark.parametrize("name", ["capability", "tag", "text"])
def test_search_is_for_one_text_each(name: str) -> None:
    me = Agent(GATEWAY)
    for search in (me.discover, me.watch):
        with pytest.raises(TypeError, match=rf"{name} is one text, not \['legal'\]"):
            search(**{name: ["legal"]})  # type: ignore[operator]


def test_one_address_is_no_list_of_addresses() -> None:
    with pytest.raises(TypeError, match="host_addresses is a list"):
        Agent(GATEWAY, host_addresses="127.0.0.1")


@pytest.mark.parametrize("name", ["start", "run", "did", "peers", "on_intent", "_execute"])
def test_capability_does_not_replace_what_the_agent_needs(name: str) -> None:
    async def method(self: object) -> None: ...

    method.__name__ = name
    kind = type("Robot", (Agent,), {name: capability(method)})
    text = rf'Robot\.{name} replaces Agent\.{name}: .*capability\(name="{name}"\)'
    with pytest.raises(TypeError, match=text):
        kind(GATEWAY)

    named = type("Robot", (Agent,), {"begin": capability(name=name)(method)})
    assert list(named(GATEWAY)._capabilities) == [name]


def test_tls_and_backoff_are_those_of_its_client() -> None:
    context, backoff = ssl.create_default_context(), Backoff(0.01, 0.01)
    agent = Agent("wss://gateway.example/ws", ssl=context, backoff=backoff)
    assert (agent.client._ssl, agent.client._backoff) == (context, backoff)


async def test_gateway_that_is_not_there() -> None:
    with pytest.raises(GatewayUnreachableError):
        async with Agent(GATEWAY):
            pass


async def test_connect_before_start_says_what_to_do() -> None:
    agent = Agent(GATEWAY)
    with pytest.raises(NotConnectedError, match="is not registered: use `async with`"):
        await agent.connect(DIDKey.generate().did)
    await agent.close()


async def test_timeout_of_connect_is_a_number() -> None:
    with pytest.raises(TypeError, match="timeout is in seconds, a number, not '5'"):
        Agent(GATEWAY).connect(DIDKey.generate().did, timeout="5")  # type: ignore[arg-type]


async def test_connect_takes_another_agents_did() -> None:
    agent = Agent(GATEWAY)
    with pytest.raises(DIDError):
        agent.connect("did:web:example.com")
    with pytest.raises(ValueError, match="does not connect with itself"):
        agent.connect(agent.did)
    agent.connect(DIDKey.generate().did)  # nothing happens until it is awaited
    await agent.close()
    await agent.close()  # twice is no harm


async def test_agent_that_overrides_nothing_understands_nothing(switchboard: Switchboard) -> None:
    async with Local(switchboard) as plain, Local(switchboard) as other, other.connect(plain.did) as peer:
        assert await peer.intent("Hello?") == Quote(status="not_understood")


async def test_quote_that_is_none_is_an_error(switchboard: Switchboard) -> None:
    class Careless(Local):
        async def on_intent(self, intent: Intent) -> Quote:
            return None  # type: ignore[return-value]

    async with Careless(switchboard) as careless, Local(switchboard) as other:
        peer = await other.connect(careless.did)
        with pytest.raises(RemoteError, match="on_intent must return a Quote, not NoneType"):
            await peer.intent("Hello?")


async def test_error_of_a_call_within_a_capability_is_not_taken_for_its_own(
    switchboard: Switchboard,
) -> None:
    class Middleman(Local):
        @capability
        async def forward(self, did: str, name: str) -> object:
            async with self.connect(did) as peer:
                return await peer.execute(name)

    async with Middleman(switchboard) as middle, Workshop(switchboard) as last, Local(switchboard) as first:
        peer = await first.connect(middle.did)
        with pytest.raises(CapabilityError, match="UnknownCapabilityError: no capability 'fly'"):
            await peer.execute("forward", did=last.did, name="fly")


async def test_hooks_see_peers_come_and_go_and_may_fail(
    switchboard: Switchboard, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str] = []

    class Watcher(Workshop):
        async def on_peer(self, peer: Peer) -> None:
            seen.append(f"came {peer.did}")
            raise RuntimeError("a mistake")

        async def on_peer_lost(self, peer: object, reason: str) -> None:
            seen.append(reason)
            await super().on_peer_lost(peer, reason)

    async with Watcher(switchboard) as watcher, Local(switchboard) as other:
        async with other.connect(watcher.did) as peer:
            assert await peer.execute("add", a=1) == 2
        await watcher.lost.get()
    assert seen == [f"came {other.did}", "it closed the connection: it is done"]
    assert "a hook of <Watcher" in caplog.text


async def test_closing_says_goodbye_to_all(switchboard: Switchboard) -> None:
    async with Workshop(switchboard) as one, Workshop(switchboard) as two:
        async with Local(switchboard) as leaver:
            await leaver.connect(one.did)
            await leaver.connect(two.did)
        assert await one.lost.get() == "it closed the connection: the agent stops"
        assert await two.lost.get() == "it closed the connection: the agent stops"


def test_face_of_the_package() -> None:
    assert {"Agent", "Intent", "Peer", "Quote", "capability"} <= set(aiconexus.__all__)
    assert aiconexus.Agent is Agent


def test_protocol_alone_does_not_import_aiortc() -> None:
    code = "import sys, aiconexus.protocol, aiconexus.client; assert 'aiortc' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


async def test_ice_servers_that_cannot_be_used_fail_every_connection_with_the_reason(
    switchboard: Switchboard,
) -> None:
    async with Local(switchboard) as one, Local(switchboard) as two:
        one._ice_servers = ({"foo": 1},)  # as a gateway that nobody trusts might name them
        for _ in range(2):
            with pytest.raises(PeerConnectError, match="check the ice_servers"):
                await one.connect(two.did)
        with pytest.raises(PeerConnectError, match="can make no connection"):
            await two.connect(one.did)
        one._ice_servers = ()
        await one.connect(two.did)


async def test_one_connection_for_two_agents_however_many_want_it(switchboard: Switchboard) -> None:
    def connections() -> list[RTCPeerConnection]:
        # By `type`: isinstance() asks weak references, too, to what is gone.
        found = [each for each in gc.get_objects() if type(each) is RTCPeerConnection]
        return [each for each in found if each not in before and each.connectionState != "closed"]

    before: list[RTCPeerConnection] = []
    before = connections()  # what other tests have left
    async with Workshop(switchboard) as one, Workshop(switchboard) as two:

        async def call(me: Workshop, other: Workshop, number: int) -> Any:
            async with me.connect(other.did) as peer:
                return await peer.execute("add", a=number)

        peers = await asyncio.gather(one.connect(two.did), two.connect(one.did))
        calls = [call(*sides, number) for number in range(100) for sides in ((one, two), (two, one))]
        assert await asyncio.gather(*calls) == [number + 1 for number in range(100) for _ in range(2)]
        assert (dict(one.peers), dict(two.peers)) == ({two.did: peers[0]}, {one.did: peers[1]})
        await asyncio.gather(*one._signaling._closing, *two._signaling._closing)
        assert len(connections()) == 2
        assert not one._signaling._attempts
        assert not two._signaling._attempts
    assert not connections()


async def test_a_hundred_that_connect_at_once_share_one_connection(switchboard: Switchboard) -> None:
    async with Workshop(switchboard) as one, Workshop(switchboard) as two:
        sides = [(one, two), (two, one)] * 50
        peers = await asyncio.gather(*(me.connect(other.did) for me, other in sides))
        assert len(set(peers)) == 2
        assert await asyncio.gather(*(peer.execute("add", a=1) for peer in peers)) == [2] * 100
        assert (one._all_peers, two._all_peers) == ({peers[0]}, {peers[1]})


async def test_a_capability_may_close_its_agent(switchboard: Switchboard) -> None:
    class Mayfly(Local):
        @capability
        async def stop(self) -> None:
            await self.close("it was asked to")

    mayfly = Mayfly(switchboard)
    async with mayfly, Local(switchboard) as other:
        peer = await other.connect(mayfly.did)
        with pytest.raises(PeerLostError, match="it was asked to"):
            await peer.execute("stop")
        await mayfly.close()
    assert not mayfly.peers


async def test_a_hook_may_close_its_agent(switchboard: Switchboard) -> None:
    class Shy(Local):
        async def on_peer(self, peer: Peer) -> None:
            await self.close("it is shy")

    shy = Shy(switchboard)
    async with shy, Local(switchboard) as other:
        with pytest.raises((PeerLostError, PeerConnectError)):
            await (await other.connect(shy.did)).execute("anything")
        await shy.close()
