"""The envelope scanner against a reader that was written from the rules and shares nothing with it.

The receiver of a forwarded message reads it with orjson. So does the oracle, for everything that orjson
can tell: what is JSON, and what the values are. What orjson hides (duplicate keys, escapes, depth) it takes
from the tokens of the text.
"""

import json
import random
import re
from collections import Counter
from typing import NamedTuple

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway._frames import scan

# fmt: off
TYPES = [
    "REGISTER", "UNREGISTER", "OFFER", "ANSWER", "ICE_CANDIDATE", "INTENT", "EXEC_REQUEST", "EXEC_RESPONSE",
    "ERROR", "PING", "PONG", "DISCOVER", "PRESENCE",
]
# fmt: on
REQUIRED = {"id", "timestamp", "from", "to", "type", "payload", "version"}
OPTIONAL = {"correlation_id", "signature", "ext"}
WITHOUT_ESCAPES = ("id", "correlation_id", "from", "to", "type", "version")

UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
DID = re.compile(r"did:key:z6Mk[123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz]{44}")
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]|[^\s{}\[\]:,"]+')


class Verdict(NamedTuple):
    accepted: bool
    type: str | None = None
    from_: str | None = None
    to: str | None = None
    id: str | None = None
    correlation_id: str | None = None
    is_json: bool = False  # orjson reads it
    is_utf8: bool = True


class Member(NamedTuple):
    name: str  # as a parser reads it
    key: str  # as it is written
    value: str  # as it is written, when it is no container


def tokens_of(text: str) -> tuple[list[Member], int]:
    """Return the members of the outermost object of a valid JSON text, and how deep it nests."""
    members, depth, deepest = [], 0, 0
    tokens = TOKEN.findall(text)
    for before, token, after, beyond in zip(
        ["", *tokens], tokens, [*tokens[1:], "", ""], [*tokens[2:], "", ""], strict=False
    ):
        if token in "{[":
            depth += 1
            deepest = max(deepest, depth)
        elif token in "}]":
            depth -= 1
        elif depth == 1 and before in "{," and after == ":":
            members.append(Member(orjson.loads(token), token, beyond))
    return members, deepest


def judge(data: bytes) -> Verdict:
    """Decide by the rules of the protocol what becomes of a message, and what may be told of it."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return Verdict(False, is_utf8=False)
    try:
        envelope = orjson.loads(data)
    except orjson.JSONDecodeError:
        return Verdict(False)
    if not isinstance(envelope, dict):
        return Verdict(False, is_json=True)
    members, depth = tokens_of(text)
    names = Counter(member.name for member in members)
    written = {member.name: member for member in members}

    def known(name: str, form: re.Pattern[str]) -> str | None:
        """Return the value of a member where there is only one way to read it, and it is well formed."""
        if names[name] != 1 or "\\" in written[name].key + written[name].value:
            return None
        value = envelope[name]
        return value if isinstance(value, str) and form.fullmatch(value) else None

    sender, recipient, ident = known("from", DID), known("to", DID), known("id", UUID)
    kind = known("type", re.compile("|".join(TYPES)))
    answered = known("correlation_id", UUID)
    accepted = (
        len(data) <= 65_536
        and depth <= 32
        and all(count == 1 for count in names.values())
        and set(names) >= REQUIRED
        and set(names) <= REQUIRED | OPTIONAL
        and not any("\\" in member.key for member in members)
        and not any("\\" in written[name].value for name in WITHOUT_ESCAPES if name in written)
        and None not in (sender, recipient, ident, kind)
        and (answered is not None or envelope.get("correlation_id") is None)
        and isinstance(envelope["timestamp"], str)
        and isinstance(envelope["payload"], dict)
        and envelope["version"] == "1.0"
        and isinstance(envelope.get("signature"), str | None)
        and isinstance(envelope.get("ext", {}), dict)
    )
    return Verdict(accepted, kind, sender, recipient, ident, answered, is_json=True)


def disagreement(data: bytes, verdict: Verdict) -> str | None:
    """Return in what the scanner differs from the verdict, or None."""
    found = scan(data)
    if (found.status == "ok") != verdict.accepted:
        return f"scanner: {found}, oracle: {verdict}"
    if len(data) <= 65_536 and (found.status == "invalid_utf8") == verdict.is_utf8:
        return f"scanner: {found}, UTF-8: {verdict.is_utf8}"
    if not verdict.is_json:
        # How much of it was read is the scanner's affair.
        return None
    if found.status in ("not_json", "lone_surrogate", "number_out_of_range"):
        return f"scanner: {found}, but orjson reads it"
    seen = (found.type, found.from_, found.to, found.id, found.correlation_id)
    expected = (verdict.type, verdict.from_, verdict.to, verdict.id, verdict.correlation_id)
    return None if seen == expected else f"scanner: {found}, oracle: {verdict}"


# Fragments of JSON as they are written: what is legal, what is nearly legal, what only some parsers read.

DIDS = [
    b'"did:key:z6MkiTBz1ymuepAQ4HEHYSF1H8quG5GLVVQR3djdX3mDooWp"',
    b'"did:key:z6MkhaXgBZDvotDkL5257faiztiGiC2QtKLGpbnnEGta2doK"',
]
IDS = [b'"3f2b8c1e-9a4d-4e6f-8b7a-1c2d3e4f5a6b"', b'"0190A5F2-7c3e-7b1d-9e2f-a1b2c3d4e5f6"']
OVERFLOW = 2**1024 - 2**970  # halfway from the largest double to infinity
NUMBERS = [
    *b"0 -0 -0.0 1 10 -7 1E+2 1e-2 0.5 -1.5e3 18446744073709551615 18446744073709551616".split(),
    *b"-9223372036854775808 -9223372036854775809 1e308 1e309 1e400 -1e400 1e-400 0e400".split(),
    *b"0e99999999999999999999 1e99999999999999999999 1e-99999999999999999999".split(),
    *b"1.7976931348623157e308 1.7976931348623158e308 1.7976931348623159e308".split(),
    *b"17.976931348623158e307 0.00017976931348623159e312".split(),
    *b"01 -01 +1 - -- .5 1. 1.e2 1e 1e+ 1e+-1 0x1 1_0 1f NaN Infinity -Infinity nan 1e5.5 1,5".split(),
    b"9" * 308,
    b"9" * 309,
    b"9" * 400,
    b"1" + b"0" * 400,
    b"1" + b"0" * 400 + b"e-200",
    b"0." + b"0" * 400 + b"1e700",
    b"0." + b"0" * 400 + b"1e710",
    b"%d" % OVERFLOW,
    b"%d" % (OVERFLOW - 1),
    b"%d.999999999999999999999" % (OVERFLOW - 1),
    b"%d000e-3" % OVERFLOW,
]
TEXTS = [
    rb'""',
    rb'"v=0\r\no=- 1 2 IN IP4 0.0.0.0\r\ns=-\r\n"',
    rb'"\"\\\/\b\f\n\r\t"',
    rb'"\u00e9\u0000\u001F"',
    rb'"\ud83d\ude00"',
    rb'"\uD83D\uDE00"',
    rb'"\ud800"',
    rb'"\udc00"',
    rb'"\ud800\ud800\udc00"',
    rb'"\ud800\u0041"',
    rb'"\ud83d\n"',
    rb'"\ud83dx"',
    rb'"\uD83"',
    rb'"\u"',
    rb'"\x41"',
    rb'"\U0041"',
    rb'"\u00g0"',
    b'"\x7f"',
    b'"\x00"',
    b'"\x1f"',
    b'"\n"',
    b'"\t"',
    '"é€😀\ud7ff\ue000\uffff\U0010ffff"'.encode(),
    b'"\x80"',
    b'"\xc0\x80"',
    b'"\xc1\xbf"',
    b'"\xc2"',
    b'"\xe0\x9f\xbf"',
    b'"\xe0\xa0\x80"',
    b'"\xed\x9f\xbf"',
    b'"\xed\xa0\x80"',
    b'"\xed\xa0\xbd\xed\xb8\x80"',
    b'"\xef\xbf"',
    b'"\xf0\x8f\xbf\xbf"',
    b'"\xf0\x90\x80\x80"',
    b'"\xf4\x8f\xbf\xbf"',
    b'"\xf4\x90\x80\x80"',
    b'"\xf5\x80\x80\x80"',
    b'"\xff"',
    b"'a'",
    b'"',
    b'"' + b"plain " * 20 + b'"',
]
VALUES = [
    *NUMBERS,
    *TEXTS,
    *DIDS,
    *IDS,
    *b"null true false nul True None undefined [] {} [[]] [{}] [1,] [,] {,} [1,2] [1 2] [:] [} (".split(),
    b"/**/",
    b"{a:1}",
    b'{"a":1,"a":2}',
    b'{"id":{"id":[{"from":null}]}}',
    b'{"a":1,}',
    b'{"a"}',
    b'{"a" 1}',
    b'{"a":}',
    b'["a":1]',
    b'{"a",1}',
    b"",
]
NESTING = (
    1,
    2,
    28,
    29,
    30,
    31,
    32,
    33,
    62,
    63,
    64,
    65,
    127,
    128,
    129,
    400,
    1021,
    1022,
    1023,
    1024,
    1025,
    3000,
)
PIECES = [
    *VALUES,
    *(bytes([byte]) for byte in range(256)),
    *(f'"{name}":'.encode() for name in sorted(REQUIRED | OPTIONAL)),
    *(b'\\u0066 \\u0069 \\u \\ud800 \\udc00 \\/ \\" {" "} }, ,{ ]] [[ }} {{ "" :: ,, ,"id":1').split(),
    b"\xef\xbb\xbf",
    b"\xc2\xa0",
    b"\xe2\x80\xa8",
]
# What may end a line, or break it.
LINE_ENDS = [
    *[rb"\r\n"] * 60,
    *rb"\n \r \t \/ \" \\ \\n \\\r \n\n\r \u000d\u000a \ud83d\ude00".split() * 2,
    *["é".encode(), "€😀".encode(), b"r", b"n", b"nr", b"\x7f"] * 2,
    *rb'\ \q \x \ud800 \u00 " \\"'.split(),
    *[b"\n", b"\x00", b"\x1f", b"\x80", b"\xc3"],
]
SPACES = [b" ", b"\n", b"\t", b"\r", b" \r\n\t ", b"\x0c", b"\x0b", b"\xc2\xa0", b"\x00"]


def nest(rng: random.Random) -> bytes:
    """Return containers in containers, now and then of crossed kinds."""
    levels = rng.choice(NESTING)
    kinds = [rng.random() < 0.5 for _ in range(levels)]
    opening = b"".join(b'{"a":' if kind else b"[" for kind in kinds)
    closing = b"".join(b"}" if kind else b"]" for kind in reversed(kinds))
    if rng.random() < 0.1:
        at = rng.randrange(len(closing))
        closing = closing[:at] + rng.choice((b"", b"]", b"}")) + closing[at + 1 :]
    return opening + rng.choice((b"1", b"[]", b"{}", b'""')) + closing


def escaped(rng: random.Random, text: bytes) -> bytes:
    """Return a string, given with its quotes, with one of its characters written as an escape."""
    if len(text) < 3:
        return text
    at = rng.randrange(1, len(text) - 1)
    return text[:at] + (b"\\u%04x" if rng.random() < 0.5 else b"\\u%04X") % text[at] + text[at + 1 :]


def lines(rng: random.Random) -> bytes:
    """Return a string of lines of any length, as an SDP has them."""
    written = [
        b"candidate:842163049 1 udp 1677729535 192.0.2.1 3478 typ srflx raddr 0.0.0.0 rport 0"[
            rng.randrange(40) : rng.randrange(88)
        ]
        + rng.choice(LINE_ENDS)
        for _ in range(rng.choice((1, 2, 3, 12)))
    ]
    return b'"' + b"".join(written) + b'"'


def members_of(rng: random.Random) -> list[tuple[bytes, bytes]]:
    """Return the members of a valid envelope, as they are written."""
    payload = rng.choice(
        (b"{}", rb'{"sdp":"v=0\r\no=- 1 2 IN IP4 192.0.2.1\r\ns=-\r\nt=0 0\r\n"}', b"", b"lines")
    )
    if payload == b"lines":
        payload = b'{"sdp":' + lines(rng) + b"}"
    elif not payload:
        payload = b'{"a":' + rng.choice(VALUES) + b',"a":' + rng.choice((b"1", b'"x"', b"[null,{}]")) + b"}"
    members = [
        (b'"id"', rng.choice(IDS)),
        (b'"timestamp"', b'"2026-01-12T10:00:00Z"'),
        (b'"from"', rng.choice(DIDS)),
        (b'"to"', rng.choice(DIDS)),
        (b'"type"', b'"%s"' % rng.choice(TYPES).encode()),
        (b'"payload"', payload),
        (b'"version"', b'"1.0"'),
    ]
    if rng.random() < 0.5:
        members.append((b'"correlation_id"', rng.choice((b"null", *IDS))))
    if rng.random() < 0.7:
        members.append((b'"signature"', rng.choice((b"null", b'"' + b"A" * 86 + b'=="'))))
    if rng.random() < 0.3:
        members.append(
            (b'"ext"', rng.choice((b"{}", b'{"capability":"x"}', b'{"a":%s}' % rng.choice(VALUES))))
        )
    if rng.random() < 0.3:
        rng.shuffle(members)
    return members


def spoil(rng: random.Random, members: list[tuple[bytes, bytes]]) -> None:
    """Break, perhaps, one rule of the envelope."""
    at = rng.randrange(len(members))
    key, value = members[at]
    match rng.randrange(9):
        case 0:
            members.insert(rng.randrange(len(members) + 1), (key, rng.choice((value, rng.choice(VALUES)))))
        case 1:
            members.insert(rng.randrange(len(members) + 1), (escaped(rng, key), rng.choice((value, b"null"))))
        case 2:
            members[at] = (escaped(rng, key), value)
        case 3:
            members[at] = (key, escaped(rng, value) if value[:1] == b'"' else value)
        case 4:
            members[at] = (key, rng.choice(VALUES))
        case 5:
            del members[at]
        case 6:
            members.insert(
                at, (rng.choice((b'"x"', b'""', b'"ID"', b'"id "', b'"\\u0078"')), rng.choice(VALUES))
            )
        case 7:
            members[at] = (key, rng.choice((b'{"a":%s}', b"%s")) % nest(rng))
        case 8:
            inner = nest(rng) if rng.random() < 0.3 else rng.choice(VALUES)
            members[:] = [
                (key, b'{"a":%s}' % inner if key == b'"payload"' else value) for key, value in members
            ]


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Return the message with one accident: of a bit, of some bytes, or of a piece."""
    at = rng.randrange(len(data) + 1)
    match rng.randrange(8):
        case 0 if at < len(data):
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case 1:
            return data[:at] + data[at + rng.randrange(1, 9) :]
        case 2:
            return data[:at] + rng.choice(PIECES) + data[at:]
        case 3:
            piece = rng.choice(PIECES)
            return data[:at] + piece + data[at + len(piece) :]
        case 4:
            return data[:at]
        case 5:
            begin = rng.randrange(len(data) + 1)
            return data[:at] + data[begin : begin + rng.randrange(60)] + data[at:]
        case 6:
            return rng.choice((data + rng.choice(PIECES), rng.choice(PIECES) + data))
        case _:
            quotes = [i for i, byte in enumerate(data) if byte in b'"{}[]:,']
            at = rng.choice(quotes) if quotes else at
            return data[:at] + rng.choice((b"", rng.choice(PIECES), b'"', b",", b" ")) + data[at + 1 :]


def generated(rng: random.Random) -> bytes:
    """Return an envelope with none, one or some faults."""
    members = members_of(rng)
    while rng.random() < 0.35:
        if not members:
            break
        spoil(rng, members)
    space = b""
    if rng.random() < 0.2:
        space = rng.choice(SPACES)
    data = (
        b"{" + b",".join(space + key + space + b":" + space + value + space for key, value in members) + b"}"
    )
    if space:
        data = space + data + space
    while rng.random() < 0.3:
        data = mutated(rng, data)
    return data


@pytest.mark.soak
def test_scanner_and_oracle_agree_on_100_000_documents():
    rng = random.Random(20260112)
    accepted = readable = 0
    for _ in range(100_000):
        data = generated(rng)
        verdict = judge(data)
        assert (difference := disagreement(data, verdict)) is None, (difference, data)
        accepted += verdict.accepted
        readable += verdict.is_json
    # Each kind of outcome must be among them: accepted, refused though JSON, and no JSON.
    assert accepted > 20_000
    assert readable - accepted > 10_000
    assert 100_000 - readable > 20_000


# What hypothesis adds to the above: any text, any number, any nesting, and a small example where it fails.

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(10**320), 10**320),
    st.floats(),
    st.text(st.characters(exclude_categories=())),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=9), inner, max_size=4)
    ),
    max_leaves=12,
)


NAMES = sorted(REQUIRED | OPTIONAL)


def encoded(value: object, ascii_only: bool) -> bytes:
    """Return the value as JSON, half surrogates and NaN and all."""
    return json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")


RAW_VALUES = st.one_of(
    st.builds(encoded, JSON, st.booleans()),
    st.sampled_from(VALUES),
    st.from_regex(rb"-?[0-9]{1,25}(\.[0-9]{1,25})?([eE][+-]?[0-9]{1,4})?", fullmatch=True),
)
RAW_KEYS = st.one_of(
    st.sampled_from([f'"{name}"'.encode() for name in NAMES]),
    st.builds(
        lambda name, seed: escaped(random.Random(seed), f'"{name}"'.encode()),
        st.sampled_from(NAMES),
        st.integers(),
    ),
    st.builds(encoded, st.text(max_size=15), st.booleans()),
)
PAYLOADS = st.builds(encoded, st.dictionaries(st.text(max_size=9), JSON, max_size=4), st.booleans())
EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 9), st.one_of(st.binary(max_size=4), st.sampled_from(PIECES))),
    max_size=3,
)


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """Draw an envelope with any payload, then members to add or replace, then edits of its bytes."""
    members = {
        f'"{name}"'.encode(): value
        for name, value in (
            ("id", IDS[0]),
            ("timestamp", b'"2026-01-12T10:00:00Z"'),
            ("from", DIDS[0]),
            ("to", DIDS[1]),
            ("type", b'"%s"' % draw(st.sampled_from(TYPES)).encode()),
            ("payload", draw(PAYLOADS)),
            ("version", b'"1.0"'),
        )
    }
    written = [*members.items(), *draw(st.lists(st.tuples(RAW_KEYS, RAW_VALUES), max_size=2))]
    if draw(st.booleans()):
        written = draw(st.permutations(written))
    data = b"{" + b",".join(key + b":" + value for key, value in written) + b"}"
    for where, length, piece in draw(EDITS):
        at = round(where * len(data))
        data = data[:at] + piece + data[at + length :]
    return data


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(messages())
def test_scanner_and_oracle_agree(data):
    assert disagreement(data, judge(data)) is None


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80))
def test_scanner_and_oracle_agree_on_noise(data):
    assert disagreement(data, judge(data)) is None
