"""The tables of causes and close codes, and the tree of exceptions."""

import json

import pytest

from aiconexus.protocol import (
    CAUSES,
    CLOSE_CODES,
    AIConexusError,
    ErrorCode,
    ErrorPayload,
    MalformedMessageError,
    MessageError,
    RemoteError,
    errors,
)
from aiconexus.protocol.errors import (
    CallBusyError,
    CallTimeoutError,
    CapabilityError,
    DIDError,
    GatewayClosedError,
    GatewayIdentityError,
    GatewayUnreachableError,
    IncompleteAnswerError,
    NotConnectedError,
    PeerConnectError,
    PeerIdentityError,
    PeerRefusedError,
    RegistrationError,
    RemoteTimeoutError,
    UnknownAgentError,
    close_code,
    remote_error,
)


def every_exception() -> list[type[Exception]]:
    return [
        value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)
    ]


def test_every_exception_hangs_in_the_tree_that_the_docstring_draws():
    for kind in every_exception():
        assert issubclass(kind, AIConexusError)
        assert kind.__name__ in errors.__doc__


def test_no_exception_hides_a_builtin():
    builtin = vars(__builtins__) if not isinstance(__builtins__, dict) else __builtins__
    assert not {kind.__name__ for kind in every_exception()} & set(builtin)


def test_cause_numbers_and_names_are_unique():
    assert len({cause.num for cause in CAUSES.values()}) == len(CAUSES)
    assert all(name == cause.name for name, cause in CAUSES.items())


def test_hundreds_of_a_cause_number_follow_its_code():
    hundreds = {cause.code: cause.num // 100 for cause in CAUSES.values()}
    assert len(set(hundreds.values())) == len(ErrorCode)
    assert all(hundreds[cause.code] == cause.num // 100 for cause in CAUSES.values())


@pytest.mark.parametrize("kind", [kind for kind in every_exception() if issubclass(kind, MessageError)])
def test_every_message_error_knows_its_cause(kind):
    error = kind()
    assert error.cause is CAUSES[kind.default]
    assert str(error) == error.cause.message
    payload = ErrorPayload.for_error(error)
    assert payload.code is error.cause.code
    assert payload.details.num == error.cause.num
    assert payload.details.temporary is error.cause.temporary


@pytest.mark.parametrize("name", CAUSES)
def test_every_cause_makes_an_error_payload(name):
    payload = ErrorPayload.for_cause(name, field="to", retry_after_ms=5)
    assert payload.message == CAUSES[name].message
    assert payload.details.model_dump() == {
        "num": CAUSES[name].num,
        "name": name,
        "temporary": CAUSES[name].temporary,
        "retry_after_ms": 5,
        "field": "to",
    }


def test_error_that_answers_a_message_quotes_only_a_little_of_it():
    payload = ErrorPayload.for_error(MalformedMessageError("x" * 60_000, field="y" * 60_000))
    assert len(payload.message) == 512
    assert len(payload.details.field) == 64


def test_did_error_shows_at_most_eighty_characters():
    assert len(str(DIDError("bad", "z" * 10_000))) < 100


@pytest.mark.parametrize("number", CLOSE_CODES)
def test_ranges_of_close_codes_tell_whether_to_reconnect(number):
    row = CLOSE_CODES[number]
    assert row.number == number
    if number >= 4000:
        assert row.reconnect is (number < 4500)


def test_unknown_close_code_follows_its_range():
    assert close_code(4499).reconnect
    assert close_code(3000).reconnect
    assert not close_code(4599).reconnect
    assert close_code(4504) is CLOSE_CODES[4504]


@pytest.mark.parametrize("row", CLOSE_CODES.values(), ids=lambda row: row.name)
def test_reason_text_of_every_close_code_fits_a_control_frame(row):
    # RFC 6455 section 5.5: a control frame has at most 125 bytes, two of them the code.
    assert len(json.dumps({"r": 3_600_000, "n": row.name})) <= 123


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (ErrorCode.UNKNOWN_AGENT, UnknownAgentError),
        (ErrorCode.CONNECTION_REFUSED, PeerRefusedError),
        (ErrorCode.TIMEOUT, RemoteTimeoutError),
        (ErrorCode.INTERNAL_ERROR, RemoteError),
    ],
)
def test_error_that_arrived_becomes_the_exception_of_its_code(code, kind):
    error = remote_error(code, "text", {"name": "x", "temporary": True, "retry_after_ms": 7})
    assert type(error) is kind
    assert (str(error), error.name, error.temporary, error.retry_after_ms) == ("text", "x", True, 7)


def test_error_without_details_is_not_temporary():
    error = remote_error(ErrorCode.INTERNAL_ERROR, "text")
    assert (error.name, error.temporary, error.retry_after_ms) == ("", False, None)


@pytest.mark.parametrize(
    ("error", "temporary"),
    [
        (DIDError("no DID", "x"), False),
        (MessageError(name="overloaded"), True),
        (MessageError(name="bad_did"), False),
        (GatewayUnreachableError("text"), True),
        (GatewayUnreachableError("text", temporary=False), False),
        (IncompleteAnswerError("text"), True),
        (GatewayIdentityError("text"), False),
        (RegistrationError("text"), False),
        (
            RegistrationError(
                "text", remote_error(ErrorCode.CONNECTION_REFUSED, "full", {"temporary": True})
            ),
            True,
        ),
        (NotConnectedError("text"), False),
        (NotConnectedError("text", temporary=True), True),
        (GatewayClosedError("text", close_code(4504)), False),
        (PeerConnectError("text"), True),
        (PeerIdentityError("text"), False),
        (CapabilityError("text"), False),
        (CallBusyError("text"), True),
    ],
)
def test_every_error_tells_whether_the_same_may_succeed_later(error, temporary):
    assert isinstance(error, AIConexusError)
    assert error.temporary is temporary


def test_timeouts_are_timeout_errors():
    assert issubclass(RemoteTimeoutError, TimeoutError)
    assert issubclass(CallTimeoutError, TimeoutError)
