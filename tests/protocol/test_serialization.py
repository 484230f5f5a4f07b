"""Canonical bytes, and the JSON that is refused before anybody looks at its fields."""

import json
import string

import orjson
import pytest
import rfc8785
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiconexus.protocol import (
    DIDKey,
    ExecRequestPayload,
    MalformedMessageError,
    Message,
    PingPayload,
    canonicalize,
    decode,
    encode,
    serialization,
    sign_message,
)
from aiconexus.protocol.limits import INTEGER_MAX, MESSAGE_MAX_BYTES
from aiconexus.protocol.serialization import dumps, loads

A, B = DIDKey.from_seed(b"\x02" * 32), DIDKey.from_seed(b"\x03" * 32)

# A busy machine is no failure.
CALM = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
INTEGERS = st.integers(-INTEGER_MAX, INTEGER_MAX) | st.sampled_from([INTEGER_MAX, -INTEGER_MAX, 0, 1, -1])
CONTROLS = st.text(st.characters(max_codepoint=0x9F) | st.sampled_from('"\\/\u2028\u2029\x7f\u00e9'))
TEXTS = st.text(st.characters(codec="utf-8")) | CONTROLS
PLAIN_KEYS = st.text(st.characters(max_codepoint=0xD7FF)) | CONTROLS
ALL_KEYS = PLAIN_KEYS | st.text(st.sampled_from("a\ud7ff\ue000\uffff\U00010000\U0001f600\U0010ffff"))
FLOATS = st.floats(allow_nan=False, allow_infinity=False)


def documents(leaves: st.SearchStrategy, keys: st.SearchStrategy) -> st.SearchStrategy:
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=5) | st.dictionaries(keys, inner, max_size=5),
        max_leaves=25,
    )


PLAIN = documents(st.none() | st.booleans() | INTEGERS | TEXTS, PLAIN_KEYS)
ANY = documents(st.none() | st.booleans() | INTEGERS | TEXTS | FLOATS, ALL_KEYS)


def nested(levels: int, kind: str = "list") -> object:
    value: object = [] if kind == "list" else {}
    for _ in range(levels - 1):
        value = [value] if kind == "list" else {"a": value}
    return value


def refusal(data: bytes | str) -> MalformedMessageError:
    with pytest.raises(MalformedMessageError) as caught:
        loads(data)
    return caught.value


# --- canonical bytes ---------------------------------------------------------------------------


@CALM
@given(ANY)
def test_canonical_bytes_are_those_of_the_rfc8785_package(document):
    assert canonicalize(document) == rfc8785.dumps(document)


@CALM
@given(PLAIN)
def test_fast_path_writes_what_the_rfc8785_package_writes(document):
    assert serialization._check(document, 1)
    assert orjson.dumps(document, option=orjson.OPT_SORT_KEYS) == rfc8785.dumps(document)


@CALM
@given(ANY)
def test_what_was_sent_has_the_canonical_bytes_of_what_was_signed(document):
    assert canonicalize(loads(dumps({"a": document}))) == canonicalize({"a": document})


def test_a_plain_document_does_not_touch_the_slow_path(monkeypatch):
    def slow(_):
        raise AssertionError("the slow path was taken")

    monkeypatch.setattr(serialization.rfc8785, "dumps", slow)
    message = Message.create(
        A.did, B.did, ExecRequestPayload(args={"é\ud7ff": [1, None, True, "\U0001f600"]})
    )
    assert sign_message(message, A).signature


@pytest.mark.parametrize("document", [1.5, [0, 1.0], {"a": [{"b": -0.0}]}, {"\ue000": 1}, {"\U0001f600": 1}])
def test_floats_and_high_keys_take_the_slow_path(document):
    assert not serialization._check(document, 1)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        # RFC 8785 appendix B.
        (0.0, "0"),
        (-0.0, "0"),
        (5e-324, "5e-324"),
        (-5e-324, "-5e-324"),
        (1.7976931348623157e308, "1.7976931348623157e+308"),
        (9007199254740992.0, "9007199254740992"),
        (295147905179352830000.0, "295147905179352830000"),
        (9.999999999999997e22, "9.999999999999997e+22"),
        (1e23, "1e+23"),
        (1.0000000000000001e23, "1.0000000000000001e+23"),
        (999999999999999700000.0, "999999999999999700000"),
        (1e21, "1e+21"),
        (9.999999999999997e-7, "9.999999999999997e-7"),
        (0.000001, "0.000001"),
        (333333333.3333332, "333333333.3333332"),
        (0.1, "0.1"),
        (1.0, "1"),
    ],
)
def test_numbers_are_written_as_ecmascript_writes_them(number, text):
    assert canonicalize([number]) == f"[{text}]".encode()


def test_keys_sort_as_utf16():
    # RFC 8785 section 3.2.3: the astral face comes before U+FB33, though its code point is higher.
    keys = ["€", "\r", "\ufb33", "1", "\U0001f600", "\u0080", "ö"]
    expected = ["\r", "1", "\u0080", "ö", "€", "\U0001f600", "\ufb33"]
    assert list(json.loads(canonicalize(dict.fromkeys(keys)))) == expected


@pytest.mark.parametrize("number", [INTEGER_MAX, -INTEGER_MAX])
def test_largest_integers_pass(number):
    assert canonicalize([number]) == f"[{number}]".encode()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (float("nan"), "JSON has no nan"),
        (float("inf"), "JSON has no inf"),
        (float("-inf"), "JSON has no -inf"),
        (2**53, "9007199254740992 is outside"),
        (-(2**53), "-9007199254740992 is outside"),
        ([10**5000], "of 16610 bits is outside"),
        (b"bytes", "bytes is not a JSON type"),
        ({1, 2}, "set is not a JSON type"),
        ({1: 2}, "the key 1 is not a string"),
    ],
)
@pytest.mark.parametrize("write", [canonicalize, dumps])
def test_what_has_no_canonical_form_is_refused_with_a_clear_text(value, text, write):
    with pytest.raises(MalformedMessageError) as caught:
        write(value)
    assert caught.value.cause.name == "not_canonical"
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "value", ["\ud800", {"\ud800": 1}, {"\ud800": 1.5}, ["\udfff", 1.5], {"a": "x\ud83d"}]
)
@pytest.mark.parametrize("write", [canonicalize, dumps])
def test_half_a_surrogate_pair_is_refused(value, write):
    with pytest.raises(MalformedMessageError, match="half a surrogate pair") as caught:
        write(value)
    assert caught.value.cause.name == "lone_surrogate"


@pytest.mark.parametrize("kind", ["list", "dict"])
@pytest.mark.parametrize("write", [canonicalize, dumps])
def test_thirty_two_levels_pass_and_thirty_three_do_not(kind, write):
    assert write(nested(32, kind))
    with pytest.raises(MalformedMessageError) as caught:
        write(nested(33, kind))
    assert caught.value.cause.name == "too_deep"


def test_a_cycle_is_too_deep():
    cycle: list[object] = []
    cycle.append(cycle)
    with pytest.raises(MalformedMessageError) as caught:
        canonicalize(cycle)
    assert caught.value.cause.name == "too_deep"


def test_a_deep_place_behind_a_float_is_found():
    with pytest.raises(MalformedMessageError):
        canonicalize([1.5, nested(32)])


# --- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"", "not_json"),
        (b"{", "not_json"),
        (b"{} {}", "not_json"),
        (b"{'a':1}", "not_json"),
        (b'{"a":01}', "not_json"),
        (b'{"a":NaN}', "not_json"),
        (b'{"a":Infinity}', "not_json"),
        (b'{"a":1,}', "not_json"),
        (b'{"a":"\x01"}', "not_json"),
        (b"\xef\xbb\xbf{}", "not_json"),
        (b"\x0c{}", "not_json"),
        (b'{"a":1}\x00', "not_json"),
        (b"[]", "not_object"),
        (b'"text"', "not_object"),
        (b"null", "not_object"),
        (b'{"a":"\xff"}', "invalid_utf8"),
        (b'{"a":"\xc0\xaf"}', "invalid_utf8"),
        (b'{"a":"\xed\xa0\x80"}', "invalid_utf8"),
        (b'{"a":"\\ud800"}', "lone_surrogate"),
        (b'{"a":"\\udc00\\ud800"}', "lone_surrogate"),
        (b'{"\\ud83d":1}', "lone_surrogate"),
        (b'{"a":1e400}', "number_out_of_range"),
        (b'{"a":9007199254740992}', "not_canonical"),
        (b'{"a":-9007199254740992}', "not_canonical"),
        (b'{"a":[18446744073709551616]}', "not_canonical"),
        (b'{"a":-100000000000000000000}', "not_canonical"),
        (b'{"a":-9223372036854775809}', "not_canonical"),
        (b'{"a":1' + b"0" * 308 + b"}", "not_canonical"),
        (b'{"a":1,"a":1}', "duplicate_key"),
        (b'{"a":1,"\\u0061":2}', "duplicate_key"),
        (b'{"b":[{"a":1,"c":2,"a":3}]}', "duplicate_key"),
        (b'{"a":' + b"[" * 32 + b"]" * 32 + b"}", "too_deep"),
        (b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}", "too_deep"),
        (b'{"a":"' + b"x" * MESSAGE_MAX_BYTES + b'"}', "too_large"),
    ],
)
def test_text_that_is_no_message_is_refused_by_its_cause(data, name):
    assert refusal(data).cause.name == name


def test_a_lone_surrogate_in_a_str_is_refused():
    assert refusal('{"a":"\ud800"}').cause.name == "lone_surrogate"


def test_size_is_counted_in_bytes():
    text = '{"a":"' + "é" * (MESSAGE_MAX_BYTES // 2) + '"}'
    assert len(text) < MESSAGE_MAX_BYTES
    assert refusal(text).cause.name == "too_large"
    assert refusal(text.encode()).cause.name == "too_large"


def test_a_message_of_exactly_the_limit_passes():
    data = b'{"a":"' + b"x" * (MESSAGE_MAX_BYTES - 8) + b'"}'
    assert len(data) == MESSAGE_MAX_BYTES
    assert loads(data)
    assert refusal(data + b" ").cause.name == "too_large"


def test_a_paired_escape_is_one_character():
    assert loads(b'{"a":"\\ud83d\\ude00"}') == {"a": "\U0001f600"}


def test_white_space_around_the_object_passes():
    assert loads(b' \t\r\n{"a":1}\n') == {"a": 1}


def test_refusal_carries_the_id_of_the_message_where_it_can_be_read():
    identifier = "00000000-0000-4000-8000-000000000001"
    assert refusal(f'{{"id":"{identifier}","a":1,"a":2}}').message_id == identifier
    assert refusal(f'{{"id":"{identifier}","a":9007199254740992}}').message_id == identifier
    assert refusal(b'{"id":"' + b"x" * 36 + b'","a":1,"a":2}').message_id is None


def test_a_long_duplicate_key_is_not_quoted_in_full():
    key = "k" * 30_000
    error = refusal(f'{{"{key}":1,"{key}":2}}')
    assert len(str(error)) < 150
    assert len(error.field) == 64


# --- encode and decode -------------------------------------------------------------------------


def test_encode_gives_the_bytes_that_arrived():
    wire = json.dumps(Message.create(A.did, B.did, PingPayload(sequence=1)).envelope(), indent=1).encode()
    assert encode(decode(wire)) == wire
    assert encode(decode(wire.decode())) == wire
    assert encode(decode(bytearray(wire))) == wire


def test_encode_gives_the_bytes_that_were_signed():
    signed = sign_message(Message.create(A.did, B.did, PingPayload(sequence=1)), A)
    assert encode(signed) is signed.wire


def test_encode_refuses_what_is_over_the_limit():
    message = Message.create(A.did, B.did, ExecRequestPayload(args={"text": "x" * MESSAGE_MAX_BYTES}))
    with pytest.raises(MalformedMessageError) as caught:
        encode(message)
    assert caught.value.cause.name == "too_large"
    assert encode(message, limit=2 * MESSAGE_MAX_BYTES)


@CALM
@given(st.dictionaries(TEXTS, ANY, max_size=4))
def test_a_message_survives_the_wire(args):
    message = Message.create(A.did, B.did, ExecRequestPayload(args=args))
    again = decode(encode(message))
    assert again.envelope() == message.envelope()


@CALM
@given(st.binary(max_size=200) | st.text(string.printable, max_size=200).map(str.encode))
def test_any_bytes_are_read_or_refused_as_malformed(data):
    try:
        loads(data)
    except MalformedMessageError:
        return
    assert isinstance(json.loads(data), dict)
