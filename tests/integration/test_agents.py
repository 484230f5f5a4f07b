"""Agents from end to end: the real gateway, real WebRTC on 127.0.0.1, and gateways that cheat or die."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import pytest
from relay import Relay
from wire import Agent as WireAgent

from aiconexus import Agent, DIDKey, GatewayClient, Intent, Message, Quote, capability
from aiconexus.client import ClientState
from aiconexus.core import PeerState
from aiconexus.protocol import AnswerPayload, MessageType, OfferPayload, sign_message
from aiconexus.protocol.errors import (
    CallTimeoutError,
    CapabilityError,
    GatewayClosedError,
    InvalidArgumentsError,
    PeerConnectError,
    PeerIdentityError,
    UnknownAgentError,
    UnknownCapabilityError,
)

if TYPE_CHECKING:
    from conftest import GatewayProcess

SECONDS = 20.0  # for anything that must happen at all


class Worker(Agent):
    """Says what it would do, does it, fails, or waits until it is told."""

    def __init__(self, gateway: str, identity: DIDKey | None = None) -> None:
        super().__init__(gateway, identity, host_addresses=["127.0.0.1"])
        self.started = asyncio.Event()
        self.released = asyncio.Event()
        self.cancelled = asyncio.Event()

    @capability(tags=["arithmetic"])
    async def double(self, value: int) -> int:
        return 2 * value

    @capability
    async def fail(self) -> None:
        raise LookupError("there is nothing here")

    @capability
    async def leave(self) -> None:
        raise SystemExit("no such option")

    @capability
    async def hold(self) -> str:
        """Run until `release`, which comes over the same data plane."""
        self.started.set()
        try:
            await self.released.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return "held to the end"

    @capability
    async def release(self) -> None:
        self.released.set()

    async def on_intent(self, intent: Intent) -> Quote:
        return Quote(status="understood", required_input="value", cost=f"for {intent.sender[-4:]}: nothing")


Pair = tuple[Worker, Worker]


@pytest.fixture
async def pair(shared_gateway: GatewayProcess) -> AsyncIterator[Pair]:
    async with Worker(shared_gateway.url) as one, Worker(shared_gateway.url) as two:
        yield (one, two) if one.did < two.did else (two, one)


# --- it works ----------------------------------------------------------------------------------


async def test_intent_and_execution_in_both_directions(pair: Pair) -> None:
    one, two = pair
    async with one.connect(two.did) as peer:
        quote = await peer.intent("Double a number for me")
        assert quote == Quote(
            status="understood", required_input="value", cost=f"for {one.did[-4:]}: nothing"
        )
        assert await peer.execute("double", value=21) == 42
        async with two.connect(one.did) as back:
            assert (await back.intent(task="double")).status == "understood"
            assert await back.execute("double", value=4) == 8
        assert str(peer.path).endswith(" udp host")


async def test_every_error_has_its_class(pair: Pair) -> None:
    one, two = pair
    async with one.connect(two.did) as peer:
        with pytest.raises(UnknownCapabilityError, match="no capability 'triple'; there is: double"):
            await peer.execute("triple", value=1)
        with pytest.raises(InvalidArgumentsError, match="value: Input should be a valid integer"):
            await peer.execute("double", value="1")
        with pytest.raises(CapabilityError, match="LookupError: there is nothing here"):
            await peer.execute("fail")
        with pytest.raises(CapabilityError, match="SystemExit: no such option"):
            await peer.execute("leave")
        with pytest.raises(CallTimeoutError):
            await peer.execute("hold", timeout=0.2)
        await asyncio.wait_for(two.cancelled.wait(), SECONDS)
        assert await peer.execute("double", value=2) == 4


async def test_agent_that_is_not_online_is_named_with_the_gateway_that_was_asked(pair: Pair) -> None:
    did = DIDKey.generate().did
    text = f"{did[:12]}…{did[-2:]} is not online (asked {pair[0].client.url})"
    with pytest.raises(UnknownAgentError, match=re.escape(text)) as caught:
        await pair[0].connect(did)
    assert caught.value.temporary


async def test_glare_through_a_gateway_ends_in_one_connection_every_time(pair: Pair) -> None:
    low, high = pair
    for _ in range(10):
        mine, theirs = await asyncio.gather(low.connect(high.did), high.connect(low.did))
        assert mine.path is not None
        assert theirs.path is not None
        assert (mine.path.local, mine.path.remote) == (theirs.path.remote, theirs.path.local)
        assert await asyncio.gather(mine.execute("double", value=1), theirs.execute("double", value=2)) == [
            2,
            4,
        ]
        await asyncio.gather(mine.release(), theirs.release())
        assert mine.state is theirs.state is PeerState.CLOSED


async def test_agent_that_registers_elsewhere_stops_serving(shared_gateway: GatewayProcess) -> None:
    key = DIDKey.generate()
    old = Worker(shared_gateway.url, key)
    serving = asyncio.ensure_future(old.serve_forever())
    await old.client.wait_for(ClientState.REGISTERED, timeout=SECONDS)
    async with Worker(shared_gateway.url, key):
        with pytest.raises(GatewayClosedError, match="replaced"):
            await asyncio.wait_for(serving, SECONDS)


async def test_running_execution_outlives_a_gateway_that_wants_the_agent_no_more(
    shared_gateway: GatewayProcess,
) -> None:
    key = DIDKey.generate()
    old = Worker(shared_gateway.url, key)
    serving = asyncio.ensure_future(old.serve_forever())
    await old.client.wait_for(ClientState.REGISTERED, timeout=SECONDS)
    async with Worker(shared_gateway.url) as caller, caller.connect(key.did) as peer:
        running = asyncio.ensure_future(peer.execute("hold"))
        await asyncio.wait_for(old.started.wait(), SECONDS)
        async with Worker(shared_gateway.url, key):
            await old.client.wait_for(ClientState.CLOSED, timeout=SECONDS)
            await peer.execute("release")
            assert await running == "held to the end"
            with pytest.raises(GatewayClosedError, match="replaced"):
                await asyncio.wait_for(serving, SECONDS)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_ends_cleanly_on_a_signal(shared_gateway: GatewayProcess, number: signal.Signals) -> None:
    # Slow callbacks are no fault: how long the import of aiortc takes is the machine's affair.
    code = f"""
import asyncio
import math

from aiconexus import Agent

class Ready(Agent):
    async def start(self):
        asyncio.get_running_loop().slow_callback_duration = math.inf
        await super().start()
        print("registered", flush=True)

Ready({shared_gateway.url!r}, host_addresses=["127.0.0.1"]).run()
print("stopped", flush=True)
"""
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "registered\n"
        process.send_signal(number)
        output, errors = process.communicate(timeout=SECONDS)
    assert (process.returncode, output, errors) == (0, "stopped\n", "")


# --- who does not answer ---------------------------------------------------------------------------


async def test_connect_to_an_agent_that_is_away_says_so(shared_gateway: GatewayProcess) -> None:
    away = await asyncio.to_thread(WireAgent, shared_gateway.port)
    async with Worker(shared_gateway.url) as one:
        with pytest.raises(PeerConnectError, match="it is online, but has not answered the OFFER"):
            await one.connect(away.did, timeout=0.5)
        watch = one.watch(dids=[away.did])
        assert (await anext(watch)).event == "join"
        away.drop()
        assert (await anext(watch)).event == "away"
        with pytest.raises(PeerConnectError, match="it is away: its connection to the gateway is"):
            await one.connect(away.did, timeout=0.5)
        await watch.aclose()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
async def test_connect_without_the_gateway_says_so(gateway: GatewayProcess, end: signal.Signals) -> None:
    async with Worker(gateway.url) as one, Worker(gateway.url) as two:
        if end is signal.SIGKILL:
            await asyncio.to_thread(gateway.kill)
            await one.client.wait_for(ClientState.RECONNECTING, timeout=SECONDS)
            text = f"the gateway {gateway.url} is away"
        else:
            gateway.signal_workers(signal.SIGSTOP)
            text = "and the gateway does not answer either"
        with pytest.raises(PeerConnectError, match=text):
            await one.connect(two.did, timeout=0.5)
        if end is signal.SIGSTOP:
            gateway.signal_workers(signal.SIGCONT)


# --- P3: the data plane outlives the gateway -------------------------------------------------------


async def test_running_execution_outlives_a_killed_gateway(gateway: GatewayProcess) -> None:
    async with Worker(gateway.url) as one, Worker(gateway.url) as two, one.connect(two.did) as peer:
        running = asyncio.ensure_future(peer.execute("hold"))
        await asyncio.wait_for(two.started.wait(), SECONDS)
        await asyncio.to_thread(gateway.kill)
        for agent in (one, two):
            await agent.client.wait_for(ClientState.RECONNECTING, timeout=SECONDS)
        assert (await peer.intent("Still there?")).status == "understood"
        await peer.execute("release")
        assert await running == "held to the end"

        await asyncio.to_thread(gateway.start)
        for agent in (one, two):
            await agent.client.wait_for(ClientState.REGISTERED, timeout=SECONDS)
        assert await peer.execute("double", value=2) == 4
        assert one.peers[two.did] is peer
        async with Worker(gateway.url) as third, third.connect(two.did) as new:
            assert await new.execute("double", value=3) == 6


async def test_connect_while_the_gateway_is_away_waits_for_it(gateway: GatewayProcess) -> None:
    async with Worker(gateway.url) as one, Worker(gateway.url) as two:
        await asyncio.to_thread(gateway.kill)
        await one.client.wait_for(ClientState.RECONNECTING, timeout=SECONDS)
        connecting = asyncio.ensure_future(one.connect(two.did).__aenter__())
        await asyncio.to_thread(gateway.start)
        await two.client.wait_for(ClientState.REGISTERED, timeout=SECONDS)
        try:
            peer = await connecting
        except UnknownAgentError:  # one came back before two did
            peer = await one.connect(two.did)
        assert await peer.execute("double", value=1) == 2


# --- P1: a hostile gateway gets nowhere ------------------------------------------------------------


@pytest.fixture
async def relay(start_gateway: Callable[..., GatewayProcess]) -> AsyncIterator[Relay]:
    async with Relay() as relay:
        gateway = await asyncio.to_thread(start_gateway, "--public-url", relay.url)
        relay.upstream = gateway.url
        yield relay


@pytest.fixture
async def victims(relay: Relay) -> AsyncIterator[Pair]:
    async with Worker(relay.url) as one, Worker(relay.url) as two:
        yield one, two


def replacing(kind: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Any], list[Any]]:
    return lambda message: [change(message) if message["type"] == kind else message]


def with_fingerprint_of_its_own(message: dict[str, Any]) -> dict[str, Any]:
    def flip(match: re.Match[str]) -> str:
        return match[0][:-2] + ("00" if match[0][-2:] != "00" else "11")

    sdp = re.sub(r"a=fingerprint:[^\r\n]+", flip, message["payload"]["sdp"])
    assert sdp != message["payload"]["sdp"]
    return {**message, "payload": {"sdp": sdp}}


async def test_relay_that_changes_nothing_is_no_obstacle(relay: Relay, victims: Pair) -> None:
    async with victims[0].connect(victims[1].did) as peer:
        assert await peer.execute("double", value=1) == 2
    types = [message["type"] for message in relay.seen]
    assert not {"INTENT", "EXEC_REQUEST", "EXEC_RESPONSE"} & set(types)


async def test_fingerprint_swapped_in_the_answer(relay: Relay, victims: Pair) -> None:
    relay.tamper = replacing("ANSWER", with_fingerprint_of_its_own)
    with pytest.raises(PeerIdentityError, match="the signature does not verify"):
        await victims[0].connect(victims[1].did)
    assert not victims[0].peers


async def test_fingerprint_swapped_in_the_offer(relay: Relay, victims: Pair) -> None:
    one, two = victims
    refused: asyncio.Queue[str] = asyncio.Queue()
    two.client.on_rejected(lambda error, data: refused.put_nowait(error.cause.name))
    relay.tamper = replacing("OFFER", with_fingerprint_of_its_own)
    with pytest.raises(PeerConnectError, match="has not answered the OFFER"):
        await one.connect(two.did, timeout=1.0)
    assert refused.get_nowait() == "bad_signature"
    assert not two.peers


async def test_offer_signed_by_the_gateway_instead(relay: Relay, victims: Pair) -> None:
    # With a key of its own it is just another agent, never the one it wants to be.
    one, two = victims
    mallory = DIDKey.generate()

    def impersonate(message: dict[str, Any]) -> dict[str, Any]:
        forged = Message.create(mallory.did, two.did, OfferPayload(sdp=message["payload"]["sdp"]))
        signed: dict[str, Any] = {**sign_message(forged, mallory).envelope(), "from": one.did}
        return signed

    relay.tamper = replacing("OFFER", impersonate)
    with pytest.raises(PeerConnectError):
        await one.connect(two.did, timeout=1.0)
    assert two.client.stats.rejected == 1
    assert not two.peers


async def test_sender_of_the_answer_swapped(relay: Relay, victims: Pair) -> None:
    one, two = victims
    mallory = DIDKey.generate()

    def answer_instead(message: dict[str, Any]) -> dict[str, Any]:
        payload = AnswerPayload(sdp=message["payload"]["sdp"])
        answer = Message.create(mallory.did, one.did, payload, correlation_id=message["correlation_id"])
        envelope: dict[str, Any] = sign_message(answer, mallory).envelope()
        return envelope

    relay.tamper = replacing("ANSWER", answer_instead)
    with pytest.raises(PeerIdentityError, match=f"{mallory.did} answered the OFFER to {two.did}"):
        await one.connect(two.did)


async def test_offer_delivered_to_somebody_else(relay: Relay, victims: Pair) -> None:
    one, two = victims
    async with Worker(relay.url) as third:
        refused: asyncio.Queue[str] = asyncio.Queue()
        third.client.on_rejected(lambda error, data: refused.put_nowait(error.cause.name))

        def redirect(message: dict[str, Any]) -> list[dict[str, Any]]:
            if message["type"] != "OFFER" or message["to"] != third.did:
                return [message]
            return [captured]

        async def capture() -> dict[str, Any]:
            with pytest.raises(PeerConnectError):
                await one.connect(two.did, timeout=0.5)
            return next(message for message in relay.seen if message["type"] == "OFFER")

        relay.tamper = lambda message: [] if message["type"] == "OFFER" else [message]
        captured = await capture()
        relay.tamper = redirect
        with pytest.raises(PeerConnectError):
            await one.connect(third.did, timeout=0.5)
        assert refused.get_nowait() == "wrong_recipient"
        assert not third.peers


async def test_answer_delivered_twice_counts_once(relay: Relay, victims: Pair) -> None:
    one, two = victims
    relay.tamper = lambda message: [message, message] if message["type"] == "ANSWER" else [message]
    async with one.connect(two.did) as peer:
        assert await peer.execute("double", value=1) == 2
    assert one.client.stats.rejected == 1


async def test_agent_that_passes_on_the_descriptions_of_two_others_cannot_speak_for_them(
    shared_gateway: GatewayProcess, pair: Pair
) -> None:
    # Mallory is an agent like any other, asked by one. It offers one's description to two as its own, and
    # two's answer to one: the DTLS connection is between one and two, though each asked for Mallory.
    one, two = pair
    key = DIDKey.generate()
    async with GatewayClient(shared_gateway.url, key) as mallory:
        offers: asyncio.Queue[Message] = asyncio.Queue()

        async def pass_on_offer(message: Message) -> None:
            offers.put_nowait(message)
            assert isinstance(message.payload, OfferPayload)
            await mallory.send(Message.create(key.did, two.did, message.payload))

        async def pass_on_answer(message: Message) -> None:
            assert isinstance(message.payload, AnswerPayload)
            await mallory.send(offers.get_nowait().reply(message.payload))

        mallory.on(MessageType.OFFER, pass_on_offer)
        mallory.on(MessageType.ANSWER, pass_on_answer)
        await mallory.register()
        peer = await one.connect(key.did)
        with pytest.raises(PeerIdentityError, match="what came in answer is not from"):
            await peer.execute("release")
        assert not two.released.is_set()
        assert two.peers[key.did].refused == 1


async def test_gateway_never_sees_the_data_plane(relay: Relay, victims: Pair) -> None:
    async with victims[0].connect(victims[1].did) as peer:
        await peer.intent("A secret question")
    assert "A secret question" not in str(relay.seen)
