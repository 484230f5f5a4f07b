"""URLs of Redis: what they mean, and what of them is shown."""

from __future__ import annotations

import pytest

from gateway.redis_line import make_client, without_password


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:1/0", "redis://h:1/0"),
        ("redis://:secret@h:1/0", "redis://:***@h:1/0"),
        ("rediss://user:secret@h", "rediss://user:***@h"),
        ("redis://h/0?password=secret&db=1", "redis://h/0?password=***&db=1"),
        ("unix:///run/redis.sock?db=0&password=secret", "unix:///run/redis.sock?db=0&password=***"),
    ],
)
def test_no_password_is_shown(url, shown):
    assert without_password(url) == shown


async def test_a_sentinel_url_is_read_as_a_redis_url_is():
    client = make_client("sentinel://user:p%40ss@[::1]:26380,two/main?db=3")
    pool = client.connection_pool
    assert [
        (s.connection_pool.connection_kwargs["host"], s.connection_pool.connection_kwargs["port"])
        for s in pool.sentinel_manager.sentinels
    ] == [("::1", 26380), ("two", 26379)]
    assert pool.connection_kwargs["username"] == "user"
    assert pool.connection_kwargs["password"] == "p@ss"
    assert pool.connection_kwargs["db"] == 3
    assert pool.service_name == "main"
    await client.aclose()


@pytest.mark.parametrize("url", ["foo", "http://h/0", "sentinel:h/main"])
def test_another_url_is_refused_with_all_forms_that_there_are(url):
    with pytest.raises(ValueError, match="redis://, rediss://, unix:// or sentinel://"):
        make_client(url)


@pytest.mark.parametrize("url", ["sentinel://h:26379", "sentinel:///main"])
def test_a_sentinel_url_without_hosts_or_service_is_refused(url):
    with pytest.raises(ValueError):
        make_client(url)
