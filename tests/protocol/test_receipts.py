"""Receipts: what a stranger can tell from a signed request and a signed response, long after."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiconexus.protocol import DIDKey, InvalidSignatureError, MalformedMessageError, Message, MessageError
from aiconexus.protocol.attachments import ARGS, RESULT, Detached, StreamDigest, Value
from aiconexus.protocol.models import (
    ErrorPayload,
    ExecRequestPayload,
    ExecResponsePayload,
    ExecStatus,
    IntentPayload,
    Payload,
)
from aiconexus.protocol.receipts import Receipt
from aiconexus.protocol.security import sign_message
from aiconexus.protocol.serialization import encode

ALICE, BOB, EVE = (DIDKey.from_seed(bytes([seed]) * 32) for seed in (1, 2, 3))

# A busy machine is no failure.
CALM = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def text_of(made: Message, key: DIDKey) -> str:
    return encode(sign_message(made, key)).decode()


def described(values: dict[str, Value]) -> list[dict[str, Any]]:
    return [Detached.of(at, value).described(is_signed=True) for at, value in values.items()]


def request(
    args: dict[str, Any] | None = None, *, attached: dict[str, Value] | None = None, **ext: Any
) -> Message:
    ext = {"capability": "add", **ext}
    if attached:
        ext["attachments"] = described(attached)
    return Message.create(ALICE.did, BOB.did, ExecRequestPayload(args=args or {}), ext=ext)


def response(
    asked: Message, payload: Payload | None = None, *, attached: dict[str, Value] | None = None, **ext: Any
) -> Message:
    if attached:
        ext["attachments"] = described(attached)
    payload = payload or ExecResponsePayload(status=ExecStatus.SUCCESS)
    return Message.create(BOB.did, ALICE.did, payload, correlation_id=asked.id, ext=ext)


def success(result: Any) -> ExecResponsePayload:
    return ExecResponsePayload(status=ExecStatus.SUCCESS, result=result)


def receipt_of(asked: Message, answered: Message) -> Receipt:
    return Receipt(text_of(asked, ALICE), text_of(answered, BOB))


@pytest.fixture
def receipt() -> Receipt:
    asked = request({"a": 1, "b": [2.5, "€"]})
    return receipt_of(asked, response(asked, success(3)))


def test_receipt_proves_who_asked_what_and_how_it_ended() -> None:
    asked = request({"a": 1})
    answered = response(asked, success({"sum": 2}))
    proven = receipt_of(asked, answered).verify()
    assert (proven.caller, proven.callee, proven.capability) == (ALICE.did, BOB.did, "add")
    assert (proven.args, proven.result, proven.error) == ({"a": 1}, {"sum": 2}, None)
    assert (proven.status, proven.stream, proven.attached) == (ExecStatus.SUCCESS, None, {})
    millisecond = timedelta(milliseconds=1)
    assert timedelta() <= asked.timestamp - proven.asked_at < millisecond
    assert timedelta() <= answered.timestamp - proven.answered_at < millisecond


@pytest.mark.parametrize("status", [ExecStatus.ERROR, ExecStatus.CANCELLED])
def test_failure_has_a_receipt_and_no_result(status: ExecStatus) -> None:
    asked = request()
    failed = ExecResponsePayload(status=status, error="no", execution_time_ms=1)
    proven = receipt_of(asked, response(asked, failed)).verify()
    assert (proven.status, proven.error) == (status, "no")
    assert not proven.covers_result(None)


def test_receipt_is_stored_and_read_again(receipt: Receipt) -> None:
    assert Receipt.from_json(receipt.to_json()) == receipt
    assert Receipt.from_json(receipt.to_json().decode()) == receipt


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "not_json"),
        (b"\xff", "not_json"),
        ("{", "not_json"),
        ("[]", "not_object"),
        ('"text"', "not_object"),
        ("7", "not_object"),
        ("null", "not_object"),
        ("{}", "wrong_type"),
        ('{"request": "{}"}', "wrong_type"),
        ('{"request": {}, "response": "{}"}', "wrong_type"),
        ('{"request": "{}", "response": null}', "wrong_type"),
    ],
)
def test_garbage_is_no_receipt(data: bytes | str, cause: str) -> None:
    with pytest.raises(MalformedMessageError, match=r"^not a receipt: [^'\n]+$") as caught:
        Receipt.from_json(data)
    assert caught.value.cause.name == cause


@CALM
@given(st.text(max_size=30), st.text(max_size=30))
def test_two_texts_that_are_no_messages_prove_nothing(one: str, other: str) -> None:
    with pytest.raises(MessageError):
        Receipt(one, other).verify()


@CALM
@given(st.data())
def test_every_byte_of_both_texts_is_signed(data: st.DataObject) -> None:
    asked = request({"a": 1})
    texts = [text_of(asked, ALICE), text_of(response(asked, success("ok")), BOB)]
    which = data.draw(st.integers(0, 1))
    place = data.draw(st.integers(0, len(texts[which]) - 1))
    letter = data.draw(st.characters(codec="ascii"))
    before = json.loads(texts[which])
    texts[which] = texts[which][:place] + letter + texts[which][place + 1 :]
    try:
        is_altered = json.loads(texts[which]) != before
    except ValueError:
        is_altered = True
    if is_altered:
        with pytest.raises(MessageError):
            Receipt(*texts).verify()


def test_altered_result_is_refused(receipt: Receipt) -> None:
    with pytest.raises(InvalidSignatureError):
        Receipt(receipt.request, receipt.response.replace('"result":3', '"result":4')).verify()


def test_receipt_without_signatures_is_refused(receipt: Receipt) -> None:
    for name in ("request", "response"):
        envelope = json.loads(getattr(receipt, name))
        del envelope["signature"]
        with pytest.raises(InvalidSignatureError):
            Receipt(**{**vars(receipt), name: json.dumps(envelope)}).verify()


def test_swapped_messages_are_refused(receipt: Receipt) -> None:
    with pytest.raises(MalformedMessageError, match="an EXEC_REQUEST and an EXEC_RESPONSE"):
        Receipt(receipt.response, receipt.request).verify()


@pytest.mark.parametrize(
    "payload", [IntentPayload(status="understood"), ErrorPayload.for_cause("internal", "no")]
)
def test_another_answer_is_refused(payload: Payload) -> None:
    asked = request()
    with pytest.raises(MalformedMessageError, match="an EXEC_REQUEST and an EXEC_RESPONSE"):
        receipt_of(asked, response(asked, payload)).verify()


@pytest.mark.parametrize("status", [ExecStatus.PARTIAL, ExecStatus.PROGRESS])
def test_response_that_ends_nothing_is_refused(status: ExecStatus) -> None:
    asked = request()
    with pytest.raises(MalformedMessageError, match="does not end a call"):
        receipt_of(asked, response(asked, ExecResponsePayload(status=status, result=1))).verify()


def test_response_to_another_request_is_refused() -> None:
    with pytest.raises(MalformedMessageError, match="answers another request"):
        receipt_of(request(), response(request())).verify()
    nothing = Message.create(BOB.did, ALICE.did, success(1))
    with pytest.raises(MalformedMessageError, match="answers another request"):
        receipt_of(request(), nothing).verify()


def test_response_may_write_the_id_in_capitals() -> None:
    asked = request()
    shouted = Message.create(BOB.did, ALICE.did, success(1), correlation_id=asked.id.upper())
    assert receipt_of(asked, shouted).verify().result == 1


def test_response_of_another_agent_is_refused() -> None:
    asked = request()
    for sender, receiver in ((EVE, ALICE), (BOB, EVE)):
        answered = Message.create(sender.did, receiver.did, success(1), correlation_id=asked.id)
        with pytest.raises(InvalidSignatureError) as caught:
            Receipt(text_of(asked, ALICE), text_of(answered, sender)).verify()
        assert caught.value.cause.name == "wrong_sender"


def test_request_without_a_capability_is_refused() -> None:
    for capability in (None, 5):
        asked = request(capability=capability)
        with pytest.raises(MalformedMessageError, match="names no capability"):
            receipt_of(asked, response(asked)).verify()


def test_what_is_announced_wrongly_is_refused() -> None:
    asked = request(attachments=[{"at": "/args/a", "as": "bytes", "size": 1}])
    with pytest.raises(MalformedMessageError, match="digest of '/args/a' is missing"):
        receipt_of(asked, response(asked)).verify()
    asked = request()
    with pytest.raises(MalformedMessageError, match=r"ext\.stream"):
        receipt_of(asked, response(asked, stream={"parts": 1})).verify()


# --- what it covers ------------------------------------------------------------------------------


def test_inline_result_is_covered_as_json(receipt: Receipt) -> None:
    proven = receipt.verify()
    assert proven.covers_result(3)
    assert proven.covers_result(3.0)  # one number in JSON
    for other in (4, "3", [3], None, b"3", object()):
        assert not proven.covers_result(other)  # type: ignore[arg-type]


def test_inline_arguments_are_covered_as_json(receipt: Receipt) -> None:
    proven = receipt.verify()
    assert proven.covers_args({"b": [2.5, "€"], "a": 1})
    for other in ({}, {"a": 1}, {"a": 1, "b": [2.5, "€"], "c": 0}, {"a": b"1", "b": [2.5, "€"]}):
        assert not proven.covers_args(other)


@pytest.mark.parametrize("result", [b"", b"abc", "abc" * 10, {"a": [1.5]}, None])
def test_attached_result_is_covered_by_its_digest(result: Value) -> None:
    asked = request()
    proven = receipt_of(asked, response(asked, attached={RESULT: result})).verify()
    assert proven.covers_result(result)
    for other in (b"abd", "abc", {"a": [1.6]}, 0, [b"bytes inside"]):
        assert not proven.covers_result(other)  # type: ignore[arg-type]


def test_bytes_are_not_the_json_that_they_spell() -> None:
    asked = request(attached={"/args/a": b"[1]"})
    proven = receipt_of(asked, response(asked, attached={RESULT: [1]})).verify()
    assert proven.covers_args({"a": b"[1]"})
    assert not proven.covers_args({"a": [1]})
    assert proven.covers_result([1])
    assert not proven.covers_result(b"[1]")


def test_attached_arguments_are_covered_with_those_beside_them() -> None:
    asked = request({"c": 1}, attached={"/args/a~1b": b"x", "/args/": b"y"})
    proven = receipt_of(asked, response(asked)).verify()
    whole: dict[str, Value] = {"a/b": b"x", "": b"y", "c": 1}
    assert proven.covers_args(whole)
    for name in whole:
        assert not proven.covers_args({**whole, name: b"z"})
        assert not proven.covers_args({other: whole[other] for other in whole if other != name})
    assert not proven.covers_args({**whole, "d": 1})


def test_all_arguments_may_be_attached_as_one() -> None:
    asked = request(attached={ARGS: {"c": 1}, "/args/a": b"x"})
    proven = receipt_of(asked, response(asked)).verify()
    assert proven.covers_args({"a": b"x", "c": 1})
    for other in ({"c": 1}, {"a": b"x"}, {"a": b"x", "c": 2}, {"a": b"x", "c": 1, "d": 1}):
        assert not proven.covers_args(other)


def test_stream_is_covered_in_whole_and_in_order() -> None:
    parts: list[Value] = [1, b"x", {"a": 2}]
    digest = StreamDigest()
    for part in parts:
        digest.add(part)
    asked = request()
    proven = receipt_of(asked, response(asked, stream=digest.summary().model_dump())).verify()
    assert proven.covers_parts(iter(parts))
    for other in ([], parts[:-1], parts[::-1], [*parts, 1], [1, "x", {"a": 2}], [object()]):
        assert not proven.covers_parts(other)  # type: ignore[arg-type]
    assert not proven.covers_result(None)


def test_result_that_did_not_stream_has_no_parts(receipt: Receipt) -> None:
    assert not receipt.verify().covers_parts([])
    assert not receipt.verify().covers_parts([3])
