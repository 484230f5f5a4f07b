from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, Field

from aiconexus.core.capabilities import capabilities_of, capability
from aiconexus.core.input import Input
from aiconexus.protocol.errors import CapabilityError, InvalidArgumentsError, MalformedMessageError
from aiconexus.protocol.serialization import canonicalize


class Clause(BaseModel):
    text: str
    page: int = Field(ge=1)


class Notary:
    @capability(tags=["legal"], version="2.1", metadata={"languages": ["en"]})
    async def extract(self, text: str, kinds: list[str], limit: int = 10) -> list[Clause]:
        """Return the clauses
        of a contract.

        Not announced: how it is done.
        """
        return [Clause(text=text, page=1) for _ in kinds[:limit]]

    @capability
    async def when(self, at: datetime, note: Annotated[str, Field(max_length=5)] = "") -> datetime:
        return at

    @capability(name="Echo!", description="As it is.")
    async def echo(self, value: Any, **more: int) -> Any:
        return more or value

    @capability
    async def broken(self) -> int:
        return "many"  # type: ignore[return-value]

    async def private(self) -> None: ...

    def __repr__(self) -> str:
        raise AssertionError("a subclass may not be ready for its repr yet")


def test_schema_comes_from_the_hints() -> None:
    extract = capabilities_of(Notary())["extract"].announced
    assert extract.description == "Return the clauses of a contract."
    assert (extract.tags, extract.version, extract.metadata) == (["legal"], "2.1", {"languages": ["en"]})
    assert extract.input == {
        "type": "object",
        "properties": {
            "text": {"type": "string"},
            "kinds": {"type": "array", "items": {"type": "string"}},
            "limit": {"type": "integer", "default": 10},
        },
        "required": ["text", "kinds"],
        "additionalProperties": False,
    }
    assert extract.output is not None
    assert extract.output["items"] == {"$ref": "#/$defs/Clause"}


def test_only_decorated_methods_are_announced_in_the_order_of_their_definition() -> None:
    assert list(capabilities_of(Notary())) == ["extract", "when", "Echo!", "broken"]


def test_subclass_adds_replaces_and_withdraws() -> None:
    class Special(Notary):
        @capability
        async def more(self) -> None: ...

        @capability(version="3")
        async def when(self, at: str) -> str:  # type: ignore[override]
            return at

        async def broken(self) -> int:
            return 1

    found = capabilities_of(Special())
    assert list(found) == ["extract", "when", "Echo!", "more"]
    assert found["when"].announced.version == "3"


async def test_arguments_are_checked_and_defaults_are_the_methods_own() -> None:
    extract = capabilities_of(Notary())["extract"]
    result = await extract.call({"text": "a", "kinds": ["x"] * 12})
    assert extract.serialize(result) == [{"text": "a", "page": 1}] * 10


@pytest.mark.parametrize(
    ("name", "args", "text"),
    [
        ("extract", {"text": "a"}, "kinds: Missing required argument"),
        ("extract", {"text": 5, "kinds": []}, "text: Input should be a valid string"),
        ("extract", {"text": "a", "kinds": "x"}, "kinds: Input should be a valid"),
        ("extract", {"text": "a", "kinds": [], "limit": "3"}, "limit: Input should be a valid integer"),
        ("extract", {"text": "a", "kinds": [], "limit": True}, "limit: Input should be a valid integer"),
        ("extract", {"text": "a", "kinds": [], "self": 1}, "self: Unexpected keyword argument"),
        ("extract", {"text": "a", "kinds": [], "colour": 1}, "colour: Unexpected keyword argument"),
        ("when", {"at": "tomorrow"}, "at: Input should be a valid datetime"),
        ("when", {"at": "2026-01-12T10:00:00Z", "note": "too long"}, "note: String should have at most 5"),
    ],
)
def test_argument_that_does_not_fit_is_named(name: str, args: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidArgumentsError, match=text):
        capabilities_of(Notary())[name].call(args)


async def test_json_forms_become_python_values_and_back() -> None:
    when = capabilities_of(Notary())["when"]
    result = await when.call({"at": "2026-01-12T10:00:00Z"})
    assert isinstance(result, datetime)
    assert when.serialize(result) == "2026-01-12T10:00:00Z"


async def test_free_arguments_are_checked_too() -> None:
    echo = capabilities_of(Notary())["Echo!"]
    assert await echo.call({"value": 1, "x": 2}) == {"x": 2}
    with pytest.raises(InvalidArgumentsError, match="x: Input should be a valid integer"):
        echo.call({"value": 1, "x": "2"})


async def test_result_that_breaks_its_promise_is_an_error() -> None:
    broken = capabilities_of(Notary())["broken"]
    with pytest.raises(CapabilityError, match="the result is not what the capability promises"):
        broken.serialize(await broken.call({}))


def test_result_without_json_form_is_an_error() -> None:
    with pytest.raises(CapabilityError, match="no JSON form"):
        capabilities_of(Notary())["Echo!"].serialize(object())


def test_result_that_is_not_a_number_does_not_become_null() -> None:
    found = capabilities_of(Notary())["Echo!"].serialize({"score": math.nan})
    assert isinstance(found, dict)
    assert found["score"] is not None  # it has no canonical form, so the caller is told
    with pytest.raises(MalformedMessageError):
        canonicalize({"score": found["score"]})


def _sync(self: object) -> None: ...


async def _positional(self: object, a: int, /) -> None: ...


async def _variadic(self: object, *values: int) -> None: ...


async def _deadline(self: object, timeout: float) -> None: ...


async def _without_self() -> None: ...


async def _other_first(text: str) -> None: ...


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (_sync, "capability _sync: neither an async method nor an async generator; write `async def`"),
        (_without_self, "its first parameter is not `self`"),
        (staticmethod(_positional), "its first parameter is not `self`"),
        (classmethod(_positional), "its first parameter is not `self`"),
        (_other_first, "its first parameter is not `self`"),
        (_positional, "arguments travel by name"),
        (_variadic, "arguments travel by name"),
        (_deadline, "Peer.execute takes `timeout` itself"),
    ],
)
def test_method_that_others_could_not_call_is_refused(method: Callable[..., Any], text: str) -> None:
    with pytest.raises(TypeError, match=text):
        capability(method)


def test_hint_without_json_schema_is_refused_with_the_name_of_the_capability() -> None:
    class Thing: ...

    class Odd:
        @capability
        async def odd(self, number: int, event: Callable[[], None]) -> None: ...

    class Odder:
        @capability
        async def odd(self) -> Thing: ...  # type: ignore[empty-body]

    # As with `from __future__ import annotations` in a module of its own.
    Odder.odd.__annotations__["return"] = Thing
    cases = ((Odd, r"Odd\.odd: .* of event \(.*\)"), (Odder, r"Odder\.odd: .* of the result \(.*\)"))
    for kind, where in cases:
        with pytest.raises(TypeError, match=rf"^capability {where}: use a pydantic model or a dataclass$"):
            capabilities_of(kind())


def test_hint_of_a_stream_belongs_to_an_async_generator() -> None:
    class Returns:
        @capability
        async def numbers(self, it: Any) -> AsyncIterator[int]:
            return it  # type: ignore[no-any-return]

    class Yields:
        @capability
        async def numbers(self) -> int:  # type: ignore[misc]
            yield 1

    with pytest.raises(TypeError, match=r"capability Returns\.numbers: .*yield instead of return"):
        capabilities_of(Returns())
    with pytest.raises(TypeError, match=r"Yields\.numbers: .* an AsyncIterator\[...\], not int"):
        capabilities_of(Yields())


def test_async_generator_may_leave_open_what_it_yields() -> None:
    class Open:
        @capability
        async def bare(self) -> AsyncIterator:  # type: ignore[type-arg]
            yield 1

        @capability
        async def nothing(self):  # type: ignore[no-untyped-def]
            yield 1

    assert [method.announced.output for method in capabilities_of(Open()).values()] == [{}, {}]


def test_decorator_is_not_given_its_tags_as_text() -> None:
    with pytest.raises(TypeError, match=r"'legal' is no method: use @capability\(tags=\[...\]\)"):
        capability("legal")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="tags is a list of tags, not one string"):
        capability(tags="legal")


def test_capability_that_cannot_be_announced_is_refused_in_one_line() -> None:
    class Nameless:
        @capability(tags=[""] * 1_000, description="x" * 5_000)
        async def talk(self) -> None: ...

    with pytest.raises(TypeError, match=r"^capability Nameless\.talk: it cannot be announced: [^\n]*$"):
        capabilities_of(Nameless())


def test_two_capabilities_of_one_name_are_refused() -> None:
    class Twice:
        @capability(name="same")
        async def one(self) -> None: ...

        @capability(name="same")
        async def two(self) -> None: ...

    with pytest.raises(ValueError, match="two capabilities of the name 'same'"):
        capabilities_of(Twice())


def test_more_capabilities_than_the_gateway_keeps_are_refused() -> None:
    def make(index: int) -> Callable[..., Any]:
        @capability(name=f"c{index}")
        async def method(self: object) -> None: ...

        return method

    many = type("Many", (), {f"c{index}": make(index) for index in range(33)})
    with pytest.raises(ValueError, match="Many announces 33 capabilities"):
        capabilities_of(many())


def test_long_description_is_cut() -> None:
    class Talker:
        @capability(description=None)
        async def talk(self) -> None: ...

    Talker.talk.__doc__ = "word " * 1_000
    description = capabilities_of(Talker())["talk"].announced.description
    assert len(description) == 1_024
    assert description.endswith("…")


# --- a parameter that is a stream ------------------------------------------------------------------


class Scale:
    @capability
    async def weigh(self, data: AsyncIterator[bytes], unit: str = "g") -> str:
        return f"{sum([len(chunk) async for chunk in data])} {unit}"

    @capability
    async def name(self, value: str = "") -> str:
        return value


def stream_of(*chunks: bytes) -> Input:
    stream = Input(lambda _: None, lambda: None)
    for chunk in chunks:
        stream.add(chunk)
    stream.end()
    return stream


async def test_stream_may_come_as_one_or_as_a_whole() -> None:
    weigh = capabilities_of(Scale())["weigh"]
    assert await weigh.call({"data": stream_of(b"ab", b"c")}) == "3 g"
    assert await weigh.call({"data": b"abcd", "unit": "t"}) == "4 t"
    assert await weigh.call({"data": "_-8="}) == "2 g"


@pytest.mark.parametrize("data", ["!!!!", "AAE", "AA EC", "é", 7, None, ["AAEC"]])
def test_stream_of_something_else_is_refused(data: Any) -> None:
    with pytest.raises(InvalidArgumentsError, match=r"^data: .*give bytes, or an async iterator of bytes$"):
        capabilities_of(Scale())["weigh"].call({"data": data})


def test_stream_is_required_and_no_other_parameter_takes_one() -> None:
    methods = capabilities_of(Scale())
    with pytest.raises(InvalidArgumentsError, match="data: Missing required argument"):
        methods["weigh"].call({})
    with pytest.raises(InvalidArgumentsError, match="value: takes no stream"):
        methods["name"].call({"value": stream_of()})


def test_argument_without_a_name_is_unknown() -> None:
    for value in (b"x", "AAEC", 7):
        with pytest.raises(InvalidArgumentsError, match="Unexpected keyword argument"):
            capabilities_of(Scale())["name"].call({"": value})
