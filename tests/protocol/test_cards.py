"""Cards: what an agent says of itself is true whoever hands it on."""

from __future__ import annotations

import json

import pytest

from aiconexus.protocol import DIDKey, InvalidSignatureError, MalformedMessageError, decode
from aiconexus.protocol.cards import read_card, sign_card, verify_card
from aiconexus.protocol.errors import DIDError, MessageError

KEY = DIDKey.from_seed(bytes(32))
OTHER = DIDKey.from_seed(bytes([1] * 32))
CAPABILITIES = [{"name": "add", "description": "é", "tags": ["math"], "input": {"minimum": 1.5}}]


def test_a_card_that_was_handed_on_verifies():
    card = json.loads(json.dumps(sign_card(CAPABILITIES, KEY, issued_at=1_000)))
    read = verify_card(card, KEY.did)
    assert (read.did, read.issued_at) == (KEY.did, 1_000)
    assert [capability.name for capability in read.capabilities] == ["add"]


@pytest.mark.parametrize(
    "change",
    [
        {"issued_at": 1_001},
        {"capabilities": []},
        {"capabilities": [{**CAPABILITIES[0], "name": "sub"}]},
        {"capabilities": [{**CAPABILITIES[0], "unknown": 1}]},
        {"signature": ""},
        {"signature": "A" * 88},
        {"signature": sign_card(CAPABILITIES, OTHER, issued_at=1_000)["signature"]},
    ],
    ids=str,
)
def test_a_card_that_was_changed_does_not(change):
    with pytest.raises(InvalidSignatureError):
        verify_card({**sign_card(CAPABILITIES, KEY, issued_at=1_000), **change}, KEY.did)


def test_a_card_is_that_of_the_agent_it_is_shown_for():
    with pytest.raises(MalformedMessageError, match=r"card\.did"):
        verify_card(sign_card([], OTHER), KEY.did)
    with pytest.raises(DIDError):
        verify_card(sign_card([], KEY), "did:key:z6Mk")


@pytest.mark.parametrize("value", [None, [], "", 1, {}, {"type": "CARD"}])
def test_what_is_no_card_is_refused(value):
    with pytest.raises(MalformedMessageError):
        read_card(value, KEY.did)


def test_no_card_passes_for_a_message():
    with pytest.raises(MessageError):
        decode(json.dumps({**sign_card([], KEY), "from": KEY.did, "to": KEY.did}))
