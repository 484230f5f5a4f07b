"""What travels beside an envelope: what may be announced, what comes of its bytes, digests of streams."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any

import pytest
import rfc8785
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiconexus.protocol import DIDKey, MalformedMessageError, Message, canonicalize
from aiconexus.protocol.attachments import (
    ARGS,
    RESULT,
    Assembly,
    Detached,
    StreamDigest,
    StreamSummary,
    argument_name,
    argument_pointer,
    attachments_of,
    join_parts,
    loads_canonical,
    stream_summary_of,
)
from aiconexus.protocol.limits import ATTACHMENTS_MAX, CHUNK_MAX_BYTES, INTEGER_MAX, MESSAGE_MAX_DEPTH
from aiconexus.protocol.models import (
    ExecRequestPayload,
    ExecResponsePayload,
    ExecStatus,
    IntentPayload,
    Payload,
)
from aiconexus.protocol.security import sign_message

ALICE, BOB = DIDKey.from_seed(b"\x01" * 32), DIDKey.from_seed(b"\x02" * 32)
DIGEST = sha256(b"abc").hexdigest()
SUCCESS = ExecResponsePayload(status=ExecStatus.SUCCESS)

# A busy machine is no failure.
CALM = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
TEXTS = st.text(st.characters(codec="utf-8")) | st.text(st.sampled_from('~/01a\\"\ue000\U0001f600'))
NUMBERS = st.integers(-INTEGER_MAX, INTEGER_MAX) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=15,
)


def request(args: dict[str, Any] | None = None) -> ExecRequestPayload:
    return ExecRequestPayload(args=args or {})


def entry(at: Any, **fields: Any) -> dict[str, Any]:
    return {"at": at, "as": "bytes", "size": 3, "sha256": DIGEST, **fields}


def message(payload: Payload, *entries: dict[str, Any], is_signed: bool = True, **ext: Any) -> Message:
    if entries:
        ext["attachments"] = list(entries)
    made = Message.create(ALICE.did, BOB.did, payload, ext=ext)
    return sign_message(made, ALICE) if is_signed else made


def refusal(made: Message) -> str:
    with pytest.raises(MalformedMessageError) as caught:
        attachments_of(made)
    assert caught.value.cause.name == "invalid_ext"
    assert caught.value.message_id == made.id
    return str(caught.value)


# --- what is announced ---------------------------------------------------------------------------


def test_message_that_announces_nothing_has_no_attachments() -> None:
    assert attachments_of(message(request())) == []


@pytest.mark.parametrize(
    ("payload", "at"),
    [
        (request(), "/args/scan"),
        (request({"scan": 1}), "/args/scan2"),
        (request(), "/args/"),  # the empty name is a name
        (request({"": 1}), "/args/ "),
        (request(), "/args/a~1b~0c\n"),
        (SUCCESS, "/result"),
        (ExecResponsePayload(status=ExecStatus.PARTIAL), "/result"),
    ],
)
def test_place_that_is_free_is_one_for_an_attachment(payload: Payload, at: str) -> None:
    (attachment,) = attachments_of(message(payload, entry(at)))
    assert (attachment.at, attachment.as_, attachment.size, attachment.sha256) == (at, "bytes", 3, DIGEST)


@pytest.mark.parametrize(
    ("payload", "at"),
    [
        (request({"scan": 1}), "/args/scan"),
        (request({"scan": None}), "/args/scan"),
        (request({"": 1}), "/args/"),
        (request({"a/b": 1}), "/args/a~1b"),
        (request(), "/args/a/b"),  # inside an argument
        (request(), "/args/~"),
        (request(), "/args/~2"),
        (request(), "args/scan"),
        (request(), "/timeout_ms"),
        (request(), "/result"),
        (request(), ""),
        (request(), "/"),
        (SUCCESS, "/args/scan"),
        (SUCCESS, "/result/0"),
        (SUCCESS, "/error"),
        (ExecResponsePayload(status=ExecStatus.SUCCESS, result=1), "/result"),
        (IntentPayload(query="?"), "/params"),
    ],
)
def test_place_that_is_none_is_refused(payload: Payload, at: str) -> None:
    assert "is no place for an attachment" in refusal(message(payload, entry(at)))


def test_all_arguments_at_once_want_none_in_the_envelope() -> None:
    whole = entry(ARGS, **{"as": "json"})
    assert [each.at for each in attachments_of(message(request(), whole, entry("/args/b")))] == [
        ARGS,
        "/args/b",
    ]
    assert "is no place for an attachment" in refusal(message(request({"a": 1}), whole))
    assert "an object, not bytes" in refusal(message(request(), entry(ARGS)))


@pytest.mark.parametrize(
    "changes",
    [
        {"at": 1},
        {"at": None},
        {"as": "text"},
        {"as": None},
        {"size": -1},
        {"size": 1.0},
        {"size": True},
        {"size": "3"},
        {"sha256": DIGEST.upper()},
        {"sha256": DIGEST[:-1]},
        {"sha256": DIGEST + "\n"},
        {"sha256": DIGEST + "0"},
        {"sha256": 5},
    ],
)
def test_entry_of_another_form_is_refused(changes: dict[str, Any]) -> None:
    made = message(request(), {**entry("/args/scan"), **changes}, is_signed=False)
    assert refusal(made).startswith("ext.attachments.0.")


@pytest.mark.parametrize("missing", ["at", "as"])
def test_entry_without_a_field_is_refused(missing: str) -> None:
    whole = entry("/args/scan")
    del whole[missing]
    assert "Field required" in refusal(message(request(), whole))


@pytest.mark.parametrize(
    "changed",
    [
        [{"at": "/args/scan", "as": "bytes", "sha256": DIGEST}],  # it cannot be known
        [{"at": "/args/scan", "as": "json"}],
        [{"at": "/args/scan", "as": "bytes"}, entry("/args/last")],
        [{"at": "/args/scan", "as": "bytes"}, {"at": "/args/more", "as": "bytes"}],
    ],
)
def test_what_cannot_be_a_stream_has_a_size(changed: list[dict[str, Any]]) -> None:
    assert "is missing: it cannot be a stream" in refusal(message(request(), *changed))


def test_last_argument_may_be_a_stream() -> None:
    whole, stream = attachments_of(message(request(), entry("/args/scan"), {"at": "/args/b", "as": "bytes"}))
    assert (whole.size is not None, stream.size) == (True, None)


@pytest.mark.parametrize("announced", [{}, "/args/scan", 1, [[]], ["/args/scan"], [None]])
def test_list_of_another_form_is_refused(announced: Any) -> None:
    assert refusal(message(request(), attachments=announced)).startswith("ext.attachments")


def test_entry_may_say_more() -> None:
    assert attachments_of(message(request(), entry("/args/scan", colour="red")))


def test_attachments_are_at_most_so_many() -> None:
    entries = [entry(f"/args/{number}") for number in range(ATTACHMENTS_MAX + 1)]
    assert len(attachments_of(message(request(), *entries[:-1]))) == ATTACHMENTS_MAX
    assert "at most 64" in refusal(message(request(), *entries))


def test_place_is_named_once() -> None:
    assert "one place twice" in refusal(message(request(), entry("/args/a"), entry("/args/a")))


def test_signed_message_says_every_digest() -> None:
    bare = entry("/args/b", sha256=None)
    assert "the digest of '/args/b' is missing" in refusal(message(request(), entry("/args/a"), bare))
    part = ExecResponsePayload(status=ExecStatus.PARTIAL)
    unsigned = message(part, entry(RESULT, sha256=None), is_signed=False)
    assert attachments_of(unsigned)[0].sha256 is None


# --- places --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pointer"),
    [
        ("scan", "/args/scan"),
        ("", "/args/"),
        ("a/b", "/args/a~1b"),
        ("~1", "/args/~01"),
        ("~/", "/args/~0~1"),
    ],
)
def test_pointer_of_an_argument_is_that_of_rfc_6901(name: str, pointer: str) -> None:
    assert argument_pointer(name) == pointer
    assert argument_name(pointer) == name


@given(TEXTS)
def test_every_name_has_a_pointer(name: str) -> None:
    assert argument_name(argument_pointer(name)) == name


@given(st.text(st.sampled_from("~/01a"), max_size=6))
def test_no_two_pointers_name_one_argument(rest: str) -> None:
    name = argument_name(f"/args/{rest}")
    assert name is None or argument_pointer(name) == f"/args/{rest}"


# --- what comes ----------------------------------------------------------------------------------


def assembly(*detached: Detached, is_signed: bool = True, **changes: Any) -> Assembly:
    entries = [{**each.described(is_signed=is_signed), **changes} for each in detached]
    made = message(request(), *entries, is_signed=is_signed)
    return Assembly(made, attachments_of(made))


def test_values_are_what_was_detached() -> None:
    both = Detached.of(ARGS, {"b": [1.5, None]}), Detached.of("/args/a", b"\x00\xff")
    collected = assembly(*both)
    assert collected.size == collected.missing == sum(len(each.data) for each in both)
    collected.add(b"".join(each.data for each in both))
    assert collected.missing == 0
    assert collected.values() == {ARGS: {"b": [1.5, None]}, "/args/a": b"\x00\xff"}


def test_empty_attachments_are_complete_at_once() -> None:
    collected = assembly(Detached.of("/args/a", b""), Detached.of("/args/b", b""))
    assert collected.missing == 0
    assert collected.values() == {"/args/a": b"", "/args/b": b""}


def test_empty_text_is_no_json() -> None:
    with pytest.raises(MalformedMessageError, match="what came for '/args/a': not JSON"):
        assembly(Detached("/args/a", b"", False)).values()


@CALM
@given(
    st.lists(st.binary(max_size=40), max_size=6),
    st.lists(st.integers(1, CHUNK_MAX_BYTES), min_size=1) | st.lists(st.integers(1, 7), min_size=1),
)
def test_chunks_may_end_anywhere(values: list[bytes], sizes: list[int]) -> None:
    places = [f"/args/{number}" for number in range(len(values))]
    collected = assembly(*map(Detached.of, places, values))
    rest = b"".join(values)
    while rest:
        size = sizes[0]
        sizes = sizes[1:] + sizes[:1]
        collected.add(rest[:size])
        rest = rest[size:]
        assert collected.missing == len(rest)
    assert collected.values() == dict(zip(places, values, strict=True))


@pytest.mark.parametrize("size", [CHUNK_MAX_BYTES - 1, CHUNK_MAX_BYTES, CHUNK_MAX_BYTES + 1])
def test_chunk_borders_leave_no_trace(size: int) -> None:
    data = bytes(number % 251 for number in range(2 * size))
    collected = assembly(Detached.of("/args/a", data[:size]), Detached.of("/args/b", data[size:]))
    for begin in range(0, len(data), CHUNK_MAX_BYTES):
        collected.add(data[begin : begin + CHUNK_MAX_BYTES])
    assert collected.values() == {"/args/a": data[:size], "/args/b": data[size:]}


def test_bytes_that_are_not_those_of_the_digest_are_refused() -> None:
    collected = assembly(Detached.of("/args/a", b"abc"), Detached.of("/args/b", b"abc"))
    collected.add(b"abcabd")
    with pytest.raises(MalformedMessageError, match="'/args/b' is not what its digest says"):
        collected.values()


def test_digest_counts_also_where_nothing_is_signed() -> None:
    collected = assembly(Detached.of("/args/a", b"abc"), is_signed=False, sha256=DIGEST)
    collected.add(b"abd")
    with pytest.raises(MalformedMessageError, match="is not what its digest says"):
        collected.values()


@pytest.mark.parametrize("data", [b"{", b'{"b":1,"a":2}', b'{"a":1,"a":1}', b"[1, 2]"])
def test_json_that_is_not_canonical_is_refused(data: bytes) -> None:
    collected = assembly(Detached("/args/a", data, False))
    collected.add(data)
    with pytest.raises(MalformedMessageError, match="what came for '/args/a': not ") as caught:
        collected.values()
    assert caught.value.message_id == collected.message.id


def test_value_without_json_form_cannot_be_detached() -> None:
    for value in (float("nan"), "\ud800", 2**53, object()):
        with pytest.raises(MalformedMessageError):
            Detached.of(RESULT, value)  # type: ignore[arg-type]


# --- canonical JSON ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "1.0",
        "-0",
        "-0.0",
        "1e2",
        "1E400",
        "1e21",  # 1e+21
        "0.0000001",  # 1e-7
        "NaN",
        "[Infinity]",
        " 1",
        "1 ",
        "[1, 2]",
        '{"a": 1}',
        '{"b":1,"a":2}',
        '{"a":1,"a":1}',
        '{"a":1,"a":1,"b":1234567890123456}',
        '{"\ue000":1,"\U00010000":2}',  # in the order of UTF-8, not of UTF-16
        r'"\u00e9"',
        r'"\/"',
        r'"\ud800"',
        r'"\ud800 1234567890123456"',
        "9007199254740993",
        "18446744073709551616",
        "1" * 5000,
        "[" * (MESSAGE_MAX_DEPTH + 1) + "]" * (MESSAGE_MAX_DEPTH + 1),
        "[" * 900 + "1234567890123456" + "]" * 900,
        "[" * 5000 + "]" * 5000,
        "[" * 5000 + "1234567890123456" + "]" * 5000,
        "",
        "{",
        "1 2",
        "\ufeff1",
    ],
)
def test_json_in_another_form_than_the_canonical_is_refused(text: str) -> None:
    with pytest.raises(MalformedMessageError) as caught:
        loads_canonical(text.encode())
    assert caught.value.cause.name in ("not_json", "not_canonical", "too_deep", "lone_surrogate")


@pytest.mark.parametrize(
    "data", [b"\xff", b'"\xed\xa0\x80"', b"1\x00", '"1234567890123456"'.encode("utf-16")]
)
def test_what_is_not_utf_8_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedMessageError):
        loads_canonical(data)


def test_integer_beyond_2_to_the_53_is_a_double() -> None:
    for value in (2.0**53, 1e17, -1e17, 2.0**64, 1e20):
        read = loads_canonical(canonicalize(value))
        assert (read, type(read)) == (value, float)
    assert type(loads_canonical(b"9007199254740991")) is int


def test_json_is_canonical_as_deep_as_a_message_may_be() -> None:
    text = b"[" * MESSAGE_MAX_DEPTH + b"]" * MESSAGE_MAX_DEPTH
    assert canonicalize(loads_canonical(text)) == text


@CALM
@given(JSON)
def test_canonical_json_is_read_as_what_was_written(value: Any) -> None:
    assert loads_canonical(bytearray(rfc8785.dumps(value))) == value


@CALM
@given(JSON, st.sampled_from([None, (",", ":")]), st.booleans())
def test_json_is_read_exactly_if_it_is_canonical(value: Any, separators: Any, is_ascii: bool) -> None:
    text = json.dumps(value, separators=separators, ensure_ascii=is_ascii).encode()
    if text == rfc8785.dumps(value):
        assert loads_canonical(text) == value
    else:
        with pytest.raises(MalformedMessageError):
            loads_canonical(text)


# --- streams -------------------------------------------------------------------------------------


def test_digest_tells_bytes_from_json_and_one_part_from_two() -> None:
    digests = set()
    for parts in ([], [""], [b""], [b'""'], ["ab"], ["a", "b"], [b"ab"], [b"a", b"b"], [["a", "b"]]):
        digest = StreamDigest()
        for part in parts:
            digest.add(part)
        assert digest.summary().parts == len(parts)
        digests.add(digest.summary().sha256)
    assert len(digests) == 9


def test_part_as_it_travels_counts_like_its_value() -> None:
    one, other = StreamDigest(), StreamDigest()
    for part in ({"b": 1, "a": 2.0}, b"abc"):
        one.add(part)
        detached = Detached.of(RESULT, part)  # type: ignore[arg-type]
        other.add_data(detached.data, is_bytes=detached.is_bytes)
    assert one.summary() == other.summary()


def test_summary_is_read_from_the_response() -> None:
    summary = StreamDigest().summary()
    assert stream_summary_of(message(SUCCESS, stream=summary.model_dump())) == summary
    assert stream_summary_of(message(SUCCESS)) is None
    more = {**summary.model_dump(), "colour": "red"}
    assert stream_summary_of(message(SUCCESS, stream=more)) == StreamSummary(parts=0, sha256=summary.sha256)


@pytest.mark.parametrize(
    "said",
    [
        [],
        "3",
        {},
        {"parts": 1},
        {"sha256": DIGEST},
        {"parts": -1, "sha256": DIGEST},
        {"parts": 1.0, "sha256": DIGEST},
        {"parts": True, "sha256": DIGEST},
        {"parts": 1, "sha256": DIGEST.upper()},
        {"parts": 1, "sha256": ""},
    ],
)
def test_summary_of_another_form_is_refused(said: Any) -> None:
    made = message(SUCCESS, stream=said)
    with pytest.raises(MalformedMessageError, match=r"ext\.stream: ") as caught:
        stream_summary_of(made)
    assert (caught.value.cause.name, caught.value.message_id) == ("invalid_ext", made.id)


def test_parts_are_joined_only_if_all_are_bytes() -> None:
    assert join_parts([b"a", b"", b"b"]) == b"ab"
    assert join_parts([b""]) == b""
    assert join_parts([]) == []
    assert join_parts([b"a", 1]) == [b"a", 1]
