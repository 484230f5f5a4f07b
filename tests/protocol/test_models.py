"""The envelope and its payloads: what is read, what is refused and with which cause."""

import json
from datetime import datetime, timedelta, timezone
from uuid import RFC_4122, UUID

import pytest
from pydantic import ValidationError

from aiconexus.protocol import (
    AnswerPayload,
    Capability,
    DIDKey,
    ErrorPayload,
    ExecRequestPayload,
    ExecResponsePayload,
    ExecStatus,
    IceCandidatePayload,
    IntentPayload,
    MalformedMessageError,
    Message,
    MessageType,
    OfferPayload,
    PingPayload,
    UnsupportedVersionError,
    decode,
    encode,
    sign_message,
)
from aiconexus.protocol.models import PAYLOADS

A, B = DIDKey.from_seed(b"\x02" * 32), DIDKey.from_seed(b"\x03" * 32)
ID = "00000000-0000-4000-8000-000000000001"
ABSENT = object()


def envelope(**changes: object) -> dict[str, object]:
    fields: dict[str, object] = {
        "id": ID,
        "timestamp": "2026-01-12T10:00:00Z",
        "from": A.did,
        "to": B.did,
        "type": "OFFER",
        "payload": {"sdp": "v=0"},
        "version": "1.0",
    }
    fields.update({"from" if key == "from_" else key: value for key, value in changes.items()})
    return {key: value for key, value in fields.items() if value is not ABSENT}


def read(**changes: object) -> Message:
    return decode(json.dumps(envelope(**changes)))


def refusal(fields: dict[str, object]) -> MalformedMessageError:
    with pytest.raises(MalformedMessageError) as caught:
        decode(json.dumps(fields))
    return caught.value


# --- envelope ----------------------------------------------------------------------------------


def test_smallest_envelope_is_read():
    message = read()
    assert (message.id, message.from_, message.to) == (ID, A.did, B.did)
    assert (message.correlation_id, message.signature, message.ext) == (None, None, {})


def test_correlation_id_and_signature_may_be_null():
    assert read(correlation_id=None, signature=None).correlation_id is None


@pytest.mark.parametrize("field", ["id", "timestamp", "from_", "to", "type", "payload", "version"])
def test_every_other_field_is_required(field):
    name = field.rstrip("_")
    error = refusal(envelope(**{field: ABSENT}))
    assert (error.cause.name, error.field) == ("missing_field", name)
    assert error.message_id == (None if name == "id" else ID)


@pytest.mark.parametrize(
    "field", ["id", "correlation_id", "timestamp", "from_", "to", "type", "version", "signature", "ext"]
)
@pytest.mark.parametrize("value", [1, True, 1.0, [], ["x"]])
def test_no_field_is_coerced_from_another_json_type(field, value):
    error = refusal(envelope(**{field: value}))
    assert (error.cause.name, error.field) == ("wrong_type", field.rstrip("_"))


@pytest.mark.parametrize("field", ["id", "timestamp", "from_", "to", "type", "version", "ext"])
def test_null_is_no_value(field):
    assert refusal(envelope(**{field: None})).cause.name == "wrong_type"


@pytest.mark.parametrize("payload", [None, [], "v=0", 1, True])
def test_a_payload_that_is_no_object_is_refused(payload):
    error = refusal(envelope(payload=payload))
    assert (error.cause.name, error.field) == ("invalid_payload", "payload")


@pytest.mark.parametrize("key", ["extra", "From", "from_", "_wire", "wire", ""])
def test_unknown_envelope_field_is_refused(key):
    error = refusal({**envelope(), key: 1})
    assert (error.cause.name, error.field, error.message_id) == ("unknown_field", key, ID)


def test_python_name_does_not_stand_in_for_from():
    fields = envelope(from_=ABSENT)
    assert refusal({**fields, "from_": A.did}).cause.name == "unknown_field"


@pytest.mark.parametrize("key", ["k" * 60_000, "a\nb" * 10_000])
def test_refusal_of_a_huge_field_stays_small_and_on_one_line(key):
    error = refusal({**envelope(), key: 1})
    assert len(error.field) <= 64
    assert "\n" not in str(error)
    reply = Message.create(B.did, A.did, ErrorPayload.for_error(error), correlation_id=error.message_id)
    assert len(encode(reply)) < 1000


@pytest.mark.parametrize("version", ["1.1", "2.0", "1", "", "1.0 "])
def test_other_version_is_told_from_a_malformed_message(version):
    with pytest.raises(UnsupportedVersionError) as caught:
        read(version=version)
    assert caught.value.cause.name == "unsupported_version"
    assert caught.value.message_id == ID


@pytest.mark.parametrize("field", ["id", "correlation_id"])
@pytest.mark.parametrize(
    "value",
    [
        "",
        "x" * 36,
        ID[:-1],
        ID + "0",
        ID.replace("-", ""),
        "{" + ID[1:-1] + "}",
        ID + "\n",
        "\uff10" + ID[1:],
    ],
)
def test_an_id_is_a_uuid_of_36_characters(field, value):
    error = refusal(envelope(**{field: value}))
    assert (error.cause.name, error.field) == ("bad_id", field)
    assert error.message_id == (None if field == "id" else ID)


def test_ids_of_new_messages_are_random_uuids():
    ids = [Message.create(A.did, B.did, PingPayload()).id for _ in range(1000)]
    for each in ids:
        read = UUID(each)
        assert (str(read), read.version, read.variant) == (each, 4, RFC_4122)
    assert len(set(ids)) == 1000
    for position, fixed in enumerate(zip(*ids, strict=True)):  # that a digit is missed by all: once in 10^27
        expected = {8: "-", 13: "-", 14: "4", 18: "-", 19: "89ab", 23: "-"}.get(position, "0123456789abcdef")
        assert set(fixed) == set(expected), position


def test_a_uuid_may_be_upper_case():
    value = "ABCDEFAB-0000-4000-8000-00000000ABCD"
    assert read(id=value).id == value


@pytest.mark.parametrize("field", ["from_", "to"])
@pytest.mark.parametrize("value", ["", "did:key:z6Mk", A.did + "#key", A.did[:-1], A.did[:-1] + "0", "*"])
def test_from_and_to_are_canonical_dids(field, value):
    error = refusal(envelope(**{field: value}))
    assert (error.cause.name, error.field) == ("bad_did", field.rstrip("_"))


@pytest.mark.parametrize("value", ["", "offer", "OFFER ", "HELLO", "MessageType.OFFER"])
def test_unknown_type_is_refused(value):
    error = refusal(envelope(type=value))
    assert (error.cause.name, error.field) == ("unknown_type", "type")


def test_ext_is_open():
    ext = {"anything": [1, {"deep": None}], "1.5": 1.5}
    assert read(ext=ext).ext == ext


def test_messages_are_immutable():
    with pytest.raises(ValidationError):
        read().to = A.did
    with pytest.raises(ValidationError):
        read().payload.sdp = "x"


# --- timestamps --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "microsecond"),
    [
        ("2026-01-12T10:00:00Z", 0),
        ("2026-01-12T10:00:00.1Z", 100_000),
        ("2026-01-12T10:00:00.123Z", 123_000),
        ("2026-01-12T10:00:00.123456Z", 123_456),
        ("2026-01-12T10:00:00.123456789Z", 123_456),
    ],
)
def test_fraction_of_a_second_has_up_to_nine_digits(text, microsecond):
    expected = datetime(2026, 1, 12, 10, 0, 0, microsecond, tzinfo=timezone.utc)
    assert read(timestamp=text).timestamp == expected


@pytest.mark.parametrize(
    "text",
    [
        "2026-01-12T10:00:00",
        "2026-01-12T10:00:00+00:00",
        "2026-01-12T10:00:00-00:00",
        "2026-01-12T12:00:00+02:00",
        "2026-01-12t10:00:00z",
        "2026-01-12 10:00:00Z",
        "2026-01-12T10:00Z",
        "2026-01-12T10:00:00.Z",
        "2026-01-12T10:00:00.1234567890Z",
        "2026-01-12T10:00:00,5Z",
        "2026-01-12T10:00:60Z",
        "2026-01-12T24:00:00Z",
        "2026-02-30T10:00:00Z",
        "0000-01-12T10:00:00Z",
        "2026-01-12T10:00:00Z\n",
        " 2026-01-12T10:00:00Z",
        "٢026-01-12T10:00:00Z",
        "1768212000",
        "",
    ],
)
def test_timestamp_is_rfc3339_in_utc_with_z(text):
    error = refusal(envelope(timestamp=text))
    assert (error.cause.name, error.field) == ("wrong_type", "timestamp")


@pytest.mark.parametrize(
    ("moment", "text"),
    [
        (datetime(2026, 1, 12, 10, tzinfo=timezone.utc), "2026-01-12T10:00:00.000Z"),
        (datetime(2026, 1, 12, 12, 0, 0, 1999, timezone(timedelta(hours=2))), "2026-01-12T10:00:00.001Z"),
        (datetime(33, 1, 12, tzinfo=timezone.utc), "0033-01-12T00:00:00.000Z"),
    ],
)
def test_timestamp_is_written_in_utc_with_milliseconds(moment, text):
    message = Message(from_=A.did, to=B.did, type="PING", payload=PingPayload(), timestamp=moment)
    assert message.envelope()["timestamp"] == text
    assert decode(encode(message)).envelope()["timestamp"] == text


def test_timestamp_without_a_zone_is_refused():
    with pytest.raises(ValidationError, match="time zone"):
        Message(from_=A.did, to=B.did, type="PING", payload=PingPayload(), timestamp=datetime(2026, 1, 1))


# --- payloads ----------------------------------------------------------------------------------

PAYLOAD_EXAMPLES = {
    "REGISTER": {"public_key": A.public_key_base58},
    "UNREGISTER": {"reason": "done"},
    "OFFER": {"sdp": "v=0"},
    "ANSWER": {"sdp": "v=0"},
    "ICE_CANDIDATE": {"candidate": "", "sdp_mid": "0", "sdp_mline_index": 0},
    "INTENT": {"query": "q", "context": [1, 1.5, None], "required_input": ["a"], "cost": "0"},
    "EXEC_REQUEST": {"args": {"a": [None, True, {"b": 1.5}]}, "timeout_ms": 1, "stream": False},
    "EXEC_RESPONSE": {"status": "success", "result": {"a": 1}, "execution_time_ms": 1.5, "stream_url": None},
    "ERROR": {"code": "TIMEOUT", "message": "m", "details": {"num": 501, "temporary": True}},
    "PING": {"sequence": 1},
    "PONG": {"sequence": 1},
    "DISCOVER": {"capability": "c", "limit": 1, "watch": True, "dids": [B.did]},
    "PRESENCE": {"agents": [{"did": B.did}], "event": "join", "cursor": "c"},
}


def test_there_are_thirteen_types_and_each_has_its_payload():
    assert list(PAYLOADS) == list(MessageType)
    assert set(PAYLOAD_EXAMPLES) == {kind.value for kind in MessageType}


@pytest.mark.parametrize("kind", PAYLOAD_EXAMPLES)
def test_payload_is_chosen_by_type_and_comes_back_unchanged(kind):
    message = read(type=kind, payload=PAYLOAD_EXAMPLES[kind])
    assert type(message.payload) is PAYLOADS[MessageType(kind)]
    assert message.payload.type.value == kind
    assert message.envelope()["payload"] == PAYLOAD_EXAMPLES[kind]


def test_payload_is_not_guessed_from_its_shape():
    assert isinstance(read(type="OFFER").payload, OfferPayload)
    assert isinstance(read(type="ANSWER").payload, AnswerPayload)
    assert refusal(envelope(type="PING", payload={"sdp": "v=0"})).field == "payload.sdp"


@pytest.mark.parametrize("kind", PAYLOAD_EXAMPLES)
@pytest.mark.parametrize("key", ["unknown", "type", "model_config"])
def test_unknown_payload_field_is_refused(kind, key):
    error = refusal(envelope(type=kind, payload={**PAYLOAD_EXAMPLES[kind], key: None}))
    assert (error.cause.name, error.field) == ("invalid_payload", f"payload.{key}")
    assert error.message_id == ID


def test_unknown_detail_of_an_error_is_ignored():
    message = read(type="ERROR", payload={"code": "TIMEOUT", "message": "m", "details": {"new": 1, "num": 2}})
    assert message.payload.details.num == 2


@pytest.mark.parametrize(
    ("kind", "payload", "field"),
    [
        ("REGISTER", {}, "public_key"),
        ("OFFER", {}, "sdp"),
        ("OFFER", {"sdp": None}, "sdp"),
        ("OFFER", {"sdp": 1}, "sdp"),
        ("ICE_CANDIDATE", {}, "candidate"),
        ("ICE_CANDIDATE", {"candidate": "", "sdp_mline_index": -1}, "sdp_mline_index"),
        ("ICE_CANDIDATE", {"candidate": "", "sdp_mline_index": True}, "sdp_mline_index"),
        ("ICE_CANDIDATE", {"candidate": "", "sdp_mline_index": "0"}, "sdp_mline_index"),
        ("INTENT", {"query": 1}, "query"),
        ("INTENT", {"query": "q", "params": []}, "params"),
        ("INTENT", {"query": "q", "required_input": ["a", 1]}, "required_input"),
        ("EXEC_REQUEST", {}, "args"),
        ("EXEC_REQUEST", {"args": []}, "args"),
        ("EXEC_REQUEST", {"args": {}, "timeout_ms": 0}, "timeout_ms"),
        ("EXEC_REQUEST", {"args": {}, "timeout_ms": 1.0}, "timeout_ms"),
        ("EXEC_REQUEST", {"args": {}, "stream": 1}, "stream"),
        ("EXEC_REQUEST", {"args": {}, "stream": "true"}, "stream"),
        ("EXEC_RESPONSE", {}, "status"),
        ("EXEC_RESPONSE", {"status": "done"}, "status"),
        ("EXEC_RESPONSE", {"status": True}, "status"),
        ("EXEC_RESPONSE", {"status": "success", "execution_time_ms": True}, "execution_time_ms"),
        ("EXEC_RESPONSE", {"status": "success", "execution_time_ms": -1}, "execution_time_ms"),
        ("ERROR", {"code": "TIMEOUT"}, "message"),
        ("ERROR", {"code": "OTHER", "message": "m"}, "code"),
        ("ERROR", {"code": "TIMEOUT", "message": "m", "details": {"num": True}}, "details.num"),
        ("ERROR", {"code": "TIMEOUT", "message": "m", "details": {"temporary": 1}}, "details.temporary"),
        ("PING", {"sequence": True}, "sequence"),
        ("PING", {"sequence": 1.0}, "sequence"),
        ("PONG", {"sequence": "1"}, "sequence"),
        ("DISCOVER", {"limit": 0}, "limit"),
        ("DISCOVER", {"limit": 201}, "limit"),
        ("PRESENCE", {"event": "gone"}, "event"),
        ("PRESENCE", {"agents": [1]}, "agents.0"),
    ],
)
def test_payload_field_of_the_wrong_kind_is_refused_by_name(kind, payload, field):
    error = refusal(envelope(type=kind, payload=payload))
    assert (error.cause.name, error.field) == ("invalid_payload", f"payload.{field}")


def test_intent_must_say_something():
    error = refusal(envelope(type="INTENT", payload={"context": "only"}))
    assert str(error) == "payload: an INTENT needs query, task or status"


def test_payload_of_another_type_cannot_be_put_into_a_message():
    with pytest.raises(ValidationError, match="not a PingPayload"):
        Message(from_=A.did, to=B.did, type="OFFER", payload=PingPayload())


def test_fields_that_were_not_set_are_left_out():
    message = Message.create(A.did, B.did, ExecResponsePayload(status=ExecStatus.SUCCESS, result=None))
    assert message.envelope()["payload"] == {"status": "success", "result": None}


def test_only_success_error_and_cancelled_end_a_call():
    assert {status.value for status in ExecStatus if status.is_final} == {"success", "error", "cancelled"}


def test_empty_candidate_is_end_of_candidates():
    assert IceCandidatePayload(candidate="").candidate == ""


# --- building ----------------------------------------------------------------------------------


def test_new_messages_have_new_ids_and_the_time():
    first, second = (Message.create(A.did, B.did, PingPayload()) for _ in range(2))
    assert first.id != second.id
    assert abs(first.timestamp - datetime.now(timezone.utc)) < timedelta(seconds=60)
    assert first.type is MessageType.PING


def test_reply_goes_back_with_the_id_as_correlation_id():
    message = read()
    reply = message.reply(AnswerPayload(sdp="v=0"), ext={"a": 1})
    assert (reply.from_, reply.to, reply.correlation_id) == (B.did, A.did, ID)
    assert reply.ext == {"a": 1}


def test_a_changed_copy_of_a_signed_message_does_not_keep_its_bytes():
    signed = sign_message(read(), A)
    assert signed.model_copy().wire == signed.wire
    assert signed.model_copy(update={"to": A.did}).wire is None


def test_bytes_of_a_message_are_no_part_of_its_json():
    assert "wire" not in read().model_dump()
    with pytest.raises(ValidationError, match="wire"):
        Message.model_validate({**envelope(), "wire": "{}"})


def test_number_that_is_no_json_is_refused_when_it_is_signed():
    message = Message.create(A.did, B.did, ExecRequestPayload(args={"x": float("nan")}))
    with pytest.raises(MalformedMessageError, match="JSON has no nan"):
        sign_message(message, A)


def test_intent_can_be_built_in_words_or_structured():
    assert IntentPayload(query="q").query == "q"
    assert IntentPayload(task="t", params={"a": 1}).params == {"a": 1}


@pytest.mark.parametrize(
    "fields",
    [
        {"name": ""},
        {"name": "n" * 65},
        {"name": "n", "description": "d" * 1025},
        {"name": "n", "tags": ["t"] * 17},
        {"name": "n", "tags": [""]},
        {"name": "n", "tags": ["t" * 65]},
        {"name": "n", "version": "1" * 33},
        {"name": 1},
    ],
)
def test_capability_has_bounds(fields):
    with pytest.raises(ValidationError):
        Capability.model_validate(fields)


def test_capability_ignores_what_it_does_not_know():
    assert Capability.model_validate({"name": "n", "new": 1}) == Capability(name="n")
