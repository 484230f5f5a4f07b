"""Micro benchmarks of the parts of a message's way: `pytest bench --benchmark-only`.

They show where time goes and what a change did; none asserts a time.
"""

from __future__ import annotations

import orjson
import pytest

from aiconexus.core.calls import Calls
from aiconexus.core.events import ExecutionArrived, PongArrived, Reply
from aiconexus.protocol import (
    DIDKey,
    IceCandidatePayload,
    Message,
    OfferPayload,
    canonicalize,
    decode,
    encode,
    sign_message,
    verify_envelope,
)
from bench.offers import offer

pytest.importorskip("pytest_benchmark")

ROUTES = 10_000  # agents of one worker; more do not fit a core's L2 cache


@pytest.fixture(scope="module")
def key():
    return DIDKey.generate()


@pytest.fixture(scope="module")
def data(key):
    """A signed OFFER of 600 bytes."""
    return offer(key, DIDKey.generate()).payload


def _signed(key, payload):
    return encode(sign_message(Message.create(key.did, DIDKey.generate().did, payload), key))


@pytest.fixture(scope="module")
def candidate(key):
    """A signed ICE_CANDIDATE of 600 bytes, the longer ones of a browser."""
    line = (
        "candidate:842163049 1 udp 1677729535 192.0.2.1 46154 typ srflx raddr 0.0.0.0 rport 0 generation 0 "
        "ufrag EsAw network-cost 999 "
    )
    size = len(_signed(key, IceCandidatePayload(candidate=line, sdp_mid="0", sdp_mline_index=0)))
    return _signed(
        key, IceCandidatePayload(candidate=line + "x" * (600 - size), sdp_mid="0", sdp_mline_index=0)
    )


@pytest.fixture(scope="module")
def large_offer(key):
    """A signed OFFER of 6 KB: what an agent sends that does not trickle, with 80 candidates."""
    sdp = (
        "v=0\r\no=- 1 2 IN IP4 0.0.0.0\r\ns=-\r\nt=0 0\r\n"
        "m=application 9 UDP/DTLS/SCTP webrtc-datachannel\r\n"
    )
    line = "a=candidate:842163049 1 udp 1677729535 192.0.2.1 46154 typ host\r\n"
    return _signed(key, OfferPayload(sdp=sdp + line * 80))


@pytest.fixture(scope="module")
def message(data):
    return decode(data)


@pytest.fixture(scope="module")
def unsigned(message):
    return message.model_copy(update={"signature": None})


@pytest.fixture(scope="module")
def signed_part(data):
    """The envelope that a signature covers."""
    envelope = orjson.loads(data)
    del envelope["signature"]
    return envelope


@pytest.mark.benchmark(group="parse")
def test_scan(benchmark, data):
    """Scan with the Python face of the scanner; the router calls its C function."""
    frames = pytest.importorskip("gateway._frames")
    assert benchmark(frames.scan, data).status == "ok"


@pytest.mark.benchmark(group="parse")
def test_scan_of_a_candidate(benchmark, candidate):
    """Scan what is sent most: one for each candidate of either side."""
    frames = pytest.importorskip("gateway._frames")
    assert len(candidate) == 600
    assert benchmark(frames.scan, candidate).status == "ok"


@pytest.mark.benchmark(group="parse")
def test_scan_of_a_large_offer(benchmark, large_offer):
    """Scan 6 KB, nearly all of it one string with a line end every 65 bytes."""
    frames = pytest.importorskip("gateway._frames")
    assert benchmark(frames.scan, large_offer).status == "ok"


@pytest.mark.benchmark(group="parse")
def test_orjson_loads(benchmark, data):
    """Parse the same bytes: what a gateway without a scanner pays at least."""
    assert benchmark(orjson.loads, data)["type"] == "OFFER"


@pytest.mark.benchmark(group="parse")
def test_decode(benchmark, data):
    """Parse and validate into a Message."""
    assert benchmark(decode, data).wire == data


@pytest.mark.benchmark(group="route")
def test_route_lookup(benchmark):
    """Look up one agent among many, by the Python face of the routing table."""
    routing = pytest.importorskip("gateway._routing")
    table = routing.RoutingTable()
    agents = [DIDKey.generate().did.encode() for _ in range(ROUTES)]
    for index, did in enumerate(agents):
        table.bind(did, 0, index)
    assert benchmark(table.get, agents[ROUTES // 2])[:2] == (0, ROUTES // 2)


@pytest.mark.benchmark(group="sign")
def test_sign(benchmark, key, unsigned):
    """Canonicalize, sign, and write the bytes."""
    assert benchmark(sign_message, unsigned, key).wire is not None


@pytest.mark.benchmark(group="sign")
def test_sign_bytes(benchmark, key, signed_part):
    """Ed25519 alone."""
    assert len(benchmark(key.sign, canonicalize(signed_part))) == 64


@pytest.mark.benchmark(group="verify")
def test_verify(benchmark, data):
    """Canonicalize and verify a parsed envelope."""
    benchmark(verify_envelope, orjson.loads(data))


@pytest.mark.benchmark(group="serialize")
def test_encode(benchmark, unsigned):
    """Write a Message that was never on the wire."""
    assert benchmark(encode, unsigned)


@pytest.mark.benchmark(group="serialize")
def test_canonicalize(benchmark, signed_part):
    """Write what is signed (RFC 8785)."""
    assert benchmark(canonicalize, signed_part)


@pytest.mark.benchmark(group="serialize")
def test_canonicalize_with_float(benchmark, signed_part):
    """Write what orjson would write differently: the way through the `rfc8785` package."""
    assert benchmark(canonicalize, {**signed_part, "ext": {"score": 0.5}})


@pytest.fixture
def two_calls(key):
    """The two ends of a DataChannel, without the channel."""
    other = DIDKey.generate()
    return Calls(key, other.did), Calls(other, key.did)


@pytest.mark.benchmark(group="calls")
def test_ping(benchmark, two_calls):
    """Write a PING, read it and write the PONG, read that."""
    caller, callee = two_calls

    def round_trip():
        _, ping = caller.ping()
        pong = callee.receive(ping)
        assert isinstance(pong, Reply)
        return caller.receive(pong.text)

    assert isinstance(benchmark(round_trip), PongArrived)


@pytest.mark.benchmark(group="calls")
def test_execution(benchmark, two_calls):
    """Sign a request with 100 characters, verify it and sign the response with these, verify that."""
    caller, callee = two_calls

    def round_trip():
        id_ = caller.execute("echo", {"value": "x" * 100}, 60.0)
        asked = callee.receive(caller.outbox.take())
        assert isinstance(asked, ExecutionArrived)
        callee.start(id_)
        callee.succeed(id_, asked.args["value"], 0.001)
        return caller.receive(callee.outbox.take())

    assert benchmark(round_trip).value == "x" * 100
