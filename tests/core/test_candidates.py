from __future__ import annotations

import pytest

from aiconexus.core.candidates import is_mdns, parse_candidate, take_out_mdns
from aiconexus.protocol.errors import MalformedMessageError

HOST = "candidate:1 1 udp 2130706431 192.0.2.1 40000 typ host"


def test_mdns_names_are_taken_out_of_a_description() -> None:
    name = "candidate:2 1 udp 1 3b0f3e4c-5b0a.local 9 typ host"
    head = f"v=0\r\na=group:BUNDLE 0\r\na={HOST}\r\n"
    assert take_out_mdns(f"{head}a={name}\r\n") == (head, [name], False)
    # What is trickled after end-of-candidates would be ignored (RFC 8838 section 14).
    assert take_out_mdns(f"{head}a={name}\r\na=end-of-candidates\r\n") == (head, [name], True)


def test_description_without_mdns_names_stays_as_it_is() -> None:
    sdp = f"v=0\na={HOST}\na=end-of-candidates\n"
    assert take_out_mdns(sdp) == (sdp, [], False)


def test_candidate_with_extensions_of_a_browser() -> None:
    candidate = parse_candidate(f"{HOST} generation 0 ufrag abcd network-cost 999")
    assert (candidate.ip, candidate.port, candidate.type) == ("192.0.2.1", 40_000, "host")
    assert not is_mdns(candidate)


def test_mdns_name_of_a_browser() -> None:
    name = "3b0f3e4c-5b0a-4d59-9b6f-0f2a7f1e7c11.local"
    assert is_mdns(parse_candidate(HOST.replace("192.0.2.1", name)))


@pytest.mark.parametrize(
    "text", ["candidate:", "candidate:1 1 udp", HOST.replace("40000", "many"), "x" * 999]
)
def test_what_is_no_candidate_is_malformed(text: str) -> None:
    with pytest.raises(MalformedMessageError, match="not an ICE candidate") as caught:
        parse_candidate(text)
    assert caught.value.field == "payload.candidate"
