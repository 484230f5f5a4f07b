"""Identity: Ed25519 keys, signatures over canonical JSON, and a guard against replay."""

from __future__ import annotations

import binascii
import math
import os
import stat
import tempfile
import time
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any, Final

import orjson
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from aiconexus.protocol.did import DID_PREFIX, decode_did, encode_did
from aiconexus.protocol.errors import (
    InvalidSignatureError,
    KeyFileError,
    KeyFileFormatError,
    KeyFilePassphraseError,
    KeyFilePermissionError,
    ReplayedMessageError,
    StaleMessageError,
    WrongRecipientError,
)
from aiconexus.protocol.limits import CLOCK_SKEW_SECONDS, MESSAGE_MAX_BYTES, REPLAY_GUARD_CAPACITY
from aiconexus.protocol.models import Message
from aiconexus.protocol.serialization import canonicalize, loads, parse


def verify_signature(did: str, data: bytes, signature: bytes) -> bool:
    """Tell whether `signature` (64 bytes, RFC 8032) over `data` was made with the key in `did`.

    libsodium checks strictly: S below the group order, no key of small order, no other form of a key.
    """
    try:
        VerifyKey(decode_did(did)).verify(data, signature)
    except (BadSignatureError, ValueError):
        return False
    return True


class DIDKey:
    """An Ed25519 key pair and its did:key. Its repr shows the DID only."""

    __slots__ = ("_signing_key", "did", "public_key_bytes")

    def __init__(self, signing_key: SigningKey) -> None:
        self._signing_key = signing_key
        self.public_key_bytes: Final[bytes] = bytes(signing_key.verify_key)
        self.did: Final[str] = encode_did(self.public_key_bytes)

    @classmethod
    def generate(cls) -> DIDKey:
        """Make a new key from the system's random source."""
        return cls(SigningKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> DIDKey:
        """Derive the key of a seed of 32 bytes (RFC 8032 section 5.1.5)."""
        if len(seed) != 32:
            raise ValueError(f"a seed has 32 bytes, not {len(seed)}")
        return cls(SigningKey(seed))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], passphrase: str | None = None) -> DIDKey:
        """Read a key from a PKCS #8 PEM file (RFC 5958, RFC 8410), as `to_file` or OpenSSL writes it.

        Raises:
            FileNotFoundError: There is none.
            KeyFilePermissionError: It is not encrypted and others than its owner may read it.
            KeyFilePassphraseError: The passphrase is wrong, missing, or there is nothing to decrypt.
            KeyFileFormatError: It holds no Ed25519 private key.
        """
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        path = Path(path)
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            pem = file.read(16_384)
        encrypted = b"BEGIN ENCRYPTED PRIVATE KEY" in pem
        if not encrypted and mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise KeyFilePermissionError(
                path, f"mode {stat.S_IMODE(mode):04o} lets others read the key; run: chmod 600 {path}"
            )
        if encrypted and not passphrase:
            raise KeyFilePassphraseError(path, "the key is encrypted; give its passphrase")
        if not encrypted and passphrase is not None:
            raise KeyFilePassphraseError(path, "the key is not encrypted; give no passphrase")
        try:
            key = load_pem_private_key(pem, passphrase.encode() if passphrase is not None else None)
        except ValueError as error:
            if encrypted:
                raise KeyFilePassphraseError(path, "wrong passphrase, or a damaged file") from error
            raise KeyFileFormatError(path, "not a PKCS #8 PEM private key") from error
        except Exception as error:  # cryptography's UnsupportedAlgorithm, and what its parser may raise
            raise KeyFileFormatError(path, f"cannot be read: {error}") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise KeyFileFormatError(path, "holds another kind of key than Ed25519")
        return cls.from_seed(key.private_bytes_raw())

    def to_file(self, path: str | os.PathLike[str], passphrase: str | None = None) -> None:
        """Write the key to a new file of mode 0600, encrypted (PBES2) if a passphrase is given.

        Raises:
            FileExistsError: There is a file already; a key is never overwritten.
        """
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import (
            BestAvailableEncryption,
            Encoding,
            KeySerializationEncryption,
            NoEncryption,
            PrivateFormat,
        )

        if passphrase == "":
            raise ValueError("the passphrase is empty")
        encryption: KeySerializationEncryption = (
            NoEncryption() if passphrase is None else BestAvailableEncryption(passphrase.encode())
        )
        key = Ed25519PrivateKey.from_private_bytes(bytes(self._signing_key))
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
        # Written beside and then linked: nobody ever reads half a key, and of two writers one loses.
        descriptor, written = tempfile.mkstemp(prefix=".key-", dir=Path(path).parent)  # mode 0600
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(pem)
                file.flush()
                os.fsync(file.fileno())
            os.link(written, path)
        finally:
            os.unlink(written)

    @classmethod
    def load_or_create(cls, path: str | os.PathLike[str], passphrase: str | None = None) -> DIDKey:
        """Read the key at `path`; where there is none, make one and write it there.

        Raises:
            KeyFileError: It cannot be read or written, or holds no key.
        """
        try:
            return cls._load_or_create(path, passphrase)
        except OSError as error:  # it may name a file that only `to_file` knows
            raise KeyFileError(path, error.strerror or str(error)) from error

    @classmethod
    def _load_or_create(cls, path: str | os.PathLike[str], passphrase: str | None) -> DIDKey:
        try:
            return cls.from_file(path, passphrase)
        except FileNotFoundError:
            key = cls.generate()
        try:
            key.to_file(path, passphrase)
        except FileExistsError:  # another process was faster: its key is the one
            return cls.from_file(path, passphrase)
        return key

    @property
    def public_key_base58(self) -> str:
        """The public key as REGISTER carries it: the part of the DID after `did:key:`."""
        return self.did[len(DID_PREFIX) :]

    def sign(self, data: bytes) -> bytes:
        """Return the Ed25519 signature of `data`, 64 bytes (RFC 8032)."""
        return self._signing_key.sign(data).signature

    def verify(self, data: bytes, signature: bytes) -> bool:
        """Tell whether `signature` over `data` was made with this key."""
        return verify_signature(self.did, data, signature)

    def __repr__(self) -> str:
        return f"DIDKey({self.did})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DIDKey) and self.did == other.did

    def __hash__(self) -> int:
        return hash(self.did)


def sign_message(message: Message, key: DIDKey) -> Message:
    """Return `message` signed by `key`, with its bytes in `wire`.

    Raises:
        InvalidSignatureError: `from` is not the key's DID.
        MalformedMessageError: It has no canonical form.
    """
    envelope = message.envelope()
    wire = sign_envelope(envelope, key)
    return message.model_copy(update={"signature": envelope["signature"], "wire": wire})


def sign_envelope(envelope: dict[str, Any], key: DIDKey) -> bytes:
    """Sign an envelope in place, whatever signature it had, and return its bytes.

    Raises:
        InvalidSignatureError: `from` is not the key's DID.
        MalformedMessageError: It has no canonical form.
    """
    if envelope["from"] != key.did:
        raise InvalidSignatureError(
            f"from is {envelope['from']}, the key is that of {key.did}", name="wrong_sender", field="from"
        )
    envelope.pop("signature", None)
    envelope["signature"] = b64encode(key.sign(canonicalize(envelope))).decode()
    return orjson.dumps(envelope)  # what has a canonical form can be written


def verify_envelope(envelope: dict[str, Any]) -> None:
    """Check the signature of a parsed envelope against the key in its `from`.

    Raises:
        InvalidSignatureError: It is missing, not base64 of 64 bytes, or does not verify.
        DIDError: `from` holds no key.
        MalformedMessageError: The envelope has no canonical form.
    """
    sender: Any = envelope.get("from")
    decode_did(sender)
    text = envelope.get("signature")
    if text is None:
        raise InvalidSignatureError(name="missing_signature", field="signature")
    try:
        signature = b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError):
        signature = b""
    # One signature has one text (RFC 4648 section 3.5): trailing bits must be zero.
    if len(signature) != 64 or b64encode(signature).decode() != text:
        raise InvalidSignatureError("signature is not the base64 of 64 bytes", field="signature")
    signed = {key: value for key, value in envelope.items() if key != "signature"}
    if not verify_signature(sender, canonicalize(signed), signature):
        raise InvalidSignatureError(field="signature")


class _Sender:
    """What a ReplayGuard knows of one sender: moments by id, and the newest moment it had to forget early."""

    __slots__ = ("floor", "seen")

    def __init__(self) -> None:
        self.seen: dict[str, float] = {}
        self.floor = float("-inf")

    def keep_newest(self, count: int) -> None:
        """Forget all but the `count` newest messages; at least one is kept."""
        forgotten = sorted(self.seen, key=self.seen.__getitem__)[:-count]
        self.floor = max(self.floor, self.seen[forgotten[-1]])
        for id_ in forgotten:
            del self.seen[id_]


class ReplayGuard:
    """Remembers the ids that were accepted for as long as their timestamps would pass, and refuses them.

    Bounded: when it is full, those who sent the most are forgotten first. Whatever is forgotten, nothing
    that is not newer is accepted from its sender afterwards: neither a full guard nor a clock that is set
    back lets a replay in, and a sender that floods a guard shuts out itself and nobody else. As many senders
    as it holds ids, all stamped with the future, can shut others out, until their stamps have passed.
    """

    def __init__(self, window: float = CLOCK_SKEW_SECONDS, capacity: int = REPLAY_GUARD_CAPACITY) -> None:
        """Args are the accepted distance of a timestamp from now in seconds, and the ids remembered."""
        self.window = window
        self.capacity = capacity
        self._senders: dict[str, _Sender] = {}
        self._count = 0
        self._floor = float("-inf")  # for all senders
        self._swept_at = float("-inf")

    def __len__(self) -> int:
        return self._count

    def accept(self, message: Message, now: float | None = None) -> None:
        """Remember a message whose signature was verified.

        Args:
            message: The message.
            now: Seconds since the epoch; the system's clock if None.

        Raises:
            StaleMessageError: Its timestamp is further than the window from `now`.
            ReplayedMessageError: It was accepted before.
        """
        now = time.time() if now is None else now
        moment = message.timestamp.timestamp()
        if abs(moment - now) > self.window:
            raise StaleMessageError(
                f"the message is {now - moment:+.0f} s old; at most ±{self.window:.0f} s are accepted: "
                "check the clocks of both machines",
                field="timestamp",
                message_id=message.id,
            )
        sender = self._senders.get(message.from_)
        if moment <= (self._floor if sender is None else max(self._floor, sender.floor)):
            raise StaleMessageError(
                "the message is not newer than others that had to be forgotten: send it anew",
                field="timestamp",
                message_id=message.id,
            )
        # UUIDs compare without regard to case (RFC 9562 section 4).
        id_ = message.id.lower()
        if sender is not None and id_ in sender.seen:
            raise ReplayedMessageError(field="id", message_id=message.id)
        if not self._swept_at <= now < self._swept_at + self.window:
            self._sweep(now)
        if self._count >= self.capacity:
            self._sweep(now)
            self._make_room(self.capacity - max(1, self.capacity // 8))
        self._senders.setdefault(message.from_, _Sender()).seen[id_] = moment
        self._count += 1

    def _sweep(self, now: float) -> None:
        """Forget what is too old to be accepted again, while the clock goes on as it should."""
        self._swept_at = now
        self._forget_until(now - self.window)

    def _forget_until(self, end: float) -> None:
        """Forget what is older than `end`, of all senders."""
        for did, sender in list(self._senders.items()):
            for id_, moment in list(sender.seen.items()):
                if moment < end:
                    del sender.seen[id_]
                    self._floor = max(self._floor, moment)
            if not sender.seen:
                # Its newest message was forgotten just now, so the common floor is above its own.
                del self._senders[did]
        self._recount()

    def _make_room(self, room: int) -> None:
        """Forget until `room` or fewer are remembered: the oldest of those who sent the most."""
        if self._count <= room:
            return
        share = _fair_share([len(sender.seen) for sender in self._senders.values()], room)
        for sender in self._senders.values():
            if len(sender.seen) > share:
                sender.keep_newest(share)
        self._recount()
        if self._count > room:  # one message each of too many senders
            moments = sorted(moment for sender in self._senders.values() for moment in sender.seen.values())
            self._forget_until(math.nextafter(moments[self._count - room - 1], math.inf))

    def _recount(self) -> None:
        self._count = sum(len(sender.seen) for sender in self._senders.values())


def _fair_share(sizes: list[int], room: int) -> int:
    """Return how many each may keep so that all together fit into `room`; at least one."""
    sizes.sort()
    for position, size in enumerate(sizes):
        share = room // (len(sizes) - position)
        if size > share:
            return max(1, share)
        room -= size
    return max(1, sizes[-1])


def verify_message(
    data: bytes | str,
    *,
    recipient: str,
    guard: ReplayGuard,
    sender: str | None = None,
    now: float | None = None,
    limit: int = MESSAGE_MAX_BYTES,
) -> Message:
    """Parse a message and prove it: signature, recipient, time, and that it is new.

    Args:
        data: The bytes as they arrived.
        recipient: The DID that `to` must be.
        guard: Where accepted ids are remembered.
        sender: The DID that `from` must be, where it is known.
        now: Seconds since the epoch; the system's clock if None.
        limit: Size limit in bytes.

    Raises:
        MessageError: A subclass for each way to be refused, with the ERROR to answer.
    """
    envelope = loads(data, limit=limit)
    return verify_loaded(envelope, data, recipient=recipient, guard=guard, sender=sender, now=now)


def verify_loaded(
    envelope: dict[str, Any],
    data: bytes | str,
    *,
    recipient: str,
    guard: ReplayGuard,
    sender: str | None = None,
    now: float | None = None,
) -> Message:
    """Prove a message of which `loads` has made `envelope`; else as `verify_message`."""
    message = parse(envelope, data)
    try:
        if sender is not None and message.from_ != sender:
            raise InvalidSignatureError(
                f"sent by {message.from_}, not by {sender}", name="wrong_sender", field="from"
            )
        verify_envelope(envelope)
        if message.to != recipient:
            raise WrongRecipientError(f"addressed to {message.to}, not to {recipient}", field="to")
        guard.accept(message, now)
    except InvalidSignatureError as error:
        error.message_id = message.id
        raise
    return message
