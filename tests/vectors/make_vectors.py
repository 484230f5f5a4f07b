"""Write the test vectors, and the generated parts of PROTOCOL_DESIGN.md, from fixed seeds.

Run it after a change of the protocol: `python tests/vectors/make_vectors.py`. A test fails while what is in
the tree differs from what it writes. The vectors are plain JSON: other implementations test against them.
"""

from __future__ import annotations

import hmac
import json
import re
from base64 import b64encode
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import rfc8785
from nacl.signing import SigningKey

from aiconexus.protocol import CAUSES, CLOSE_CODES, encode_did, limits
from aiconexus.protocol.limits import PROTOCOL_VERSION

HERE = Path(__file__).parent
DOCUMENT = HERE.parent.parent / "PROTOCOL_DESIGN.md"

SEEDS = {"gateway": b"\x01" * 32, "A": b"\x02" * 32, "B": b"\x03" * 32}
KEYS = {name: SigningKey(seed) for name, seed in SEEDS.items()}
DIDS = {name: encode_did(bytes(key.verify_key)) for name, key in KEYS.items()}
NONCE = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8"  # the bytes 00 01 ... 1f
TURN_USERNAME = f"1768298403:{DIDS['A']}"  # the secret that it is signed with is "north"
RESUME_TOKEN = "ICEiIyQlJicoKSorLC0uLzAxMjM0NTY3ODk6Ozw9Pj8"


def sdp(ufrag: str, setup: str, byte: int) -> str:
    """Return a DataChannel description whose fingerprint is `byte` 32 times."""
    lines = (
        "v=0",
        "o=- 3978880800 1 IN IP4 192.0.2.1",
        "s=-",
        "t=0 0",
        "a=group:BUNDLE 0",
        "m=application 9 UDP/DTLS/SCTP webrtc-datachannel",
        "c=IN IP4 0.0.0.0",
        "a=mid:0",
        "a=sctp-port:5000",
        "a=max-message-size:262144",
        f"a=ice-ufrag:{ufrag}",
        "a=ice-pwd:" + ufrag * 6,
        "a=fingerprint:sha-256 " + ":".join([f"{byte:02X}"] * 32),
        f"a=setup:{setup}",
    )
    return "".join(line + "\r\n" for line in lines)


CAPABILITY = {
    "name": "extract_clauses",
    "description": "Return the sentences of `text` that hold a clause of one of `kinds`.",
    "tags": ["legal"],
    "input": {
        "type": "object",
        "properties": {
            "text": {"type": "string"},
            "kinds": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["text", "kinds"],
        "additionalProperties": False,
    },
    "output": {"type": "array", "items": {"type": "string"}},
}


def card(name: str, **changed: Any) -> dict[str, Any]:
    """Return the signed card of one of KEYS."""
    signed = {
        "type": "CARD",
        "did": DIDS[name],
        "issued_at": 1768212000000,
        "capabilities": [CAPABILITY],
        **changed,
    }
    return {**signed, "signature": b64encode(KEYS[name].sign(rfc8785.dumps(signed)).signature).decode()}


CARDS = {"A": card("A"), "B": card("B")}

# Each is for agent B. reason: "" if it is good, else what is wrong with it.
CARD_CASES = (
    ("", CARDS["B"]),
    ("", card("B", capabilities=[])),
    ("", card("B", capabilities=[{"name": "ü", "later": {"x": 1.5}}])),
    ("signature", {**CARDS["B"], "issued_at": 1768212000001}),
    ("signature", {**CARDS["B"], "signature": CARDS["A"]["signature"]}),
    ("signature", {**CARDS["B"], "signature": "x"}),
    ("did", CARDS["A"]),
    ("type", card("B", type="OFFER")),
    ("unknown field", card("B", more=1)),
    ("issued_at", card("B", issued_at="2026-01-12T10:00:00Z")),
    ("a name twice", card("B", capabilities=[{"name": "a"}, {"name": "a"}])),
    ("too many", card("B", capabilities=[{"name": str(number)} for number in range(33)])),
    ("too large", card("B", capabilities=[{"name": "a", "metadata": {"x": "y" * 8200}}])),
)

SCAN = bytes(range(32))


def attachment(at: str, value: Any, *, is_signed: bool = True) -> dict[str, Any]:
    """Return what an envelope says about a value that travels beside it (section 13.6)."""
    is_bytes = isinstance(value, bytes)
    data = value if is_bytes else rfc8785.dumps(value)
    said: dict[str, Any] = {"at": at, "as": "bytes" if is_bytes else "json", "size": len(data)}
    return {**said, "sha256": sha256(data).hexdigest()} if is_signed else said


def stream_digest(parts: list[Any]) -> dict[str, Any]:
    """Return `ext.stream` of the response that ends these parts (section 13.6)."""
    digest = sha256()
    for part in parts:
        is_bytes = isinstance(part, bytes)
        data = part if is_bytes else rfc8785.dumps(part)
        digest.update((b"b" if is_bytes else b"j") + len(data).to_bytes(8, "big") + data)
    return {"parts": len(parts), "sha256": digest.hexdigest()}


# name, second, from, to, type, payload, and: answers (a name), ext, signed
EXAMPLES: tuple[dict[str, Any], ...] = (
    {
        "name": "register-challenge",
        "from": "gateway",
        "to": "gateway",
        "type": "REGISTER",
        "payload": {"public_key": DIDS["gateway"][8:]},
        "ext": {
            "nonce": NONCE,
            "features": ["resume", "discover"],
            "limits": {
                "message_max_bytes": 65536,
                "message_rate": 200,
                "message_burst": 1000,
                "capabilities_max": 32,
                "capabilities_max_bytes": 8192,
                "away_ms": 30000,
                "away_max_messages": 64,
                "away_max_bytes": 65536,
                "register_timeout_ms": 10000,
            },
            "ping_interval_ms": 25000,
            "time": 1768212000000,
        },
    },
    {
        "name": "register-proof",
        "from": "A",
        "to": "gateway",
        "type": "REGISTER",
        "payload": {"public_key": DIDS["A"][8:]},
        "ext": {"nonce": NONCE, "aud": "wss://gateway.example/ws", "card": CARDS["A"]},
    },
    {
        "name": "register-answer",
        "from": "gateway",
        "to": "A",
        "type": "REGISTER",
        "answers": "register-proof",
        "payload": {"public_key": DIDS["gateway"][8:]},
        "ext": {
            "session": "5d2a3c1e-7b5b-4b8e-9d43-8d5c7f1a2b3c",
            "resume_token": RESUME_TOKEN,
            "ice_servers": [
                {"urls": ["stun:stun.example:3478"]},
                {
                    "urls": ["turn:turn.example:3478?transport=udp", "turns:turn.example:5349"],
                    "username": TURN_USERNAME,
                    "credential": b64encode(hmac.digest(b"north", TURN_USERNAME.encode(), "sha1")).decode(),
                },
            ],
            "ice_servers_ttl_ms": 86_400_000,
            "resumed": False,
        },
    },
    {
        "name": "offer",
        "from": "A",
        "to": "B",
        "type": "OFFER",
        "payload": {"sdp": sdp("aaaa", "actpass", 0xAA)},
    },
    {
        "name": "ice-candidate",
        "from": "A",
        "to": "B",
        "type": "ICE_CANDIDATE",
        "answers": "offer",
        "payload": {
            "candidate": "candidate:1 1 udp 2130706431 192.0.2.1 50000 typ host",
            "sdp_mid": "0",
            "sdp_mline_index": 0,
        },
    },
    {
        "name": "end-of-candidates",
        "from": "A",
        "to": "B",
        "type": "ICE_CANDIDATE",
        "answers": "offer",
        "payload": {"candidate": "", "sdp_mid": "0", "sdp_mline_index": 0},
    },
    {
        "name": "answer",
        "from": "B",
        "to": "A",
        "type": "ANSWER",
        "answers": "offer",
        "payload": {"sdp": sdp("bbbb", "active", 0xBB)},
    },
    {
        "name": "error-from-gateway",
        "from": "gateway",
        "to": "A",
        "type": "ERROR",
        "answers": "offer",
        "signed": False,
        "payload": {
            "code": "UNKNOWN_AGENT",
            "message": CAUSES["not_online"].message,
            "details": {"num": 300, "name": "not_online", "temporary": True, "field": "to"},
        },
    },
    {
        "name": "error-from-agent",
        "from": "B",
        "to": "A",
        "type": "ERROR",
        "answers": "offer",
        "payload": {
            "code": "CONNECTION_REFUSED",
            "message": CAUSES["busy"].message,
            "details": {"num": 404, "name": "busy", "temporary": True, "retry_after_ms": 5000},
        },
    },
    {
        "name": "ping",
        "from": "A",
        "to": "gateway",
        "type": "PING",
        "signed": False,
        "payload": {"sequence": 7},
    },
    {
        "name": "pong",
        "from": "gateway",
        "to": "A",
        "type": "PONG",
        "answers": "ping",
        "signed": False,
        "payload": {"sequence": 7},
    },
    {
        "name": "intent",
        "from": "A",
        "to": "B",
        "type": "INTENT",
        "payload": {
            "query": "Extract the non-compete clauses of this contract",
            "context": {"language": "en", "pages": 12},
        },
    },
    {
        "name": "intent-task",
        "from": "A",
        "to": "B",
        "type": "INTENT",
        "payload": {"task": "extract_clauses", "params": {"kinds": ["compete"]}},
    },
    {
        "name": "intent-answer",
        "from": "B",
        "to": "A",
        "type": "INTENT",
        "answers": "intent",
        "payload": {"status": "understood", "required_input": "text", "cost": "0.50 EUR"},
    },
    {
        "name": "exec-request",
        "from": "A",
        "to": "B",
        "type": "EXEC_REQUEST",
        "payload": {
            "args": {"text": "They shall not compete. Café №1 pays 99.50 €.", "kinds": ["compete"]},
            "timeout_ms": 30000,
            "stream": True,
        },
        "ext": {"capability": "extract_clauses"},
    },
    {
        "name": "exec-partial",
        "from": "B",
        "to": "A",
        "type": "EXEC_RESPONSE",
        "answers": "exec-request",
        "signed": False,
        "payload": {"status": "partial", "result": ["They shall not compete"]},
    },
    {
        "name": "exec-success",
        "from": "B",
        "to": "A",
        "type": "EXEC_RESPONSE",
        "answers": "exec-request",
        "payload": {"status": "success", "result": ["They shall not compete"], "execution_time_ms": 41.5},
    },
    {
        "name": "exec-error",
        "from": "B",
        "to": "A",
        "type": "EXEC_RESPONSE",
        "answers": "exec-request",
        "payload": {"status": "error", "error": "kinds: at least one is needed", "execution_time_ms": 0},
        "ext": {"error": {"name": "invalid_arguments"}},
    },
    {
        "name": "cancel",
        "from": "A",
        "to": "B",
        "type": "INTENT",
        "answers": "exec-request",
        "payload": {"status": "cancel"},
    },
    {
        "name": "exec-cancelled",
        "from": "B",
        "to": "A",
        "type": "EXEC_RESPONSE",
        "answers": "exec-request",
        "payload": {"status": "cancelled", "error": "the caller cancelled", "execution_time_ms": 12},
        "ext": {"error": {"name": "cancelled"}},
    },
    {
        "name": "discover",
        "from": "A",
        "to": "gateway",
        "type": "DISCOVER",
        "payload": {"capability": "extract_clauses", "tag": "legal", "limit": 50},
    },
    {
        "name": "presence",
        "from": "gateway",
        "to": "A",
        "type": "PRESENCE",
        "answers": "discover",
        "signed": False,
        "payload": {"agents": [{"did": DIDS["B"], "status": "online", "card": CARDS["B"]}]},
    },
    {
        "name": "watch",
        "from": "A",
        "to": "gateway",
        "type": "DISCOVER",
        "payload": {"tag": "legal", "watch": True},
    },
    {
        "name": "presence-event",
        "from": "gateway",
        "to": "A",
        "type": "PRESENCE",
        "answers": "watch",
        "signed": False,
        "payload": {"agents": [{"did": DIDS["B"], "status": "offline"}], "event": "leave"},
    },
    {
        "name": "unregister",
        "from": "A",
        "to": "gateway",
        "type": "UNREGISTER",
        "payload": {"reason": "done for today"},
    },
    {
        "name": "goodbye",
        "from": "A",
        "to": "B",
        "type": "UNREGISTER",
        "signed": False,
        "payload": {"reason": "done for today"},
    },
    {
        "name": "exec-attached",
        "from": "A",
        "to": "B",
        "type": "EXEC_REQUEST",
        "payload": {"args": {"language": "en"}},
        "ext": {"capability": "read_scan", "attachments": [attachment("/args/scan", SCAN)]},
    },
    {
        "name": "exec-streamed",
        "from": "B",
        "to": "A",
        "type": "EXEC_RESPONSE",
        "answers": "exec-request",
        "payload": {"status": "success", "execution_time_ms": 52},
        "ext": {"stream": stream_digest([["They shall not compete"], SCAN])},
    },
)


def identifier(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012d}"


def signed_bytes(envelope: dict[str, Any]) -> bytes:
    return rfc8785.dumps({key: value for key, value in envelope.items() if key != "signature"})


def build_messages() -> dict[str, dict[str, Any]]:
    """Return the envelopes of all examples by name."""
    numbers = {example["name"]: number for number, example in enumerate(EXAMPLES, 1)}
    messages = {}
    for example in EXAMPLES:
        number = numbers[example["name"]]
        answers = example.get("answers")
        envelope = {
            "id": identifier(number),
            "correlation_id": identifier(numbers[answers]) if answers else None,
            "timestamp": f"2026-01-12T10:00:{number:02d}.000Z",
            "from": DIDS[example["from"]],
            "to": DIDS[example["to"]],
            "type": example["type"],
            "payload": example["payload"],
            "version": PROTOCOL_VERSION,
        }
        if "ext" in example:
            envelope["ext"] = example["ext"]
        if example.get("signed", True):
            signature = KEYS[example["from"]].sign(signed_bytes(envelope)).signature
            envelope["signature"] = b64encode(signature).decode()
        messages[example["name"]] = envelope
    return messages


MESSAGES = build_messages()

# --- refusals ----------------------------------------------------------------------------------

PLAIN = {
    "id": identifier(99),
    "timestamp": "2026-01-12T10:00:00Z",
    "from": DIDS["A"],
    "to": DIDS["B"],
    "type": "OFFER",
    "payload": {"sdp": "v=0"},
    "version": "1.0",
}


def changed(**changes: Any) -> str:
    fields = {**PLAIN, **{key.replace("from_", "from"): value for key, value in changes.items()}}
    return compact({key: value for key, value in fields.items() if value is not ...})


def compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def build_refusals() -> Iterator[tuple[str, str, str]]:
    """Yield a text, the cause of its refusal, and who must refuse it.

    That is everybody; a gateway at least, as a full parser cannot see it; or the receiver, while a gateway
    that only scans MAY forward it.
    """
    text = compact(PLAIN)
    everybody = (
        ("", "not_json"),
        (text[:-1], "not_json"),
        (text + text, "not_json"),
        (text.replace("{", "{,", 1), "not_json"),
        (text.replace("}", ",}", 1), "not_json"),
        ("\ufeff" + text, "not_json"),
        (changed(payload={"sdp": 7}).replace("7", "NaN"), "not_json"),
        (changed(payload={"sdp": 7}).replace(":7", ":07"), "not_json"),
        (text.replace("v=0", "v=\n0"), "not_json"),
        (f"[{text}]", "not_object"),
        (text.replace("v=0", "\\ud800"), "lone_surrogate"),
        (text.replace("v=0", "\\udc00\\ud800"), "lone_surrogate"),
        (changed(ext={"a": 7}).replace(":7", ":" + "[" * 31 + "]" * 31), "too_deep"),
        (changed(ext={"a": 7}).replace(":7", ":1e400"), "number_out_of_range"),
        (text[:-1] + ',"type":"OFFER"}', "duplicate_key"),
        (text[:-1] + f',"from":"{DIDS["A"]}"}}', "duplicate_key"),
        (changed(extra=1), "unknown_field"),
        *((changed(**{key: ...}), "missing_field") for key in ("id", "timestamp", "from_", "to", "type")),
        (changed(payload=...), "missing_field"),
        (changed(version=...), "missing_field"),
        (changed(id=1), "wrong_type"),
        (changed(id=None), "wrong_type"),
        (changed(timestamp=1768212000), "wrong_type"),
        (changed(ext=None), "wrong_type"),
        (changed(ext=[]), "wrong_type"),
        (changed(signature=1), "wrong_type"),
        (changed(version=1.0), "wrong_type"),
        (changed(id="1"), "bad_id"),
        (changed(id="{" + identifier(1)[1:-1] + "}"), "bad_id"),
        (changed(correlation_id=""), "bad_id"),
        (changed(to="*"), "bad_did"),
        (changed(to=DIDS["B"] + "#key"), "bad_did"),
        (changed(to=DIDS["B"][:-1] + "0"), "bad_did"),
        (changed(from_="did:web:agent.example"), "bad_did"),
        (changed(type="offer"), "unknown_type"),
        (changed(type="HELLO"), "unknown_type"),
        (changed(version="1.1"), "unsupported_version"),
    )
    for wire, cause in everybody:
        yield wire, cause, "everybody"
    gateway = (
        (text.replace('"from"', '"fr\\u006fm"'), "escaped_key"),
        (text.replace('"OFFER"', '"OFF\\u0045R"'), "escaped_value"),
        (text.replace(DIDS["A"], DIDS["A"].replace("d", "\\u0064", 1)), "escaped_value"),
    )
    for wire, cause in gateway:
        yield wire, cause, "gateway"
    for number in ("9007199254740992", "-9007199254740992", "18446744073709551616", "100000000000000000000"):
        yield changed(ext={"a": 7}).replace(":7", ":" + number), "not_canonical", "receiver"


REFUSALS = [{"wire": wire, "cause": cause, "by": by} for wire, cause, by in build_refusals()]

CANONICAL = (
    '{"b":1,"a":2}',
    '{ "spaces" : [ ] }',
    '{"numbers":[333333333.33333329,1E30,4.50,2e-3,0.000000000000000000000000001,-0,-0.0,1.0]}',
    '{"limits":[9007199254740991,-9007199254740991,5e-324,1.7976931348623157e308]}',
    '{"string":"\\u20ac$\\u000F\\u000aA\'\\u0042\\u0022\\u005c\\\\\\"\\/"}',
    '{"\\u20ac":"Euro Sign","\\r":"Carriage Return","\\ufb33":"Hebrew Letter Dalet With Dagesh",'
    '"1":"One","\\ud83d\\ude00":"Emoji: Grinning Face","\\u0080":"Control",'
    '"\\u00f6":"Latin Small Letter O With Diaeresis"}',
    '{"literals":[null,true,false],"":{"\\u007f":"\\u2028"}}',
)

# --- files -------------------------------------------------------------------------------------


def identity(name: str, seed: bytes) -> dict[str, str]:
    public_key = bytes(SigningKey(seed).verify_key)
    return {"name": name, "seed": seed.hex(), "public_key": public_key.hex(), "did": encode_did(public_key)}


def build_files() -> dict[str, Any]:
    """Return the content of every vector file by its name."""
    return {
        "identities.json": [identity(name, seed) for name, seed in {"zero": bytes(32), **SEEDS}.items()],
        "canonical.json": [
            {"text": text, "canonical": rfc8785.dumps(json.loads(text)).decode()} for text in CANONICAL
        ],
        "messages.json": [
            {
                "name": name,
                "wire": compact(envelope),
                "canonical": signed_bytes(envelope).decode(),
                "signature": envelope.get("signature"),
            }
            for name, envelope in MESSAGES.items()
        ],
        "frames.json": [
            {"frame": data.hex(), "kind": kind, "call": call, "chunk": chunk.hex(), "taken": taken}
            for data, kind, call, chunk, taken in FRAMES
        ],
        "streams.json": [
            {
                "parts": [
                    {"bytes": part.hex()} if isinstance(part, bytes) else {"json": part} for part in parts
                ],
                "stream": stream_digest(parts),
            }
            for parts in STREAMS
        ],
        "refusals.json": REFUSALS,
        "cards.json": [{"did": DIDS["B"], "card": value, "reason": reason} for reason, value in CARD_CASES],
        "causes.json": [
            {"num": row.num, "name": row.name, "code": row.code.value, "temporary": row.temporary}
            for row in CAUSES.values()
        ],
        "close_codes.json": [
            {
                "number": row.number,
                "name": row.name,
                "reconnect": row.reconnect,
                "retry_after_ms": row.retry_after_ms,
            }
            for row in CLOSE_CODES.values()
        ],
    }


# --- frames and streams ------------------------------------------------------------------------

CALL = "01234567-89ab-4def-8123-456789abcdef"
HEAD = bytes.fromhex(CALL.replace("-", ""))

# frame, kind ("" if it is to be refused as bad_frame), call, bytes of DATA or digest of END, count of CREDIT
FRAMES = (
    (b"\x01" + HEAD + b"x", "data", CALL, b"x", None),
    (b"\x01" + HEAD + SCAN, "data", CALL, SCAN, None),
    (b"\x02" + HEAD + bytes(8), "credit", CALL, b"", 0),
    (b"\x02" + HEAD + (1_048_576).to_bytes(8, "big"), "credit", CALL, b"", 1_048_576),
    (b"\x02" + HEAD + (2**53 - 1).to_bytes(8, "big"), "credit", CALL, b"", 2**53 - 1),
    (b"\x03" + HEAD + SCAN, "end", CALL, SCAN, None),
    (b"", "", "", b"", None),
    (b"\x01" + HEAD[:-1], "", "", b"", None),
    (b"\x01" + HEAD, "", "", b"", None),
    (b"\x01" + HEAD + bytes(limits.CHUNK_MAX_BYTES + 1), "", "", b"", None),
    (b"\x02" + HEAD + bytes(7), "", "", b"", None),
    (b"\x02" + HEAD + bytes(9), "", "", b"", None),
    (b"\x02" + HEAD + (2**53).to_bytes(8, "big"), "", "", b"", None),
    (b"\x03" + HEAD + SCAN[1:], "", "", b"", None),
    (b"\x03" + HEAD + SCAN + b"x", "", "", b"", None),
    (b"\x00" + HEAD + b"x", "", "", b"", None),
    (b"{" + HEAD + b"}", "", "", b"", None),
)
STREAMS: tuple[list[Any], ...] = (
    [],
    [""],
    [b""],
    [1, 2.5, None, {"b": "€", "a": [True]}],
    [SCAN, b"\x00", b""],
    [["They shall not compete"], SCAN],
)

# --- the document ------------------------------------------------------------------------------

LIMITS = (
    ("MESSAGE_MAX_BYTES", "bytes", "one message through the gateway"),
    ("MESSAGE_MAX_DEPTH", "levels", "nesting of objects and arrays; the envelope is level 1"),
    ("DATA_MESSAGE_MAX_BYTES", "bytes", "one message on the DataChannel"),
    ("INLINE_MAX_BYTES", "bytes", "an envelope on the DataChannel with JSON that could be attached"),
    ("CHUNK_MAX_BYTES", "bytes", "in one DATA frame"),
    ("FRAME_HEAD_BYTES", "bytes", "before them: kind and call"),
    ("ATTACHMENTS_MAX", "", "attachments of one message"),
    ("ATTACHMENTS_MAX_BYTES", "bytes", "of attachments of one peer that are kept at one time"),
    ("ATTACHED_JSON_MAX_BYTES", "bytes", "of JSON among the attachments of one message"),
    ("CALL_WINDOW_BYTES", "bytes", "of one call and direction without CREDIT"),
    ("CALL_CREDIT_BYTES", "bytes", "taken, until CREDIT is due"),
    ("INTEGER_MAX", "", "largest integer, and its negative (RFC 7493 §2.2)"),
    ("NONCE_BYTES", "bytes", "of the handshake's nonce"),
    ("CAPABILITIES_MAX", "", "capabilities of one agent"),
    ("CAPABILITIES_MAX_BYTES", "bytes", "all of them together, as compact JSON"),
    ("MESSAGE_RATE", "messages/s", "of one session; more are refused as `rate_limited`"),
    ("MESSAGE_BURST", "messages", "of one session at once"),
    ("AWAY_SECONDS", "s", "a dropped session stays routable"),
    ("AWAY_MAX_MESSAGES", "messages", "wait for an agent that is away"),
    ("AWAY_MAX_BYTES", "bytes", "wait for an agent that is away"),
    ("WRITE_QUEUE_MAX_BYTES", "bytes", "wait for a connection that does not read; above: slow consumer"),
    ("DRAIN_SECONDS", "s", "in which a gateway that stops sends everybody away"),
    ("REGISTER_TIMEOUT_SECONDS", "s", "from the 101 response to a complete REGISTER"),
    ("REGISTER_CLOCK_SKEW_SECONDS", "s", "between the clocks of gateway and agent, either way"),
    ("CLOCK_SKEW_SECONDS", "s", "between a timestamp and the receiver's clock, either way"),
    ("REPLAY_GUARD_CAPACITY", "ids", "a receiver remembers"),
    ("PING_INTERVAL_SECONDS", "s", "of silence before the gateway sends a WebSocket ping"),
    ("PONG_TIMEOUT_SECONDS", "s", "after that ping until the gateway closes with 4004"),
    ("PEER_PING_INTERVAL_SECONDS", "s", "of silence on the DataChannel before a PING"),
    ("PEER_PONG_TIMEOUT_SECONDS", "s", "after that PING without any packet until the peer counts as dead"),
    ("PEER_STALL_SECONDS", "s", "a peer may take nothing of what waits for it"),
    ("PEER_IDLE_SECONDS", "s", "without a call until an agent lets a connection go that nothing holds"),
    ("TURN_TTL_SECONDS", "s", "TURN credentials can be used, unless the operator says otherwise"),
    ("GATHER_TIMEOUT_SECONDS", "s", "STUN and TURN servers have to answer"),
    ("CONNECT_TIMEOUT_SECONDS", "s", "from OFFER to an open DataChannel"),
    ("REQUEST_TIMEOUT_SECONDS", "s", "for an answer of the gateway"),
    ("CALL_TIMEOUT_SECONDS", "s", "for an execution whose caller names no other deadline"),
    ("STREAM_TIMEOUT_SECONDS", "s", "for a stream whose caller names no other deadline"),
    ("RECONNECT_BASE_SECONDS", "s", "first upper bound of the reconnection delay"),
    ("RECONNECT_MAX_SECONDS", "s", "last upper bound of it"),
)


def table(head: str, rows: Iterator[tuple[object, ...]]) -> str:
    columns = head.split("|")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines)


def yes(value: bool) -> str:
    return "yes" if value else "no"


def limit_text(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def signing_steps() -> str:
    """Return the example of section 5.3: canonical bytes and signature of the smallest signed message."""
    envelope = MESSAGES["end-of-candidates"]
    canonical = signed_bytes(envelope).decode()
    return "\n".join(
        (
            "Agent A signs its end-of-candidates message. "
            f"Its canonical form has {len(canonical.encode())} bytes:",
            "",
            "```text",
            canonical,
            "```",
            "",
            "| value | |",
            "|---|---|",
            f"| seed of A | `{SEEDS['A'].hex()}` |",
            f"| public key of A | `{bytes(KEYS['A'].verify_key).hex()}` |",
            f"| DID of A | `{DIDS['A']}` |",
            f"| signature, base64 | `{envelope['signature']}` |",
            "",
            "On the wire:",
            "",
            block(envelope),
        )
    )


def block(envelope: dict[str, Any]) -> str:
    return "```json\n" + json.dumps(envelope, ensure_ascii=False, indent=2) + "\n```"


def build_parts() -> dict[str, str]:
    """Return the generated parts of the document by the name in their markers."""
    parts = {f"example {name}": block(envelope) for name, envelope in MESSAGES.items()}
    parts["signing"] = signing_steps()
    parts["identities"] = table(
        "who|seed|DID",
        ((name, f"`{seed[:1].hex()}`, 32 times", f"`{DIDS[name]}`") for name, seed in SEEDS.items()),
    )
    parts["causes"] = table(
        "num|name|code|temporary|meaning",
        (
            (row.num, f"`{row.name}`", row.code.value, yes(row.temporary), row.message.replace("\\", "\\\\"))
            for row in CAUSES.values()
        ),
    )
    parts["close codes"] = table(
        "code|name|meaning|reconnect|default wait, ms",
        (
            (
                row.number,
                f"`{row.name}`",
                row.meaning,
                yes(row.reconnect),
                f"{row.retry_after_ms:,}" if row.reconnect else "",
            )
            for row in CLOSE_CODES.values()
        ),
    )
    parts["limits"] = table(
        "limit|value|of what",
        (
            (f"`{name}`", f"{limit_text(getattr(limits, name))} {unit}".strip(), text)
            for name, unit, text in LIMITS
        ),
    )
    return parts


MARKED = re.compile(r"(?ms)^<!-- begin (?P<name>[^\n]+) -->\n.*?^<!-- end (?P=name) -->$")


def render(document: str) -> str:
    """Return the document with its generated parts as they should be."""
    parts = build_parts()
    return MARKED.sub(
        lambda found: f"<!-- begin {found['name']} -->\n{parts[found['name']]}\n<!-- end {found['name']} -->",
        document,
    )


def main() -> None:
    for name, content in build_files().items():
        (HERE / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    DOCUMENT.write_text(render(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
