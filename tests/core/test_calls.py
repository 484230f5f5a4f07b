"""The state machine alone: two of them, and the texts that go from one to the other."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import date
from enum import Enum
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from aiconexus.core.answers import KEEP_SECONDS, Answers
from aiconexus.core.calls import Calls
from aiconexus.core.events import (
    Answered,
    ArgumentsArrived,
    CancelArrived,
    DoneArrived,
    Event,
    ExecutionArrived,
    Failed,
    InputArrived,
    InputEnded,
    IntentArrived,
    Left,
    PartArrived,
    PongArrived,
    ProgressArrived,
    Refused,
    Reply,
)
from aiconexus.core.intents import Quote
from aiconexus.protocol import (
    DIDKey,
    ErrorCode,
    ExecRequestPayload,
    ExecResponsePayload,
    ExecStatus,
    IntentPayload,
    Message,
    MessageType,
    OfferPayload,
    decode,
)
from aiconexus.protocol.attachments import Detached, StreamDigest
from aiconexus.protocol.errors import (
    CallBusyError,
    CallCancelledError,
    CallError,
    CallTimeoutError,
    CapabilityError,
    InvalidArgumentsError,
    PeerIdentityError,
    RemoteError,
    UnknownCapabilityError,
)
from aiconexus.protocol.frames import Credit, Data, credit_frame, data_frame, end_frame, parse_frame
from aiconexus.protocol.limits import (
    ATTACHMENTS_MAX_BYTES,
    CALL_CREDIT_BYTES,
    CALL_TIMEOUT_SECONDS,
    CALL_WINDOW_BYTES,
    CHUNK_MAX_BYTES,
    DATA_MESSAGE_MAX_BYTES,
)
from aiconexus.protocol.security import sign_message, verify_envelope
from aiconexus.protocol.serialization import encode

ALICE, BOB, EVE = (DIDKey.from_seed(bytes([seed]) * 32) for seed in (1, 2, 3))


@pytest.fixture
def alice() -> Calls:
    return Calls(ALICE, BOB.did)


@pytest.fixture
def bob() -> Calls:
    return Calls(BOB, ALICE.did)


def sent(calls: Calls) -> str | bytes | None:
    """Return the next message that is to be sent; None if there is none."""
    return calls.outbox.take()


def sent_text(calls: Calls) -> str:
    text = sent(calls)
    assert isinstance(text, str)
    return text


def execute(calls: Calls, capability: str, args: dict[str, Any], timeout: float) -> tuple[str, str]:
    """Return the id of an EXEC_REQUEST, and its text."""
    return calls.execute(capability, args, timeout), sent_text(calls)


def intent(calls: Calls, payload: IntentPayload, timeout: float) -> tuple[str, str]:
    """Return the id of an INTENT, and its text."""
    return calls.ask(payload, timeout), sent_text(calls)


def succeed(calls: Calls, id_: str, result: Any) -> str:
    """Return the text of a result."""
    calls.succeed(id_, result, 0.0123)
    return sent_text(calls)


def fail(calls: Calls, id_: str, name: str, text: str) -> str:
    calls.fail(id_, name, text)
    return sent_text(calls)


def answer_intent(calls: Calls, id_: str, quote: Quote) -> str:
    calls.quote(id_, quote)
    return sent_text(calls)


def carry(sender: Calls, receiver: Calls) -> list[Event]:
    """Let everything arrive that is to be sent; return what has happened."""
    events = []
    while (message := sent(sender)) is not None:
        event = receiver.receive(message)
        events += [] if event is None else [event]
    return events


def ask(alice: Calls, bob: Calls, capability: str = "add", **args: Any) -> str:
    """Let Alice's EXEC_REQUEST arrive at Bob; return its id."""
    id_, text = execute(alice, capability, args, 30.0)
    event = bob.receive(text)
    assert isinstance(event, ExecutionArrived)
    assert event.id == id_
    return id_


def edited(text: str, **fields: Any) -> str:
    return json.dumps({**json.loads(text), **fields})


# --- executions --------------------------------------------------------------------------------


def test_execution_is_signed_both_ways_and_ends_in_its_result(alice: Calls, bob: Calls) -> None:
    id_, text = execute(alice, "add", {"a": 1}, 2.5)
    verify_envelope(json.loads(text))
    assert bob.receive(text) == ExecutionArrived(id_, "add", {"a": 1}, 2.5)
    assert alice.open == 1
    answer = succeed(bob, id_, {"sum": 2})
    verify_envelope(json.loads(answer))
    assert json.loads(answer)["payload"]["execution_time_ms"] == 12
    assert alice.receive(answer) == Answered(id_, {"sum": 2}, receipt=ANY)
    assert alice.open == 0


def test_python_values_travel_as_json(alice: Calls, bob: Calls) -> None:
    _, text = execute(alice, "plan", {"day": date(2026, 1, 12), "tags": ("a", "b")}, 1.0)
    event = bob.receive(text)
    assert isinstance(event, ExecutionArrived)
    assert event.args == {"day": "2026-01-12", "tags": ["a", "b"]}


def test_capability_may_be_named_by_the_member_of_an_enum(alice: Calls, bob: Calls) -> None:
    id_, text = execute(alice, Enum("Name", {"ADD": "add"}, type=str).ADD, {}, 1.0)
    assert bob.receive(text) == ExecutionArrived(id_, "add", {}, 1.0)


def test_capability_that_is_no_json_cannot_be_sent(alice: Calls) -> None:
    with pytest.raises(InvalidArgumentsError, match="object is not a JSON type"):
        alice.execute(object(), {}, 1.0)  # type: ignore[arg-type]
    assert (alice.open, sent(alice)) == (0, None)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("unknown_capability", UnknownCapabilityError),
        ("invalid_arguments", InvalidArgumentsError),
        ("capability_error", CapabilityError),
        ("timeout", CallTimeoutError),
        ("cancelled", CallCancelledError),
        ("busy", CallBusyError),
        ("of a later version", CallError),
    ],
)
def test_every_failure_has_its_class(alice: Calls, bob: Calls, name: str, kind: type[CallError]) -> None:
    id_ = ask(alice, bob)
    answer = fail(bob, id_, name, "the reason")
    failed = alice.receive(answer)
    assert isinstance(failed, Failed)
    assert type(failed.error) is kind
    assert str(failed.error) == "the reason"
    assert failed.error.capability == "add"


def test_request_has_exactly_one_answer(alice: Calls, bob: Calls) -> None:
    id_ = ask(alice, bob)
    assert sent(bob) is None
    bob.succeed(id_, 1, 0.0)
    assert sent(bob) is not None
    bob.succeed(id_, 2, 0.0)
    bob.fail(id_, "timeout", "too late")
    bob.finish(id_, 0.0)
    assert sent(bob) is None


def test_second_answer_is_ignored(alice: Calls, bob: Calls) -> None:
    id_ = ask(alice, bob)
    first = succeed(bob, id_, 1)
    second = edited(first, id="00000000-0000-4000-8000-000000000001")
    unsigned = Message.model_validate({**json.loads(second), "signature": None})
    alice.receive(first)
    assert alice.receive(encode(sign_message(unsigned, BOB)).decode()) is None


def test_progress_is_no_end(alice: Calls, bob: Calls) -> None:
    id_ = ask(alice, bob)
    final = succeed(bob, id_, 1)
    progress = json.loads(final)
    progress["id"] = "00000000-0000-4000-8000-000000000002"
    progress["payload"] = {"status": "progress", "result": 0.5}
    del progress["signature"]
    assert alice.receive(json.dumps(progress)) == ProgressArrived(id_, 0.5)
    assert alice.receive(final) == Answered(id_, 1, receipt=ANY)


@pytest.mark.parametrize("value", [2**60, float("nan"), "\ud800"])
def test_result_without_canonical_form_becomes_an_error(alice: Calls, bob: Calls, value: Any) -> None:
    id_ = ask(alice, bob)
    answer = succeed(bob, id_, value)
    failed = alice.receive(answer)
    assert isinstance(failed, Failed)
    assert "the result cannot be sent" in str(failed.error)


@pytest.mark.parametrize("value", [2**60, float("inf"), "\ud800", object(), [b"bytes deep inside \xff"]])
def test_arguments_that_cannot_be_sent_are_refused_at_the_caller(alice: Calls, value: Any) -> None:
    with pytest.raises(InvalidArgumentsError, match="the arguments cannot be sent"):
        alice.execute("add", {"a": value}, 1.0)
    assert alice.open == 0


async def _blocks() -> AsyncIterator[bytes]:
    yield b"block"


def test_what_is_meant_as_a_stream_and_is_none_is_named(alice: Calls) -> None:
    text = "the arguments cannot be sent: data: .*; give JSON, bytes, or an async iterator of bytes"
    with open(__file__, "rb") as file:
        for value in (file, Path(__file__), _blocks):
            with pytest.raises(InvalidArgumentsError, match=text):
                alice.execute("measure", {"unit": "kB", "data": value}, 1.0)
    assert alice.open == 0


def test_text_of_an_exception_may_hold_anything(alice: Calls, bob: Calls) -> None:
    id_ = ask(alice, bob)
    answer = fail(bob, id_, "capability_error", "no such file: \udcff" + "x" * 10_000)
    failed = alice.receive(answer)
    assert isinstance(failed, Failed)
    assert str(failed.error).startswith("no such file: \\udcff")
    assert len(str(failed.error)) < 5_000


def test_peer_that_asks_for_too_much_is_told_busy(alice: Calls, bob: Calls) -> None:
    id_, text = execute(alice, "add", {}, 1.0)
    reply = bob.receive(text, busy="much is to be done")
    assert isinstance(reply, Reply)
    failed = alice.receive(reply.text)
    assert isinstance(failed, Failed)
    assert failed.id == id_
    assert isinstance(failed.error, CallBusyError)
    assert str(failed.error) == "busy: much is to be done; try again"
    bob.fail(id_, "timeout", "a second answer")
    assert sent(bob) is None


# --- cancel ------------------------------------------------------------------------------------


def test_abandoned_execution_is_cancelled_there(alice: Calls, bob: Calls) -> None:
    id_ = ask(alice, bob)
    cancel = alice.abandon(id_)
    assert cancel is not None
    assert bob.receive(cancel) == CancelArrived(id_)
    answer = fail(bob, id_, "cancelled", "the caller cancelled")
    assert json.loads(answer)["payload"]["status"] == "cancelled"
    assert alice.receive(answer) is None


def test_cancel_that_crosses_the_answer_is_ignored(alice: Calls, bob: Calls) -> None:
    id_ = ask(alice, bob)
    answer, cancel = succeed(bob, id_, 1), alice.abandon(id_)
    assert cancel is not None
    assert bob.receive(cancel) is None
    assert alice.receive(answer) is None


def test_what_is_answered_is_not_cancelled(alice: Calls, bob: Calls) -> None:
    id_ = ask(alice, bob)
    answer = succeed(bob, id_, 1)
    alice.receive(answer)
    assert alice.abandon(id_) is None


# --- intents -----------------------------------------------------------------------------------


def test_intent_is_answered_by_a_quote(alice: Calls, bob: Calls) -> None:
    id_, text = intent(alice, IntentPayload(query="translate this", context={"to": "fr"}), 30.0)
    event = bob.receive(text)
    assert isinstance(event, IntentArrived)
    assert (event.intent.sender, event.intent.query) == (ALICE.did, "translate this")
    assert event.intent.context == {"to": "fr"}
    quote = Quote(status="understood", required_input=["text"], cost="0.50 EUR")
    answer = answer_intent(bob, id_, quote)
    verify_envelope(json.loads(answer))
    assert alice.receive(answer) == Answered(id_, quote)
    bob.quote(id_, quote)
    assert sent(bob) is None


def test_quote_that_cannot_travel_is_answered_by_an_error(alice: Calls, bob: Calls) -> None:
    id_, text = intent(alice, IntentPayload(task="translate"), 30.0)
    bob.receive(text)
    answer = answer_intent(bob, id_, Quote(status="understood").model_copy(update={"cost": 5}))
    failed = alice.receive(answer)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, RemoteError)


def test_intent_that_failed_is_answered_by_an_error(alice: Calls, bob: Calls) -> None:
    id_, text = intent(alice, IntentPayload(task="translate"), 30.0)
    bob.receive(text)
    answer = fail(bob, id_, "capability_error", "ValueError: no")
    failed = alice.receive(answer)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, RemoteError)
    assert (failed.error.code, str(failed.error)) == (ErrorCode.INTERNAL_ERROR, "ValueError: no")


def test_deadline_of_an_intent_travels(alice: Calls, bob: Calls) -> None:
    id_, text = intent(alice, IntentPayload(query="think about it"), 120.0)
    event = bob.receive(text)
    assert isinstance(event, IntentArrived)
    assert event.timeout == 120.0
    answer = fail(bob, id_, "timeout", "no result in 120 s")
    failed = alice.receive(answer)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, CallTimeoutError)


@pytest.mark.parametrize("timeout_ms", [0, -1, 1.5, "60000", True, None])
def test_deadline_of_an_intent_that_is_none_is_refused(alice: Calls, bob: Calls, timeout_ms: Any) -> None:
    intent = Message.create(ALICE.did, BOB.did, IntentPayload(query="think"), ext={"timeout_ms": timeout_ms})
    assert refusal(bob, encode(sign_message(intent, ALICE)).decode()) == ("invalid_ext", intent.id)


def test_intent_that_asks_nothing_is_refused(alice: Calls, bob: Calls) -> None:
    _, text = intent(alice, IntentPayload(status="understood"), 30.0)
    refused = bob.receive(text)
    assert isinstance(refused, Refused)
    assert refused.error.cause.name == "invalid_payload"


# --- what must be refused ------------------------------------------------------------------------


def refusal(calls: Calls, text: str | bytes) -> tuple[str, str | None]:
    """Return cause and `correlation_id` of the ERROR that answers `text`."""
    refused = calls.receive(text)
    assert isinstance(refused, Refused)
    assert refused.reply is not None
    error = decode(refused.reply)
    assert error.type is MessageType.ERROR
    assert (error.from_, error.to) == (BOB.did, ALICE.did)
    return refused.error.cause.name, error.correlation_id


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        ("", "not_json"),
        ("hello", "not_json"),
        ("[]", "not_object"),
        ("{}", "missing_field"),
        (b"{}", "bad_frame"),
        ("x" * (DATA_MESSAGE_MAX_BYTES + 1), "too_large"),
        ('{"type": ["ERROR"], "payload": {"status": []}}', "missing_field"),
        ('{"type": "EXEC_RESPONSE", "payload": {"status": ["success"]}}', "missing_field"),
        ("[" * 5000 + "]" * 5000, "too_deep"),
    ],
)
def test_garbage_is_answered_by_an_error(bob: Calls, data: str | bytes, cause: str) -> None:
    found, correlation_id = refusal(bob, data)
    assert found == cause
    assert correlation_id is None


def test_error_names_the_message_that_it_refuses(alice: Calls, bob: Calls) -> None:
    id_, text = execute(alice, "add", {}, 1.0)
    assert refusal(bob, edited(text, type="NOISE")) == ("unknown_type", id_)
    assert refusal(bob, edited(text, id="x" * 36)) == ("bad_id", None)


def test_unsigned_request_is_refused(alice: Calls, bob: Calls) -> None:
    id_, text = execute(alice, "add", {}, 1.0)
    assert refusal(bob, edited(text, signature=None)) == ("missing_signature", id_)


def test_altered_request_is_refused(alice: Calls, bob: Calls) -> None:
    id_, text = execute(alice, "pay", {"amount": 1}, 1.0)
    altered = edited(text, payload={"args": {"amount": 1_000}, "timeout_ms": 1_000})
    assert refusal(bob, altered) == ("bad_signature", id_)


def test_request_of_a_third_agent_is_refused(bob: Calls) -> None:
    eve = Calls(EVE, BOB.did)
    id_, text = execute(eve, "add", {}, 1.0)
    assert refusal(bob, text) == ("wrong_sender", id_)


def test_request_to_a_third_agent_is_refused(bob: Calls) -> None:
    alice_to_eve = Calls(ALICE, EVE.did)
    id_, text = execute(alice_to_eve, "add", {}, 1.0)
    assert refusal(bob, text) == ("wrong_recipient", id_)


def test_id_that_comes_twice_for_another_request_is_refused(alice: Calls, bob: Calls) -> None:
    id_, text = execute(alice, "add", {}, 1.0)
    assert isinstance(bob.receive(text), ExecutionArrived)
    # Upper case is the same UUID; the signature covers it, so Alice herself must have sent it.
    shouted = Message.model_validate({**json.loads(text), "id": id_.upper(), "signature": None})
    assert refusal(bob, encode(sign_message(shouted, ALICE)).decode()) == ("replayed", id_.upper())


def test_request_without_capability_is_refused(alice: Calls, bob: Calls) -> None:
    id_, text = execute(alice, "add", {}, 1.0)
    nameless = Message.model_validate({**json.loads(text), "ext": {}, "signature": None})
    assert refusal(bob, encode(sign_message(nameless, ALICE)).decode()) == ("invalid_ext", id_)


def test_signaling_has_no_place_on_the_channel(bob: Calls) -> None:
    offer = Message.create(ALICE.did, BOB.did, OfferPayload(sdp="v=0"))
    assert refusal(bob, encode(offer).decode()) == ("unexpected_type", offer.id)


@pytest.mark.parametrize("changes", [{"payload": {}}, {"from": EVE.did}, {"version": "2.0"}])
def test_error_is_never_answered_by_an_error(alice: Calls, bob: Calls, changes: dict[str, Any]) -> None:
    refused = bob.receive("garbage")
    assert isinstance(refused, Refused)
    assert refused.reply is not None
    again = alice.receive(edited(refused.reply, **changes))
    assert isinstance(again, Refused)
    assert again.reply is None


def test_answer_with_a_bad_signature_fails_the_call(alice: Calls, bob: Calls) -> None:
    id_ = ask(alice, bob)
    answer = succeed(bob, id_, "true")
    refused = alice.receive(edited(answer, payload={"status": "success", "result": "false"}))
    assert isinstance(refused, Refused)
    assert refused.failed is not None
    assert refused.failed.id == id_
    assert isinstance(refused.failed.error, PeerIdentityError)
    assert alice.receive(answer) is None  # it is over


@pytest.mark.parametrize("more", [{"result": 1, "colour": "red"}, {"status": "perhaps"}])
def test_signed_answer_that_is_malformed_fails_the_call(
    alice: Calls, bob: Calls, more: dict[str, Any]
) -> None:
    id_ = ask(alice, bob)
    answer = json.loads(succeed(bob, id_, 1))
    answer["payload"].update(more)
    refused = alice.receive(json.dumps(answer))
    assert isinstance(refused, Refused)
    assert refused.failed is not None
    assert refused.failed.id == id_
    assert alice.open == 0


def test_request_without_a_deadline_has_the_usual_one(alice: Calls, bob: Calls) -> None:
    payload = ExecRequestPayload(args={})
    request = Message.create(ALICE.did, BOB.did, payload, ext={"capability": "add"})
    event = bob.receive(encode(sign_message(request, ALICE)).decode())
    assert isinstance(event, ExecutionArrived)
    assert event.timeout == CALL_TIMEOUT_SECONDS


def test_error_of_the_peer_fails_the_call_that_it_names(alice: Calls, bob: Calls) -> None:
    id_, text = execute(alice, "add", {}, 1.0)
    refused = bob.receive(edited(text, signature=None))
    assert isinstance(refused, Refused)
    assert refused.reply is not None
    failed = alice.receive(refused.reply)
    assert isinstance(failed, Failed)
    assert failed.id == id_
    assert isinstance(failed.error, RemoteError)
    assert failed.error.name == "missing_signature"


# --- ping, done, goodbye -------------------------------------------------------------------------


def test_ping_is_answered_by_pong_with_its_sequence(alice: Calls, bob: Calls) -> None:
    id_, text = alice.ping()
    reply = bob.receive(edited(text, payload={"sequence": 7}))
    assert isinstance(reply, Reply)
    assert json.loads(reply.text)["payload"] == {"sequence": 7}
    assert alice.open == 0  # a PING is no reason to keep a connection
    assert alice.receive(reply.text) == PongArrived(id_)


@pytest.mark.parametrize("is_done", [True, False])
def test_done_is_asked_and_answered(alice: Calls, bob: Calls, is_done: bool) -> None:
    id_, text = alice.ping(is_done=True)
    event = bob.receive(text, is_done=is_done)
    assert isinstance(event, DoneArrived)
    assert event.is_done is is_done
    assert alice.receive(event.reply) == PongArrived(id_, is_done)


def test_peer_that_does_not_know_done_keeps_the_connection(alice: Calls, bob: Calls) -> None:
    id_, text = alice.ping(is_done=True)
    event = bob.receive(text, is_done=True)
    assert isinstance(event, DoneArrived)
    assert alice.receive(edited(event.reply, ext={})) == PongArrived(id_)


def test_goodbye_says_why(alice: Calls, bob: Calls) -> None:
    assert bob.receive(alice.leave("done for today")) == Left("done for today")


def test_goodbye_may_hold_any_text(alice: Calls, bob: Calls) -> None:
    assert bob.receive(alice.leave("half a pair \udcff" + "x" * 300_000)) is not None


def test_result_that_is_no_json_becomes_an_error(alice: Calls, bob: Calls) -> None:
    id_ = ask(alice, bob)
    text = succeed(bob, id_, object())
    event = alice.receive(text)
    assert isinstance(event, Failed)
    assert isinstance(event.error, CapabilityError)


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan"), 1e20])
def test_timeout_that_is_none_is_refused(alice: Calls, timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout is in seconds"):
        alice.execute("add", {}, timeout)


@pytest.mark.parametrize("status", ["", "cancel"])
def test_quote_has_a_status_that_commands_nothing(status: str) -> None:
    with pytest.raises(ValueError, match="neither empty nor"):
        Quote(status=status)


def test_answer_to_an_intent_that_looks_like_a_cancel_fails_it(alice: Calls, bob: Calls) -> None:
    id_, _ = intent(alice, IntentPayload(query="Hello?"), 30.0)
    answer = Message.create(BOB.did, ALICE.did, IntentPayload(status="cancel"), correlation_id=id_)
    event = alice.receive(encode(sign_message(answer, BOB)).decode())
    assert isinstance(event, Failed)
    assert event.id == id_


def test_forged_answer_fails_its_call_however_it_writes_the_id(alice: Calls, bob: Calls) -> None:
    id_ = ask(alice, bob)
    text = succeed(bob, id_, 3)
    event = alice.receive(edited(text, correlation_id=id_.upper()))
    assert isinstance(event, Refused)
    assert isinstance(event.failed, Failed)
    assert isinstance(event.failed.error, PeerIdentityError)


# --- attached arguments --------------------------------------------------------------------------


def entry(at: str, data: bytes, *, is_bytes: bool = True, is_signed: bool = True, **changes: Any) -> Any:
    return {**Detached(at, data, is_bytes).described(is_signed=is_signed), **changes}


def request_with(*entries: Any, args: dict[str, Any] | None = None) -> tuple[str, str]:
    """Return id and text of a request of Alice with these `ext.attachments`, whatever they are."""
    ext = {"capability": "scan", "attachments": list(entries)}
    made = Message.create(ALICE.did, BOB.did, ExecRequestPayload(args=args or {}), ext=ext)
    return made.id, encode(sign_message(made, ALICE)).decode()


def response_with(id_: str, status: str, *entries: Any, **fields: Any) -> str:
    """Return the text of a response of Bob with these `ext.attachments`, whatever they are."""
    ext = {"attachments": list(entries), **fields.pop("ext", {})}
    payload = ExecResponsePayload(status=ExecStatus(status), **fields)
    made = Message.create(BOB.did, ALICE.did, payload, correlation_id=id_, ext=ext)
    return encode(sign_message(made, BOB) if payload.status.is_final else made).decode()


def turned_down(calls: Calls, text: str) -> tuple[str, str]:
    """Return status and `ext.error.name` of the response that answers a request at once."""
    reply = calls.receive(text)
    assert isinstance(reply, Reply)
    response = decode(reply.text)
    assert isinstance(response.payload, ExecResponsePayload)
    assert response.signature is not None
    assert sent(calls) is None
    return response.payload.status.value, response.ext["error"]["name"]


def final_status(calls: Calls) -> tuple[str, str]:
    """Return status and `ext.error.name` of the response that is to be sent, and nothing after it."""
    response = decode(sent_text(calls))
    assert sent(calls) is None
    assert isinstance(response.payload, ExecResponsePayload)
    assert response.signature is not None
    return response.payload.status.value, response.ext["error"]["name"]


def test_arguments_arrive_after_the_call(alice: Calls, bob: Calls) -> None:
    data = bytes(range(256)) * 100
    id_ = alice.execute("scan", {"scan": data, "language": "en"}, 1.0)
    called, arrived = carry(alice, bob)
    assert called == ExecutionArrived(id_, "scan", None, 1.0)
    assert arrived == ArgumentsArrived(id_, {"scan": data, "language": "en"})


def test_empty_arguments_arrive_with_the_call(alice: Calls, bob: Calls) -> None:
    id_ = alice.execute("scan", {"scan": b"", "more": bytearray()}, 1.0)
    assert carry(alice, bob) == [ExecutionArrived(id_, "scan", {"scan": b"", "more": b""}, 1.0)]


def test_long_json_and_bytes_travel_together(alice: Calls, bob: Calls) -> None:
    args = {"text": "x" * 20_000, "number": 1e17, "a/b~": memoryview(b"abc"), "": b"no name"}
    id_ = alice.execute("scan", args, 1.0)
    arrived = carry(alice, bob)[-1]
    assert arrived == ArgumentsArrived(id_, {**args, "a/b~": b"abc"})


@pytest.mark.parametrize(
    ("bad", "data"),
    [
        (entry("/args/a", b"abc"), b"abd"),
        (entry("/args/a", b"{}", is_bytes=False), b"[]"),
        (entry("/args/a", b'{"b": 1}', is_bytes=False), b'{"b": 1}'),
        (entry("/args", b"[1]", is_bytes=False), b"[1]"),
    ],
)
def test_arguments_that_are_not_what_was_signed_have_a_fault(bob: Calls, bad: Any, data: bytes) -> None:
    id_, text = request_with(bad)
    assert bob.receive(text) == ExecutionArrived(id_, "scan", None, CALL_TIMEOUT_SECONDS)
    arrived = bob.receive(data_frame(id_, data))
    assert isinstance(arrived, ArgumentsArrived)
    assert (arrived.id, arrived.args) == (id_, {})
    assert arrived.fault
    bob.fail(id_, "invalid_arguments", arrived.fault)
    assert final_status(bob) == ("error", "invalid_arguments")


@pytest.mark.parametrize(
    "bad", [entry("/args/a", b"", sha256="0" * 64), entry("/args/a", b"", is_bytes=False)]
)
def test_fault_that_needs_no_bytes_ends_the_call_at_once(bob: Calls, bad: Any) -> None:
    _, text = request_with(bad)
    assert turned_down(bob, text) == ("error", "invalid_arguments")


def test_argument_that_comes_twice_is_a_fault(bob: Calls) -> None:
    whole = b'{"a":1}'
    id_, text = request_with(entry("/args", whole, is_bytes=False), entry("/args/a", b"x"))
    bob.receive(text)
    arrived = bob.receive(data_frame(id_, whole + b"x"))
    assert arrived == ArgumentsArrived(id_, {}, "the argument 'a' came twice")
    id_, text = request_with(entry("/args", whole, is_bytes=False), {"at": "/args/a", "as": "bytes"})
    bob.receive(text)
    arrived = bob.receive(data_frame(id_, whole))
    assert arrived == ArgumentsArrived(id_, {}, "the argument 'a' came twice")


def test_announcement_that_is_none_is_refused(bob: Calls) -> None:
    id_, text = request_with(entry("/args/a", b"abc"), args={"a": 1})
    assert refusal(bob, text) == ("invalid_ext", id_)
    assert bob.receive(data_frame(id_, b"abc")) is None  # it never was a call


def test_more_than_is_ever_kept_is_refused_as_soon_as_it_is_announced(bob: Calls) -> None:
    id_, text = request_with(entry("/args/a", b"abc", size=ATTACHMENTS_MAX_BYTES + 1))
    assert turned_down(bob, text) == ("error", "invalid_arguments")
    assert bob.receive(data_frame(id_, b"abc")) is None  # it has crossed the end


def test_more_than_can_be_kept_now_is_busy(bob: Calls) -> None:
    first, text = request_with(entry("/args/a", b"abc", size=ATTACHMENTS_MAX_BYTES))
    assert isinstance(bob.receive(text), ExecutionArrived)
    small, text = request_with(entry("/args/a", b"x"))
    assert turned_down(bob, text) == ("error", "busy")
    _, text = request_with(entry("/args/a", b""))
    assert isinstance(bob.receive(text), ExecutionArrived)
    bob.fail(first, "cancelled", "no")
    assert final_status(bob) == ("cancelled", "cancelled")
    again, text = request_with(entry("/args/a", b"x"))
    assert again != small
    assert isinstance(bob.receive(text), ExecutionArrived)


def test_streams_that_could_fill_the_memory_are_busy(bob: Calls) -> None:
    for _ in range(ATTACHMENTS_MAX_BYTES // CALL_WINDOW_BYTES):
        _, text = request_with({"at": "/args/a", "as": "bytes"})
        assert isinstance(bob.receive(text), ExecutionArrived)
    _, text = request_with({"at": "/args/a", "as": "bytes"})
    assert turned_down(bob, text) == ("error", "busy")


def test_bytes_that_no_request_has_announced_fail_it(alice: Calls, bob: Calls) -> None:
    id_ = ask(alice, bob)
    refused = bob.receive(data_frame(id_, b"x"))
    assert isinstance(refused, Refused)
    assert (refused.error.cause.name, refused.cancelled, refused.failed) == ("bad_frame", id_, None)
    assert refused.reply is not None
    assert decode(refused.reply).correlation_id == id_
    failed = alice.receive(refused.reply)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, RemoteError)
    assert failed.error.name == "bad_frame"
    bob.succeed(id_, 1, 0.0)
    assert sent(bob) is None
    assert bob.receive(data_frame(id_, b"x")) is None


def test_bytes_beyond_what_a_request_has_announced_fail_it(bob: Calls) -> None:
    id_, text = request_with(entry("/args/a", b"abc"))
    bob.receive(text)
    refused = bob.receive(data_frame(id_, b"abcd"))
    assert isinstance(refused, Refused)
    assert refused.cancelled == id_


def test_request_that_fails_by_its_bytes_is_replayed_when_it_comes_again(bob: Calls) -> None:
    id_, text = request_with(entry("/args/a", b"abc"))
    bob.receive(text)
    bob.receive(data_frame(id_, b"abcd"))
    assert refusal(bob, text) == ("replayed", id_)


def test_frame_that_is_none_fails_nothing(alice: Calls, bob: Calls) -> None:
    id_ = ask(alice, bob)
    refused = bob.receive(b"\x01")
    assert isinstance(refused, Refused)
    assert (refused.error.cause.name, refused.cancelled, refused.failed) == ("bad_frame", None, None)
    assert isinstance(alice.receive(succeed(bob, id_, 1)), Answered)


def test_text_that_is_none_fails_no_call_whose_id_it_takes(alice: Calls, bob: Calls) -> None:
    id_ = ask(alice, bob)
    twice = f'{{"id":"{id_}","id":"{id_}"}}'
    refused = bob.receive(twice)
    assert isinstance(refused, Refused)
    assert (refused.error.cause.name, refused.cancelled) == ("duplicate_key", None)
    refused = alice.receive(twice)
    assert isinstance(refused, Refused)
    assert refused.failed is None
    assert isinstance(alice.receive(succeed(bob, id_, 1)), Answered)


def test_frames_of_a_call_that_is_over_or_never_was_are_ignored(alice: Calls, bob: Calls) -> None:
    id_ = ask(alice, bob)
    alice.receive(succeed(bob, id_, 1))
    for call in (id_, "01234567-89ab-4def-8123-456789abcdef"):
        for calls in (alice, bob):
            assert calls.receive(data_frame(call, b"x")) is None
            assert calls.receive(credit_frame(call, 1)) is None
            assert sent(calls) is None


@pytest.mark.parametrize("is_request", [True, False])
def test_id_of_an_open_call_of_this_side_is_refused(alice: Calls, bob: Calls, is_request: bool) -> None:
    id_ = ask(alice, bob)
    payload = ExecRequestPayload(args={}) if is_request else IntentPayload(query="?")
    same = Message.create(BOB.did, ALICE.did, payload, ext={"capability": "add"})
    same = same.model_copy(update={"id": id_.upper()})
    refused = alice.receive(encode(sign_message(same, BOB)).decode())
    assert isinstance(refused, Refused)
    assert (refused.error.cause.name, refused.failed) == ("replayed", None)
    assert isinstance(alice.receive(succeed(bob, id_, 1)), Answered)


# --- a stream among the arguments -----------------------------------------------------------------


async def nothing() -> AsyncIterator[bytes]:
    """Stand for a stream: whoever has it feeds it."""
    yield b""


def feed(alice: Calls, bob: Calls, *chunks: bytes, **args: Any) -> str:
    """Let a call with a stream run at Bob, and these bytes arrive; return its id."""
    id_ = alice.execute("scan", {"data": nothing(), **args}, 30.0)
    event = bob.receive(sent_text(alice))
    assert isinstance(event, ExecutionArrived)
    assert event.input == "data"
    bob.start(id_)
    for chunk in chunks:
        assert alice.feed(id_, chunk)
        assert carry(alice, bob) == [InputArrived(id_, chunk)]
        bob.took_input(id_, len(chunk))
    return id_


def test_stream_arrives_while_the_call_runs_and_is_signed_for(alice: Calls, bob: Calls) -> None:
    id_ = feed(alice, bob, b"abc", b"de")
    assert alice.feed(id_, b"")
    alice.end_feed(id_)
    assert carry(alice, bob) == [InputEnded(id_)]
    bob.has_read_input(id_)
    bob.succeed(id_, 5, 0.0)
    (answered,) = carry(bob, alice)
    assert isinstance(answered, Answered)
    assert answered.receipt is not None
    proven = answered.receipt.verify()
    assert proven.covers_args({"data": b"abcde"})
    assert not proven.covers_args({"data": b"abcd"})
    assert not alice.feed(id_, b"late")
    alice.end_feed(id_)
    assert sent(alice) is None


def test_stream_that_was_not_read_to_its_end_is_not_signed_for(alice: Calls, bob: Calls) -> None:
    id_ = feed(alice, bob, b"abc")
    bob.succeed(id_, 5, 0.0)
    (answered,) = carry(bob, alice)
    assert isinstance(answered, Answered)
    assert answered.receipt is not None
    assert not answered.receipt.verify().covers_args({"data": b"abc"})
    assert bob.receive(data_frame(id_, b"d")) is None  # it has crossed the end
    assert bob.receive(end_frame(id_, bytes(32))) is None


def test_stream_that_is_not_what_was_sent_has_a_fault(alice: Calls, bob: Calls) -> None:
    id_ = feed(alice, bob, b"abc")
    ended = bob.receive(end_frame(id_, sha256(b"abd").digest()))
    assert ended == InputEnded(id_, "what came of the stream is not what was sent")


@pytest.mark.parametrize("status", ["success", "error", "cancelled"])
def test_callee_that_has_read_something_else_is_not_believed(alice: Calls, bob: Calls, status: str) -> None:
    id_ = feed(alice, bob, b"abc")
    said = {"size": 3, "sha256": sha256(b"abd").hexdigest()}
    failed = alice.receive(response_with(id_, status, ext={"input": said}))
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, PeerIdentityError)


@pytest.mark.parametrize("said", [[], {"size": 3}, {"size": -1, "sha256": "0" * 64}])
def test_what_was_read_in_another_form_fails_the_call(alice: Calls, bob: Calls, said: Any) -> None:
    id_ = feed(alice, bob, b"abc")
    failed = alice.receive(response_with(id_, "success", ext={"input": said}))
    assert isinstance(failed, Failed)
    assert type(failed.error) is CallError
    assert "ext.input" in str(failed.error)


def test_stream_waits_for_its_reader(alice: Calls, bob: Calls) -> None:
    id_ = feed(alice, bob)
    alice.feed(id_, bytes(2 * CALL_WINDOW_BYTES))
    came = carry(alice, bob)
    assert len(came) == CALL_WINDOW_BYTES // CHUNK_MAX_BYTES
    assert carry(bob, alice) == []
    assert carry(alice, bob) == []
    bob.took_input(id_, CALL_WINDOW_BYTES)
    carry(bob, alice)
    assert len(carry(alice, bob)) == CALL_WINDOW_BYTES // CHUNK_MAX_BYTES


@pytest.mark.parametrize("is_over", [False, True])
def test_end_of_a_stream_that_is_none_fails_the_call(alice: Calls, bob: Calls, is_over: bool) -> None:
    id_ = feed(alice, bob) if is_over else ask(alice, bob)
    end = end_frame(id_, sha256(b"").digest())
    if is_over:
        assert bob.receive(end) == InputEnded(id_)
    for frame in (end, data_frame(id_, b"x")):
        refused = bob.receive(frame)
        if frame is end:
            assert isinstance(refused, Refused)
            assert (refused.error.cause.name, refused.cancelled) == ("bad_frame", id_)
        else:
            assert refused is None


def test_end_before_the_attachments_are_there_fails_the_call(bob: Calls) -> None:
    id_, text = request_with(entry("/args/a", b"abc"), {"at": "/args/b", "as": "bytes"})
    assert bob.receive(text) == ExecutionArrived(id_, "scan", None, CALL_TIMEOUT_SECONDS, False, "b")
    refused = bob.receive(end_frame(id_, sha256(b"").digest()))
    assert isinstance(refused, Refused)
    assert refused.cancelled == id_


def test_frames_of_an_intent_are_ignored(alice: Calls, bob: Calls) -> None:
    id_, text = intent(alice, IntentPayload(query="?"), 30.0)
    bob.receive(text)
    for frame in (end_frame(id_, bytes(32)), data_frame(id_, b"x"), credit_frame(id_, 1)):
        for calls in (alice, bob):
            assert calls.receive(frame) is None
    assert isinstance(alice.receive(answer_intent(bob, id_, Quote(status="understood"))), Answered)


def test_request_whose_stream_was_empty_is_cancelled_also_while_its_end_waits(
    alice: Calls, bob: Calls
) -> None:
    id_ = feed(alice, bob)
    alice.end_feed(id_)
    cancel = alice.abandon(id_)
    assert cancel is not None
    assert bob.receive(cancel) == CancelArrived(id_)
    assert sent(alice) is None


# --- attached results, parts and credit ------------------------------------------------------------


def stream(alice: Calls, bob: Calls) -> str:
    """Let a call of Alice that wants parts run at Bob; return its id."""
    id_ = alice.execute("parts", {}, 30.0, is_stream=True)
    assert carry(alice, bob) == [ExecutionArrived(id_, "parts", {}, 30.0, True)]
    bob.start(id_)
    return id_


def test_result_of_bytes_is_attached(alice: Calls, bob: Calls) -> None:
    id_ = ask(alice, bob)
    bob.succeed(id_, bytes(50_000), 0.0)
    (answered,) = carry(bob, alice)
    assert answered == Answered(id_, bytes(50_000), receipt=ANY)


def test_result_whose_digest_is_wrong_fails_the_call(alice: Calls, bob: Calls) -> None:
    id_ = ask(alice, bob)
    assert alice.receive(response_with(id_, "success", entry("/result", b"abc"))) is None
    failed = alice.receive(data_frame(id_, b"abd"))
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, PeerIdentityError)
    assert alice.open == 0


@pytest.mark.parametrize("status", ["partial", "progress"])
def test_part_that_cannot_be_used_fails_the_call_and_cancels_it_there(
    alice: Calls, bob: Calls, status: str
) -> None:
    id_ = stream(alice, bob)
    assert alice.receive(response_with(id_, status, entry("/result", b"{", is_bytes=False))) is None
    failed = alice.receive(data_frame(id_, b"{"))
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, PeerIdentityError)
    assert carry(alice, bob) == [CancelArrived(id_)]


def test_bytes_that_no_response_has_announced_fail_the_call(alice: Calls, bob: Calls) -> None:
    id_ = stream(alice, bob)
    bob.part(id_, b"abc")
    assert carry(bob, alice) == [PartArrived(id_, b"abc")]
    refused = alice.receive(data_frame(id_, b"d"))
    assert isinstance(refused, Refused)
    assert refused.error.cause.name == "bad_frame"
    assert refused.failed is not None
    assert (refused.failed.id, type(refused.failed.error)) == (id_, CallError)
    assert carry(alice, bob) == [CancelArrived(id_)]


def test_response_with_more_than_can_be_kept_fails_the_call(alice: Calls, bob: Calls) -> None:
    id_ = ask(alice, bob)
    large = entry("/result", b"", size=ATTACHMENTS_MAX_BYTES + 1)
    refused = alice.receive(response_with(id_, "success", large))
    assert isinstance(refused, Refused)
    assert refused.error.cause.name == "too_large"
    assert refused.failed is not None
    assert refused.failed.id == id_
    assert carry(alice, bob) == [CancelArrived(id_)]


def test_response_for_which_others_leave_no_room_says_so(alice: Calls, bob: Calls) -> None:
    first, second = ask(alice, bob), ask(alice, bob)
    assert (
        alice.receive(response_with(first, "success", entry("/result", b"", size=ATTACHMENTS_MAX_BYTES)))
        is None
    )
    refused = alice.receive(response_with(second, "success", entry("/result", b"", size=2)))
    assert isinstance(refused, Refused)
    assert refused.failed is not None
    assert refused.failed.id == second
    assert "2 bytes are attached, and 268435456 bytes of other calls are kept" in str(refused.failed.error)


def test_envelope_ends_what_is_not_complete_before_it(alice: Calls, bob: Calls) -> None:
    id_ = stream(alice, bob)
    half = response_with(id_, "partial", entry("/result", bytes(ATTACHMENTS_MAX_BYTES // 4)))
    for _ in range(5):  # each of them forgets the one before, or there would be no room
        assert alice.receive(half) is None
        assert alice.receive(data_frame(id_, bytes(CHUNK_MAX_BYTES))) is None
    assert alice.receive(response_with(id_, "progress", result=1)) == ProgressArrived(id_, 1)
    refused = alice.receive(data_frame(id_, b"x"))
    assert isinstance(refused, Refused)
    assert refused.error.cause.name == "bad_frame"


@pytest.mark.parametrize(("status", "is_stream"), [("progress", True), ("partial", False)])
def test_what_waits_for_no_reader_is_neither_kept_nor_left_without_credit(
    alice: Calls, bob: Calls, status: str, is_stream: bool
) -> None:
    id_ = alice.execute("parts", {}, 30.0, is_stream=is_stream)
    carry(alice, bob)
    announced = response_with(id_, status, entry("/result", bytes(CALL_CREDIT_BYTES)))
    for number in range(1, 6):
        alice.receive(announced)
        for _ in range(CALL_CREDIT_BYTES // CHUNK_MAX_BYTES):
            alice.receive(data_frame(id_, bytes(CHUNK_MAX_BYTES)))
        granted = []
        while (frame := sent(alice)) is not None:
            assert isinstance(frame, bytes)
            granted.append(parse_frame(frame))
        assert isinstance(granted[-1], Credit)
        # All that a sender could wait for was granted.
        assert number * CALL_CREDIT_BYTES - granted[-1].taken < CALL_CREDIT_BYTES
    large = entry("/result", b"", size=ATTACHMENTS_MAX_BYTES)
    assert alice.receive(response_with(id_, "success", large)) is None


def test_part_after_the_final_response_is_ignored(alice: Calls, bob: Calls) -> None:
    id_ = stream(alice, bob)
    part = response_with(id_, "partial", entry("/result", b"abc"))
    bob.finish(id_, 0.0)
    assert carry(bob, alice) == [Answered(id_, None, True, ANY)]
    assert alice.receive(part) is None
    assert alice.receive(data_frame(id_, b"abc")) is None
    assert not bob.part(id_, b"late")
    bob.progress(id_, 0.5)
    assert sent(bob) is None


def test_who_wants_no_stream_gets_no_parts(alice: Calls, bob: Calls) -> None:
    id_ = ask(alice, bob)
    bob.start(id_)
    assert not bob.part(id_, 1)
    bob.progress(id_, 0.5)
    assert sent(bob) is None
    assert alice.receive(response_with(id_, "partial", result=1)) is None
    assert isinstance(alice.receive(succeed(bob, id_, [1])), Answered)


def test_parts_wait_until_the_call_runs(alice: Calls, bob: Calls) -> None:
    id_ = alice.execute("parts", {}, 30.0, is_stream=True)
    carry(alice, bob)
    assert not bob.part(id_, 1)
    bob.start(id_)
    assert bob.part(id_, 1)


@pytest.mark.parametrize("value", [float("nan"), "\ud800", {"a": object()}, ["x" * 20_000, float("nan")]])
def test_part_without_json_form_is_none(alice: Calls, bob: Calls, value: Any) -> None:
    id_ = stream(alice, bob)
    with pytest.raises(CapabilityError, match="a part cannot be sent"):
        bob.part(id_, value)
    bob.finish(id_, 0.0)
    assert carry(bob, alice) == [Answered(id_, None, True, ANY)]


@pytest.mark.parametrize("value", ["x" * 20_000, object(), float("inf")])
def test_progress_is_short_json(alice: Calls, bob: Calls, value: Any) -> None:
    id_ = stream(alice, bob)
    with pytest.raises(CapabilityError, match="the progress"):
        bob.progress(id_, value)


STREAM_OF_ONE = StreamDigest()
STREAM_OF_ONE.add(1)


@pytest.mark.parametrize(
    "said",
    [
        {**STREAM_OF_ONE.summary().model_dump(), "parts": 2},
        {**STREAM_OF_ONE.summary().model_dump(), "sha256": "0" * 64},
        StreamDigest().summary().model_dump(),
        None,
    ],
)
def test_stream_that_is_not_the_signed_one_fails(alice: Calls, bob: Calls, said: Any) -> None:
    id_ = stream(alice, bob)
    bob.part(id_, 1)
    assert carry(bob, alice) == [PartArrived(id_, 1)]
    failed = alice.receive(response_with(id_, "success", ext={"stream": said}))
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, PeerIdentityError)
    assert failed.receipt is not None


def test_summary_of_parts_that_never_came_fails(alice: Calls, bob: Calls) -> None:
    id_ = ask(alice, bob)
    said = STREAM_OF_ONE.summary().model_dump()
    failed = alice.receive(response_with(id_, "success", ext={"stream": said}))
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, PeerIdentityError)


@pytest.mark.parametrize("said", [[], {}, {"parts": -1, "sha256": "0" * 64}, {"parts": 0, "sha256": "x"}])
def test_summary_of_another_form_fails_the_call(alice: Calls, bob: Calls, said: Any) -> None:
    id_ = stream(alice, bob)
    failed = alice.receive(response_with(id_, "success", ext={"stream": said}))
    assert isinstance(failed, Failed)
    assert type(failed.error) is CallError
    assert "ext.stream" in str(failed.error)
    assert alice.open == 0


def test_failure_after_parts_needs_no_summary(alice: Calls, bob: Calls) -> None:
    id_ = stream(alice, bob)
    bob.part(id_, 1)
    assert carry(bob, alice) == [PartArrived(id_, 1)]
    bob.fail(id_, "capability_error", "no more")
    (failed,) = carry(bob, alice)
    assert isinstance(failed, Failed)
    assert type(failed.error) is CapabilityError


def test_failure_overtakes_the_parts_that_wait(alice: Calls, bob: Calls) -> None:
    id_ = stream(alice, bob)
    bob.part(id_, bytes(5 * CHUNK_MAX_BYTES))
    alice.receive(sent_text(bob))
    frame = sent(bob)
    assert isinstance(frame, bytes)
    assert isinstance(parse_frame(frame), Data)
    alice.receive(frame)
    bob.fail(id_, "timeout", "too late")
    (failed,) = carry(bob, alice)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, CallTimeoutError)


def test_sender_that_ignores_the_window_is_refused(alice: Calls, bob: Calls) -> None:
    id_ = stream(alice, bob)
    text = response_with(id_, "partial", result="x" * 10_000)
    for _ in range(2 * CALL_WINDOW_BYTES // len(text)):
        assert isinstance(alice.receive(text), PartArrived)
    refused = alice.receive(text)
    assert isinstance(refused, Refused)
    assert refused.error.cause.name == "bad_frame"
    assert refused.failed is not None
    assert refused.failed.id == id_
    assert carry(alice, bob) == [CancelArrived(id_)]


# --- the same request again ------------------------------------------------------------------------


def test_request_again_is_ignored_while_it_runs_and_answered_alike_after(alice: Calls, bob: Calls) -> None:
    id_, text = execute(alice, "add", {}, 1.0)
    assert isinstance(bob.receive(text), ExecutionArrived)
    assert bob.receive(text) is None
    assert sent(bob) is None
    answer = succeed(bob, id_, 1)
    assert bob.receive(text) is None
    assert sent_text(bob) == answer


def test_request_again_and_again_has_one_answer_that_waits(alice: Calls, bob: Calls) -> None:
    id_, text = execute(alice, "add", {}, 1.0)
    bob.receive(text)
    bob.succeed(id_, 1, 0.0)
    for _ in range(3):
        bob.receive(text)
    assert sent(bob) is not None
    assert sent(bob) is None


def test_request_over_a_second_connection_waits_for_the_first(alice: Calls) -> None:
    answers = Answers()
    first, second, third = (Calls(BOB, ALICE.did, answers=answers) for _ in range(3))
    id_, text = execute(alice, "add", {}, 1.0)
    assert isinstance(first.receive(text), ExecutionArrived)
    for _ in range(3):
        assert second.receive(text) is None
    assert sent(second) is None
    answer = succeed(first, id_, 1)
    assert sent_text(second) == answer
    assert sent(second) is None
    assert third.receive(text) is None
    assert sent_text(third) == answer


def test_request_over_a_second_connection_waits_for_long(alice: Calls) -> None:
    now, answers = [0.0], Answers()
    first, second = (Calls(BOB, ALICE.did, answers=answers, clock=lambda: now[0]) for _ in range(2))
    id_, text = execute(alice, "add", {}, 600.0)
    first.receive(text)
    second.receive(text)
    now[0] = KEEP_SECONDS + 1
    assert isinstance(first.receive(execute(alice, "add", {}, 1.0)[1]), ExecutionArrived)
    answer = succeed(first, id_, 1)
    assert sent_text(second) == answer


def test_answer_that_is_not_kept_is_not_repeated(alice: Calls) -> None:
    answers = Answers()
    first, second = (Calls(BOB, ALICE.did, answers=answers) for _ in range(2))
    id_, text = execute(alice, "add", {}, 1.0)
    first.receive(text)
    second.receive(text)
    first.succeed(id_, b"attached", 0.0)
    error = decode(sent_text(second))
    assert (error.type, error.correlation_id, error.payload.details.name) == (  # type: ignore[union-attr]
        MessageType.ERROR,
        id_,
        "replayed",
    )
    assert refusal(second, text) == ("replayed", id_)
    assert refusal(Calls(BOB, ALICE.did, answers=answers), text) == ("replayed", id_)


def test_another_request_of_that_id_is_replayed_over_a_second_connection(alice: Calls) -> None:
    answers = Answers()
    first, second = (Calls(BOB, ALICE.did, answers=answers) for _ in range(2))
    id_, text = execute(alice, "add", {}, 1.0)
    first.receive(text)
    other = Message.model_validate({**json.loads(text), "ext": {"capability": "sub"}, "signature": None})
    assert refusal(second, encode(sign_message(other, ALICE)).decode()) == ("replayed", id_)
    assert isinstance(alice.receive(succeed(first, id_, 1)), Answered)
