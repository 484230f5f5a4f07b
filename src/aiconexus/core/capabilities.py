"""Capabilities: async methods that other agents may call, described by JSON Schemas from their hints.

One that is an async generator streams: what it yields are the parts of its result. A parameter that is an
`AsyncIterator[bytes]` streams, too: the method reads it as the caller sends it.
"""

from __future__ import annotations

import inspect
from base64 import b64decode
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Final, TypeVar, get_args, get_origin, get_type_hints, overload

import orjson
from pydantic import (
    ConfigDict,
    JsonValue,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
)
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import CoreSchema, PydanticSerializationError, core_schema

from aiconexus.core.input import Input, whole
from aiconexus.protocol.attachments import Value
from aiconexus.protocol.errors import CapabilityError, InvalidArgumentsError
from aiconexus.protocol.limits import CAPABILITIES_MAX, CAPABILITIES_MAX_BYTES
from aiconexus.protocol.models import Capability

_MARK: Final = "__aiconexus_capability__"
_DESCRIPTION_MAX: Final = 1_024  # characters; protocol.models.Capability refuses more
_RESERVED: Final = frozenset({"timeout", "on_progress", "on_receipt"})  # Peer.execute takes them itself
ADAPTERS_MAX: Final = 16  # of a method: one for each argument that came as bytes, and for each set of them
_STREAMS: Final = (AsyncGenerator, AsyncIterator, AsyncIterable)

Method = TypeVar("Method", bound=Callable[..., Coroutine[Any, Any, Any] | AsyncIterator[Any]])


@dataclass(frozen=True)
class _Mark:
    """What the decorator was given; read again when an agent object is made."""

    name: str | None = None
    description: str | None = None
    tags: Sequence[str] = ()
    version: str = "1.0"
    metadata: dict[str, JsonValue] = field(default_factory=dict)


@overload
def capability(method: Method, /) -> Method: ...
@overload
def capability(
    *,
    name: str | None = None,
    description: str | None = None,
    tags: Sequence[str] = (),
    version: str = "1.0",
    metadata: dict[str, JsonValue] | None = None,
) -> Callable[[Method], Method]: ...
def capability(
    method: Method | None = None,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    tags: Sequence[str] = (),
    version: str = "1.0",
    metadata: dict[str, JsonValue] | None = None,
) -> Method | Callable[[Method], Method]:
    """Offer an async method of an Agent to other agents.

    Its parameters and its result are checked against their type hints; unknown arguments are refused. An
    async generator streams its result: each part is checked. Bytes travel as they are where they are a whole
    argument, result or part; deeper inside they are base64 (RFC 4648 section 5), and may be so anywhere.

    Args:
        method: The method, where the decorator is used without parentheses.
        name: What others call; the method's name if None.
        description: For people and language models; the docstring's first paragraph if None.
        tags: What it can be found by.
        version: Of the capability, not of the protocol.
        metadata: Anything else to announce.

    Raises:
        TypeError: It is not an async method, or others could not call it.
    """
    if isinstance(method, str):
        raise TypeError(f"{method!r} is no method: use @capability(tags=[...])")
    if isinstance(tags, str):
        raise TypeError("tags is a list of tags, not one string")
    mark = _Mark(name, description, tuple(tags), version, metadata or {})

    def decorate(method: Method) -> Method:
        if isinstance(method, staticmethod | classmethod):
            raise TypeError(f"capability {_full_name(method)}: its first parameter is not `self`")
        if not inspect.iscoroutinefunction(method) and not inspect.isasyncgenfunction(method):
            raise TypeError(
                f"capability {_full_name(method)}: neither an async method nor an async generator; "
                "write `async def`"
            )
        parameters = list(inspect.signature(method).parameters.values())
        # A decorator below this one may take all that there is as `*args`.
        if not parameters or (
            parameters[0].name != "self" and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL
        ):
            raise TypeError(f"capability {_full_name(method)}: its first parameter is not `self`")
        for parameter in parameters[1:]:
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
                raise TypeError(
                    f"capability {_full_name(method)}: arguments travel by name, "
                    f"{parameter} cannot be given one"
                )
            if parameter.name in _RESERVED:
                raise TypeError(
                    f"capability {_full_name(method)}: Peer.execute takes `{parameter.name}` itself; "
                    "call the parameter otherwise"
                )
        setattr(method, _MARK, mark)
        return method

    return decorate if method is None else decorate(method)


class CapabilityMethod:
    """One capability of one agent object: what it announces, and how it is called.

    Attributes:
        announced: What the gateway and other agents are told.
        is_stream: Whether its result comes in parts.
    """

    def __init__(self, method: Callable[..., Any], mark: _Mark) -> None:
        self.is_stream: Final = inspect.isasyncgenfunction(method)
        try:
            self._method = method
            self._hints = get_type_hints(method, include_extras=True)
            self._input = _input_of(method, self._hints)
            self._parameters = inspect.signature(method).parameters
            self._bytes_adapter = lru_cache(ADAPTERS_MAX)(self._new_bytes_adapter)
            self._arguments_without = lru_cache(ADAPTERS_MAX)(partial(_arguments, method))
            arguments = self._arguments_without(frozenset({self._input} if self._input else ()))
            self._result = _result_adapter(_result_hint(self._hints.get("return", Any), self.is_stream))
            self.announced: Final = Capability(
                name=mark.name or _name(method),
                description=_describe(method) if mark.description is None else mark.description,
                tags=list(mark.tags),
                version=mark.version,
                input=_with_input(arguments.json_schema(schema_generator=_Schema), self._input),
                output=self._result.json_schema(mode="serialization", schema_generator=_Schema),
                stream=self.is_stream,
                metadata=mark.metadata,
            )
        except PydanticUserError as error:
            text = _without_schema(self._hints) or error.message
            raise TypeError(
                f"capability {_full_name(method)}: no JSON Schema can be made of {text}"
            ) from error
        except ValidationError as error:
            text = _explain(error)
            raise TypeError(f"capability {_full_name(method)}: it cannot be announced: {text}") from error
        except Exception as error:  # TypeError of this module, NameError of a hint
            raise TypeError(f"capability {_full_name(method)}: {error}") from error

    def call(self, args: dict[str, Any]) -> Any:
        """Return the coroutine, or the async generator, of one execution; nothing of it has run yet.

        Args:
            args: By name: JSON, bytes, and `Input` for the one that streams.

        Raises:
            InvalidArgumentsError: `args` does not fit the hints.
        """
        whole: dict[str, JsonValue] = {}
        apart: dict[str, Any] = {}
        for name, value in args.items():
            if self._input and name == self._input:
                apart[name] = self._stream(value)
            elif isinstance(value, bytes):
                apart[name] = self._check_bytes(name, value)
            elif isinstance(value, Input):
                raise InvalidArgumentsError(f"{name}: takes no stream", self.announced.name)
            else:
                whole[name] = value
        if self._input and self._input not in apart:
            raise InvalidArgumentsError(f"{self._input}: Missing required argument", self.announced.name)
        try:
            # JSON mode: a datetime comes as text, a tuple as an array; "1" is still not an int.
            begin = self._arguments_without(frozenset(apart)).validate_json(orjson.dumps(whole))
        except ValidationError as error:
            raise InvalidArgumentsError(_explain(error), self.announced.name) from None
        return begin(**apart)

    def _check_bytes(self, name: str, value: bytes) -> Any:
        """Check an argument that did not come as JSON."""
        if name not in self._parameters:
            raise InvalidArgumentsError(f"{name}: Unexpected keyword argument", self.announced.name)
        try:
            return self._bytes_adapter(name).validate_python(value)
        except ValidationError as error:
            raise InvalidArgumentsError(f"{name}: {_explain(error)}", self.announced.name) from None

    def _new_bytes_adapter(self, name: str) -> TypeAdapter[Any]:
        try:
            return TypeAdapter(self._hints.get(name, Any), config=ConfigDict(strict=True))
        except PydanticUserError:  # a model has its own configuration
            return TypeAdapter(self._hints[name])

    def _stream(self, value: Any) -> AsyncIterator[bytes]:
        if isinstance(value, str):
            try:
                value = b64decode(value, b"-_", validate=True)
            except ValueError:
                raise self._no_stream() from None
        if isinstance(value, bytes):
            return whole(value)
        if not isinstance(value, Input):
            raise self._no_stream()
        return value

    def _no_stream(self) -> InvalidArgumentsError:
        text = f"{self._input}: takes a stream of bytes: give bytes, or an async iterator of bytes"
        return InvalidArgumentsError(text, self.announced.name)

    def serialize(self, result: Any) -> Value:
        """Return the JSON, or the bytes, of what the method returned or yielded.

        Raises:
            CapabilityError: That is not what its hint promises.
        """
        try:
            checked = self._result.validate_python(result)
            if isinstance(checked, bytes | bytearray | memoryview):
                return bytes(checked)
            value: JsonValue = self._result.dump_python(checked, mode="json")
        except ValidationError as error:
            text = f"the result is not what the capability promises: {_explain(error)}"
            raise CapabilityError(text, self.announced.name) from error
        except PydanticSerializationError as error:
            raise CapabilityError(f"the result has no JSON form: {error}", self.announced.name) from error
        return value


def capabilities_of(agent: object, base: type = object) -> dict[str, CapabilityMethod]:
    """Collect the capabilities of an agent object by name, in the order of their definition.

    Args:
        agent: What has them.
        base: The class whose own attributes none of them may replace.

    Raises:
        TypeError: No JSON Schema can be made for one, or it replaces what the agent itself needs.
        ValueError: Two have one name, or they are too many or too large to announce.
    """
    found: dict[str, CapabilityMethod] = {}
    kind = type(agent)
    for attribute in dict.fromkeys(name for base in reversed(kind.__mro__) for name in vars(base)):
        mark = getattr(inspect.getattr_static(kind, attribute), _MARK, None)
        if not isinstance(mark, _Mark):
            continue
        if hasattr(base, attribute):
            raise TypeError(
                f"capability {kind.__name__}.{attribute} replaces {base.__name__}.{attribute}: "
                f'call the method otherwise, with @capability(name="{mark.name or attribute}")'
            )
        method = CapabilityMethod(getattr(agent, attribute), mark)
        name = method.announced.name
        if name in found:
            raise ValueError(f"{kind.__name__} has two capabilities of the name {name!r}")
        found[name] = method
    size = len(orjson.dumps([method.announced.model_dump(mode="json") for method in found.values()]))
    if len(found) > CAPABILITIES_MAX or size > CAPABILITIES_MAX_BYTES:
        raise ValueError(
            f"{kind.__name__} announces {len(found)} capabilities in {size} bytes; "
            f"at most {CAPABILITIES_MAX} in {CAPABILITIES_MAX_BYTES} fit"
        )
    return found


class _Schema(GenerateJsonSchema):
    """JSON Schema 2020-12 without the titles that only repeat the names: the gateway's room is short."""

    def field_title_should_be_set(self, schema: CoreSchema | core_schema.ModelField) -> bool:
        return False


def _result_adapter(hint: Any) -> TypeAdapter[Any]:
    try:
        # Otherwise NaN and infinity would travel as null where the hint says nothing.
        return TypeAdapter(hint, config=ConfigDict(ser_json_inf_nan="constants", ser_json_bytes="base64"))
    except PydanticUserError:  # a model has its own configuration
        return TypeAdapter(hint)


def _result_hint(hint: Any, is_stream: bool) -> Any:
    """Return the hint of what a method returns, or of what an async generator yields.

    Raises:
        TypeError: The hint is that of the other.
    """
    if ((get_origin(hint) or hint) in _STREAMS) is is_stream:
        return (*get_args(hint), Any)[0] if is_stream else hint
    if not is_stream:
        raise TypeError("its hint promises a stream: yield instead of return")
    if hint is not Any:
        raise TypeError(f"it yields, so its hint is an AsyncIterator[...], not {_text_of(hint)}")
    return Any


def _without_schema(hints: dict[str, Any]) -> str:
    """Tell which hint pydantic can make no JSON Schema of, and what to do; "" if it can of each."""
    for name, hint in hints.items():
        is_stream = get_origin(hint) in _STREAMS
        try:
            TypeAdapter((*get_args(hint), Any)[0] if is_stream else hint).json_schema()
        except PydanticUserError:
            what = "the result" if name == "return" else name
            return f"{what} ({_text_of(hint)}): use a pydantic model or a dataclass"
    return ""


def _text_of(hint: Any) -> str:
    is_class = isinstance(hint, type) and not get_args(hint)
    return hint.__qualname__.rpartition("<locals>.")[2] if is_class else str(hint)


def _input_of(method: Callable[..., Any], hints: dict[str, Any]) -> str:
    """Return which parameter is a stream of bytes; "" if none is.

    Raises:
        TypeError: Several are, or one of something else.
    """
    streams = [
        name for name in inspect.signature(method).parameters if get_origin(hints.get(name)) in _STREAMS
    ]
    if len(streams) > 1:
        raise TypeError(f"{' and '.join(streams)} are streams; one can be")
    if streams and get_args(hints[streams[0]])[:1] != (bytes,):
        raise TypeError(f"{streams[0]} is a stream of something else than bytes")
    return streams[0] if streams else ""


def _with_input(schema: dict[str, Any], name: str) -> dict[str, Any]:
    """Add a stream of bytes to the JSON Schema of the other arguments."""
    if name:
        schema.setdefault("properties", {})[name] = {"type": "string", "format": "binary", "stream": True}
        schema.setdefault("required", []).append(name)
    return schema


def _arguments(method: Callable[..., Any], apart: frozenset[str]) -> TypeAdapter[Any]:
    """Return what checks the arguments of a method that come as JSON, and returns what takes those `apart`.

    Only that calls the method: a ValidationError is about the arguments, never from inside. It is a plain
    function, as pydantic asks a bound method for the repr of its agent, which a subclass may have defined
    over attributes that it has not set yet.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return partial(method, *args, **kwargs)

    signature = inspect.signature(method)
    kept = [parameter for name, parameter in signature.parameters.items() if name not in apart]
    call.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    call.__annotations__ = {name: hint for name, hint in method.__annotations__.items() if name not in apart}
    call.__module__, call.__name__, call.__qualname__ = method.__module__, _name(method), _name(method)
    function: Any = call
    return TypeAdapter(function, config=ConfigDict(strict=True, val_json_bytes="base64"))


def _name(method: Callable[..., Any]) -> str:
    return method.__name__


def _full_name(method: Callable[..., Any]) -> str:
    """Return the names of its class and itself, for whoever has to look for it."""
    return method.__qualname__.rpartition("<locals>.")[2]


def _describe(method: Callable[..., Any]) -> str:
    paragraph = (inspect.getdoc(method) or "").split("\n\n")[0].replace("\n", " ")
    return paragraph if len(paragraph) <= _DESCRIPTION_MAX else paragraph[: _DESCRIPTION_MAX - 1] + "…"


def _explain(error: ValidationError) -> str:
    """Put a ValidationError into one line, without the values: they may be secret, or long."""
    faults = []
    for fault in error.errors(include_url=False, include_context=False, include_input=False):
        where = ".".join(str(part) for part in fault["loc"])
        faults.append(f"{where}: {fault['msg']}" if where else fault["msg"])
    return "; ".join(faults)
