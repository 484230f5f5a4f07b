"""URLs of STUN and TURN servers."""

from __future__ import annotations

import pytest

from aiconexus.protocol.ice import parse_ice_url


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        # RFC 7064 appendix A, RFC 7065 appendix A
        ("stun:example.org", ("stun", "example.org", 3478, "udp")),
        ("stuns:example.org", ("stuns", "example.org", 5349, "tcp")),
        ("stun:example.org:8000", ("stun", "example.org", 8000, "udp")),
        ("turn:example.org", ("turn", "example.org", 3478, "udp")),
        ("turns:example.org", ("turns", "example.org", 5349, "tcp")),
        ("turn:example.org:8000", ("turn", "example.org", 8000, "udp")),
        ("turn:example.org?transport=udp", ("turn", "example.org", 3478, "udp")),
        ("turn:example.org?transport=tcp", ("turn", "example.org", 3478, "tcp")),
        ("turns:example.org?transport=tcp", ("turns", "example.org", 5349, "tcp")),
        ("turns:example.org:443?transport=udp", ("turns", "example.org", 443, "udp")),
        ("TURN:Example.org?transport=TCP", ("turn", "Example.org", 3478, "tcp")),
        ("stun:192.0.2.1:1", ("stun", "192.0.2.1", 1, "udp")),
        ("turn:[2001:db8::1]:65535", ("turn", "2001:db8::1", 65_535, "udp")),
    ],
)
def test_what_a_url_says(url: str, expected: tuple[str, str, int, str]) -> None:
    assert parse_ice_url(url) == expected
    assert parse_ice_url(url).is_turn == expected[0].startswith("turn")


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("", "is no URL such as stun:host:3478"),
        ("example.org", "is no URL such as"),
        ("http:example.org", "is no URL such as"),
        ("turn:", "is no URL such as"),
        ("turn://example.org", "there is no // in these URLs"),
        ("turn:user@example.org", "is no URL such as"),
        ("turn:2001:db8::1", "is no URL such as"),
        ("turn:a b", "is no URL such as"),
        ("turn:a?transport=tls", "is no URL such as"),
        ("turn:a:0", "no such port"),
        ("turn:a:65536", "no such port"),
        ("stun:a?transport=udp", "only turn: and turns: URLs have a transport"),
    ],
)
def test_what_is_no_url_is_told(url: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        parse_ice_url(url)
