"""Every refusal is an ERROR with its correlation_id, counted, logged once, and nobody else notices."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any
from uuid import uuid4

import pytest
from wire import BINARY, CONTINUATION, TEXT, Agent, RawClient, assert_exchange, close_frame, frame

from aiconexus.protocol import (
    DIDKey,
    DiscoverPayload,
    ErrorPayload,
    ExecRequestPayload,
    ExecResponsePayload,
    ExecStatus,
    IntentPayload,
    Payload,
    PingPayload,
    PongPayload,
    PresencePayload,
    RegisterPayload,
    UnregisterPayload,
    sign_message,
)
from aiconexus.protocol.cards import sign_card
from aiconexus.protocol.errors import CAUSES

OTHER = DIDKey.from_seed(b"o" * 32)
ID = "123e4567-e89b-42d3-a456-426614174000"


@dataclass
class Bystanders:
    """Two agents that must not notice anything."""

    a: Agent
    b: Agent


@pytest.fixture
def port(shared_gateway) -> int:
    return shared_gateway.port


@pytest.fixture(scope="module")
def bystanders(shared_gateway):
    with Agent(shared_gateway.port) as a, Agent(shared_gateway.port) as b:
        yield Bystanders(a, b)


@pytest.fixture
def refusals(shared_gateway, bystanders):
    """Count what the gateway refuses during a test, and see that the others still talk after it."""
    counters = shared_gateway.health()["counters"]["refused"]
    lines = len(shared_gateway.log_lines())

    class Refusals:
        @staticmethod
        def assert_one(name: str) -> dict[str, Any]:
            now = shared_gateway.health()["counters"]["refused"]
            grown = {key: now[key] - counters.get(key, 0) for key in now if now[key] != counters.get(key, 0)}
            assert grown == {name: 1}
            (line,) = shared_gateway.log_lines()[lines:]
            assert line["cause"] == name
            return line

    yield Refusals
    assert_exchange(bystanders.a, bystanders.b)


@dataclass(frozen=True)
class Bad:
    """A message of a registered agent and what must come of it.

    Attributes:
        name: `details.name` of the ERROR, and what is counted.
        make: Builds the text message.
        has_id: Whether the id can be read, so that the ERROR must name it.
        field: `details.field` of the ERROR.
        close: The code that the session ends with; None: it goes on.
    """

    name: str
    make: Callable[[Agent], bytes]
    has_id: bool = True
    field: str | None = None
    close: int | None = None


def changed(name: str, /, **fields: Any) -> Bad:
    """An OFFER with fields replaced, or left out if `...`."""
    first = next(iter(fields)).rstrip("_")
    return Bad(
        name,
        lambda agent: json.dumps(agent.envelope(OTHER.did, **fields)).encode(),
        has_id=first != "id",
        field=first if name != "unknown_field" else None,
    )


def edited(name: str, old: str, new: str, *, has_id: bool = True, field: str | None = None) -> Bad:
    """The text of an OFFER, edited."""

    def make(agent: Agent) -> bytes:
        data = agent.offer(OTHER.did).decode()
        assert old in data
        return data.replace(old, new, 1).encode()

    return Bad(name, make, has_id, field)


def payload(name: str, body: Payload, field: str | None = "type", *, to_gateway: bool = False) -> Bad:
    """A well-formed, signed message of a type that has no place here."""
    return Bad(
        name,
        lambda agent: agent.message(agent.gateway_did if to_gateway else OTHER.did, body),
        field=field,
    )


def nested(depth: int) -> str:
    return '{"a":' * depth + "0" + "}" * depth


IN_SESSION = {
    # --- not one JSON object
    "not JSON": Bad("not_json", lambda _: b"hello", has_id=False),
    "an empty message": Bad("not_json", lambda _: b"", has_id=False),
    "a NUL behind the object": Bad("not_json", lambda a: a.offer(OTHER.did) + b"\0"),
    "two objects": Bad("not_json", lambda a: a.offer(OTHER.did) * 2),
    "a byte order mark": Bad("not_json", lambda a: b"\xef\xbb\xbf" + a.offer(OTHER.did), has_id=False),
    "an array": Bad("not_object", lambda _: b"[]", has_id=False),
    "a string": Bad("not_object", lambda _: b'"OFFER"', has_id=False),
    "null": Bad("not_object", lambda _: b"null", has_id=False),
    "NaN": edited("not_json", '"payload":{', '"payload":{"x":NaN,', field="payload"),
    "a lone surrogate": edited("lone_surrogate", "v=0", "v=0\\ud800", field="payload"),
    "a number over the range": edited(
        "number_out_of_range", '"payload":{', '"payload":{"x":1e999,', field="payload"
    ),
    "too deep": edited("too_deep", '"payload":{', f'"payload":{{"x":{nested(31)},', field="payload"),
    "far too deep": edited("too_deep", '"payload":{', f'"payload":{{"x":{nested(900)},', field="payload"),
    # --- size and coding: these end the session
    "too large": Bad("too_large", lambda a: a.offer(OTHER.did, 65_536) + b" ", close=1009),
    "much too large": Bad("too_large", lambda a: a.offer(OTHER.did, 65_536) + b" " * 190_000, close=1009),
    "invalid UTF-8": Bad(
        "invalid_utf8", lambda a: a.offer(OTHER.did).replace(b"v=0", b"v=\xff"), field="payload", close=1007
    ),
    # --- keys
    "a key twice": edited("duplicate_key", '{"id"', f'{{"from":"{OTHER.did}","id"', field="from"),
    "the id twice": edited("duplicate_key", '{"id"', f'{{"id":"{ID}","id"', has_id=False, field="id"),
    "an escaped key": edited("escaped_key", '"from"', '"fr\\u006fm"', field="from"),
    "an escaped key that repeats another": edited(
        "escaped_key", '{"id"', f'{{"fr\\u006fm":"{OTHER.did}","id"', field="from"
    ),
    "an unknown field": changed("unknown_field", trace="x"),
    # --- values
    "an escaped from": edited("escaped_value", '"did:key:', '"did\\u003akey:', field="from"),
    "an escaped type": edited("escaped_value", '"OFFER"', '"\\u004fFFER"', field="type"),
    "an escaped id": edited("escaped_value", '"id":"', '"id":"\\u0030', has_id=False, field="id"),
    **{
        f"no {name}": changed("missing_field", **{name: ...})
        for name in ("id", "timestamp", "from_", "to", "type", "payload", "version")
    },
    **{
        f"{name} is {value!r}": changed("wrong_type", **{name: value})
        for name, value in (
            ("id", 7),
            ("id", None),
            ("timestamp", 1.5),
            ("from_", [OTHER.did]),
            ("to", {}),
            ("to", None),
            ("type", 1),
            ("payload", []),
            ("payload", "x"),
            ("version", 1.0),
            ("correlation_id", 1),
            ("signature", {}),
            ("ext", []),
            ("ext", None),
        )
    },
    "an id that is no UUID": changed("bad_id", id="1"),
    "a correlation_id that is no UUID": changed("bad_id", correlation_id=ID + "0"),
    "an unknown type": changed("unknown_type", type="HELLO"),
    "a type in small letters": changed("unknown_type", type="offer"),
    "an empty type": changed("unknown_type", type=""),
    "version 2.0": changed("unsupported_version", version="2.0"),
    "version 1.1 with fields to come": changed("unsupported_version", version="1.1", trace="x"),
    # --- who
    "from somebody else": changed("wrong_sender", from_=OTHER.did),
    "to a DID of another method": changed("bad_did", to="did:web:example.org"),
    "to a DID URL": changed("bad_did", to=OTHER.did + "#key"),
    "to a DID in capitals": changed("bad_did", to=OTHER.did.upper()),
    "to a DID that is not canonical": changed("bad_did", to=OTHER.did[:12] + "z" * 44),
    "to an agent that is not online": Bad("not_online", lambda a: a.offer(OTHER.did), field="to"),
    "an OFFER to the gateway": Bad("not_online", lambda a: a.offer(a.gateway_did), field="to"),
    "an ERROR to an agent that is not online": payload(
        "not_online", ErrorPayload.for_cause("declined"), "to"
    ),
    # --- what
    "an INTENT": payload("data_plane_only", IntentPayload(query="x")),
    "an EXEC_REQUEST": payload("data_plane_only", ExecRequestPayload(args={})),
    "an EXEC_RESPONSE": payload("data_plane_only", ExecResponsePayload(status=ExecStatus.SUCCESS)),
    "an INTENT to the gateway": payload("data_plane_only", IntentPayload(query="x"), to_gateway=True),
    "a DISCOVER to an agent": payload("unexpected_type", DiscoverPayload()),
    "a DISCOVER with a limit of 0": Bad(
        "invalid_payload",
        lambda a: a.message(a.gateway_did, DiscoverPayload()).replace(
            b'"payload":{', b'"payload":{"limit":0'
        ),
        field="payload.limit",
    ),
    "PRESENCE": payload("unexpected_type", PresencePayload(), to_gateway=True),
    "a PING to an agent": payload("unexpected_type", PingPayload()),
    "a PONG to an agent": payload("unexpected_type", PongPayload()),
    "an UNREGISTER to an agent": payload("unexpected_type", UnregisterPayload()),
    "a REGISTER to an agent": payload("unexpected_type", RegisterPayload(public_key="z")),
    "a REGISTER on a session with another's card": Bad(
        "invalid_ext",
        lambda a: a.signed(a.registration(ext={"card": sign_card([], OTHER)})),
        field="ext.card.did",
    ),
    "a PING with an unknown payload field": Bad(
        "invalid_payload",
        lambda a: a.message(a.gateway_did, PingPayload()).replace(b'"payload":{', b'"payload":{"x":1'),
        field="payload.x",
    ),
    "a PING whose sequence is a string": Bad(
        "invalid_payload",
        lambda a: a.message(a.gateway_did, PingPayload()).replace(
            b'"payload":{', b'"payload":{"sequence":"1"'
        ),
        field="payload.sequence",
    ),
    "a PING with a bad timestamp": Bad(
        "wrong_type",
        lambda a: json.dumps(
            {**json.loads(a.message(a.gateway_did, PingPayload())), "timestamp": "yesterday"}
        ).encode(),
        field="timestamp",
    ),
    "a PING with a key twice in its payload": Bad(
        "duplicate_key",
        lambda a: a.message(a.gateway_did, PingPayload()).replace(
            b'"payload":{', b'"payload":{"sequence":1,"sequence":2'
        ),
        field="sequence",
    ),
}


@pytest.mark.parametrize("case", IN_SESSION.values(), ids=IN_SESSION)
def test_a_registered_agent_is_told_what_was_wrong(case, port, refusals):
    with Agent(port) as agent:
        data = case.make(agent)
        agent.send(data)
        error = agent.receive_error(case.name, _id_in(data) if case.has_id else None)
        cause = CAUSES[case.name]
        assert (error["code"], error["details"]["num"]) == (cause.code.value, cause.num)
        assert error["details"]["temporary"] is cause.temporary
        assert error["details"].get("field") == case.field
        line = refusals.assert_one(case.name)
        assert line["event"] == "refused"
        assert line["did"] == agent.did
        if case.close is None:
            agent.ping()
        else:
            _assert_closed(agent, case.close)


def _id_in(data: bytes) -> str:
    return data.replace(b'"id": ', b'"id":').partition(b'"id":"')[2][:36].decode()


def _assert_closed(client: RawClient, code: int) -> dict[str, Any]:
    close = client.read_close()
    assert close.close_code == code
    client.write(close_frame(code))
    client.assert_ended()
    return close.close_reason


def test_the_signature_of_what_is_forwarded_is_the_receivers_to_check(port):
    with Agent(port) as a, Agent(port) as b:
        data = a.offer(b.did).replace(b'"signature":"', b'"signature":"AAAA')
        a.send(data)
        assert b.read_text() == data


@pytest.mark.parametrize("state", ["registered", "not registered"])
@pytest.mark.parametrize(
    "written",
    [frame(BINARY, b"{}"), frame(BINARY, b""), frame(BINARY, b"{", fin=False) + frame(CONTINUATION, b"}")],
    ids=["whole", "empty", "fragmented"],
)
def test_a_binary_frame_is_answered_and_ends_the_connection(written, state, port, refusals):
    with Agent(port, register=state == "registered") as agent:
        agent.write(written)
        agent.receive_error("binary_frame", None)
        assert _assert_closed(agent, 1003) == {"n": "unsupported_data", "r": 5000}
        refusals.assert_one("binary_frame")


# --- REGISTER --------------------------------------------------------------------------------------


def _registration(**options: Any) -> Callable[[Agent], bytes]:
    return lambda agent: agent.signed(agent.registration(**options))


def _late(seconds: float) -> Callable[[Agent], bytes]:
    def make(agent: Agent) -> bytes:
        moment = datetime.now(timezone.utc) + timedelta(seconds=seconds)
        return agent.signed(agent.registration().model_copy(update={"timestamp": moment}))

    return make


def _edited(old: bytes, new: bytes) -> Callable[[Agent], bytes]:
    def make(agent: Agent) -> bytes:
        data = agent.signed(agent.registration())
        assert old in data
        return data.replace(old, new, 1)

    return make


def _by_another_key(agent: Agent) -> bytes:
    """Signed by a key that is not the one in `from`."""
    message = agent.registration()
    forged = sign_message(message.model_copy(update={"from_": OTHER.did}), OTHER)
    envelope = json.loads(agent.signed(message))
    envelope["signature"] = forged.signature
    return json.dumps(envelope).encode()


def _nonce_of_another_connection(agent: Agent) -> bytes:
    with Agent(agent.port, register=False) as other:
        return agent.signed(agent.registration(ext={"nonce": other.nonce}))


def _replayed(agent: Agent) -> bytes:
    """What this agent proved on another connection, byte for byte."""
    with Agent(agent.port, agent.key, register=False) as before:
        data = before.signed(before.registration())
        before.send(data)
        assert before.receive()["type"] == "REGISTER"
        before.close()
        return data


def _unsigned(agent: Agent) -> bytes:
    envelope = json.loads(agent.signed(agent.registration()))
    del envelope["signature"]
    return json.dumps(envelope).encode()


def _with_card(*capabilities: Any) -> Callable[[Agent], bytes]:
    return lambda a: a.signed(a.registration(ext={"card": sign_card(list(capabilities), a.key)}))


AT_REGISTRATION = {
    # --- 4500: not a REGISTER at all
    "not JSON": ("not_json", 4500, lambda _: b"hello"),
    "an array": ("not_object", 4500, lambda _: b"[]"),
    "an OFFER": ("unexpected_type", 4500, lambda a: a.offer(OTHER.did)),
    "a PING": ("unexpected_type", 4500, lambda a: a.message(a.gateway_did, PingPayload())),
    "an INTENT": ("unexpected_type", 4500, lambda a: a.message(OTHER.did, IntentPayload(query="x"))),
    "a key twice": ("duplicate_key", 4500, _edited(b'{"id"', b'{"timestamp":"","id"')),
    "a key twice in ext": ("duplicate_key", 4500, _edited(b'"ext":{', b'"ext":{"nonce":"x",')),
    "no version": ("missing_field", 4500, _edited(b'"version":"1.0",', b"")),
    "an unknown payload field": ("invalid_payload", 4500, _edited(b'"payload":{', b'"payload":{"a":1,')),
    "too deep": ("too_deep", 4500, _edited(b'"ext":{', b'"ext":{"x":' + nested(31).encode() + b",")),
    "the card is a list": ("invalid_ext", 4500, _registration(ext={"card": []})),
    "a capability is a string": ("invalid_ext", 4500, _with_card("a")),
    "a capability without a name": ("invalid_ext", 4500, _with_card({})),
    "a capability with an empty name": ("invalid_ext", 4500, _with_card({"name": ""})),
    "a capability twice": ("invalid_ext", 4500, _with_card({"name": "a"}, {"name": "a"})),
    "33 capabilities": ("invalid_ext", 4500, _with_card(*({"name": str(i)} for i in range(33)))),
    "capabilities over 8 KiB": ("invalid_ext", 4500, _with_card({"name": "a", "x": "x" * 8192})),
    "the card of another": (
        "invalid_ext",
        4500,
        lambda a: a.signed(a.registration(ext={"card": sign_card([], OTHER)})),
    ),
    "hidden is a number": ("invalid_ext", 4500, _registration(ext={"hidden": 1})),
    "resume is a number": ("invalid_ext", 4500, _registration(ext={"resume": 1})),
    # --- 4502: the proof fails
    "no signature": ("missing_signature", 4502, _unsigned),
    "a forged signature": ("bad_signature", 4502, _by_another_key),
    "a signature that is no base64": ("bad_signature", 4502, _edited(b'"signature":"', b'"signature":"!')),
    "something changed behind the signature": ("bad_signature", 4502, _edited(b'"ext":{', b'"ext":{"x":1,')),
    "another public key": (
        "wrong_key",
        4502,
        _registration(payload=RegisterPayload(public_key=OTHER.public_key_base58)),
    ),
    "to another gateway": ("wrong_recipient", 4502, _registration(to=OTHER.did)),
    "no nonce": ("wrong_nonce", 4502, _registration(ext={"nonce": ...})),
    "a nonce that is no string": ("wrong_nonce", 4502, _registration(ext={"nonce": 1})),
    "a nonce of its own": ("wrong_nonce", 4502, _registration(ext={"nonce": "é" * 43})),
    "the nonce of another connection": ("wrong_nonce", 4502, _nonce_of_another_connection),
    "a replay": ("wrong_nonce", 4502, _replayed),
    "no audience": ("wrong_audience", 4502, _registration(ext={"aud": ...})),
    "an audience that is no string": ("wrong_audience", 4502, _registration(ext={"aud": ["ws://x/ws"]})),
    "another audience": ("wrong_audience", 4502, _registration(ext={"aud": "ws://gateway.example/ws"})),
    "61 s late": ("stale_timestamp", 4502, _late(-61)),
    "61 s early": ("stale_timestamp", 4502, _late(+62)),
    # --- others
    "version 2.0": ("unsupported_version", 4505, _edited(b'"version":"1.0"', b'"version":"2.0"')),
    "too large": ("too_large", 1009, lambda a: a.signed(a.registration()) + b" " * 65_536),
    "invalid UTF-8": ("invalid_utf8", 1007, _edited(b'"aud":"ws', b'"aud":"\xff')),
}


@pytest.mark.parametrize(("name", "code", "make"), AT_REGISTRATION.values(), ids=AT_REGISTRATION)
def test_a_registration_that_fails_is_answered_and_ends_the_connection(name, code, make, port, refusals):
    with Agent(port, register=False) as agent:
        data = make(agent)
        agent.send(data, agent.signed(agent.registration()))  # what comes behind it is too late
        has_id = name not in ("not_json", "not_object")
        agent.receive_error(name, _id_in(data) if has_id else None)
        assert _assert_closed(agent, code)["n"]
        refusals.assert_one(name)


def test_the_nonce_is_of_32_bytes_and_of_one_connection(port):
    nonces = set()
    for _ in range(20):
        with Agent(port, register=False) as agent:
            assert len(agent.nonce) == 43
            nonces.add(agent.nonce)
    assert len(nonces) == 20


def test_a_clock_that_is_a_little_off_registers(port):
    for seconds in (-58, +58):
        with Agent(port, register=False) as agent:
            agent.send(_late(seconds)(agent))
            assert agent.receive()["type"] == "REGISTER"


def test_a_refused_claim_does_not_touch_the_session_of_its_owner(port):
    """Also its ERROR, although it is addressed to the claimed DID, goes to who claimed it."""
    with Agent(port) as owner:
        with Agent(port, register=False) as thief:
            thief.key, thief.did = OTHER, owner.did
            forged = sign_message(thief.registration().model_copy(update={"from_": OTHER.did}), OTHER)
            envelope = {**json.loads(forged.wire or b""), "from": owner.did}
            envelope["payload"] = {"public_key": owner.key.public_key_base58}
            thief.send(json.dumps(envelope).encode())
            assert thief.receive_error("bad_signature", envelope["id"])
            _assert_closed(thief, 4502)
        owner.ping()


# --- what a stranger writes does not become the operator's problem ----------------------------------


@pytest.mark.parametrize("style", ["json", "console"])
def test_nobody_can_write_lines_into_the_log(start_gateway, style):
    evil = "x\nlevel=error \x1b[31mfake\r\u2028\x00\x7f\x9b31m"
    gateway = start_gateway("--log-format", style)
    with Agent(gateway.port) as agent:
        ping = json.loads(agent.message(agent.gateway_did, PingPayload()))
        fields = ("timestamp", "version", "type", "to", "id", "correlation_id")
        for spoilt in ({"payload": {evil: 1}}, *({name: evil} for name in fields)):
            agent.send(json.dumps({**ping, **spoilt}).encode())
            assert agent.receive()["type"] == "ERROR"
        key = json.dumps(evil)
        twice = json.dumps({**ping, "payload": {"x": 0}}).replace('"x": 0', f"{key}: 1, {key}: 2")
        agent.send(twice.encode())
        agent.receive_error("duplicate_key", ping["id"])
        agent.ping()
    with Agent(gateway.port, register=False) as agent:
        message = agent.registration(ext={"aud": evil})
        agent.send(agent.signed(message))
        agent.receive_error("wrong_audience", message.id)
    lines = gateway.log.splitlines()
    assert len([line for line in lines if "cause" in line]) == len(fields) + 3
    assert len(lines) == len(fields) + 4, "besides them one line says that it serves"
    assert not [letter for letter in gateway.log if not letter.isprintable() and letter != "\n"]


def test_an_error_never_outgrows_its_limit(port):
    """However long the names are that a stranger chose, they are quoted only in part."""
    with Agent(port) as agent:
        for payload_ in ({"é" * 20_000: 1}, {"sequence": {"é" * 20_000: 1}}):
            ping = json.loads(agent.message(agent.gateway_did, PingPayload()))
            agent.send(json.dumps({**ping, "payload": payload_}, ensure_ascii=False).encode())
            data = agent.read_text()
            assert len(data) < 2_500
            assert json.loads(data)["payload"]["details"]["name"] == "invalid_payload"
        with Agent(port, register=False) as other:
            long = "x" * 60_000
            message = other.registration(ext={"aud": "ws://" + long})
            other.send(other.signed(message))
            assert len(other.read_text()) < 2_500


def test_many_refusals_in_one_write_are_as_many_errors_in_order(port, bystanders):
    with Agent(port) as agent:
        ids = [str(uuid4()) for _ in range(900)]  # within the burst of a session
        agent.send(*(b'{"id":"%s"}' % name.encode() for name in ids))
        assert [agent.receive()["correlation_id"] for _ in ids] == ids
        agent.ping()
    assert_exchange(bystanders.a, bystanders.b)


def test_a_text_frame_in_pieces_of_one_byte_is_refused_like_a_whole_one(port):
    with Agent(port) as agent:
        agent.write_frame(TEXT, b"h", fin=False)
        for letter in b"ell":
            agent.write_frame(CONTINUATION, bytes([letter]), fin=False)
        agent.write_frame(CONTINUATION, b"o")
        agent.receive_error("not_json", None)
        agent.ping()
