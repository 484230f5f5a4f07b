"""PROTOCOL_DESIGN.md and the vectors say what the code does, and every example in them verifies.

Signatures are checked here with PyNaCl and rfc8785 alone, as another implementation would.
"""

import importlib.util
import json
import re
from base64 import b64decode
from pathlib import Path
from types import ModuleType

import base58
import hypothesis
import pytest
import rfc8785
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nacl.signing import SigningKey, VerifyKey

from aiconexus.protocol import (
    CAUSES,
    CLOSE_CODES,
    DIDKey,
    ErrorPayload,
    ExecResponsePayload,
    InvalidSignatureError,
    MalformedMessageError,
    Message,
    MessageError,
    MessageType,
    ReplayGuard,
    canonicalize,
    decode,
    decode_did,
    encode,
    limits,
    verify_envelope,
    verify_message,
)
from aiconexus.protocol.attachments import (
    Assembly,
    Detached,
    StreamDigest,
    StreamSummary,
    attachments_of,
    stream_summary_of,
)
from aiconexus.protocol.cards import verify_card
from aiconexus.protocol.frames import Credit, Data, End, credit_frame, data_frame, end_frame, parse_frame
from aiconexus.protocol.models import PAYLOADS, ErrorDetails
from aiconexus.protocol.serialization import loads

HERE = Path(__file__).parent
DOCUMENT = (HERE.parent.parent / "PROTOCOL_DESIGN.md").read_text(encoding="utf-8")


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_vectors", HERE / "make_vectors.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name: str) -> list[dict]:
    return json.loads((HERE / name).read_text(encoding="utf-8"))


# A busy machine is no failure.
CALM = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
make_vectors = load_generator()
MESSAGES = read("messages.json")
BLOCKS = [json.loads(text) for text in re.findall(r"(?ms)^```json\n(.*?)^```$", DOCUMENT)]


UNSIGNED = (
    MessageType.PING,
    MessageType.PONG,
    MessageType.UNREGISTER,
    MessageType.DISCOVER,
    MessageType.PRESENCE,
)


def must_be_signed(message: Message, gateway: str) -> bool:
    kind = message.type
    if kind is MessageType.EXEC_RESPONSE:
        assert isinstance(message.payload, ExecResponsePayload)
        return message.payload.status.is_final
    if kind is MessageType.ERROR:
        return message.from_ != gateway
    return kind not in UNSIGNED


def verify(envelope: dict) -> None:
    """Check a signature by the document's own words, section 5.1."""
    key = base58.b58decode(envelope["from"].removeprefix("did:key:z"))
    assert key[:2] == b"\xed\x01"
    signed = {name: value for name, value in envelope.items() if name != "signature"}
    VerifyKey(key[2:]).verify(rfc8785.dumps(signed), b64decode(envelope["signature"]))


# --- generated parts ---------------------------------------------------------------------------


def test_vectors_in_the_tree_are_what_the_script_writes():
    files = make_vectors.build_files()
    assert {path.name for path in HERE.glob("*.json")} == set(files)
    for name, content in files.items():
        assert read(name) == content, f"run {HERE / 'make_vectors.py'}"


def test_document_in_the_tree_is_what_the_script_writes():
    assert make_vectors.render(DOCUMENT) == DOCUMENT, f"run {HERE / 'make_vectors.py'}"


def test_document_shows_every_example():
    begun = re.findall(r"(?m)^<!-- begin (.+) -->$", DOCUMENT)
    assert len(set(begun)) == len(begun)
    shown_elsewhere = {"example end-of-candidates"}  # in the step by step signature
    assert set(begun) | shown_elsewhere == set(make_vectors.build_parts())


# --- messages ----------------------------------------------------------------------------------


def test_every_type_has_an_example_in_the_document():
    assert {block["type"] for block in BLOCKS} == {kind.value for kind in MessageType}


@pytest.mark.parametrize("envelope", BLOCKS, ids=lambda block: f"{block['id'][-2:]}-{block['type']}")
def test_every_json_block_of_the_document_is_a_message_that_verifies(envelope):
    message = decode(json.dumps(envelope))
    if "signature" in envelope:
        verify(envelope)
        verify_envelope(envelope)
    gateway = make_vectors.DIDS["gateway"]
    assert "signature" in envelope or not must_be_signed(message, gateway)


@pytest.mark.parametrize("vector", MESSAGES, ids=lambda vector: vector["name"])
def test_message_vector_verifies_and_survives(vector):
    envelope = json.loads(vector["wire"])
    signed = {name: value for name, value in envelope.items() if name != "signature"}
    assert rfc8785.dumps(signed).decode() == canonicalize(signed).decode() == vector["canonical"]
    assert envelope.get("signature") == vector["signature"]
    if vector["signature"] is not None:
        verify(envelope)
        verify_envelope(loads(vector["wire"]))
    message = decode(vector["wire"])
    assert encode(message).decode() == vector["wire"]
    assert message.envelope() == envelope


def test_examples_answer_each_other():
    by_id = {envelope["id"]: envelope for envelope in make_vectors.MESSAGES.values()}
    for envelope in by_id.values():
        asked = by_id.get(envelope["correlation_id"])
        if asked is not None:
            assert {envelope["from"], envelope["to"]} & {asked["from"], asked["to"]}


# --- the other vectors -------------------------------------------------------------------------


@pytest.mark.parametrize("vector", read("identities.json"), ids=lambda vector: vector["name"])
def test_identity_vector(vector):
    seed, public_key = bytes.fromhex(vector["seed"]), bytes.fromhex(vector["public_key"])
    assert bytes(SigningKey(seed).verify_key) == public_key
    assert DIDKey.from_seed(seed).did == vector["did"]
    assert decode_did(vector["did"]) == public_key


@pytest.mark.parametrize("vector", read("canonical.json"), ids=lambda vector: vector["text"][:24])
def test_canonical_vector(vector):
    assert canonicalize(loads(vector["text"])).decode() == vector["canonical"]


REFUSALS = [
    pytest.param(vector, id=f"{number}-{vector['cause']}")
    for number, vector in enumerate(read("refusals.json"))
]


@pytest.mark.parametrize("vector", REFUSALS)
def test_refusal_vector_is_refused_by_the_sdk(vector):
    if vector["by"] == "gateway":
        return
    with pytest.raises(MessageError) as caught:
        decode(vector["wire"])
    assert caught.value.cause.name == vector["cause"]


@pytest.mark.parametrize("vector", REFUSALS)
def test_refusal_vector_is_refused_by_the_gateway(vector):
    frames = pytest.importorskip("gateway._frames", reason="the gateway's extensions are not built")
    if vector["by"] != "receiver":
        assert frames.scan(vector["wire"].encode()).status == vector["cause"]


@pytest.mark.parametrize("vector", MESSAGES, ids=lambda vector: vector["name"])
def test_message_vector_passes_the_gateway(vector):
    frames = pytest.importorskip("gateway._frames", reason="the gateway's extensions are not built")
    found = frames.scan(vector["wire"].encode())
    envelope = json.loads(vector["wire"])
    assert found.status == "ok"
    assert (found.id, found.from_, found.to, found.type) == tuple(
        envelope[name] for name in ("id", "from", "to", "type")
    )


@pytest.mark.parametrize("vector", read("cards.json"), ids=lambda vector: vector["reason"] or "good")
def test_card_vector(vector):
    if not vector["reason"]:
        assert verify_card(vector["card"], vector["did"]).did == vector["did"]
        return
    error = InvalidSignatureError if vector["reason"] == "signature" else MalformedMessageError
    with pytest.raises(error):
        verify_card(vector["card"], vector["did"])


FRAMES = [
    pytest.param(vector, id=f"{number}-{vector['kind'] or 'bad'}")
    for number, vector in enumerate(read("frames.json"))
]


@pytest.mark.parametrize("vector", FRAMES)
def test_frame_vector(vector):
    frame, call = bytes.fromhex(vector["frame"]), vector["call"]
    if vector["kind"] == "data":
        chunk = bytes.fromhex(vector["chunk"])
        assert parse_frame(frame) == Data(call, chunk)
        assert data_frame(call, chunk) == frame
    elif vector["kind"] == "credit":
        assert parse_frame(frame) == Credit(call, vector["taken"])
        assert credit_frame(call, vector["taken"]) == frame
    elif vector["kind"] == "end":
        digest = bytes.fromhex(vector["chunk"])
        assert parse_frame(frame) == End(call, digest)
        assert end_frame(call, digest) == frame
    else:
        with pytest.raises(MalformedMessageError) as caught:
            parse_frame(frame)
        assert caught.value.cause.name == "bad_frame"


@pytest.mark.parametrize("vector", read("streams.json"), ids=lambda vector: str(vector["stream"]["parts"]))
def test_stream_vector(vector):
    whole, as_they_travel = StreamDigest(), StreamDigest()
    for part in vector["parts"]:
        value = bytes.fromhex(part["bytes"]) if "bytes" in part else part["json"]
        whole.add(value)
        detached = Detached.of("/result", value)
        as_they_travel.add_data(detached.data, is_bytes=detached.is_bytes)
    assert whole.summary() == as_they_travel.summary() == StreamSummary(**vector["stream"])


def test_attached_example_is_complete_with_its_bytes():
    message = Message.model_validate(make_vectors.MESSAGES["exec-attached"])
    assembly = Assembly(message, attachments_of(message))
    assert assembly.size == len(make_vectors.SCAN)
    for number in make_vectors.SCAN:
        assert assembly.missing
        assembly.add(bytes([number]))
    assert assembly.values() == {"/args/scan": make_vectors.SCAN}


def test_attached_example_takes_no_other_bytes():
    message = Message.model_validate(make_vectors.MESSAGES["exec-attached"])
    assembly = Assembly(message, attachments_of(message))
    assembly.add(make_vectors.SCAN[::-1])
    with pytest.raises(MalformedMessageError, match="is not what its digest says"):
        assembly.values()


def test_streamed_example_is_the_digest_of_its_parts():
    digest = StreamDigest()
    digest.add(make_vectors.MESSAGES["exec-partial"]["payload"]["result"])
    digest.add(make_vectors.SCAN)
    message = Message.model_validate(make_vectors.MESSAGES["exec-streamed"])
    assert stream_summary_of(message) == digest.summary()


def test_refusal_vectors_differ_from_a_good_message_in_one_thing():
    assert decode(make_vectors.compact(make_vectors.PLAIN)).type is MessageType.OFFER
    assert {vector["by"] for vector in read("refusals.json")} == {"everybody", "gateway", "receiver"}


# --- tables ------------------------------------------------------------------------------------


def rows_after(heading: str) -> list[list[str]]:
    """Return the cells of the first table after a heading."""
    text = DOCUMENT[DOCUMENT.index(heading) + len(heading) :]
    found = re.search(r"(?m)^\|(?:.*\|\n)+", text)
    assert found is not None
    lines = found[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_table_of_causes_is_that_of_the_code():
    rows = rows_after("<!-- begin causes -->")
    assert [(int(row[0]), row[1].strip("`"), row[2], row[3] == "yes") for row in rows] == [
        (cause.num, cause.name, cause.code.value, cause.temporary) for cause in CAUSES.values()
    ]


def test_table_of_close_codes_is_that_of_the_code():
    rows = rows_after("<!-- begin close codes -->")
    assert [(int(row[0]), row[1].strip("`"), row[3] == "yes") for row in rows] == [
        (row.number, row.name, row.reconnect) for row in CLOSE_CODES.values()
    ]


def test_table_of_limits_has_every_limit():
    named = {row[0].strip("`") for row in rows_after("<!-- begin limits -->")}
    numbers = {name for name, value in vars(limits).items() if isinstance(value, int | float)}
    assert named == numbers


@pytest.mark.parametrize("kind", MessageType)
def test_table_of_a_payload_has_its_fields_in_order(kind):
    rows = rows_after(f"\n### {kind.value}\n")
    model = PAYLOADS[kind]
    assert [row[0].rstrip("?").strip("`") for row in rows] == list(model.model_fields)
    for row, field in zip(rows, model.model_fields.values(), strict=True):
        assert row[0].endswith("?") is not field.is_required()


@pytest.mark.parametrize("kind", MessageType)
def test_table_of_a_payload_says_where_null_may_stand(kind):
    envelope = next(e for e in make_vectors.MESSAGES.values() if e["type"] == kind.value)
    others = {"query": "q", "task": "t"} if kind is MessageType.INTENT else {}  # one of them must be there
    for row in rows_after(f"\n### {kind.value}\n"):
        name = row[0].rstrip("?").strip("`")
        changed = {**envelope, "payload": {**envelope["payload"], **others, name: None}}
        try:
            decode(json.dumps(changed))
        except MalformedMessageError:
            accepts_null = False
        else:
            accepts_null = True
        assert accepts_null is ("null" in row[1] or row[1] == "any"), name


def test_table_of_details_has_every_detail():
    text = DOCUMENT[DOCUMENT.index("\n### ERROR\n") :]
    named = re.findall(r"(?m)^\| `(num)`, `(name)` |^\| `(temporary|retry_after_ms|field)` ", text)
    assert {name for row in named for name in row if name} == set(ErrorDetails.model_fields)


@pytest.mark.parametrize(
    "place",
    ["### 3.1 ", "### 3.2 ", "A receiver verifies in this order", "**3. The gateway checks**"],
)
def test_table_of_faults_names_causes_that_exist(place):
    named = {name for row in rows_after(place) for name in re.findall(r"`(\w+)`", row[1])}
    assert named
    assert named <= set(CAUSES)


def test_links_inside_the_document_lead_somewhere():
    headings = {
        re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"(?m)^#+ (.+)$", DOCUMENT)
    }
    targets = re.findall(r"\]\(#([^)]+)\)", DOCUMENT)
    assert targets
    assert set(targets) <= headings


# --- mutations ---------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=60),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)


def paths(value: object, here: tuple = ()) -> list[tuple]:
    """Return where every value inside of `value` stands."""
    found = [here] if here else []
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        found += paths(item, (*here, key))
    return found


@CALM
@given(st.data())
def test_a_message_with_any_value_replaced_is_read_or_refused(data):
    envelope = json.loads(data.draw(st.sampled_from(MESSAGES))["wire"])
    *parents, last = data.draw(st.sampled_from(paths(envelope)))
    place = envelope
    for key in parents:
        place = place[key]
    before, place[last] = place[last], data.draw(JSON)
    hypothesis.assume(place[last] != before)  # 7.0 has the canonical form of 7
    wire = json.dumps(envelope)
    read_or_refused(wire.encode())
    if envelope.get("signature") is not None:
        with pytest.raises(MessageError):
            verify_message(wire, recipient=str(envelope["to"]), guard=ReplayGuard(), now=1768212000)


def read_or_refused(wire: bytes) -> None:
    """Read a message, or build the ERROR that refuses it: nothing else may happen."""
    try:
        message = decode(wire)
    except MessageError as error:
        refusal = error
    else:
        assert message.wire == wire
        return
    a, b = make_vectors.DIDS["A"], make_vectors.DIDS["B"]
    payload = ErrorPayload.for_error(refusal)
    reply = Message.create(a, b, payload, correlation_id=refusal.message_id)
    assert len(encode(reply)) < 2000


@CALM
@given(st.sampled_from(MESSAGES), st.integers(0, 2000), st.binary(max_size=4), st.integers(0, 4))
def test_bytes_with_any_place_replaced_are_read_or_refused(vector, place, patch, removed):
    wire = vector["wire"].encode()
    place %= len(wire)
    read_or_refused(wire[:place] + patch + wire[place + removed :])
