"""The envelope scanner, case by case; test_frames_oracle.py holds it against orjson."""

import importlib.machinery
import json
import os
import re

import pytest

import gateway._frames
from aiconexus.protocol.errors import CAUSES
from aiconexus.protocol.limits import MESSAGE_MAX_BYTES, MESSAGE_MAX_DEPTH
from aiconexus.protocol.models import MessageType
from gateway._frames import FIELD_NAMES, STATUS_NAMES, TYPE_NAMES, Scan, scan

ID = "3f2b8c1e-9a4d-4e6f-8b7a-1c2d3e4f5a6b"
OTHER_ID = "0190a5f2-7c3e-7b1d-9e2f-a1b2c3d4e5f6"
ALICE = "did:key:z6MkiTBz1ymuepAQ4HEHYSF1H8quG5GLVVQR3djdX3mDooWp"
BOB = "did:key:z6MkhaXgBZDvotDkL5257faiztiGiC2QtKLGpbnnEGta2doK"

# Halfway from the largest double to what would be the next: the smallest integer that rounds to infinity.
OVERFLOW = 2**1024 - 2**970

# Every member as it is written in JSON. A case replaces, drops or adds some.
MEMBERS = {
    "id": f'"{ID}"',
    "correlation_id": "null",
    "timestamp": '"2026-01-12T10:00:00Z"',
    "from": f'"{ALICE}"',
    "to": f'"{BOB}"',
    "type": '"OFFER"',
    "payload": '{"sdp":"v=0\\r\\n"}',
    "version": '"1.0"',
    "signature": f'"{"A" * 86}=="',
    "ext": "{}",
}


def document(*extra: str, **values: str | None) -> bytes:
    """Return the envelope with other raw values (`None`: without that member) and `extra` members at its end.

    `from_` stands for `from`.
    """
    changed = {name.rstrip("_"): value for name, value in values.items()}
    members = [f'"{name}":{value}' for name, value in {**MEMBERS, **changed}.items() if value is not None]
    return ("{" + ",".join([*members, *extra]) + "}").encode("utf-8", "surrogatepass")


def nested(levels: int) -> str:
    """Return an array of that depth, to put into payload, which is level 2."""
    return "[" * levels + "]" * levels


def test_compiled_module_is_loaded():
    assert gateway._frames.__file__.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES))
    # `make test` also runs this file on builds for machines without AVX2 and without SSE2.
    if wanted := os.environ.get("AICONEXUS_SCAN"):
        assert wanted == gateway._frames.INSTRUCTIONS


def test_accepted_envelope_gives_type_ids_and_dids():
    found = scan(document(correlation_id=f'"{OTHER_ID}"'))
    assert isinstance(found, Scan)
    assert (found.status, found.field) == ("ok", None)
    assert (found.type, found.id, found.correlation_id) == ("OFFER", ID, OTHER_ID)
    assert (found.from_, found.to) == (ALICE, BOB)


def test_scan_reads_as_what_it_found():
    assert repr(scan(b"{")) == (
        "Scan(status='not_json', field=None, type=None, id=None, correlation_id=None, from_=None, to=None)"
    )


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(document(correlation_id=None), id="no correlation_id"),
        pytest.param(document(signature=None), id="no signature"),
        pytest.param(document(signature="null"), id="null signature"),
        pytest.param(document(ext=None), id="no ext"),
        pytest.param(document(ext='{"a":{"a":1},"a":[]}'), id="ext with a key twice"),
        pytest.param(document(payload='{"id":1,"id":2,"from":3}'), id="payload with envelope keys twice"),
        pytest.param(document(payload='{"fr\\u006fm":1}'), id="payload with escaped key"),
        pytest.param(document(payload="{ }"), id="empty payload"),
        pytest.param(b" \t\r\n" + document() + b" \t\r\n", id="white space around"),
        pytest.param(json.dumps(json.loads(document()), indent=3).encode(), id="white space within"),
        pytest.param(document(id=f'"{ID.upper()}"'), id="upper case id"),
        pytest.param(document(id=f'"{"0" * 8}-0000-0000-0000-{"0" * 12}"'), id="nil UUID"),
        pytest.param(document(timestamp='""'), id="timestamp is read elsewhere"),
        pytest.param(document(timestamp='"\\u0032026"'), id="escaped timestamp"),
        pytest.param(document(signature='"\\/\\/"'), id="escaped signature"),
        pytest.param(document(payload='{"a":"\\"\\\\\\/\\b\\f\\n\\r\\t\\u00e9"}'), id="every escape"),
        pytest.param(document(payload='{"a":"\\ud83d\\uDE00"}'), id="escaped pair of surrogates"),
        pytest.param(document(payload='{"a":"\\u0000"}'), id="escaped NUL"),
        pytest.param(document(payload='{"a":"\x7f"}'), id="DEL is no control character"),
        pytest.param(
            document(payload='{"a":"\x80\u07ff\u0800\ud7ff\ue000\uffff\U00010000\U0010ffff"}'), id="UTF-8"
        ),
        pytest.param(
            document(payload='{"a":[true,false,null,[],{},[[]],{"b":{}}]}'), id="every kind of value"
        ),
        pytest.param(document(payload='{"a":' + nested(30) + "}"), id="depth 32"),
        pytest.param(
            document(payload='{"a":[' + ",".join([nested(29)] * 9) + "]}"), id="depth 32, again and again"
        ),
    ],
)
def test_accepted(data):
    found = scan(data)
    assert (found.status, found.field) == ("ok", None)
    assert (found.type, found.from_, found.to) == ("OFFER", ALICE, BOB)


REFUSED = {
    # Grammar.
    "empty message": (b"", "not_json", None),
    "white space alone": (b" \n", "not_json", None),
    "byte order mark": (b"\xef\xbb\xbf" + document(), "not_json", None),
    "NUL after the object": (document() + b"\x00", "not_json", None),
    "two objects": (document() + document(), "not_json", None),
    "second object after a line feed": (document() + b"\n" + document(), "not_json", None),
    "no-break space around": (b"\xc2\xa0" + document(), "not_json", None),
    "form feed around": (b"\x0c" + document(), "not_json", None),
    "trailing comma": (document()[:-1] + b",}", "not_json", None),
    "leading comma": (b"{," + document()[1:], "not_json", None),
    "key without quotes": (document("a:1"), "not_json", None),
    "no colon": (document('"ext"'), "not_json", None),
    "no value": (document(ext=""), "not_json", "ext"),
    "brackets crossed": (document(payload='{"a":[}]'), "not_json", "payload"),
    "trailing comma in an array": (document(payload='{"a":[1,]}'), "not_json", "payload"),
    "trailing comma in an object": (document(payload='{"a":1,}'), "not_json", "payload"),
    "array with a colon": (document(payload='{"a":["b":1]}'), "not_json", "payload"),
    "single quotes": (document(payload="{'a':1}"), "not_json", "payload"),
    "comment": (document(payload="{/**/}"), "not_json", "payload"),
    "NaN": (document(payload='{"a":NaN}'), "not_json", "payload"),
    "infinity": (document(payload='{"a":-Infinity}'), "not_json", "payload"),
    "literal cut short": (document(payload='{"a":nul}'), "not_json", "payload"),
    "literal in capitals": (document(signature="NULL"), "not_json", "signature"),
    "line feed in a string": (document(payload='{"a":"\n"}'), "not_json", "payload"),
    "NUL in a string": (document(payload='{"a":"\x00"}'), "not_json", "payload"),
    "unknown escape": (document(payload='{"a":"\\x41"}'), "not_json", "payload"),
    "escape in capitals": (document(payload='{"a":"\\U0041"}'), "not_json", "payload"),
    "escape cut short": (document(payload='{"a":"\\u12"}'), "not_json", "payload"),
    "grammar before meaning": (document(type='"NEWS"', payload='{"a":.5}'), "not_json", "payload"),
    # UTF-8, anywhere in the message.
    "lone continuation byte": (document()[:-1] + b"\x80", "invalid_utf8", None),
    "overlong slash": (document().replace(b"v=0", b"\xc0\xaf"), "invalid_utf8", "payload"),
    "overlong DEL": (document().replace(b"v=0", b"\xc1\xbf"), "invalid_utf8", "payload"),
    "overlong NUL": (document().replace(b"v=0", b"\xc0\x80"), "invalid_utf8", "payload"),
    "overlong, three bytes": (document().replace(b"v=0", b"\xe0\x9f\xbf"), "invalid_utf8", "payload"),
    "overlong, four bytes": (document().replace(b"v=0", b"\xf0\x8f\xbf\xbf"), "invalid_utf8", "payload"),
    "encoded surrogate": (document(payload='{"a":"\ud800"}'), "invalid_utf8", "payload"),
    "encoded pair of surrogates": (document(payload='{"a":"\ud83d\ude00"}'), "invalid_utf8", "payload"),
    "over U+10FFFF": (document().replace(b"v=0", b"\xf4\x90\x80\x80"), "invalid_utf8", "payload"),
    "byte 0xff": (document().replace(b"v=0", b"\xff"), "invalid_utf8", "payload"),
    "sequence cut short by a quote": (document().replace(b"v=0", b'\xe2\x82"'), "invalid_utf8", "payload"),
    "bad UTF-8 behind a fault of grammar": (
        b"{x" + document().replace(b"v=0", b"\xff"),
        "invalid_utf8",
        None,
    ),
    # One object.
    "array": (b"[" + document() + b"]", "not_object", None),
    "string": (b'"OFFER"', "not_object", None),
    "number": (b" -1.5e3 ", "not_object", None),
    "null": (b"null", "not_object", None),
    # Text and numbers that only some parsers read.
    "lone high surrogate": (document(payload='{"a":"\\ud800"}'), "lone_surrogate", "payload"),
    "lone low surrogate": (document(payload='{"a":"\\udc00"}'), "lone_surrogate", "payload"),
    "two high surrogates": (document(payload='{"a":"\\ud800\\ud800"}'), "lone_surrogate", "payload"),
    "surrogate, then a letter": (document(payload='{"a":"\\ud800\\u0041"}'), "lone_surrogate", "payload"),
    "pair of surrogates reversed": (document(payload='{"a":"\\ude00\\ud83d"}'), "lone_surrogate", "payload"),
    "lone surrogate in a key": (document(ext='{"\\ud800":1}'), "lone_surrogate", "ext"),
    "number over the doubles": (document(payload='{"a":1e400}'), "number_out_of_range", "payload"),
    # Depth.
    "depth 33": (document(payload='{"a":' + nested(31) + "}"), "too_deep", "payload"),
    "depth 33 in an unknown field": (document('"x":' + nested(32)), "unknown_field", None),
    "depth 33 of objects": (document(ext='{"a":' * 32 + "1" + "}" * 32), "too_deep", "ext"),
    "depth 1,000": (document(payload='{"a":' + nested(998) + "}"), "too_deep", "payload"),
    "depth 30,000": (document(payload='{"a":' + nested(30_000) + "}"), "too_deep", "payload"),
    "depth 60,000 left open": (document(payload='{"a":' + "[" * 60_000), "too_deep", "payload"),
    # Size.
    "over 64 KiB": (document(payload='{"a":"' + "x" * 65_536 + '"}'), "too_large", None),
    "over 64 KiB and no JSON": (b"x" * 65_537, "too_large", None),
    "over 256 KiB": (document(payload='{"a":"' + "x" * 262_144 + '"}'), "too_large", None),
    # Keys of the envelope.
    "id twice": (document(f'"id":"{OTHER_ID}"'), "duplicate_key", "id"),
    "id twice, the same": (document(f'"id":"{ID}"'), "duplicate_key", "id"),
    "from twice": (document(f'"from":"{BOB}"'), "duplicate_key", "from"),
    "ext twice": (document('"ext":{}'), "duplicate_key", "ext"),
    "signature twice, null": (document('"signature":null'), "duplicate_key", "signature"),
    "from written with an escape, too": (document(f'"fr\\u006fm":"{BOB}"'), "escaped_key", "from"),
    "to written with an escape": (document(f'"t\\u006F":"{BOB}"', to=None), "escaped_key", "to"),
    "longest key, escaped": (
        document("".join(f"\\u{ord(c):04x}" for c in "correlation_id").join('""') + ":null"),
        "escaped_key",
        "correlation_id",
    ),
    "unknown key": (document('"x":1'), "unknown_field", None),
    "empty key": (document('"":1'), "unknown_field", None),
    "key in capitals": (document('"ID":1'), "unknown_field", None),
    "unknown key, escaped": (document('"\\u0078":1'), "unknown_field", None),
    "key with NUL at its end": (document('"id\\u0000":1'), "unknown_field", None),
    "longest key and more, escaped": (document('"\\u0063orrelation_ids":1'), "unknown_field", None),
    "empty object": (b" { } ", "missing_field", "id"),
    **{
        f"no {name}": (document(**{name: None}), "missing_field", name)
        for name in ("id", "timestamp", "from", "to", "type", "payload", "version")
    },
    # Values of the envelope.
    **{f"{name} is a number": (document(**{name: "1"}), "wrong_type", name) for name in MEMBERS},
    **{
        f"{name} is null": (document(**{name: "null"}), "wrong_type", name)
        for name in MEMBERS
        if name not in ("correlation_id", "signature")
    },
    "payload is an array": (document(payload="[]"), "wrong_type", "payload"),
    "ext is a string": (document(ext='"x"'), "wrong_type", "ext"),
    **{
        f"{name} escaped": (
            document(**{name: f'"\\u{ord(MEMBERS[name][1]):04x}{MEMBERS[name][2:]}'}),
            "escaped_value",
            name,
        )
        for name in ("id", "from", "to", "type", "version")
    },
    "correlation_id escaped": (
        document(correlation_id=f'"\\u0030{OTHER_ID[1:]}"'),
        "escaped_value",
        "correlation_id",
    ),
    "slash escaped in from": (document(from_=f'"{ALICE[:-1]}\\/"'), "escaped_value", "from"),
    "id without hyphens": (document(id=f'"{ID.replace("-", "")}"'), "bad_id", "id"),
    "id in braces": (document(id=f'"{{{ID}}}"'), "bad_id", "id"),
    "id with a hyphen misplaced": (document(id='"3f2b8c1e9-a4d-4e6f-8b7a-1c2d3e4f5a6b"'), "bad_id", "id"),
    "id with a hyphen too many": (document(id='"3f2b8c1e-9a4d-4e6f-8b7a-1c2d3e4f5a6-"'), "bad_id", "id"),
    "id with a g": (document(id=f'"g{ID[1:]}"'), "bad_id", "id"),
    "id with a g at its end": (document(id=f'"{ID[:-1]}g"'), "bad_id", "id"),
    "empty id": (document(id='""'), "bad_id", "id"),
    "correlation_id malformed": (document(correlation_id='"1"'), "bad_id", "correlation_id"),
    "from too short": (document(from_=f'"{ALICE[:-1]}"'), "bad_did", "from"),
    "to too long": (document(to=f'"{BOB}1"'), "bad_did", "to"),
    "to of another key type": (document(to=f'"did:key:zQ3s{BOB[12:]}"'), "bad_did", "to"),
    "0 right behind the prefix": (document(to=f'"{BOB[:12]}0{BOB[13:]}"'), "bad_did", "to"),
    "to of another method": (document(to='"did:web:example.com"'), "bad_did", "to"),
    **{
        f"{letter} is not in base58btc": (document(from_=f'"{ALICE[:-1]}{letter}"'), "bad_did", "from")
        for letter in "0OIl+/_ é"
    },
    "unknown type": (document(type='"NEWS"'), "unknown_type", "type"),
    "type in small letters": (document(type='"offer"'), "unknown_type", "type"),
    "empty type": (document(type='""'), "unknown_type", "type"),
    "version 2.0": (document(version='"2.0"'), "unsupported_version", "version"),
    "version 1.00": (document(version='"1.00"'), "unsupported_version", "version"),
    "empty version": (document(version='""'), "unsupported_version", "version"),
}


@pytest.mark.parametrize(("data", "status", "field"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(data, status, field):
    found = scan(data)
    assert (found.status, found.field) == (status, field)


def test_every_reason_has_a_case():
    assert {"ok"} | {status for _, status, _ in REFUSED.values()} == set(STATUS_NAMES)
    assert len(set(STATUS_NAMES)) == len(STATUS_NAMES)


def test_every_reason_has_a_number_on_the_wire():
    assert set(STATUS_NAMES[1:]) <= set(CAUSES)


def test_types_are_those_of_the_protocol():
    assert set(TYPE_NAMES[1:]) == {kind.value for kind in MessageType}


@pytest.mark.parametrize("name", TYPE_NAMES[1:])
def test_every_type_is_known_by_its_name(name):
    found = scan(document(type=f'"{name}"'))
    assert (found.status, found.type) == ("ok", name)


def test_every_field_is_known_by_its_name():
    assert FIELD_NAMES[0] is TYPE_NAMES[0] is None
    assert set(FIELD_NAMES[1:]) == set(MEMBERS)
    assert scan(document()).status == "ok"


@pytest.mark.parametrize(
    "number",
    [
        "0",
        "-0",
        "-0.0",
        "10",
        "1E+2",
        "1e-2",
        "0.5",
        "-1.5e3",
        "1e308",
        "1e-999999999999999999999999",
        "0e400",
        "9" * 308,
        "0." + "0" * 400 + "1e700",
        "1" + "0" * 400 + "e-400",
        "18446744073709551616",
        "0.0e99999999999999999999",
        "1.7976931348623158e308",
        str(OVERFLOW - 1),
        "1" * 9_000 + "e-8999",
        f"{OVERFLOW - 1}.{'9' * 900}",
        f"{OVERFLOW - 1}000e-3",
    ],
)
def test_accepted_number(number):
    assert scan(document(payload=f'{{"a":{number}}}')).status == "ok"


@pytest.mark.parametrize(
    "number",
    [
        "",
        "-",
        "+1",
        "01",
        "-01",
        "00",
        ".5",
        "1.",
        "1.e2",
        "1e",
        "1e+",
        "1e-",
        "1e+-1",
        "0x1",
        "1_0",
        "--1",
        "1.2.3",
        "1e1.5",
        "1f",
        "\u0661",
    ],
)
def test_number_outside_the_grammar_is_refused(number):
    assert scan(document(payload=f'{{"a":{number}}}')).status == "not_json"


@pytest.mark.parametrize(
    "number",
    [
        "1e309",
        "-1e400",
        "10e308",
        "1e99999999999999999999",
        "9" * 309,
        "1.7976931348623159e308",
        "0.1e310",
        str(OVERFLOW),
        f"{OVERFLOW}.0",
        f"0.000{OVERFLOW}e312",
        f"{OVERFLOW}000e-3",
        "0." + "0" * 400 + "1e710",
        "1" + "0" * 9_000,
    ],
)
def test_number_that_overflows_a_double_is_refused(number):
    found = scan(document(payload=f'{{"a":{number}}}'))
    assert (found.status, found.field, found.id) == ("number_out_of_range", "payload", ID)


def test_limits_are_those_of_the_protocol():
    data = document()
    assert scan(data + b" " * (MESSAGE_MAX_BYTES - len(data))).status == "ok"
    assert scan(data + b" " * (MESSAGE_MAX_BYTES - len(data) + 1)).status == "too_large"
    assert scan(document(payload=f'{{"a":{nested(MESSAGE_MAX_DEPTH - 2)}}}')).status == "ok"
    assert scan(document(payload=f'{{"a":{nested(MESSAGE_MAX_DEPTH - 1)}}}')).status == "too_deep"


def test_no_beginning_of_an_envelope_is_an_envelope():
    data = document(payload='{"a":["\\u00e9\\ud83d\\ude00é€😀",-1.5e+3,true,null,{}]}')
    for size in range(len(data)):
        assert scan(data[:size]).status in ("not_json", "invalid_utf8")


def test_string_may_end_at_any_distance_from_the_end_of_the_message():
    for size in range(70):
        text = "x" * size
        data = document(payload="{}", signature=None, ext=f'{{"a":"{text}"}}')
        assert scan(data).status == "ok"
        for odd in ("\n", "\x1f", "\x00"):
            assert scan(document(ext=f'{{"a":"{text}{odd}"}}')).status == "not_json"
        assert scan(document(ext=f'{{"a":"{text}\\"é\\\\{text}"}}')).status == "ok"
        assert scan(data[:-3]).status == "not_json"


# What stands in a string, as it is written, and what becomes of the message.
WRITTEN = {
    "\\r\\n": "ok",
    "\\n\\n\\r": "ok",
    "\\t": "ok",
    '\\"': "ok",
    "\\\\": "ok",
    "\\\\n": "ok",
    "\\\\\\r": "ok",
    "\\u000d": "ok",
    "nr": "ok",
    "é€😀": "ok",
    "\x7f": "ok",
    "\\q": "not_json",
    "\\N": "not_json",
    "\\\\\\q": "not_json",
    '\\\\"': "not_json",
    "\\r\n": "not_json",
    "\\\r": "not_json",
    "\x00": "not_json",
    "\x1f": "not_json",
    "\\é": "not_json",
    "\\\ud800": "invalid_utf8",
    "\ud800": "invalid_utf8",
}


@pytest.mark.parametrize(("written", "status"), WRITTEN.items(), ids=ascii)
def test_escape_is_read_alike_wherever_it_stands(written, status):
    # In a string far from the end of the message, and in the last one: 16 and 32 bytes are read at a time.
    for before in range(100):
        for behind in (0, 1, 15, 16, 17, 31, 32, 33, 80):
            text = f'"{"x" * before}{written}{"y" * behind}"'
            assert scan(document(payload=f'{{"sdp":{text}}}')).status == status
            assert scan(document(signature=text, ext=None)).status == status


def test_string_ends_at_its_first_quote_without_a_backslash():
    for size in range(100):
        text = "x" * size + "\\r\\n"
        assert scan(document(payload=f'{{"a":"{text}","b":1}}')).status == "ok"
        assert scan(document(payload=f'{{"a":"{text}\\","b":1}}')).status == "not_json"
        assert scan(document(payload=f'{{"a":"{text}\\\\","b":1}}')).status == "ok"


@pytest.mark.parametrize(
    ("name", "valid", "form"),
    [
        ("id", ID, rb"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"),
        ("correlation_id", ID, rb"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"),
        ("from", ALICE, rb"did:key:z6Mk[1-9A-HJ-NP-Za-km-z]{44}"),
        ("to", BOB, rb"did:key:z6Mk[1-9A-HJ-NP-Za-km-z]{44}"),
    ],
)
def test_every_byte_of_an_id_and_a_did_counts(name, valid, form):
    head, tail = document(**{name: '"@"'}).split(b"@")
    for at in range(len(valid)):
        for byte in range(256):
            text = valid[:at].encode() + bytes([byte]) + valid[at + 1 :].encode()
            accepted = re.fullmatch(form, text) is not None
            assert (scan(head + text + tail).status == "ok") == accepted, text


@pytest.mark.parametrize("name", FIELD_NAMES[1:])
def test_key_is_known_only_by_its_whole_name(name):
    value = MEMBERS[name]
    assert scan(document(f'"{name}" :\n{value}', **{name: None})).status == "ok"
    for at in range(len(name)):
        for odd in (
            name[:at],
            name[:at] + "~" + name[at + 1 :],
            name[:at] + name[at].upper() + name[at + 1 :],
        ):
            expected = "unknown_field" if odd != name else "ok"
            assert scan(document(f'"{odd}":{value}', **{name: None})).status == expected
    assert scan(document(f'"{name}x":{value}', **{name: None})).status == "unknown_field"
    for end in ("", ":", "x", '"'):
        assert scan((f'{{"{name}{end}').encode()).status == "not_json"
        assert scan((f'{{"{name}"{end}').encode()).status == "not_json"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(document(f'"id":"{ID}"', id=None, type='"NEWS"'), id="unknown type before"),
        pytest.param(document(f'"id":"{ID}"', id=None, from_="1"), id="wrong type before"),
        pytest.param(document(f'"id":"{ID}"', id=None, to='"did:web:a"'), id="bad DID before"),
        pytest.param(
            document(f'"id":"{ID}"', id=None, payload='{"a":' + nested(900) + "}"), id="depth before"
        ),
        pytest.param(document('"x":[{}]', f'"id":"{ID}"', id=None), id="unknown field before"),
        pytest.param(document('"to":[[]]', f'"id":"{ID}"', id=None), id="duplicate before"),
        pytest.param(document('"t\\u006f":{"a":""}', f'"id":"{ID}"', id=None), id="escaped key before"),
        pytest.param(document(f'"id":"{ID}"', id=None, from_='"\\u0064"'), id="escaped value before"),
        pytest.param(
            document(f'"id":"{ID}"', id=None, payload='{"a":"\\ud800"}'), id="lone surrogate before"
        ),
        pytest.param(document(f'"id":"{ID}"', id=None, payload='{"a":1e999}'), id="large number before"),
        pytest.param(
            document(f'"id":"{ID}"', id=None, payload='{"a":"' + "x" * 70_000 + '"}'), id="over 64 KiB"
        ),
        pytest.param(document() + b"x", id="fault of grammar behind"),
        pytest.param(document().replace(b"v=0", b"\xff"), id="bad UTF-8 behind"),
    ],
)
def test_refusal_knows_the_id(data):
    found = scan(data)
    assert found.status != "ok"
    assert found.id == ID


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(document(f'"id":"{OTHER_ID}"'), id="twice"),
        pytest.param(document('"id":null'), id="twice, then null"),
        pytest.param(document('"id":1', f'"id":"{ID}"'), id="three times"),
        pytest.param(document(f'"\\u0069d":"{OTHER_ID}"'), id="twice, then with an escape"),
        pytest.param(document(f'"\\u0069d":"{ID}"', id=None), id="key with an escape"),
        pytest.param(document(id=f'"\\u0033{ID[1:]}"'), id="value with an escape"),
        pytest.param(document(id=f'"{ID}0"'), id="malformed"),
        pytest.param(document(id=f'["{ID}"]'), id="in an array"),
        pytest.param(document(payload='{"a":"' + "x" * 262_144 + '"}'), id="over 256 KiB"),
    ],
)
def test_doubtful_id_is_not_reported(data):
    found = scan(data)
    assert found.status != "ok"
    assert found.id is None


def test_what_came_twice_is_not_reported():
    found = scan(document(f'"from":"{BOB}"', f'"to":"{ALICE}"', '"type":"PING"', '"correlation_id":null'))
    assert (found.status, found.field, found.id) == ("duplicate_key", "from", ID)
    assert (found.from_, found.to, found.type, found.correlation_id) == (None, None, None, None)


def test_first_refusal_is_the_one_reported():
    assert scan(document('"x":1', from_="1", to='"x"')).status == "wrong_type"
    assert scan(document('"x":1', '"to":1', type='"NEWS"')).status == "unknown_type"


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize(
    "change",
    [
        {"extra": '"hops":3'},
        {"payload": None},
        {"payload": "[]"},
        {"id": '"01ARZ3NDEKTSV4RRFFQ69G5FAV"'},
        {"to": '"did:web:example.com"'},
        {"type": '"NEWS"'},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_version_is_told_of_the_version_and_not_of_what_came_with_it(change, place):
    change = dict(change)
    extra = [change.pop("extra")] if "extra" in change else []
    version = '"version":"2.0"'
    if place == "before":
        data = b"{" + version.encode() + b"," + document(*extra, version=None, **change)[1:]
    else:
        data = document(*extra, version, version=None, **change)
    found = scan(data)
    assert (found.status, found.field) == ("unsupported_version", "version")


@pytest.mark.parametrize(
    ("data", "status"),
    [
        pytest.param(document('"version":"2.0"'), "duplicate_key", id="version twice"),
        pytest.param(
            document('"to":1', '"version":"2.0"', version=None), "duplicate_key", id="duplicate before"
        ),
        pytest.param(
            document('"t\\u006f":1', version='"2.0"', to=None), "unsupported_version", id="escape behind"
        ),
        pytest.param(
            document(payload='{"a":1e999}', version='"2.0"'), "number_out_of_range", id="number before"
        ),
        pytest.param(document(payload='{"a":1e}', version='"2.0"'), "not_json", id="grammar"),
        pytest.param(document(version="2"), "wrong_type", id="version is no string"),
    ],
)
def test_other_version_does_not_excuse_what_no_version_allows(data, status):
    assert scan(data).status == status


@pytest.mark.parametrize("data", ["{}", bytearray(b"{}"), memoryview(b"{}"), None, 1])
def test_only_bytes_are_scanned(data):
    with pytest.raises(TypeError):
        scan(data)
