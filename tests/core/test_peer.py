"""Calls between two connected agents, over a real DataChannel on 127.0.0.1."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import re
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from datetime import date
from typing import Any

import pytest
from switchboard import Switchboard, Workshop

from aiconexus.core import Peer, PeerState, detach
from aiconexus.core import peer as peer_module
from aiconexus.core.calls import Calls
from aiconexus.core.keepalive import KeepAlive
from aiconexus.core.peer import ACCEPTED_MAX, RUNNING_MAX
from aiconexus.core.pings import PingTexts
from aiconexus.protocol import ErrorPayload, Message, encode
from aiconexus.protocol.errors import (
    CallBusyError,
    CallError,
    CallTimeoutError,
    CapabilityError,
    InvalidArgumentsError,
    MalformedMessageError,
    PeerLostError,
    RemoteError,
    UnknownCapabilityError,
)
from aiconexus.protocol.limits import (
    DATA_MESSAGE_MAX_BYTES,
    PEER_IDLE_SECONDS,
    PEER_PING_INTERVAL_SECONDS,
)

Pair = tuple[Workshop, Workshop]


@pytest.fixture
async def peer(pair: Pair) -> AsyncIterator[Peer]:
    """The second agent, as the first sees it."""
    async with pair[0].connect(pair[1].did) as peer:
        yield peer


async def raw_reply(peer: Peer, text: str | bytes) -> dict[str, Any]:
    """Send `text` as it is and return what comes back."""
    loop = asyncio.get_running_loop()
    reply: asyncio.Future[str | bytes] = loop.create_future()
    peer._channel.receive(lambda data: None if reply.done() else reply.set_result(data))
    try:
        peer._channel._channel.send(text)
        message: dict[str, Any] = json.loads(await asyncio.wait_for(reply, 10))
    finally:
        peer._channel.receive(peer._receive)
    return message


def execute(calls: Calls, capability: str, args: dict[str, Any], timeout: float) -> tuple[str, str]:
    """Return the id of an EXEC_REQUEST, and its text."""
    id_ = calls.execute(capability, args, timeout)
    text = calls.outbox.take()
    assert isinstance(text, str)
    return id_, text


def stall(peer: Peer) -> Callable[[], Awaitable[None]]:
    """Let nothing leave at this side; return what lets it go again."""
    sctp = peer._connection._pc.sctp
    assert sctp is not None
    transmit = sctp._transmit

    async def nothing() -> None: ...

    async def resume() -> None:
        sctp._transmit = transmit
        await transmit()

    sctp._transmit = nothing
    return resume


def slow_down(peer: Peer, bytes_per_second: float) -> None:
    """Put a link of this speed behind this side, with its queue."""
    assert peer._connection._pc.sctp is not None
    dtls = peer._connection._pc.sctp.transport
    send, loop = dtls._send_data, asyncio.get_running_loop()
    free_at = loop.time()

    async def send_slowly(data: bytes) -> None:
        nonlocal free_at
        free_at = max(free_at, loop.time()) + len(data) / bytes_per_second
        await asyncio.sleep(free_at - loop.time())
        await send(data)

    dtls._send_data = send_slowly


def count_requests(peer: Peer, count: int) -> tuple[asyncio.Event, Callable[[], int]]:
    """Return an event for `count` messages having arrived, and the most executions so far."""
    arrived, left, most = asyncio.Event(), count, 0

    def receive(data: str | bytes) -> None:
        nonlocal left, most
        peer._receive(data)
        left, most = left - 1, max(most, len(peer._executions))
        if left == 0:
            arrived.set()

    peer._channel.receive(receive)
    return arrived, lambda: most


async def closing(peer: Peer) -> None:
    """Wait until it asks whether it may be closed."""
    while peer.state is not PeerState.CLOSING:  # noqa: ASYNC110 -- loop passes until it asks
        await asyncio.sleep(0)


# --- calls -------------------------------------------------------------------------------------


async def test_result_comes_back(peer: Peer) -> None:
    assert await peer.execute("add", a=40, b=2) == 42
    assert await peer.execute("echo", value={"deep": [1, 2.5, None, "ü", True]}) == {
        "deep": [1, 2.5, None, "ü", True]
    }
    assert await peer.execute("echo", value=date(2026, 1, 12)) == "2026-01-12"


async def test_many_calls_at_once_find_their_answers(peer: Peer) -> None:
    results = await asyncio.gather(*(peer.execute("add", a=number) for number in range(100)))
    assert results == list(range(1, 101))


async def test_both_sides_call_at_once(pair: Pair, peer: Peer) -> None:
    one, two = pair
    back = two.peers[one.did]
    results = await asyncio.gather(
        *(side.execute("add", a=number) for number in range(20) for side in (peer, back))
    )
    assert results == [number + 1 for number in range(20) for _ in range(2)]


async def test_what_is_too_large_is_an_error_here(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detach, "ATTACHMENTS_MAX_BYTES", 1_000_000)
    monkeypatch.setattr(detach, "ATTACHED_JSON_MAX_BYTES", 500_000)
    fits = "x" * 499_000
    assert await peer.execute("echo", value=fits) == fits
    for value in ("x" * 500_000, b"x" * 1_000_001):
        with pytest.raises(
            InvalidArgumentsError, match="at most 1000000 are kept, and 500000 of JSON: stream"
        ):
            await peer.execute("echo", value=value)
    with pytest.raises(CapabilityError, match="at most 1000000 are kept, and 500000 of JSON: stream"):
        await peer.execute("blocks", count=1, size=1_000_001)
    with pytest.raises(MalformedMessageError, match="at most 262144 can be sent"):
        await peer.intent("x" * DATA_MESSAGE_MAX_BYTES)
    assert await peer.execute("add", a=1) == 2


async def test_intent_and_quote(peer: Peer) -> None:
    quote = await peer.intent("Draw me a sheep", context={"paper": "A4"})
    assert (quote.status, quote.required_input, quote.cost) == ("Draw me a sheep", ["text"], "0.50 EUR")
    assert (await peer.intent(task="draw", params={"what": "sheep"})).status == "draw"


async def test_intent_without_content_is_a_type_error(peer: Peer) -> None:
    with pytest.raises(TypeError, match="needs a query or a task"):
        await peer.intent()
    with pytest.raises(MalformedMessageError, match="no JSON form"):
        await peer.intent("x", context=object())


async def test_ping_measures_a_round_trip(peer: Peer) -> None:
    assert 0 < await peer.ping() < 10


async def test_ping_without_a_pong_in_time_fails_and_a_late_one_is_nothing(pair: Pair, peer: Peer) -> None:
    resume = stall(pair[1].peers[pair[0].did])
    with pytest.raises(CallTimeoutError, match=r"no answer from .* in 0\.05 s"):
        await peer.ping(timeout=0.05)
    await resume()
    assert 0 < await peer.ping() < 10
    assert peer.refused == 0


async def ping_answered_by(peer: Peer, answer: Callable[[str], str], *, is_cancelled: bool = False) -> None:
    """Send a PING, and let the text that `answer` returns for its id come back before the real one."""
    ping = asyncio.ensure_future(peer.ping())
    await asyncio.sleep(0)
    text = answer(next(iter(peer._pongs)))
    if is_cancelled:
        ping.cancel()
    peer._receive(text)
    await ping


async def test_pong_may_come_when_whoever_waited_is_cancelled(pair: Pair, peer: Peer) -> None:
    pong = PingTexts(pair[1].did, pair[0].did).pong
    with pytest.raises(asyncio.CancelledError):
        await ping_answered_by(peer, pong, is_cancelled=True)
    assert 0 < await peer.ping() < 10


async def test_ping_fails_when_it_is_refused(pair: Pair, peer: Peer) -> None:
    payload = ErrorPayload.for_cause("busy", "not now")
    with pytest.raises(RemoteError, match="not now"):
        await ping_answered_by(
            peer,
            lambda id_: encode(
                Message.create(pair[1].did, pair[0].did, payload, correlation_id=id_)
            ).decode(),
        )


async def test_ping_fails_when_its_pong_is_none(pair: Pair, peer: Peer) -> None:
    pong = PingTexts(pair[1].did, pair[0].did).pong
    with pytest.raises(CallError, match="cannot be used"):
        await ping_answered_by(peer, lambda id_: pong(id_).replace("{}", '{"sequence":"x"}'))


async def test_ping_fails_with_the_connection(pair: Pair, peer: Peer) -> None:
    stall(pair[1].peers[pair[0].did])
    ping = asyncio.ensure_future(peer.ping())
    await asyncio.sleep(0)
    await peer.close()
    with pytest.raises(PeerLostError, match="this side closed the connection"):
        await ping


# --- each error its class ------------------------------------------------------------------------


async def test_unknown_capability_tells_what_there_is(peer: Peer) -> None:
    with pytest.raises(UnknownCapabilityError, match="no capability 'fly'; there is: add, echo") as caught:
        await peer.execute("fly")
    assert caught.value.capability == "fly"


async def test_bad_argument_is_named(peer: Peer) -> None:
    with pytest.raises(InvalidArgumentsError, match=r"^a: Input should be a valid integer$"):
        await peer.execute("add", a="one")
    with pytest.raises(InvalidArgumentsError, match=r"^c: Unexpected keyword argument$"):
        await peer.execute("add", a=1, c=2)


async def test_exception_is_an_error_and_the_channel_lives_on(
    peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(CapabilityError, match=r"^ValueError: the page is torn$"):
        await peer.execute("fail", text="the page is torn")
    with pytest.raises(CapabilityError, match=r"^ValueError$"):
        await peer.execute("fail", text="")
    assert await peer.execute("add", a=1) == 2
    # The traceback stays where it belongs.
    record = next(record for record in caplog.records if record.exc_info)
    assert record.getMessage().startswith("fail of <Workshop did:key:")


async def test_exception_of_on_intent_is_an_error(peer: Peer) -> None:
    with pytest.raises(RemoteError, match=r"^RuntimeError: no idea$"):
        await peer.intent("fail")


async def test_timeout_cancels_there_too(pair: Pair, peer: Peer) -> None:
    with pytest.raises(CallTimeoutError, match=r"no answer from did:key:z6Mk….. in 0\.2 s") as caught:
        await peer.execute("wait", timeout=0.2)
    assert isinstance(caught.value, TimeoutError)
    await asyncio.wait_for(pair[1].cancelled.wait(), 10)
    assert await peer.execute("add", a=1) == 2


async def test_callee_enforces_the_deadline_by_itself(pair: Pair, peer: Peer) -> None:
    calls = Calls(pair[0]._key, pair[1].did)
    _, request = execute(calls, "wait", {}, 0.1)
    response = await raw_reply(peer, request)
    assert response["payload"]["status"] == "error"
    assert response["payload"]["error"] == "no result in 0.1 s"
    assert response["payload"]["execution_time_ms"] >= 100
    assert response["ext"] == {"error": {"name": "timeout"}}
    assert pair[1].cancelled.is_set()


async def test_cancelling_the_caller_cancels_there_too(pair: Pair, peer: Peer) -> None:
    call = asyncio.ensure_future(peer.execute("wait"))
    await pair[1].started.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.wait_for(pair[1].cancelled.wait(), 10)


async def test_cancel_that_comes_with_its_request_is_answered(pair: Pair, peer: Peer) -> None:
    # Before the capability has run a single step.
    calls = Calls(pair[0]._key, pair[1].did)
    id_, request = execute(calls, "wait", {}, 10.0)
    cancel = calls.abandon(id_)
    assert cancel is not None
    there = pair[1].peers[pair[0].did]
    sent = asyncio.ensure_future(raw_reply(peer, calls.ping()[1]))
    there._receive(request)
    there._receive(cancel)
    response = await sent
    assert response["payload"]["status"] == "cancelled"
    assert not pair[1].started.is_set()


async def test_calls_beyond_what_runs_at_once_wait_and_complete(pair: Pair, peer: Peer) -> None:
    running = [asyncio.ensure_future(peer.execute("wait")) for _ in range(RUNNING_MAX)]
    await pair[1].started.wait()
    late = asyncio.ensure_future(peer.execute("add", a=1))  # a task, too: it comes behind the others
    await peer.ping()
    there = pair[1].peers[pair[0].did]
    assert len(there._executions) == RUNNING_MAX + 1
    assert not late.done()
    pair[1].release.set()
    assert await asyncio.gather(*running) == ["released"] * RUNNING_MAX
    assert await late == 2


async def test_call_that_waits_to_run_is_cancelled_and_times_out(
    pair: Pair, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = pair[1].peers[pair[0].did]
    there._room = asyncio.Semaphore(1)
    first = asyncio.ensure_future(peer.execute("wait"))
    await pair[1].started.wait()
    with pytest.raises(CallTimeoutError):
        await peer.execute("add", a=1, timeout=0.1)
    second = asyncio.ensure_future(peer.execute("add", a=1))
    await peer.ping()
    second.cancel()
    await asyncio.wait({second})
    pair[1].release.set()
    assert await first == "released"
    await asyncio.wait(set(there._serving) or {asyncio.ensure_future(asyncio.sleep(0))})
    assert not there._executions


async def test_thousand_calls_at_once_complete(peer: Peer) -> None:
    results = await asyncio.gather(*(peer.execute("add", a=number) for number in range(1_000)))
    assert results == list(range(1, 1_001))


async def test_busy_peer_says_so(pair: Pair, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_module, "ACCEPTED_MAX", 4)
    running = [asyncio.ensure_future(peer.execute("wait")) for _ in range(4)]
    with pytest.raises(CallBusyError, match="busy: 4 calls of yours run or wait"):
        await asyncio.ensure_future(peer.execute("add", a=1))
    pair[1].release.set()
    assert await asyncio.gather(*running) == ["released"] * 4
    assert await peer.execute("add", a=1) == 2
    assert ACCEPTED_MAX > RUNNING_MAX


# --- what a peer can cost --------------------------------------------------------------------------


async def test_answers_that_are_not_read_count_as_running(
    pair: Pair, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_module, "ACCEPTED_MAX", 4)
    there = pair[1].peers[pair[0].did]
    resume = stall(there)
    arrived, most = count_requests(there, 40)
    calls = [asyncio.ensure_future(peer.execute("echo", value="x" * 15_000)) for _ in range(40)]
    await arrived.wait()
    assert most() == 4
    await resume()
    ends = await asyncio.gather(*calls, return_exceptions=True)
    refused = [end for end in ends if isinstance(end, CallError)]
    assert len(refused) >= 4
    assert all("busy: 4 calls of yours run or wait, or their answers wait" in str(end) for end in refused)
    assert [end for end in ends if end not in refused] == ["x" * 15_000] * (40 - len(refused))
    assert await peer.execute("add", a=1) == 2


async def test_bytes_that_wait_for_a_peer_are_bounded(
    pair: Pair, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_module, "UNREAD_MAX_BYTES", 300_000)
    there = pair[1].peers[pair[0].did]
    resume = stall(there)
    calls = []
    for _ in range(60):
        arrived, _ = count_requests(there, 1)
        calls.append(asyncio.ensure_future(peer.execute("echo", value="x" * 15_000)))
        await arrived.wait()
    assert there._unread < 400_000
    await resume()
    *_, last = await asyncio.gather(*calls, return_exceptions=True)
    assert re.match(r"busy: \d{3},\d{3} bytes of answers are on their way to you", str(last))


async def test_bytes_that_are_put_together_for_a_peer_are_bounded(
    pair: Pair, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_module, "UNREAD_MAX_BYTES", 300_000)
    there = pair[1].peers[pair[0].did]
    assert len(await peer.execute("blocks", count=20, size=10_000)) == 200_000
    with pytest.raises(CallBusyError, match="try again, or ask for a stream"):
        await peer.execute("blocks", count=100, size=10_000)
    assert pair[1].made == 31  # and no more after that
    assert there._unread == 0


async def test_what_this_side_asks_makes_it_busy_for_nobody(
    pair: Pair, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_module, "UNREAD_MAX_BYTES", 0)
    there = pair[1].peers[pair[0].did]
    resume = stall(peer)
    calls = [asyncio.ensure_future(peer.execute("echo", value="x" * 15_000)) for _ in range(20)]
    calls.append(asyncio.ensure_future(peer.execute("reverse", data=bytes(1_000_000))))
    arrived, _ = count_requests(peer, 1)
    asked = asyncio.ensure_future(there.execute("add", a=1))
    await arrived.wait()
    await resume()
    assert await asked == 2
    monkeypatch.undo()
    for call in calls:
        call.cancel()


async def test_calls_with_long_envelopes_are_bounded(
    pair: Pair, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_module, "ACCEPTED_MAX_BYTES", 100_000)
    monkeypatch.setattr(detach, "INLINE_MAX_BYTES", DATA_MESSAGE_MAX_BYTES)  # so does another implementation
    there = pair[1].peers[pair[0].did]
    there._room = asyncio.Semaphore(0)
    arrived, _ = count_requests(there, 3)
    waiting = [asyncio.ensure_future(peer.execute("echo", value="x" * 60_000)) for _ in range(3)]
    await arrived.wait()
    with pytest.raises(CallBusyError, match=r"busy: 12\d\d\d\d bytes of calls of yours run or wait"):
        await waiting[2]
    there._room.release()
    assert await asyncio.gather(*waiting[:2]) == ["x" * 60_000] * 2
    assert there._calls.accepted_bytes == 0
    assert await peer.execute("add", a=1) == 2


async def test_arguments_are_not_kept_while_the_answer_waits(pair: Pair, peer: Peer) -> None:
    there = pair[1].peers[pair[0].did]
    kept: list[weakref.ref[object]] = []

    class Watched(dict[str, Any]):
        pass

    async def execute(name: str, args: dict[str, Any]) -> bytes:
        return bytes(2_000_000)

    take_args = there._take_args

    def watch(execution: Any, args: dict[str, Any], fault: str) -> None:
        args = Watched(args)
        kept.append(weakref.ref(args))
        take_args(execution, args, fault)

    there._on_execute = execute
    there._take_args = watch  # type: ignore[method-assign]
    async with aclosing(peer.stream("any", data=b"large")) as parts:
        peer._calls._grant = lambda call: None  # type: ignore[method-assign]  # it reads the answer slowly
        waiting = asyncio.ensure_future(anext(parts))
        while not kept or not there._unread:  # noqa: ASYNC110 -- loop passes until the answer waits
            await asyncio.sleep(0)
        gc.collect()
        assert [each() for each in kept] == [None]
        assert there._executions
        waiting.cancel()
        await asyncio.wait({waiting})


@pytest.mark.parametrize("ends_by", ["result", "exception", "cancel", "timeout"])
async def test_call_that_is_over_leaves_nothing_to_the_garbage_collector(
    pair: Pair, peer: Peer, ends_by: str
) -> None:
    # Its task has the result, or an exception whose frames have the arguments: any number of megabytes.
    there = pair[1].peers[pair[0].did]
    tasks: list[weakref.ref[Any]] = []
    started = asyncio.Event()

    async def execute(name: str, args: dict[str, Any]) -> bytes:
        tasks.append(weakref.ref(asyncio.current_task()))
        started.set()
        if ends_by == "exception":
            raise ValueError("no")
        if ends_by != "result":
            await asyncio.Event().wait()
        return args["data"]

    there._on_execute = execute
    gc.collect()
    gc.disable()
    try:
        timeout = 0.1 if ends_by == "timeout" else 10.0
        call = asyncio.ensure_future(peer.execute("any", data=b"some", timeout=timeout))
        await started.wait()
        if ends_by == "cancel":
            call.cancel()
        (over,), _ = await asyncio.wait({call})
        assert over.cancelled() or (over.exception() is None) is (ends_by == "result")
        await there.quiet()
        for _ in range(10):  # passes of the loop, in which its last callbacks run
            await asyncio.sleep(0)
        assert [task() for task in tasks] == [None]
    finally:
        gc.enable()


async def test_congested_peer_still_answers_pings(pair: Pair, peer: Peer) -> None:
    there = pair[1].peers[pair[0].did]
    resume = stall(there)
    arrived, _ = count_requests(there, 9)
    calls = [asyncio.ensure_future(peer.execute("echo", value="x" * 200_000)) for _ in range(8)]
    ping = asyncio.ensure_future(peer.ping())
    await arrived.wait()
    await resume()
    await asyncio.gather(ping, *calls)


async def test_peer_that_sends_and_reads_nothing_is_given_up(
    pair: Pair, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_module, "UNSENT_MAX_BYTES", 10_000)
    stall(pair[1].peers[pair[0].did])
    for _ in range(100):
        peer._channel.send(peer._calls.ping()[1])
    assert await asyncio.wait_for(pair[1].lost.get(), 10) == "it sends without reading the replies"


async def test_peer_that_takes_nothing_is_given_up(pair: Pair, peer: Peer) -> None:
    there = pair[1].peers[pair[0].did]
    stall(there)
    call = asyncio.ensure_future(there.execute("echo", value="x" * 200_000))
    more = asyncio.ensure_future(there.execute("echo", value="x" * 200_000))
    await asyncio.sleep(0)
    there._timer.cancel()
    there._keepalive = KeepAlive(asyncio.get_running_loop().time(), interval=0.05, stall=0.1)
    there._check()
    with pytest.raises(PeerLostError, match="it has read nothing for 60 s"):
        await asyncio.wait_for(call, 10)
    with pytest.raises(PeerLostError):
        await more


async def test_slow_link_is_not_taken_for_a_dead_peer(pair: Pair, peer: Peer) -> None:
    there = pair[1].peers[pair[0].did]
    slow_down(peer, bytes_per_second=250_000)
    for side in (peer, there):
        side._timer.cancel()
        side._keepalive = KeepAlive(asyncio.get_running_loop().time(), interval=0.1, timeout=0.2)
        side._check()
    # Four times as long as until a silent peer is dead.
    value = "x" * 200_000
    assert await peer.execute("echo", value=value) == value
    assert PeerState.CLOSED not in (peer.state, there.state)


async def test_capability_that_does_not_end_delays_no_answer_and_stays_counted(
    pair: Pair, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_module, "GRACE_SECONDS", 0.05)
    monkeypatch.setattr(peer_module, "ACCEPTED_MAX", 2)
    released = asyncio.Event()

    async def stubborn(name: str, args: dict[str, Any]) -> str:
        while not released.is_set():
            with suppress(asyncio.CancelledError):
                await released.wait()
        return "late"

    there = pair[1].peers[pair[0].did]
    there._on_execute = stubborn
    calls = Calls(pair[0]._key, pair[1].did)
    try:
        _, request = execute(calls, "timed out", {}, 0.05)
        assert (await raw_reply(peer, request))["ext"] == {"error": {"name": "timeout"}}
        id_, request = execute(calls, "cancelled", {}, 10.0)
        peer._channel.send(request)
        cancel = calls.abandon(id_)
        assert cancel is not None
        assert (await raw_reply(peer, cancel))["payload"]["status"] == "cancelled"
        with pytest.raises(CallError, match="busy"):
            await peer.execute("one more", timeout=5)
    finally:
        released.set()
    await asyncio.wait(set(there._serving))
    assert not there._executions


# --- bad input on the channel ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "cause"), [("garbage", "not_json"), (b"\x00\x01", "bad_frame"), ("{}", "missing_field")]
)
async def test_bad_input_is_answered_counted_and_harmless(
    pair: Pair, peer: Peer, data: str | bytes, cause: str
) -> None:
    error = await raw_reply(peer, data)
    assert error["type"] == "ERROR"
    assert error["payload"]["details"]["name"] == cause
    assert pair[1].peers[pair[0].did].refused == 1
    assert await peer.execute("add", a=1) == 2


async def test_only_the_first_refusal_is_a_warning(
    pair: Pair, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "aiconexus.core")
    for _ in range(3):
        await raw_reply(peer, "garbage")
    levels = [record.levelno for record in caplog.records if "is refused" in record.getMessage()]
    assert levels == [logging.WARNING, logging.DEBUG, logging.DEBUG]


async def test_request_that_comes_twice_is_executed_once_and_answered_alike(pair: Pair, peer: Peer) -> None:
    calls = Calls(pair[0]._key, pair[1].did)
    _, request = execute(calls, "count", {}, 10.0)
    first = await raw_reply(peer, request)
    assert first["payload"]["result"] == 1
    assert await raw_reply(peer, request) == first


async def test_request_that_comes_again_over_the_next_connection_is_answered_alike(pair: Pair) -> None:
    calls = Calls(pair[0]._key, pair[1].did)
    _, request = execute(calls, "count", {}, 10.0)
    replies = []
    for _ in range(2):
        async with pair[0].connect(pair[1].did) as peer:
            replies.append(await raw_reply(peer, request))
        await asyncio.wait_for(pair[0].lost.get(), 10)
    assert replies[0] == replies[1]
    assert replies[0]["payload"]["result"] == 1


# --- its end -----------------------------------------------------------------------------------------


async def test_goodbye_fails_running_calls_with_its_reason(pair: Pair, peer: Peer) -> None:
    call = asyncio.ensure_future(peer.execute("wait"))
    await pair[1].started.wait()
    await pair[1].peers[pair[0].did].close("out of paper")
    with pytest.raises(PeerLostError, match="it closed the connection: out of paper") as caught:
        await call
    assert caught.value.did == pair[1].did
    assert await pair[0].lost.get() == "it closed the connection: out of paper"
    assert await pair[1].lost.get() == "this side closed the connection: out of paper"
    assert peer.state is PeerState.CLOSED
    assert not pair[0].peers
    assert pair[1].cancelled.is_set()
    with pytest.raises(PeerLostError, match="is not connected: it closed the connection: out of paper"):
        await peer.execute("add", a=1)


async def test_goodbye_that_cannot_be_sent_leaves_nothing_open(
    pair: Pair, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(text: str) -> None:
        raise ValueError("the remote party only supports messages up to 100 bytes")

    monkeypatch.setattr(peer._channel, "send", refuse)
    await peer.close()
    assert peer._connection._pc.connectionState == "closed"
    await pair[0].lost.get()
    await asyncio.wait(set(pair[0]._tasks))
    assert not pair[0]._all_peers


async def test_peer_that_falls_silent_is_given_up(pair: Pair, peer: Peer) -> None:
    there = pair[1].peers[pair[0].did]
    there._channel.receive(lambda data: None)  # deaf
    there._timer.cancel()
    call = asyncio.ensure_future(peer.execute("wait"))
    peer._keepalive = KeepAlive(asyncio.get_running_loop().time(), interval=0.1, timeout=0.1)
    peer._check()
    with pytest.raises(PeerLostError, match=r"it was silent for 15 s: .* its event loop is blocked"):
        await asyncio.wait_for(call, 10)
    assert not pair[0].peers


async def test_connection_that_breaks_without_goodbye_is_noticed(pair: Pair, peer: Peer) -> None:
    call = asyncio.ensure_future(peer.execute("wait"))
    await pair[1].started.wait()
    await pair[1].peers[pair[0].did]._connection.close()
    with pytest.raises(PeerLostError, match="the connection broke"):
        await asyncio.wait_for(call, 10)


async def test_capability_that_refuses_to_be_cancelled_does_not_hold_up_the_end(
    switchboard: Switchboard, pair: Pair
) -> None:
    two = pair[1]
    released = asyncio.Event()

    async def stubborn(name: str, args: dict[str, Any]) -> str:
        two.started.set()
        try:
            await released.wait()
        except asyncio.CancelledError:
            await released.wait()
        return "done"

    two._execute = stubborn  # type: ignore[method-assign]
    async with pair[0].connect(two.did) as peer:
        with pytest.raises(CallTimeoutError):
            await peer.execute("x", timeout=0.1)
        await two.started.wait()
    released.set()


# --- who needs it --------------------------------------------------------------------------------------


async def test_leaving_the_block_closes_on_both_sides(pair: Pair) -> None:
    one, two = pair
    async with one.connect(two.did) as peer:
        assert set(two.peers) == {one.did}
    assert peer.state is PeerState.CLOSED
    assert not one.peers
    assert await two.lost.get() == "it closed the connection: it is done"
    assert not two.peers


async def test_inner_block_leaves_the_connection_to_the_outer(pair: Pair) -> None:
    one, two = pair
    async with one.connect(two.did) as outer:
        async with one.connect(two.did) as inner:
            assert inner is outer
        assert await outer.execute("add", a=1) == 2


async def test_connection_that_the_other_side_needs_stays(pair: Pair) -> None:
    one, two = pair
    async with two.connect(one.did) as theirs:
        async with one.connect(two.did) as mine:
            assert await mine.execute("add", a=1) == 2
        assert mine.state is PeerState.OPEN
        assert await theirs.execute("add", a=2) == 3
        async with one.connect(two.did) as again:
            assert again is mine
    assert not one.peers or await one.lost.get()


async def test_call_that_runs_needs_the_connection(pair: Pair) -> None:
    one, two = pair
    async with one.connect(two.did):
        back = asyncio.ensure_future(two.peers[one.did].execute("wait"))
        await one.started.wait()
    assert not back.done()
    one.release.set()
    assert await back == "released"
    # Nobody holds it any more: when it falls silent, that is found out.
    peer = two.peers[one.did]
    peer._keepalive = KeepAlive(asyncio.get_running_loop().time(), interval=0.05)
    peer._check()
    assert await asyncio.wait_for(one.lost.get(), 10) == "it closed the connection: it is done"


async def test_silent_connection_that_is_held_stays(pair: Pair, peer: Peer) -> None:
    there = pair[1].peers[pair[0].did]
    for side in (peer, there):
        side._timer.cancel()
        side._keepalive = KeepAlive(asyncio.get_running_loop().time(), interval=0.0)
        side._check()
        assert side._pinging is not None
        await side._pinging
        assert peer.state is there.state is PeerState.OPEN
        side._timer.cancel()
    assert await peer.execute("add", a=1) == 2


async def test_idle_connection_closes_unless_a_block_holds_it(pair: Pair) -> None:
    one, two = pair

    def idle(peer: Peer) -> None:
        """Let it be silent, and unused for so long as the agents would take it for idle."""
        peer._timer.cancel()
        peer._used_at -= PEER_IDLE_SECONDS
        peer._keepalive = KeepAlive(asyncio.get_running_loop().time(), interval=0.0)
        peer._check()

    mine, theirs = await asyncio.gather(one.connect(two.did), two.connect(one.did))
    async with one.connect(two.did):
        idle(mine)
        await mine._pinging
        idle(theirs)
        await theirs._pinging
        assert mine.state is theirs.state is PeerState.OPEN
    assert await asyncio.wait_for(two.lost.get(), 10) == "it closed the connection: it is done"


async def test_idle_connection_closes_though_it_is_never_silent(pair: Pair) -> None:
    one, two = pair
    peer = await one.connect(two.did)
    await peer.ping()
    peer._timer.cancel()
    peer._used_at -= PEER_IDLE_SECONDS
    peer._check()
    assert peer._leaving is not None  # without a PING that is due
    assert await asyncio.wait_for(two.lost.get(), 10) == "it closed the connection: it is done"


async def test_connection_with_calls_is_not_idle(pair: Pair) -> None:
    one, two = pair
    mine = await one.connect(two.did)
    theirs = await two.connect(one.did)
    running = asyncio.ensure_future(mine.execute("wait"))
    await two.started.wait()
    for peer in (mine, theirs):
        peer._used_at -= PEER_IDLE_SECONDS
        peer._check()
        assert peer._awaited
    two.release.set()
    assert await running == "released"
    for peer in (mine, theirs):
        peer._used_at -= PEER_IDLE_SECONDS
    assert await mine.execute("add", a=1) == 2
    for peer in (mine, theirs):
        peer._check()
        assert peer._awaited


async def test_idle_timeout_is_that_of_the_agent(switchboard: Switchboard) -> None:
    async with (
        Workshop(switchboard, idle_timeout=0.0) as one,
        Workshop(switchboard, idle_timeout=None) as two,
    ):
        mine, theirs = await asyncio.gather(one.connect(two.did), two.connect(one.did))
        theirs._used_at = 0.0
        for peer in (mine, theirs):
            peer._check()
        assert (mine._awaited, theirs._awaited) == (0, 1)


async def test_leaving_that_is_cancelled_still_ends_what_nobody_needs(pair: Pair) -> None:
    one, two = pair
    peer = await one.connect(two.did)
    leaving = asyncio.ensure_future(peer.release())
    await closing(peer)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert await asyncio.wait_for(two.lost.get(), 5) == "it closed the connection: it is done"
    assert await asyncio.wait_for(peer.settled(), 5) is PeerState.CLOSED


async def test_request_while_the_connection_is_left_keeps_it(pair: Pair) -> None:
    one, two = pair
    peer = await one.connect(two.did)
    leaving = asyncio.ensure_future(peer.release())
    await closing(peer)
    call = asyncio.ensure_future(peer.execute("wait"))
    await leaving
    await two.started.wait()
    there = two.peers[one.did]
    assert peer.state is there.state is PeerState.OPEN
    # Nothing is left that would end it: only the check for silence is due.
    assert there._timer.when() <= asyncio.get_running_loop().time() + PEER_PING_INTERVAL_SECONDS
    two.release.set()
    assert await call == "released"


async def test_peer_that_gives_no_pong_in_time_is_left_to_the_keep_alive(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_module, "PEER_PONG_TIMEOUT_SECONDS", 0.1)
    one, two = pair
    peer = await one.connect(two.did)
    two.peers[one.did]._channel.receive(lambda data: None)
    await peer.release()
    assert peer.state is PeerState.OPEN


async def test_both_leave_at_once(pair: Pair) -> None:
    one, two = pair
    mine, theirs = await asyncio.gather(one.connect(two.did), two.connect(one.did))
    await asyncio.gather(mine.release(), theirs.release())
    assert mine.state is theirs.state is PeerState.CLOSED


async def test_connect_while_the_old_connection_closes_gets_a_new_one(pair: Pair) -> None:
    one, two = pair
    for _ in range(5):
        mine = await one.connect(two.did)
        leaving = asyncio.ensure_future(mine.release())
        again, theirs = await asyncio.gather(one.connect(two.did), two.connect(one.did))
        assert await again.execute("add", a=1) == 2
        assert await theirs.execute("add", a=2) == 3
        await leaving
        await asyncio.gather(again.release(), theirs.release())
