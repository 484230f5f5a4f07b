"""Bytes to messages and back: orjson on the wire, RFC 8785 (JCS) for what is signed."""

from __future__ import annotations

from math import isfinite
from typing import Any

import orjson
import rfc8785
from pydantic import ValidationError

from aiconexus.protocol.errors import MalformedMessageError, MessageError, UnsupportedVersionError
from aiconexus.protocol.limits import INTEGER_MAX, MESSAGE_MAX_BYTES, MESSAGE_MAX_DEPTH, PROTOCOL_VERSION
from aiconexus.protocol.models import Message

# Keys from here on may sort differently as UTF-16 (RFC 8785 section 3.2.3) and as UTF-8 (orjson).
_FIRST_KEY_OUT_OF_ORDER = "\ud800"


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
        raise MalformedMessageError(f"cannot be signed: {error}", name="not_canonical") from None


def dumps(value: Any) -> bytes:
    """Return `value` as compact JSON, refused for what `canonicalize` refuses: both ends read the same."""
    try:
        _check(value, 1)
        return orjson.dumps(value)
    except TypeError as error:
        raise MalformedMessageError(f"cannot be sent: {error}", name="not_canonical") from None


def _check(value: Any, depth: int) -> bool:
    """Refuse what is not I-JSON (RFC 7493); tell whether orjson writes it as RFC 8785 does."""
    kind = type(value)
    if kind is str or value is None or kind is bool:
        return True
    if kind is int:
        if not -INTEGER_MAX <= value <= INTEGER_MAX:
            raise MalformedMessageError(
                f"the integer {value} is outside ±(2^53 - 1): send it as a string", name="not_canonical"
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
            plain = _check(item, depth + 1) and plain and not (key and max(key) >= _FIRST_KEY_OUT_OF_ORDER)
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
    data = message.wire if message.wire is not None else dumps(message.envelope())
    if len(data) > limit:
        raise MalformedMessageError(
            f"the message has {len(data)} bytes; at most {limit} can be sent", name="too_large"
        )
    return data


def loads(data: bytes | str, *, limit: int = MESSAGE_MAX_BYTES) -> dict[str, Any]:
    """Parse one JSON object of at most `limit` bytes.

    Raises:
        MalformedMessageError: It is none.
    """
    if len(data) > limit:
        raise MalformedMessageError(
            f"the message has {len(data)} bytes; at most {limit} are read", name="too_large"
        )
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise MalformedMessageError(f"not JSON: {error}", name="not_json") from None
    if not isinstance(value, dict):
        raise MalformedMessageError(name="not_object")
    return value


def decode(data: bytes | str, *, limit: int = MESSAGE_MAX_BYTES) -> Message:
    """Parse one message. Nothing about it is proven yet: see `security.verify_message`.

    Raises:
        UnsupportedVersionError: Its `version` is not 1.0.
        MalformedMessageError: It is not a message of this protocol.
    """
    return parse(loads(data, limit=limit), data if isinstance(data, bytes) else data.encode())


def parse(envelope: dict[str, Any], wire: bytes) -> Message:
    """Turn a parsed envelope and the bytes it came from into a Message; see `decode`."""
    try:
        _check(envelope, 1)
        version = envelope.get("version")
        if isinstance(version, str) and version != PROTOCOL_VERSION:
            raise UnsupportedVersionError(
                f"version {version!r} is not spoken here, only {PROTOCOL_VERSION}", field="version"
            )
        if "version" not in envelope or "timestamp" not in envelope or "id" not in envelope:
            missing = next(key for key in ("id", "timestamp", "version") if key not in envelope)
            raise MalformedMessageError(f"{missing} is missing", name="missing_field", field=missing)
        if "from_" in envelope:
            raise MalformedMessageError(name="unknown_field", field="from_")
        message = Message.model_validate(envelope)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "payload"
        raise MalformedMessageError(
            f"{field}: {first['msg']}", field=field, message_id=_readable_id(envelope)
        ) from None
    except MessageError as error:
        error.message_id = _readable_id(envelope)
        raise
    message._wire = wire
    return message


def _readable_id(envelope: dict[str, Any]) -> str | None:
    value = envelope.get("id")
    return value if isinstance(value, str) and len(value) == 36 else None
