"""Registrar: what is sent first, and which proofs are refused for which cause."""

from __future__ import annotations

import json
import re
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from aiconexus.protocol import (
    DIDKey,
    Message,
    MessageError,
    OfferPayload,
    RegisterPayload,
    decode,
    sign_message,
    verify_envelope,
)
from aiconexus.protocol.cards import sign_card
from gateway.handshake import Handshake, Registrar
from gateway.ice import IceServers
from gateway.registry import Shown

GATEWAY = DIDKey.from_seed(b"g" * 32)
AGENT = DIDKey.from_seed(b"a" * 32)
OTHER = DIDKey.from_seed(b"o" * 32)


def registrar(*public_urls: str, ice: IceServers | None = None) -> Registrar:
    return Registrar(
        GATEWAY,
        public_urls=public_urls,
        register_timeout=10,
        ping_interval=25,
        away=30,
        message_rate=50,
        message_burst=300,
        ice=ice,
    )


def register(
    handshake: Handshake, *, key: DIDKey = AGENT, to: str = GATEWAY.did, payload: Any = None, **ext: Any
) -> bytes:
    """Sign a REGISTER for a handshake; keywords replace keys of `ext`, `...` removes them."""
    full = {"nonce": handshake.nonce, "aud": f"ws://{handshake.host}/ws", **ext}
    message = Message.create(
        key.did,
        to,
        payload or RegisterPayload(public_key=key.public_key_base58),
        ext={name: value for name, value in full.items() if value is not ...},
    )
    wire = sign_message(message, key).wire
    assert wire is not None
    return wire


def refused(data: bytes, handshake: Handshake, of: Registrar | None = None) -> MessageError:
    with pytest.raises(MessageError) as caught:
        (of or registrar()).check(handshake, data)
    return caught.value


@pytest.fixture
def handshake() -> Handshake:
    return registrar().begin("gateway.example:8000")[0]


def test_the_first_message_is_signed_and_fits_the_models():
    state, data = registrar().begin("gateway.example")
    verify_envelope(json.loads(data))
    message = decode(data)
    assert (message.from_, message.to) == (GATEWAY.did, GATEWAY.did)
    assert message.ext["nonce"] == state.nonce
    assert state.timeout == 10
    limits = message.ext["limits"]
    assert (limits["register_timeout_ms"], limits["away_ms"]) == (10_000, 30_000)
    assert (limits["message_rate"], limits["message_burst"]) == (50, 300)


def test_the_protocol_names_every_limit_that_is_announced():
    announced = decode(registrar().begin("gateway.example")[1]).ext["limits"]
    root = Path(__file__).parents[2]
    example = json.loads((root / "tests/vectors/messages.json").read_text())[0]["wire"]
    assert list(json.loads(example)["ext"]["limits"]) == list(announced)
    rows = (root / "PROTOCOL_DESIGN.md").read_text().splitlines()
    (row,) = [row for row in rows if row.startswith("| `limits` | object |")]
    assert re.findall("`([a-z_]+)`", row)[1:] == list(announced)


def test_a_proof_is_accepted_and_answered(handshake):
    card = sign_card([{"name": "a", "tags": ["x"], "later": 1}], AGENT)
    data = register(handshake, card=card, hidden=True, resume="token")
    registration = registrar().check(handshake, data)
    assert registration.did == AGENT.did
    assert json.loads(registration.shown.card) == card
    assert [(offer.name, offer.tags) for offer in registration.shown.offers] == [("a", ("x",))]
    assert registration.shown.hidden
    assert registration.resume_token == "token"
    answer = registrar().accept(registration, session="s", resume_token="t", resumed=True)
    verify_envelope(json.loads(answer))
    message = decode(answer)
    assert (message.to, message.correlation_id) == (AGENT.did, registration.message.id)
    assert message.ext == {
        "session": "s",
        "worker": 0,
        "resume_token": "t",
        "ice_servers": [],
        "resumed": True,
    }


def test_every_answer_names_the_ice_servers_with_new_credentials(handshake):
    gateway = registrar(ice=IceServers(("stun:a",), ("turn:b",), "north", 60))
    registration = gateway.check(handshake, register(handshake))
    for answer in (
        gateway.accept(registration, session="s", resume_token="t", resumed=False),
        gateway.note(registration.message),
    ):
        ext = decode(answer).ext
        assert ext["ice_servers_ttl_ms"] == 60_000
        stun, turn = ext["ice_servers"]
        assert (stun, turn["urls"]) == ({"urls": ["stun:a"]}, ["turn:b"])
        assert turn["username"].endswith(f":{AGENT.did}")


def test_card_and_resume_may_be_left_out(handshake):
    registration = registrar().check(handshake, register(handshake))
    assert (registration.shown, registration.resume_token) == (Shown(), None)


def test_every_refusal_names_its_cause_its_field_and_the_message(handshake):
    cases = {
        ("unexpected_type", "type"): register(handshake, payload=OfferPayload(sdp="x")),
        ("invalid_ext", "ext.resume"): register(handshake, resume=7),
        ("wrong_recipient", "to"): register(handshake, to=OTHER.did),
        ("wrong_key", "payload.public_key"): register(
            handshake, payload=RegisterPayload(public_key=OTHER.public_key_base58)
        ),
        ("wrong_nonce", "ext.nonce"): register(handshake, nonce="x" * 43),
        ("wrong_audience", "ext.aud"): register(handshake, aud="ws://evil.example/ws"),
        ("bad_signature", "signature"): register(handshake).replace(b'"ext":{', b'"ext":{"x":1,'),
    }
    for (name, field), data in cases.items():
        error = refused(data, handshake)
        assert (error.cause.name, error.field) == (name, field)
        assert error.message_id == json.loads(data)["id"]


def test_the_cheap_checks_come_before_the_signature(handshake, monkeypatch):
    monkeypatch.setattr("gateway.handshake.verify_envelope", lambda _: pytest.fail("verified"))
    refused(register(handshake, nonce="x"), handshake)
    refused(register(handshake, aud="ws://evil.example/ws"), handshake)
    refused(register(handshake, to=OTHER.did), handshake)
    refused(register(handshake, card=0), handshake)


def test_a_handshake_is_of_one_connection():
    gateway = registrar()
    first, second = gateway.begin("a:1")[0], gateway.begin("a:1")[0]
    assert refused(register(first), second).cause.name == "wrong_nonce"
    assert gateway.check(first, register(first)).did == AGENT.did


@pytest.mark.parametrize(("seconds", "fits"), [(0, True), (59, True), (-59, True), (61, False), (-61, False)])
def test_the_clock_may_be_off_by_a_minute(handshake, monkeypatch, seconds, fits):
    data = register(handshake)
    moment = decode(data).timestamp.timestamp()
    monkeypatch.setattr("gateway.handshake.time.time", lambda: moment + seconds)
    if fits:
        registrar().check(handshake, data)
    else:
        assert refused(data, handshake).cause.name == "stale_timestamp"


def test_a_timestamp_outside_the_calendar_of_the_clock_is_refused(handshake):
    for year in (1, 9999):
        message = Message.create(
            AGENT.did,
            GATEWAY.did,
            RegisterPayload(public_key=AGENT.public_key_base58),
            ext={"nonce": handshake.nonce, "aud": f"ws://{handshake.host}/ws"},
        ).model_copy(update={"timestamp": datetime(year, 1, 1, tzinfo=timezone.utc) + timedelta(days=1)})
        data = sign_message(message, AGENT).wire
        assert refused(data, handshake).cause.name in ("stale_timestamp", "wrong_type")


@pytest.mark.parametrize(
    ("host", "audience"),
    [
        ("gateway.example", "ws://gateway.example/ws"),
        ("gateway.example", "wss://gateway.example/ws"),  # TLS ends at a proxy
        ("gateway.example", "wss://gateway.example:443/ws"),
        ("gateway.example:80", "ws://gateway.example/ws"),
        ("gateway.example:443", "wss://gateway.example/ws"),
        ("GATEWAY.example", "ws://gateway.EXAMPLE/ws"),
        ("gateway.example:8000", "ws://gateway.example:8000"),
        ("127.0.0.1:8000", "ws://127.0.0.1:8000/other?token=1"),
        ("[::1]:8000", "ws://[::1]:8000/ws"),
        ("[::1]", "ws://[::1]/ws"),
        ("gateway.example.", "ws://gateway.example./ws"),
    ],
)
def test_without_public_urls_the_audience_is_the_host_that_was_asked_for(host, audience):
    handshake = registrar().begin(host)[0]
    assert registrar().check(handshake, register(handshake, aud=audience)).did == AGENT.did


@pytest.mark.parametrize(
    ("host", "audience"),
    [
        ("gateway.example", "ws://evil.example/ws"),
        ("gateway.example", "ws://gateway.example:8000/ws"),
        ("gateway.example:8000", "ws://gateway.example/ws"),
        ("gateway.example:80", "wss://gateway.example/ws"),
        ("gateway.example:443", "ws://gateway.example/ws"),
        ("gateway.example", "http://gateway.example/ws"),
        ("gateway.example", "gateway.example"),
        ("gateway.example", "//gateway.example/ws"),
        ("gateway.example", "ws:gateway.example"),
        ("gateway.example", "ws:///ws"),
        ("gateway.example", ""),
        ("gateway.example", "ws://gateway.example:99999/ws"),
        ("gateway.example", "ws://gateway.example:port/ws"),
        ("gateway.example", "ws://gateway.example:0/ws"),
        ("gateway.example", "ws://[gateway.example/ws"),
        ("gateway.example", "ws://gateway.example./ws"),
        # Whoever dials these may reach somebody else than we read.
        ("gateway.example", "ws://gateway.example@evil.example/ws"),
        ("gateway.example", "ws://evil.example@gateway.example/ws"),
        ("gateway.example", "ws://evil.example\\@gateway.example/ws"),
        ("gateway.example", "ws://evil.example\\.gateway.example/ws"),
        ("gateway.example", "ws://gateway.example\\.evil.example/ws"),
        ("gateway.example", "ws://gateway.example#@evil.example/ws"),
        ("gateway.example", "ws://gate\tway.example/ws"),
        ("gateway.example", "ws://gateway.example\n/ws"),
        ("gateway.example", " ws://gateway.example/ws"),
        ("gateway.example", "\x00ws://gateway.example/ws"),
        ("gateway.example", "ws://gateway.example /ws"),
        ("gateway.example", "ws://\uff47ateway.example/ws"),
        # What a stranger writes into Host.
        ("", "ws:///ws"),
        ("user@gateway.example", "ws://gateway.example/ws"),
        ("evil.example\\@gateway.example", "ws://gateway.example/ws"),
        ("gateway.example/evil", "ws://gateway.example/ws"),
        ("gateway.example?evil", "ws://gateway.example/ws"),
        ("gateway.example:99999", "ws://gateway.example/ws"),
        ("a b", "ws://a b/ws"),
    ],
)
def test_another_audience_is_refused(host, audience):
    handshake = registrar().begin(host)[0]
    error = refused(register(handshake, aud=audience), handshake)
    assert (error.cause.name, error.field) == ("wrong_audience", "ext.aud")


@pytest.mark.parametrize("audience", [None, 7, [], {}, True, ...])
def test_an_audience_that_is_no_string_is_refused(handshake, audience):
    assert refused(register(handshake, aud=audience), handshake).cause.name == "wrong_audience"


@pytest.mark.parametrize(
    ("audience", "fits"),
    [
        ("wss://gateway.example/ws", True),
        ("wss://gateway.example:443/ws", True),
        ("wss://GATEWAY.example/ws", True),
        ("ws://127.0.0.1:8000/ws", True),
        ("ws://gateway.example/ws", False),
        ("wss://gateway.example/other", False),
        ("wss://gateway.example:8443/ws", False),
        ("wss://evil.example/ws", False),
        ("wss://gateway.example", False),
        ("wss://evil.example\\@gateway.example/ws", False),
        ("wss://user@gateway.example/ws", False),
    ],
)
def test_with_public_urls_the_audience_is_one_of_them_whatever_the_host(audience, fits):
    gateway = registrar("wss://gateway.example/ws", "ws://127.0.0.1:8000/ws")
    handshake = gateway.begin("evil.example")[0]
    if fits:
        gateway.check(handshake, register(handshake, aud=audience))
    else:
        error = refused(register(handshake, aud=audience), handshake, gateway)
        assert error.cause.name == "wrong_audience"


@pytest.mark.parametrize(
    "capabilities",
    [
        None,
        {},
        "a",
        ["a"],
        [None],
        [[]],
        [{}],
        [{"name": ""}],
        [{"name": 1}],
        [{"name": "x" * 65}],
        [{"name": "a", "tags": "x"}],
        [{"name": "a", "tags": [""]}],
        [{"name": "a", "tags": ["x"] * 17}],
        [{"name": "a", "description": "x" * 1025}],
        [{"name": "a", "input": []}],
        [{"name": "a"}, {"name": "a"}],
        [{"name": str(number)} for number in range(33)],
        [{"name": "a", "ignored": "x" * 8192}],
        [{"name": str(number), "description": "é" * 500} for number in range(10)],
    ],
    ids=lambda value: str(value)[:40],
)
def test_capabilities_that_do_not_fit_are_refused(handshake, capabilities):
    error = refused(register(handshake, card=sign_card(capabilities, AGENT)), handshake)
    assert error.cause.name == "invalid_ext"
    assert error.field.startswith("ext.card.capabilities")
    assert len(str(error)) < 300


@pytest.mark.parametrize(
    ("card", "field"),
    [
        (0, "ext.card"),
        ([], "ext.card"),
        ({}, "ext.card.type"),
        ({**sign_card([], AGENT), "type": "OFFER"}, "ext.card.type"),
        ({**sign_card([], AGENT), "more": 1}, "ext.card.more"),
        ({**sign_card([], AGENT), "issued_at": -1}, "ext.card.issued_at"),
        (sign_card([], DIDKey.from_seed(bytes([9] * 32))), "ext.card.did"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_card_of_this_agent_is_refused(handshake, card, field):
    error = refused(register(handshake, card=card), handshake)
    assert (error.cause.name, error.field) == ("invalid_ext", field)


def test_hidden_is_a_boolean(handshake):
    error = refused(register(handshake, hidden=1), handshake)
    assert (error.cause.name, error.field) == ("invalid_ext", "ext.hidden")


def test_32_capabilities_fit(handshake):
    capabilities = [{"name": str(number), "input": {"type": "object"}} for number in range(32)]
    registration = registrar().check(handshake, register(handshake, card=sign_card(capabilities, AGENT)))
    assert len(registration.shown.offers) == 32


def test_nonces_and_tokens_are_of_32_random_bytes():
    made = {registrar().begin("a")[0].nonce for _ in range(100)} | {
        Registrar.new_resume_token() for _ in range(100)
    }
    assert len(made) == 200
    assert {len(text) for text in made} == {43}
