"""The handshake: what an agent proves, and what it demands of a gateway."""

from __future__ import annotations

import asyncio
import logging
import ssl
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from scripted_gateway import ScriptedGateway, Visit
from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed

from aiconexus.client import Backoff, ClientState, GatewayClient
from aiconexus.protocol import (
    Capability,
    DIDKey,
    ErrorPayload,
    MalformedMessageError,
    Message,
    PingPayload,
    RegisterPayload,
    encode,
    sign_message,
)
from aiconexus.protocol.cards import verify_card
from aiconexus.protocol.errors import (
    GatewayClosedError,
    GatewayIdentityError,
    GatewayUnreachableError,
    NotConnectedError,
    RegistrationError,
)
from aiconexus.protocol.limits import MESSAGE_MAX_BYTES


async def test_session_holds_what_the_gateway_granted(
    gateway: ScriptedGateway, client: GatewayClient
) -> None:
    session = await client.register()
    assert client.state is ClientState.REGISTERED
    assert session is client.session
    assert session.id == "session-1"
    assert session.gateway_did == gateway.key.did
    assert session.features == ("resume",)
    assert session.limits == {"message_max_bytes": 65_536}
    assert session.ice_servers == [{"urls": "stun:127.0.0.1:3478"}]
    assert session.resumed is False


async def test_register_signs_nonce_audience_and_capabilities(
    gateway: ScriptedGateway, client: GatewayClient
) -> None:
    await client.register(["echo", {"name": "add", "tags": ["math"]}, Capability(name="sub", version="2.0")])
    visit = await gateway.visit()
    assert visit.agent == client.did
    assert visit.register_ext["nonce"] == visit.challenge().ext["nonce"]
    assert visit.register_ext["aud"] == gateway.url
    card = visit.register_ext["card"]
    assert card["capabilities"] == [
        {"name": "echo"},
        {"name": "add", "tags": ["math"]},
        {"name": "sub", "version": "2.0"},
    ]
    assert [capability.name for capability in verify_card(card, client.did).capabilities] == [
        "echo",
        "add",
        "sub",
    ]
    assert "hidden" not in visit.register_ext
    assert "resume" not in visit.register_ext


async def test_an_agent_with_nothing_to_offer_has_no_card_and_may_be_hidden(
    gateway: ScriptedGateway, client: GatewayClient
) -> None:
    await client.register(hidden=True)
    visit = await gateway.visit()
    assert "card" not in visit.register_ext
    assert visit.register_ext["hidden"] is True


async def test_audience_and_texts_leave_secrets_of_the_url_out(gateway: ScriptedGateway, key: DIDKey) -> None:
    url = gateway.url.replace("//", "//user:secret@") + "?token=secret"
    async with GatewayClient(url, key) as client:
        await client.register()
        visit = await gateway.visit()
        assert visit.register_ext["aud"] == client.url == gateway.url
        assert visit.socket.request is not None
        assert visit.socket.request.headers["Authorization"].startswith("Basic ")
        assert "secret" not in repr(client)
    await gateway.stop()
    async with GatewayClient(url, key) as client:
        with pytest.raises(GatewayUnreachableError) as caught:
            await client.register()
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://localhost/ws", "http://localhost/ws"),
        ("localhost:8000", "localhost:8000"),
        ("ws://", "ws://"),
        ("", ""),
        ("http://user:secret@localhost/ws?token=secret", "http://localhost/ws"),
        ("user:secret@localhost/ws", "localhost/ws"),
    ],
)
def test_url_that_is_none_is_refused_when_it_is_given(url: str, shown: str, key: DIDKey) -> None:
    # By `Agent`, too, whose argument has another name.
    with pytest.raises(ValueError, match=r"ws://host:port/ws") as caught:
        GatewayClient(url, key)
    assert str(caught.value).startswith("the gateway's URL must")
    assert str(caught.value).endswith(f"not {shown!r}")


async def test_capabilities_are_checked_before_anything_is_sent(
    gateway: ScriptedGateway, client: GatewayClient
) -> None:
    with pytest.raises(MalformedMessageError, match=r"ext.card.capabilities.1.name"):
        await client.register(["good", {"name": ""}])
    with pytest.raises(MalformedMessageError, match="33 capabilities"):
        await client.register(f"c{number}" for number in range(33))
    with pytest.raises(MalformedMessageError, match="shorten"):
        await client.register({"name": f"c{number}", "description": "d" * 1024} for number in range(9))
    assert gateway.connections == 0
    assert client.state is ClientState.DISCONNECTED


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ({"capabilities_max": 1}, "at most 1 capabilities, these are 2"),
        ({"capabilities_max_bytes": 20}, "at most 20 bytes of capabilities, these are 31"),
    ],
)
async def test_announced_limits_of_capabilities_are_obeyed(
    gateway: ScriptedGateway, client: GatewayClient, limits: dict[str, int], text: str
) -> None:
    async def narrow(visit: Visit) -> None:
        await visit.send(visit.challenge(ext={**visit.challenge().ext, "limits": limits}))
        with pytest.raises(ConnectionClosed):
            await visit.read()

    gateway.scripts.append(narrow)
    with pytest.raises(RegistrationError, match=text):
        await client.register(["one", "two"])
    await client.register(["one", "two"])


# --- gateways that do not prove who they are -------------------------------------------------------


def wire_of(message: Message, key: DIDKey) -> bytes:
    return encode(sign_message(message, key))


async def fake_without_key(visit: Visit) -> None:
    """It names the real gateway's DID, but cannot sign for it."""
    thief = DIDKey.generate()
    message = visit.challenge()
    forged = message.model_copy(update={"from_": thief.did, "to": thief.did})
    wire = wire_of(forged, thief).replace(thief.did.encode(), message.from_.encode())
    await visit.send_raw(wire)


async def unsigned(visit: Visit) -> None:
    await visit.send_raw(encode(visit.challenge()))


async def not_self_addressed(visit: Visit) -> None:
    await visit.send(visit.challenge(to=DIDKey.generate().did))


async def key_of_somebody_else(visit: Visit) -> None:
    payload = RegisterPayload(public_key=DIDKey.generate().public_key_base58)
    await visit.send(visit.challenge(payload=payload))


async def no_nonce(visit: Visit) -> None:
    await visit.send(visit.challenge(ext={}))


async def nonce_that_is_no_text(visit: Visit) -> None:
    await visit.send(visit.challenge(ext={"nonce": [1]}))


async def nonce_as_large_as_a_message(visit: Visit) -> None:
    size = len(wire_of(visit.challenge(ext={"nonce": ""}), visit.key))
    await visit.send(visit.challenge(ext={"nonce": "n" * (MESSAGE_MAX_BYTES - size)}))


async def another_type(visit: Visit) -> None:
    await visit.send(visit.challenge(type="PING", payload=PingPayload()))


async def not_json(visit: Visit) -> None:
    await visit.send_raw(b"hello")


async def altered_on_the_way(visit: Visit) -> None:
    wire = wire_of(visit.challenge(), visit.key)
    await visit.send_raw(wire.replace(b'"resume"', b'"forged"'))


@pytest.mark.parametrize(
    "script",
    [
        fake_without_key,
        unsigned,
        not_self_addressed,
        key_of_somebody_else,
        no_nonce,
        nonce_that_is_no_text,
        nonce_as_large_as_a_message,
        another_type,
        not_json,
        altered_on_the_way,
    ],
)
async def test_first_message_must_prove_the_gateway(
    script: Any, gateway: ScriptedGateway, client: GatewayClient
) -> None:
    gateway.scripts.append(script)
    with pytest.raises(GatewayIdentityError):
        await client.register()
    assert client.state is ClientState.DISCONNECTED
    assert client.session is None
    await client.register()  # an honest one now: nothing is left of the first attempt
    assert client.state is ClientState.REGISTERED


async def test_gateway_must_be_the_pinned_one(gateway: ScriptedGateway, key: DIDKey, other: DIDKey) -> None:
    async with GatewayClient(gateway.url, key, gateway_did=other.did) as client:
        with pytest.raises(GatewayIdentityError, match="another one answers"):
            await client.register()
    async with GatewayClient(gateway.url, key, gateway_did=gateway.key.did) as client:
        await client.register()


@pytest.mark.parametrize(("age", "words"), [(300, "300 s behind"), (-300, "300 s ahead of")])
async def test_clock_gap_is_named(
    age: float, words: str, gateway: ScriptedGateway, client: GatewayClient
) -> None:
    async def late(visit: Visit) -> None:
        await visit.send(visit.challenge(age=age))

    gateway.scripts.append(late)
    with pytest.raises(GatewayIdentityError, match=words):
        await client.register()


async def test_clock_gap_of_a_minute_less_a_second_is_accepted(
    gateway: ScriptedGateway, client: GatewayClient
) -> None:
    async def late(visit: Visit) -> None:
        await visit.send(visit.challenge(age=58))
        await visit.answer(await visit.read())
        await visit.serve()

    gateway.scripts.append(late)
    await client.register()


async def test_answer_must_be_signed_by_the_same_gateway(
    gateway: ScriptedGateway, client: GatewayClient, other: DIDKey
) -> None:
    gateway.scripts.append(lambda visit: visit.welcome(key=other))
    with pytest.raises(GatewayIdentityError, match="answer to REGISTER"):
        await client.register()


async def test_answer_to_another_register_is_no_answer(
    gateway: ScriptedGateway, client: GatewayClient
) -> None:
    gateway.scripts.append(lambda visit: visit.welcome(correlation_id=visit.challenge().id))
    with pytest.raises(RegistrationError, match="did not answer"):
        await client.register()


# --- refusals --------------------------------------------------------------------------------------


async def test_terminal_refusal_closes_the_client(gateway: ScriptedGateway, client: GatewayClient) -> None:
    gateway.scripts.append(lambda visit: visit.refuse("wrong_audience", 4502))
    with pytest.raises(RegistrationError, match=r"ext\.aud is not") as caught:
        await client.register()
    assert caught.value.cause is not None
    assert caught.value.cause.name == "wrong_audience"
    assert client.state is ClientState.CLOSED
    with pytest.raises(GatewayClosedError, match="check the key") as closed:
        await client.receive()
    assert closed.value.close_code.number == 4502
    with pytest.raises(GatewayClosedError):
        async for _ in client:
            pass
    with pytest.raises(GatewayClosedError):
        await client.register()
    assert gateway.connections == 1


async def test_temporary_refusal_may_be_tried_again(gateway: ScriptedGateway, client: GatewayClient) -> None:
    gateway.scripts.append(lambda visit: visit.refuse("internal", 4002))
    with pytest.raises(RegistrationError):
        await client.register()
    assert client.state is ClientState.DISCONNECTED
    await client.register()


async def test_error_in_place_of_the_first_message_is_a_refusal(
    gateway: ScriptedGateway, client: GatewayClient
) -> None:
    async def full(visit: Visit) -> None:
        error = ErrorPayload.for_cause("internal", "full")
        await visit.send_raw(encode(Message.create(visit.key.did, visit.key.did, error)))
        await visit.close(1013)

    gateway.scripts.append(full)
    with pytest.raises(RegistrationError, match="full"):
        await client.register()


@pytest.mark.parametrize("code", [4500, 4502, 4503, 4504, 4505, 4599])
async def test_terminal_close_without_a_word_closes_the_client(
    code: int, gateway: ScriptedGateway, client: GatewayClient
) -> None:
    gateway.scripts.append(lambda visit: visit.close(code))
    with pytest.raises(GatewayClosedError) as caught:
        await client.register()
    assert caught.value.close_code.number == code
    assert client.state is ClientState.CLOSED


async def test_no_gateway_at_the_address_fails_at_once_and_names_it(
    gateway: ScriptedGateway, client: GatewayClient
) -> None:
    await gateway.stop()
    begin = time.monotonic()
    with pytest.raises(
        GatewayUnreachableError, match=rf"{gateway.url} cannot be reached.*is the gateway"
    ) as got:
        await client.register(timeout=60)
    assert got.value.temporary
    assert time.monotonic() - begin < 5
    assert client.state is ClientState.DISCONNECTED


async def test_other_web_servers_are_told_from_gateways(key: DIDKey) -> None:
    async def nothing(socket: Any) -> None:
        await socket.wait_closed()

    def not_found(connection: Any, request: Any) -> Any:
        status = {"/": 404, "/full": 503}.get(request.path)
        return None if status is None else connection.respond(status, "nothing here\n")

    async with serve(nothing, "127.0.0.1", 0, process_request=not_found) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        async with GatewayClient(f"ws://127.0.0.1:{port}/", key) as client:
            with pytest.raises(GatewayUnreachableError, match=r"HTTP 404.*check the URL") as got:
                await client.register()
            assert not got.value.temporary
        async with GatewayClient(f"ws://127.0.0.1:{port}/full", key) as client:
            with pytest.raises(GatewayUnreachableError, match=r"HTTP 503.*it is full") as got:
                await client.register()
            assert got.value.temporary
        async with GatewayClient(f"ws://127.0.0.1:{port}/ws", key) as client:
            with pytest.raises(GatewayUnreachableError, match="does not speak ioap") as got:
                await client.register()
            assert not got.value.temporary


async def says_nothing(visit: Visit) -> None:
    await visit.socket.wait_closed()


async def does_not_answer(visit: Visit) -> None:
    await visit.send(visit.challenge())


@pytest.mark.parametrize(
    ("script", "stage"),
    [(says_nothing, "waiting for its REGISTER"), (does_not_answer, "waiting for its answer to REGISTER")],
)
async def test_silent_gateway_costs_no_more_than_the_timeout(
    script: Any, stage: str, gateway: ScriptedGateway, client: GatewayClient
) -> None:
    gateway.scripts.append(script)
    with pytest.raises(GatewayUnreachableError, match=rf"within 0.2 s \({stage}\)"):
        await client.register(timeout=0.2)
    assert client.state is ClientState.DISCONNECTED


# --- TLS -------------------------------------------------------------------------------------------


def certificate(path: Path) -> None:
    """Write a key and a certificate for 127.0.0.1 that it has signed itself, in one PEM file."""
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "gateway")])
    now = datetime.now(timezone.utc)
    signed = (
        x509.CertificateBuilder(name, name, private.public_key(), 1, now, now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False
        )
        .sign(private, hashes.SHA256())
    )
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(pem + signed.public_bytes(Encoding.PEM))


async def test_certificate_must_be_trusted(key: DIDKey, tmp_path: Path) -> None:
    path = tmp_path / "gateway.pem"
    certificate(path)
    gateway = ScriptedGateway()
    gateway.ssl = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    gateway.ssl.load_cert_chain(path)
    await gateway.start()
    try:
        async with GatewayClient(gateway.url, key, ssl=ssl.create_default_context(cafile=path)) as client:
            await client.register()
            assert (await gateway.visit()).register_ext["aud"] == gateway.url
            await client.ping()
        async with GatewayClient(gateway.url, key) as client:
            with pytest.raises(GatewayUnreachableError, match="certificate verify failed") as got:
                await client.register()
            assert not got.value.temporary
    finally:
        await gateway.stop()


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", None])
async def test_a_port_that_does_not_speak_tls_is_told_from_a_gateway_that_is_not_there(
    answer: bytes | None, key: DIDKey
) -> None:
    is_over = asyncio.Event()

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        if answer is None:
            await is_over.wait()
        else:
            writer.write(answer)
        writer.close()

    async with await asyncio.start_server(play, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with GatewayClient(f"wss://127.0.0.1:{port}/ws", key) as client:
            with pytest.raises(GatewayUnreachableError, match="may not speak TLS: dial ws://"):
                await client.register(timeout=10 if answer is not None else 0.2)
        is_over.set()
    async with GatewayClient(f"wss://127.0.0.1:{port}/ws", key) as client:
        with pytest.raises(GatewayUnreachableError, match="is the gateway running"):
            await client.register()


def test_tls_settings_without_tls_are_a_mistake(key: DIDKey) -> None:
    with pytest.raises(ValueError, match="wss://"):
        GatewayClient("ws://127.0.0.1/ws", key, ssl=ssl.create_default_context())


# --- cancelling and closing ------------------------------------------------------------------------


async def test_cancelled_register_leaves_no_connection(
    gateway: ScriptedGateway, client: GatewayClient
) -> None:
    arrived, gone = asyncio.Event(), asyncio.Event()

    async def watch(visit: Visit) -> None:
        arrived.set()
        await visit.socket.wait_closed()
        gone.set()

    gateway.scripts.append(watch)
    task = asyncio.create_task(client.register())
    await arrived.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert client.state is ClientState.DISCONNECTED
    await asyncio.wait_for(gone.wait(), 5)
    await client.register()


async def test_close_ends_a_running_register(gateway: ScriptedGateway, client: GatewayClient) -> None:
    arrived = asyncio.Event()

    async def watch(visit: Visit) -> None:
        arrived.set()

    gateway.scripts.append(watch)
    task = asyncio.create_task(client.register())
    await arrived.wait()
    await client.close()
    with pytest.raises(NotConnectedError, match="closed before"):
        await task
    assert client.state is ClientState.CLOSED


async def test_register_twice_is_a_mistake(client: GatewayClient) -> None:
    await client.register()
    with pytest.raises(RuntimeError, match="unregister first"):
        await client.register()


async def test_unregister_says_why_and_allows_to_come_back(
    gateway: ScriptedGateway, client: GatewayClient
) -> None:
    await client.register()
    await client.unregister("moving house")
    assert client.state is ClientState.DISCONNECTED
    assert client.session is None
    assert [message.payload.reason for message in gateway.unregistered] == ["moving house"]  # type: ignore[attr-defined]
    await gateway.visit()
    await client.register()
    assert "resume" not in (await gateway.visit()).register_ext


async def test_close_unregisters_and_can_be_repeated(gateway: ScriptedGateway, client: GatewayClient) -> None:
    await client.register()
    visit = await gateway.visit()
    await asyncio.gather(client.close(), client.close())
    await client.close()
    assert await visit.closed() == 1000
    assert len(gateway.unregistered) == 1
    assert client.state is ClientState.CLOSED


async def test_client_needs_no_gateway_to_be_made_and_closed(key: DIDKey) -> None:
    async with GatewayClient("ws://127.0.0.1:1/ws", key, backoff=Backoff()) as client:
        assert client.state is ClientState.DISCONNECTED
    assert client.state is ClientState.CLOSED


# --- a quiet and light library ---------------------------------------------------------------------


def test_import_loads_no_webrtc_and_nothing_is_printed() -> None:
    code = """
import asyncio, sys
from aiconexus import DIDKey, GatewayClient
from aiconexus.protocol.errors import GatewayUnreachableError
heavy = {"aiortc", "av", "picows", "gateway", "uvloop"} & set(sys.modules)
assert not heavy, heavy
async def main():
    async with GatewayClient("ws://127.0.0.1:9/ws", DIDKey.generate()) as client:
        try:
            await client.register()
        except GatewayUnreachableError:
            pass
asyncio.run(main(), debug=False)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_loggers_are_silent_by_default() -> None:
    assert any(
        isinstance(handler, logging.NullHandler) for handler in logging.getLogger("aiconexus").handlers
    )
