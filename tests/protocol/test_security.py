"""Identity, key files, signatures, and the guard against replay."""

import re
import shutil
import stat
import subprocess
import threading
from base64 import b64decode, b64encode, urlsafe_b64encode
from datetime import datetime, timedelta, timezone

import base58
import orjson
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa, x25519
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiconexus.protocol import (
    DIDError,
    DIDKey,
    InvalidSignatureError,
    MalformedMessageError,
    Message,
    MessageError,
    OfferPayload,
    PingPayload,
    ReplayGuard,
    canonicalize,
    decode_did,
    encode_did,
    sign_message,
    verify_envelope,
    verify_message,
    verify_signature,
)
from aiconexus.protocol.errors import (
    DIDAlphabetError,
    DIDCanonicalError,
    DIDCodecError,
    DIDLengthError,
    DIDMethodError,
    DIDMultibaseError,
    DIDTypeError,
    KeyFileError,
    KeyFileFormatError,
    KeyFilePassphraseError,
    KeyFilePermissionError,
    ReplayedMessageError,
    StaleMessageError,
    WrongRecipientError,
)

A, B, C = (DIDKey.from_seed(bytes([number]) * 32) for number in (2, 3, 4))
NOON = datetime(2026, 1, 12, 12, tzinfo=timezone.utc)
NOW = NOON.timestamp()
# A busy machine is no failure.
CALM = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
GROUP_ORDER = 2**252 + 27742317777372353535851937790883648493


def multibase(data: bytes) -> str:
    return "did:key:z" + base58.b58encode(data).decode()


def offer(seconds: float = 0.0, **fields: object) -> Message:
    return Message(
        from_=A.did,
        to=B.did,
        type="OFFER",
        payload=OfferPayload(sdp="v=0"),
        timestamp=NOON + timedelta(seconds=seconds),
        **fields,
    )


def accept(message: Message, *, now: float = NOW, **options: object) -> Message:
    return verify_message(message.wire, **{"recipient": B.did, "guard": ReplayGuard(), "now": now, **options})


# --- did:key -----------------------------------------------------------------------------------


def test_seed_of_zero_bytes_gives_the_published_did():
    key = DIDKey.from_seed(bytes(32))
    assert key.did == "did:key:z6MkiTBz1ymuepAQ4HEHYSF1H8quG5GLVVQR3djdX3mDooWp"
    assert key.public_key_base58 == "z6MkiTBz1ymuepAQ4HEHYSF1H8quG5GLVVQR3djdX3mDooWp"


@CALM
@given(st.binary(min_size=32, max_size=32))
def test_every_key_has_one_did_of_56_characters(public_key):
    did = encode_did(public_key)
    assert len(did) == 56
    assert did.startswith("did:key:z6Mk")
    assert decode_did(did) == public_key


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_key_of_another_size_has_no_did(size):
    with pytest.raises(ValueError, match="32 bytes"):
        encode_did(bytes(size))
    with pytest.raises(ValueError, match="32 bytes"):
        DIDKey.from_seed(bytes(size))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (None, DIDTypeError),
        (7, DIDTypeError),
        (A.did.encode(), DIDTypeError),
        ("", DIDMethodError),
        (A.public_key_base58, DIDMethodError),
        ("did:web:example.org", DIDMethodError),
        ("DID:KEY:" + A.public_key_base58, DIDMethodError),
        (" " + A.did, DIDMethodError),
        ("did:key:", DIDMultibaseError),
        ("did:key:u7QEC", DIDMultibaseError),
        ("did:key:Z" + A.did[9:], DIDMultibaseError),
        (A.did[:-1], DIDLengthError),
        (A.did + "1", DIDLengthError),
        (A.did + "\n", DIDLengthError),
        (multibase(b"\xe7\x01" + bytes(33)), DIDLengthError),
        (A.did[:-1] + "0", DIDAlphabetError),
        (A.did[:-1] + "O", DIDAlphabetError),
        (A.did[:-1] + "I", DIDAlphabetError),
        (A.did[:-1] + "l", DIDAlphabetError),
        (A.did[:-1] + " ", DIDAlphabetError),
        (A.did[:-1] + "é", DIDAlphabetError),
        (multibase(b"\xec\x01" + bytes(32)), DIDCodecError),
        ("did:key:z1" + A.did[9:-1], DIDCodecError),
        ("did:key:z" + "z" * 47, DIDCodecError),
        ("did:key:z" + "1" * 47, DIDCodecError),
        (f"{A.did}#{A.public_key_base58}", DIDCanonicalError),
        (A.did + "?service=x", DIDCanonicalError),
        (A.did + "/path", DIDCanonicalError),
    ],
)
def test_each_way_a_did_can_be_wrong_has_its_own_error(text, kind):
    with pytest.raises(DIDError) as caught:
        decode_did(text)
    assert type(caught.value) is kind
    assert caught.value.text is text
    with pytest.raises(kind):  # a refusal is not cached as something else
        decode_did(text)


@CALM
@given(st.integers(8, 55), st.sampled_from("123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz0OIl#"))
def test_a_did_with_one_other_character_is_another_key_or_none(place, character):
    text = A.did[:place] + character + A.did[place + 1 :]
    try:
        key = decode_did(text)
    except DIDError:
        return
    assert encode_did(key) == text
    assert (key == A.public_key_bytes) is (text == A.did)


def test_a_key_shows_its_did_and_not_its_secret():
    assert repr(A) == f"DIDKey({A.did})"
    assert not hasattr(A, "__dict__")


def test_keys_are_equal_if_their_dids_are():
    assert DIDKey.from_seed(b"\x02" * 32) == A
    assert {A, DIDKey.from_seed(b"\x02" * 32)} == {A}
    assert A not in (B, A.did)
    assert DIDKey.generate() != DIDKey.generate()


def test_signature_verifies_with_its_key_and_its_data_only():
    signature = A.sign(b"data")
    assert len(signature) == 64
    assert A.verify(b"data", signature)
    assert not A.verify(b"Data", signature)
    assert not B.verify(b"data", signature)
    assert not A.verify(b"data", signature[:-1])


def test_signatures_are_those_of_rfc8032():
    # RFC 8032 section 7.1, test 1.
    key = DIDKey.from_seed(bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"))
    assert key.public_key_bytes.hex() == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert key.sign(b"").hex() == (
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
        "d25bf5f0595bbe24655141438e7a100b"
    )


def test_signature_with_s_beyond_the_group_order_is_refused():
    # RFC 8032 section 5.1.7: without this check every signature has a second form.
    signature = A.sign(b"data")
    other = int.from_bytes(signature[32:], "little") + GROUP_ORDER
    assert not A.verify(b"data", signature[:32] + other.to_bytes(32, "little"))


@pytest.mark.parametrize("point", [b"\x01" + bytes(31), bytes(32), b"\x00" * 31 + b"\x80"])
def test_key_of_small_order_verifies_nothing(point):
    # With such a key the signature (identity, 0) would hold for any data.
    assert not verify_signature(encode_did(point), b"data", b"\x01" + bytes(63))


# --- key files ---------------------------------------------------------------------------------


def write_pem(path, key, encryption=None):
    path.touch(0o600)
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            encryption or serialization.NoEncryption(),
        )
    )


@pytest.mark.parametrize("passphrase", [None, "correct horse", "Füße \U0001f600"])
def test_key_file_gives_the_key_back(tmp_path, passphrase):
    path = tmp_path / "agent.key"
    A.to_file(path, passphrase)
    assert DIDKey.from_file(path, passphrase) == A
    assert DIDKey.from_file(str(path), passphrase).sign(b"x") == A.sign(b"x")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]
    assert (b"ENCRYPTED" in path.read_bytes()) is (passphrase is not None)


def test_key_file_is_never_overwritten(tmp_path):
    path = tmp_path / "agent.key"
    A.to_file(path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        B.to_file(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_dangling_link_is_not_written_through(tmp_path):
    path = tmp_path / "agent.key"
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        A.to_file(path)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o610, 0o601])
def test_key_that_others_can_reach_is_refused(tmp_path, mode):
    path = tmp_path / "agent.key"
    A.to_file(path)
    path.chmod(mode)
    with pytest.raises(KeyFilePermissionError, match=f"mode {mode:04o}.*chmod 600") as caught:
        DIDKey.from_file(path)
    assert caught.value.path == path


def test_encrypted_key_may_be_readable_by_others(tmp_path):
    path = tmp_path / "agent.key"
    A.to_file(path, "secret")
    path.chmod(0o644)
    assert DIDKey.from_file(path, "secret") == A


@pytest.mark.parametrize(
    ("written", "read", "text"),
    [
        ("secret", "wrong", "wrong passphrase"),
        ("secret", "", "give its passphrase"),
        ("secret", None, "give its passphrase"),
        (None, "secret", "not encrypted"),
    ],
)
def test_wrong_missing_and_needless_passphrase_are_told_apart(tmp_path, written, read, text):
    path = tmp_path / "agent.key"
    A.to_file(path, written)
    with pytest.raises(KeyFilePassphraseError, match=text):
        DIDKey.from_file(path, read)


def test_empty_passphrase_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="empty"):
        A.to_file(tmp_path / "agent.key", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "make",
    [
        x25519.X25519PrivateKey.generate,
        ed448.Ed448PrivateKey.generate,
        lambda: ec.generate_private_key(ec.SECP256R1()),
        lambda: rsa.generate_private_key(65537, 2048),
    ],
    ids=["x25519", "ed448", "p256", "rsa"],
)
def test_key_of_another_kind_is_refused(tmp_path, make):
    path = tmp_path / "agent.key"
    write_pem(path, make())
    with pytest.raises(KeyFileFormatError, match="another kind of key"):
        DIDKey.from_file(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 100,
        b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        b"-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA\n-----END PUBLIC KEY-----\n",
    ],
)
def test_file_that_holds_no_key_is_refused(tmp_path, content):
    path = tmp_path / "agent.key"
    path.touch(0o600)
    path.write_bytes(content)
    with pytest.raises(KeyFileFormatError):
        DIDKey.from_file(path)


def test_missing_key_file_is_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        DIDKey.from_file(tmp_path / "none")


@pytest.mark.parametrize("passphrase", [None, "secret"])
def test_load_or_create_keeps_the_first_key(tmp_path, passphrase):
    path = tmp_path / "agent.key"
    assert DIDKey.load_or_create(path, passphrase) == DIDKey.load_or_create(path, passphrase)


@pytest.mark.parametrize("where", [".", "missing/agent.key", "file/agent.key"])
def test_key_file_that_cannot_be_is_named_as_it_was_given(tmp_path, where):
    (tmp_path / "file").touch()
    path = tmp_path / where
    with pytest.raises(KeyFileError, match=rf"^{re.escape(str(path))}: [A-Z][a-z ]+$") as caught:
        DIDKey.load_or_create(path)
    assert caught.value.path == path


def test_load_or_create_in_many_threads_gives_one_key(tmp_path):
    path, barrier, dids = tmp_path / "agent.key", threading.Barrier(8), []

    def start():
        barrier.wait()
        dids.append(DIDKey.load_or_create(path).did)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(dids) == 8
    assert len(set(dids)) == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")
@pytest.mark.parametrize("passphrase", [None, "secret"])
def test_openssl_reads_our_key_files_and_we_read_its(tmp_path, passphrase):
    ours, theirs = tmp_path / "ours.key", tmp_path / "theirs.key"
    A.to_file(ours, passphrase)
    password = [] if passphrase is None else ["-passin", f"pass:{passphrase}"]
    command = ["openssl", "pkey", "-in", str(ours), *password, "-pubout", "-outform", "DER"]
    assert subprocess.run(command, check=True, capture_output=True).stdout.endswith(A.public_key_bytes)

    cipher = [] if passphrase is None else ["-aes-256-cbc", "-pass", f"pass:{passphrase}"]
    subprocess.run(
        ["openssl", "genpkey", "-algorithm", "ed25519", *cipher, "-out", str(theirs)],
        check=True,
        capture_output=True,
    )
    theirs.chmod(0o600)
    assert DIDKey.from_file(theirs, passphrase).did.startswith("did:key:z6Mk")


# --- signed messages ---------------------------------------------------------------------------


def test_signed_message_is_accepted():
    assert accept(sign_message(offer(), A)).payload.sdp == "v=0"


def test_signature_covers_the_canonical_form_without_itself():
    signed = sign_message(offer(ext={"b": 1, "a": 1.5}), A)
    envelope = orjson.loads(signed.wire)
    signature = b64decode(envelope.pop("signature"))
    assert A.verify(canonicalize(envelope), signature)


def test_order_of_keys_and_white_space_do_not_matter():
    envelope = orjson.loads(sign_message(offer(), A).wire)
    turned = orjson.dumps(dict(reversed(envelope.items())), option=orjson.OPT_INDENT_2)
    assert verify_message(turned, recipient=B.did, guard=ReplayGuard(), now=NOW).wire == turned


def test_only_the_sender_can_sign():
    with pytest.raises(InvalidSignatureError) as caught:
        sign_message(offer(), B)
    assert (caught.value.cause.name, caught.value.field) == ("wrong_sender", "from")


def test_a_message_that_is_signed_again_has_one_signature():
    once = sign_message(offer(), A)
    assert sign_message(once, A).wire == once.wire


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", "00000000-0000-4000-8000-0000000000ff"),
        ("correlation_id", "00000000-0000-4000-8000-0000000000ff"),
        ("timestamp", "2026-01-12T12:00:00Z"),
        ("from", C.did),
        ("to", C.did),
        ("type", "ANSWER"),
        ("payload", {"sdp": "v=1"}),
        ("ext", {"a": 1}),
    ],
)
def test_change_of_any_field_breaks_the_signature(field, value):
    envelope = orjson.loads(sign_message(offer(), A).wire)
    with pytest.raises(InvalidSignatureError) as caught:
        verify_message(
            orjson.dumps({**envelope, field: value}), recipient=B.did, guard=ReplayGuard(), now=NOW
        )
    assert caught.value.cause.name == "bad_signature"


def test_null_and_absent_correlation_id_are_not_the_same_bytes():
    envelope = orjson.loads(sign_message(offer(), A).wire)
    assert envelope.pop("correlation_id") is None
    with pytest.raises(InvalidSignatureError):
        verify_envelope(envelope)


def test_signature_has_one_text_only():
    envelope = orjson.loads(sign_message(offer(), A).wire)
    text = envelope["signature"]
    signature = b64decode(text)
    verify_envelope(envelope)
    last = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    trailing = text[:-3] + last[last.index(text[-3]) + 1] + "=="  # another text of the same bytes
    assert b64decode(trailing) == signature
    others = [
        trailing,
        text.rstrip("="),
        text + "=",
        text + "\n",
        " " + text,
        text[:40] + "\n" + text[40:],
        text[:-1],
        "",
        b64encode(signature + b"\0").decode(),
        b64encode(signature[:-1]).decode(),
        urlsafe_b64encode(b"\xff" * 64).decode(),
        "é" * 88,
        signature.hex(),
        7,
        ["x"],
        True,
    ]
    for other in others:
        with pytest.raises(InvalidSignatureError) as caught:
            verify_envelope({**envelope, "signature": other})
        assert caught.value.cause.name == "bad_signature", other


@pytest.mark.parametrize("signature", [None, "absent"])
def test_missing_signature_is_told_from_a_bad_one(signature):
    envelope = orjson.loads(sign_message(offer(), A).wire)
    del envelope["signature"]
    if signature is None:
        envelope["signature"] = None
    with pytest.raises(InvalidSignatureError) as caught:
        verify_envelope(envelope)
    assert (caught.value.cause.name, caught.value.field) == ("missing_signature", "signature")


@pytest.mark.parametrize("sender", [None, 7, "did:key:z6Mk"])
def test_envelope_whose_sender_is_no_did_cannot_be_verified(sender):
    envelope = {**orjson.loads(sign_message(offer(), A).wire), "from": sender}
    with pytest.raises(DIDError):
        verify_envelope(envelope)


# --- verify_message ----------------------------------------------------------------------------


def refusal(message: Message, **options: object) -> MessageError:
    with pytest.raises(MessageError) as caught:
        accept(message, **options)
    assert caught.value.message_id == message.id
    return caught.value


def test_message_to_somebody_else_is_refused():
    error = refusal(sign_message(offer(), A), recipient=C.did)
    assert type(error) is WrongRecipientError
    assert (error.cause.name, error.field) == ("wrong_recipient", "to")


def test_message_from_somebody_else_is_refused():
    error = refusal(sign_message(offer(), A), sender=C.did)
    assert (error.cause.name, error.field) == ("wrong_sender", "from")
    assert accept(sign_message(offer(), A), sender=A.did)


@pytest.mark.parametrize("seconds", [-120, -119.999, 0, 119.999, 120])
def test_timestamp_within_two_minutes_passes(seconds):
    assert accept(sign_message(offer(seconds), A))


@pytest.mark.parametrize("seconds", [-86_400, -120.001, 120.001, 86_400])
def test_timestamp_further_than_two_minutes_is_stale(seconds):
    error = refusal(sign_message(offer(seconds), A))
    assert type(error) is StaleMessageError
    assert (error.cause.name, error.field) == ("stale_timestamp", "timestamp")


def test_the_same_message_twice_is_a_replay():
    message, guard = sign_message(offer(), A), ReplayGuard()
    accept(message, guard=guard)
    error = refusal(message, guard=guard)
    assert type(error) is ReplayedMessageError
    assert (error.cause.name, error.field) == ("replayed", "id")


def test_an_id_in_other_case_is_the_same_id():
    guard = ReplayGuard()
    identifier = "abcdefab-0000-4000-8000-00000000abcd"
    accept(sign_message(offer(id=identifier), A), guard=guard)
    assert type(refusal(sign_message(offer(id=identifier.upper()), A), guard=guard)) is ReplayedMessageError


def test_a_refused_message_is_not_remembered():
    message, guard = sign_message(offer(), A), ReplayGuard()
    for options in ({"recipient": C.did}, {"now": NOW + 500}, {"sender": C.did}):
        refusal(message, guard=guard, **options)
    assert len(guard) == 0
    assert accept(message, guard=guard)


def test_size_limit_is_the_callers():
    message = sign_message(offer(), A)
    assert accept(message, limit=len(message.wire))
    with pytest.raises(MalformedMessageError):
        accept(message, limit=len(message.wire) - 1)


def test_text_and_bytes_are_verified_alike():
    wire = sign_message(offer(), A).wire
    for data in (wire, wire.decode(), bytearray(wire)):
        assert verify_message(data, recipient=B.did, guard=ReplayGuard(), now=NOW).wire == wire


def test_the_clock_is_that_of_the_system_unless_another_is_given():
    message = sign_message(Message.create(A.did, B.did, PingPayload()), A)
    assert verify_message(message.wire, recipient=B.did, guard=ReplayGuard())
    with pytest.raises(StaleMessageError):
        verify_message(sign_message(offer(), A).wire, recipient=B.did, guard=ReplayGuard())


# --- replay guard ------------------------------------------------------------------------------


def bare(seconds: float, number: int = 0, sender: str = A.did) -> Message:
    return Message.model_construct(
        id=f"00000000-0000-4000-8000-{number:012x}",
        from_=sender,
        timestamp=NOON + timedelta(seconds=seconds),
    )


def test_two_senders_may_use_the_same_id():
    guard = ReplayGuard()
    guard.accept(bare(0, sender=A.did), NOW)
    guard.accept(bare(0, sender=B.did), NOW)
    assert len(guard) == 2


def test_guard_forgets_what_is_too_old_to_be_accepted():
    guard = ReplayGuard()
    for number in range(10):
        guard.accept(bare(0, number), NOW)
    guard.accept(bare(121, 10), NOW + 121)
    assert len(guard) == 1


def test_full_guard_refuses_what_is_not_newer_than_the_forgotten():
    guard = ReplayGuard(capacity=2)
    for number in range(3):
        guard.accept(bare(number, number), NOW)
    assert len(guard) == 2
    for seconds in (0, -1):  # the forgotten one again, and one that was never seen
        with pytest.raises(StaleMessageError):
            guard.accept(bare(seconds, 0), NOW)
    guard.accept(bare(0.5, 9), NOW)


def test_full_guard_forgets_those_who_sent_the_most():
    guard = ReplayGuard(capacity=1000)
    guard.accept(bare(-100, 1, B.did), NOW)
    # Stamped as late as can be: were there one floor for all, it would shut everybody out for minutes.
    for number in range(5000):
        guard.accept(bare(119 + number / 10_000, number, A.did), NOW)
    assert len(guard) <= 1000
    with pytest.raises(ReplayedMessageError):
        guard.accept(bare(-100, 1, B.did), NOW)
    guard.accept(bare(-99, 2, B.did), NOW)
    guard.accept(bare(-119, 1, C.did), NOW)
    with pytest.raises(StaleMessageError):
        guard.accept(bare(119, 0, A.did), NOW)


def test_guard_that_is_full_of_single_messages_forgets_the_oldest():
    guard = ReplayGuard(capacity=8)
    for number in range(50):
        guard.accept(bare(number, 0, f"sender {number}"), NOW)
    assert len(guard) == 8
    for number in range(50):
        with pytest.raises((StaleMessageError, ReplayedMessageError)):
            guard.accept(bare(number, 0, f"sender {number}"), NOW)
    guard.accept(bare(43.5, 0, "somebody new"), NOW)


def test_full_guard_keeps_up_with_a_sender_in_order():
    guard = ReplayGuard(capacity=16)
    for number in range(500):
        guard.accept(bare(number / 10, number), NOW)
        with pytest.raises(ReplayedMessageError):
            guard.accept(bare(number / 10, number), NOW)


def test_clock_that_is_set_back_lets_no_replay_in():
    guard = ReplayGuard()
    guard.accept(bare(0), NOW)
    guard.accept(bare(1000, 1), NOW + 1000)
    with pytest.raises(StaleMessageError):
        guard.accept(bare(0), NOW)


@CALM
@given(
    messages=st.lists(
        st.tuples(st.integers(-20, 20), st.sampled_from([A.did, B.did])), min_size=1, max_size=12
    ),
    deliveries=st.lists(st.tuples(st.integers(0, 50), st.integers(-20, 20)), max_size=60),
    capacity=st.integers(1, 5),
)
def test_no_message_is_accepted_twice_whatever_the_order_and_the_clock(messages, deliveries, capacity):
    guard, accepted = ReplayGuard(window=5, capacity=capacity), []
    for index, now in deliveries:
        number = index % len(messages)
        seconds, sender = messages[number]
        try:
            guard.accept(bare(seconds, number, sender), NOW + now)
        except (StaleMessageError, ReplayedMessageError):
            continue
        accepted.append(number)
        assert abs(seconds - now) <= 5
    assert len(set(accepted)) == len(accepted)
    assert len(guard) <= capacity


@CALM
@given(st.lists(st.tuples(st.integers(0, 10), st.integers(-5, 5)), max_size=40))
def test_every_new_message_in_the_window_is_accepted_while_there_is_room(steps):
    guard, now = ReplayGuard(window=5), 0
    for number, (passed, skew) in enumerate(steps):
        now += passed
        message = bare(now + skew, number)
        if now + skew <= guard._floor - NOW:
            continue  # older than a message that is too old itself: only where senders' clocks differ
        guard.accept(message, NOW + now)
        with pytest.raises(ReplayedMessageError):
            guard.accept(message, NOW + now)
