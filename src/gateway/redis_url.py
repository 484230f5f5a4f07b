"""URLs of Redis: what is wrong with one, said before anybody connects, and what of one may be shown."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from redis.exceptions import RedisError

from gateway.redis_line import make_client

# Of redis-py, as far as a gateway can work with any value of theirs.
_OPTIONS = (
    "db",
    "username",
    "password",
    "client_name",
    "health_check_interval",
    "socket_connect_timeout",
    "socket_keepalive",
    "socket_timeout",
)
_TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_TLS_OPTIONS = (
    *_TLS_FILES,
    "ssl_ca_path",
    "ssl_cert_reqs",
    "ssl_check_hostname",
    "ssl_ciphers",
    "ssl_min_version",
    "ssl_password",
)


def check_url(url: str) -> None:
    """Find what is wrong with a URL.

    Raises:
        ValueError: It is none, has an unknown option, or names a file that is not there. The text says what
            to write instead, and has no part of a password.
    """
    scheme = url.partition("://")[0]
    if scheme in ("redis", "rediss", "sentinel", "unix"):
        _check_place(url, scheme)
        _check_options(url, scheme)
    try:
        pool = make_client(url).connection_pool
        pool.make_connection()  # type: ignore[no-untyped-call]
    except RedisError as error:
        raise ValueError(f"an option of the URL of Redis has a value that cannot be: {error}") from None
    for name in _TLS_FILES:
        path = pool.connection_kwargs.get(name)
        if path and not Path(path).is_file():
            raise ValueError(f"{name}: there is no file {path}")


def _check_place(url: str, scheme: str) -> None:
    """Check what stands before the query; a password in which `/`, `?` or `#` stand as they are ends it."""
    try:
        parts = urlsplit(url)
        is_host = all(urlsplit(f"//{host}").port != 0 for host in parts.netloc.rpartition("@")[2].split(","))
        is_cut = bool(parts.fragment) or "@" in parts.path
    except ValueError:
        head, *behind = re.split("[/?#]", url.partition("://")[2], maxsplit=1)
        is_host = False
        is_cut = "@" in "".join(behind) or re.search(r"[\[\]].*@", head) is not None
    if is_cut and scheme != "unix":
        raise ValueError(
            "in a user name and a password, what is no letter or digit is written in percent-encoding: "
            "%40 for @, %2F for /, %3A for :, %23 for #, %3F for ?, %25 for %"
        )
    if not is_host:
        raise ValueError(
            "behind :// (and behind user:password@) stands host:port; the port is a number up to 65535"
        )
    if scheme == "unix" and (parts.netloc.rpartition("@")[2] or not parts.path):
        raise ValueError("behind unix:// stands the whole path of the socket, as in unix:///run/redis.sock")
    if scheme in ("redis", "rediss") and not re.fullmatch(r"/?|/\d+/?", parts.path):
        raise ValueError(
            "behind the host stands the number of a database or nothing, as in redis://host:6379/0"
        )


def _check_options(url: str, scheme: str) -> None:
    query = urlsplit(url).query
    try:
        options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError:
        raise ValueError(
            "behind the ? of a Redis URL stands option=value, and & between two of them"
        ) from None
    has_tls = scheme == "rediss"
    if scheme == "sentinel" and "ssl" in options:
        has_tls = options.pop("ssl") == "true"
        if not has_tls:
            raise ValueError("the option ssl of the URL has one value, true; leave it out to do without TLS")
    for name in options:
        if name in _TLS_OPTIONS and not has_tls:
            instead = {
                "redis": "write rediss:// instead of redis://",
                "sentinel": "add ssl=true",
                "unix": "a socket of this machine has none",
            }
            raise ValueError(f"the option {name} of the URL is for TLS: {instead[scheme]}")
        if name not in (*_OPTIONS, *_TLS_OPTIONS):
            known = ", ".join((*_OPTIONS, *_TLS_OPTIONS) if has_tls else _OPTIONS)
            raise ValueError(f"{name!r} is no option of the URL of a Redis; there are {known}")


def without_password(url: str) -> str:
    """Return a URL as it may be shown."""
    head, mark, options = url.partition("?")
    scheme, _, rest = head.partition("://")
    credentials, at, place = rest.rpartition("@")
    user, colon, _ = credentials.partition(":")
    options = re.sub("password=[^&]*", "password=***", options)
    return f"{scheme}://{user}{':***' if colon else ''}{at}{place}{mark}{options}"
