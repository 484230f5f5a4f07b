"""Bytes to messages and back: orjson on the wire, RFC 8785 (JCS) for what is signed."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from math import isfinite
from typing import Any

import orjson
import rfc8785
from pydantic import ValidationError

from aiconexus.protocol.errors import CAUSES, MalformedMessageError, UnsupportedVersionError
from aiconexus.protocol.limits import INTEGER_MAX, MESSAGE_MAX_BYTES, MESSAGE_MAX_DEPTH, PROTOCOL_VERSION
from aiconexus.protocol.models import UUID_PATTERN, Message

# Keys from here on may sort differently as UTF-16 (RFC 8785 section 3.2.3) and as UTF-8 (orjson).
_FIRST_KEY_OUT_OF_ORDER = "\ud800"

_NAME_BY_FIELD = {
    "id": "bad_id",
    "correlation_id": "bad_id",
    "from": "bad_did",
    "to": "bad_did",
    "type": "unknown_type",
}


def canonicalize(value: Any) -> bytes:
    """Return the canonical JSON (RFC 8785) of `value`.

    Without floats, and with keys below U+D800, orjson's sorted output is byte-identical to it and some
    fifty times faster; everything else goes through the `rfc8785` package.

    Raises:
        MalformedMessageError: `value` has no canonical form: NaN, an infinity, an integer outside
            ±(2^53 - 1), a lone surrogate, something that is not JSON, or more than 32 levels.
    """
    try:
        if _check(value, 1):
            return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
        return rfc8785.dumps(value)
    except (TypeError, ValueError) as error:  # orjson.JSONEncodeError is a TypeError
        raise _not_writable("signed", error) from None


def dumps(value: Any) -> bytes:
    """Return `value` as compact JSON, refused for what `canonicalize` refuses: both ends read the same."""
    try:
        _check(value, 1)
        return orjson.dumps(value)
    except TypeError as error:
        raise _not_writable("sent", error) from None


def _not_writable(what: str, error: Exception) -> MalformedMessageError:
    """Name what is left to go wrong after `_check`: text that has no UTF-8 form."""
    if isinstance(error, UnicodeError) or "UTF-8" in str(error):
        return MalformedMessageError(
            f"cannot be {what}: a text holds half a surrogate pair", name="lone_surrogate"
        )
    return MalformedMessageError(f"cannot be {what}: {error}", name="not_canonical")


def _check(value: Any, depth: int) -> bool:
    """Refuse what is not I-JSON (RFC 7493); tell whether orjson writes it as RFC 8785 does."""
    kind = type(value)
    if kind is str or value is None or kind is bool:
        return True
    if kind is int:
        if not -INTEGER_MAX <= value <= INTEGER_MAX:
            raise _too_large_an_integer(
                value if value.bit_length() < 256 else f"of {value.bit_length()} bits"
            )
        return True
    if kind is float:
        if not isfinite(value):
            raise MalformedMessageError(f"JSON has no {value}", name="not_canonical")
        return False
    if depth > MESSAGE_MAX_DEPTH:
        raise MalformedMessageError(name="too_deep")
    if kind is dict:
        plain = True
        for key, item in value.items():
            if type(key) is not str:
                raise MalformedMessageError(f"the key {key!r} is not a string", name="not_canonical")
            if not key.isascii() and max(key) >= _FIRST_KEY_OUT_OF_ORDER:
                plain = False
            # Most are texts: a call for each of these would take a third longer.
            if type(item) is not str and not _check(item, depth + 1):
                plain = False
        return plain
    if kind is list or kind is tuple:
        # A list, not a generator: every item is checked, whatever the first ones say.
        return all([_check(item, depth + 1) for item in value])  # noqa: C419
    raise MalformedMessageError(f"{kind.__name__} is not a JSON type", name="not_canonical")


def encode(message: Message, *, limit: int = MESSAGE_MAX_BYTES) -> bytes:
    """Return the bytes of `message`: those that were signed or received, if there are any.

    Raises:
        MalformedMessageError: It has no JSON form, or more than `limit` bytes.
    """
    return fitting(message.wire if message.wire is not None else dumps(message.envelope()), limit)


def fitting(data: bytes, limit: int) -> bytes:
    """Return the bytes of a message as they are.

    Raises:
        MalformedMessageError: They are more than `limit`.
    """
    if len(data) > limit:
        raise MalformedMessageError(
            f"the message has {len(data)} bytes; at most {limit} can be sent", name="too_large"
        )
    return data


def loads(data: bytes | str, *, limit: int = MESSAGE_MAX_BYTES) -> dict[str, Any]:
    """Parse one I-JSON object (RFC 7493) of at most `limit` bytes.

    Raises:
        MalformedMessageError: It is none: also for a key that stands twice in one object, as parsers
            disagree on which of the two counts, and what was verified must be what is read; and for an
            integer literal outside ±(2^53 - 1), however large, of which every language reads another number.
    """
    try:
        wire = data.encode() if isinstance(data, str) else bytes(data)
    except UnicodeEncodeError:
        raise MalformedMessageError(name="lone_surrogate") from None
    if len(wire) > limit:
        raise MalformedMessageError(
            f"the message has {len(wire)} bytes; at most {limit} are read", name="too_large"
        )
    try:
        value = orjson.loads(wire)
    except orjson.JSONDecodeError as error:
        raise _not_json(wire, str(error)) from None
    if not isinstance(value, dict):
        raise MalformedMessageError(name="not_object")
    try:
        _check(value, 1)
        # What orjson writes as it came has no key twice, and no integer that it took for a float.
        if orjson.dumps(value) != wire:
            decoder = _DUPLICATES_AND_INTEGERS if _MAY_BE_BEYOND_64_BITS.search(wire) else _DUPLICATES
            decoder.decode(wire.decode())
    except MalformedMessageError as error:
        error.message_id = _readable_id(value)
        raise
    return value


def _not_json(wire: bytes, reason: str) -> MalformedMessageError:
    """Name what orjson refused; its text tells the rest."""
    name = "not_json"
    try:
        wire.decode()
    except UnicodeDecodeError:
        name = "invalid_utf8"
    else:
        if "surrogate" in reason:
            name = "lone_surrogate"
        elif "depth" in reason or "ecursion" in reason:
            name = "too_deep"
        elif "infinity" in reason:
            name = "number_out_of_range"
    return MalformedMessageError(f"{CAUSES[name].message}: {reason}", name=name)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> None:
    if len(dict(pairs)) != len(pairs):
        keys = sorted(key for key, _ in pairs)
        key = next(key for key, other in pairwise(keys) if key == other)
        raise MalformedMessageError(
            f"the key {key[:64]!r} stands twice in one object", name="duplicate_key", field=key[:64]
        )


def _check_literal(text: str) -> None:
    """Refuse an integer literal of any size: of one over 2^64 orjson makes a float, which would pass."""
    if len(text) > _INTEGER_DIGITS or not -INTEGER_MAX <= int(text) <= INTEGER_MAX:
        raise _too_large_an_integer(text if len(text) < 80 else f"of {len(text)} digits")


def _too_large_an_integer(shown: object) -> MalformedMessageError:
    return MalformedMessageError(
        f"the integer {shown} is outside ±(2^53 - 1): send it as a string", name="not_canonical"
    )


_INTEGER_DIGITS = len(str(-INTEGER_MAX))
# orjson keeps the last of two equal keys, reads integers beyond 64 bits as floats, and tells neither: these
# decoders are only asked for that. To look at every integer takes five times as long.
_DUPLICATES = json.JSONDecoder(object_pairs_hook=_refuse_duplicates)
_DUPLICATES_AND_INTEGERS = json.JSONDecoder(object_pairs_hook=_refuse_duplicates, parse_int=_check_literal)
_MAY_BE_BEYOND_64_BITS = re.compile(rb"[0-9]{19}")


def decode(data: bytes | str, *, limit: int = MESSAGE_MAX_BYTES) -> Message:
    """Parse one message. Nothing about it is proven yet: see `security.verify_message`.

    Raises:
        UnsupportedVersionError: Its `version` is not 1.0.
        MalformedMessageError: It is not a message of this protocol.
    """
    return parse(loads(data, limit=limit), data)


def parse(envelope: dict[str, Any], wire: bytes | str) -> Message:
    """Turn an envelope that `loads` returned, and what it came from, into a Message; see `decode`."""
    version = envelope.get("version")
    if isinstance(version, str) and version != PROTOCOL_VERSION:
        raise UnsupportedVersionError(
            f"version {version[:16]!r} is not spoken here, only {PROTOCOL_VERSION}",
            field="version",
            message_id=_readable_id(envelope),
        )
    # The model has defaults for these, another name for `from`, and `wire`, for those who build messages.
    for field in ("id", "timestamp", "version"):
        if field not in envelope:
            raise _malformed("missing_field", field, envelope)
    for field in ("from_", "wire"):
        if field in envelope:
            raise _malformed("unknown_field", field, envelope)
    data = wire.encode() if isinstance(wire, str) else bytes(wire)
    try:
        return Message.model_validate({**envelope, "wire": data})
    except ValidationError as error:
        raise _invalid(error, envelope) from None


def _invalid(error: ValidationError, envelope: dict[str, Any]) -> MalformedMessageError:
    """Name the cause and the field of the first thing that pydantic refused."""
    first = error.errors(include_url=False, include_context=False)[0]
    path = first["loc"]
    field = str(path[0]) if path else "payload"
    text = first["msg"].removeprefix("Value error, ")
    if field not in envelope:
        return _malformed("missing_field", field, envelope)
    if field not in Message.model_fields and field != "from":
        return _malformed("unknown_field", field, envelope)
    if field == "payload":
        return _malformed("invalid_payload", _payload_path(path, envelope), envelope, text)
    if not isinstance(envelope[field], str):
        kind = "an object" if field == "ext" else "a string"
        return _malformed("wrong_type", field, envelope, f"not {kind}")
    name = _NAME_BY_FIELD.get(field, "wrong_type")
    return _malformed(name, field, envelope, "" if name in ("bad_id", "unknown_type") else text)


def _payload_path(path: tuple[int | str, ...], envelope: dict[str, Any]) -> str:
    """Return where in the payload the fault is, without the names that pydantic gives to union members."""
    parts: list[str] = []
    value: Any = envelope
    for part in path:
        if isinstance(value, dict):
            value = value.get(str(part))
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            break
        parts.append(str(part))
    return ".".join(parts) or "payload"


def _malformed(name: str, field: str, envelope: dict[str, Any], text: str = "") -> MalformedMessageError:
    # The sender chose the names of unknown fields: what goes into logs and ERRORs is short and printable.
    field = field[:64] if field.isprintable() else repr(field)[1:65]
    return MalformedMessageError(
        f"{field}: {text or CAUSES[name].message}",
        name=name,
        field=field,
        message_id=_readable_id(envelope),
    )


def _readable_id(envelope: dict[str, Any]) -> str | None:
    value = envelope.get("id")
    return value if isinstance(value, str) and re.fullmatch(UUID_PATTERN, value) else None
