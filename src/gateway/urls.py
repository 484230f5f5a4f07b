"""URLs of gateways, as agents dial and sign them."""

from __future__ import annotations

import re

_DEFAULT_PORTS = {"ws": 80, "wss": 443}
_VISIBLE = r"[^#?\\\x00-\x20\x7f-\U0010ffff]"  # printable ASCII but for what ends a path
_URL = re.compile(
    rf"(wss?)://([a-z0-9._~-]+|\[[0-9a-f:.]+\])(?::([0-9]{{1,5}}))?(/{_VISIBLE}*)?(?:\?[!\"$-\[\]-~]*)?",
    re.ASCII | re.IGNORECASE,
)


def parse_url(url: str) -> tuple[str, str, int, str]:
    r"""Return scheme, host, port and path of a WebSocket URL.

    Strict, unlike `urlsplit`: in `ws://a\@b/` and `ws://a\tb/` some parsers find another host than
    others, and whoever signs such a text may have dialled somebody else. User names and fragments are
    refused as well (RFC 6455 section 3 has neither).

    Raises:
        ValueError: It is none.
    """
    match = _URL.fullmatch(url)
    if match is None:
        raise ValueError(f"not a WebSocket URL: {url!r}")
    scheme, host, port, path = match.groups()
    scheme = scheme.lower()
    number = int(port) if port else _DEFAULT_PORTS[scheme]
    if not 0 < number <= 65_535:
        raise ValueError(f"no such port: {url!r}")
    return scheme, host.lower(), number, path or ""
