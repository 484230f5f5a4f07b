"""URLs of Redis: what is wrong with one, and what of one is shown."""

from __future__ import annotations

import pytest

from gateway.redis_url import check_url, without_password

ESCAPE = "%40 for @"
PLACE = "stands host:port"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:1/0", "redis://h:1/0"),
        ("redis://:secret@h:1/0", "redis://:***@h:1/0"),
        ("rediss://user:secret@h", "rediss://user:***@h"),
        ("redis://h/0?password=secret&db=1", "redis://h/0?password=***&db=1"),
        ("redis://h:1/0?db=1&password=p:sec@ret?", "redis://h:1/0?db=1&password=***"),
        ("rediss://h?ssl_password=secret", "rediss://h?ssl_password=***"),
        ("unix:///run/redis.sock?db=0&password=secret", "unix:///run/redis.sock?db=0&password=***"),
    ],
)
def test_no_password_is_shown(url, shown):
    assert without_password(url) == shown


@pytest.mark.parametrize(
    "url",
    [
        "redis://",
        "redis://h",
        "redis://h:6379/3",
        "redis://[::1]:6379/0",
        "redis://:p%40ss%2F@h?db=1&client_name=gateway",
        "redis://:p@ss@h",
        "redis://h/0?password=p@ss",
        "rediss://h?ssl_cert_reqs=none&ssl_check_hostname=no&socket_timeout=1",
        "unix:///run/redis@1.sock?db=0",
        "unix://user:password@/run/redis.sock",
        "sentinel://user:p%40ss@[::1]:26379,two/main?db=3&ssl=true&ssl_cert_reqs=none",
    ],
)
def test_a_url_that_can_work_is_taken(url):
    check_url(url)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("foo", "a Redis URL begins with redis://, rediss://, unix:// or sentinel://"),
        ("http://h", "a Redis URL begins with"),
        ("sentinel://h:26379", "names the service"),
        ("sentinel:///main", "no host:port of a Sentinel"),
        ("redis://h:port/0", PLACE),
        ("redis://h:99999", PLACE),
        ("sentinel://h,two:port/main", PLACE),
        ("redis://:s3cr3t", PLACE),
        ("redis://h/main", "the number of a database"),
        ("redis://h/0/1", "the number of a database"),
        ("unix://run/redis.sock", "unix:///run/redis.sock"),
        ("unix://", "unix:///run/redis.sock"),
        ("redis://h?passwrod", "option=value"),
        ("redis://h?passwrod=s3cr3t", "'passwrod' is no option .+ password"),
        ("redis://h?decode_responses=yes", "'decode_responses' is no option"),
        ("rediss://h?ssl_ca_cert=ca.pem", "'ssl_ca_cert' is no option .+ ssl_ca_certs"),
        ("sentinel://h/main?sll=true", "'sll' is no option"),
        ("redis://h?ssl_ca_certs=ca.pem", "write rediss:// instead of redis://"),
        ("sentinel://h/main?ssl_ca_certs=ca.pem", "add ssl=true"),
        ("sentinel://h/main?ssl=yes", "one value, true"),
        ("unix:///run/redis.sock?ssl_ca_certs=ca.pem", "has none"),
        ("rediss://h?ssl_ca_certs=/nowhere/ca.pem", "ssl_ca_certs: there is no file /nowhere/ca.pem"),
        ("rediss://h?ssl_cert_reqs=some", "some"),
        ("redis://h?db=x", "'db'"),
    ],
)
def test_a_url_that_cannot_work_is_refused_with_what_to_write_instead(url, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        check_url(url)
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["redis://", "rediss://", "sentinel://"])
@pytest.mark.parametrize("character", ["/", "#", "?", "["])
@pytest.mark.parametrize("start", ["s3cr3t", "12"])
def test_a_password_that_is_not_in_percent_encoding_is_named_as_the_reason(scheme, character, start):
    with pytest.raises(ValueError, match=f"{ESCAPE}|option=value") as caught:
        check_url(f"{scheme}:{start}{character}s3cr3t@h:6379/0")
    assert "s3cr3t" not in str(caught.value)
