"""Clients of Redis: what becomes of a URL, and what counts as a loss."""

from __future__ import annotations

import asyncio

import pytest
import uvloop
from redis.asyncio.connection import SSLConnection

from gateway.redis_line import close_client, is_loss, make_client


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
    await close_client(client)


@pytest.mark.parametrize("url", ["foo", "http://h/0", "sentinel:h/main"])
def test_another_url_is_refused_with_all_forms_that_there_are(url):
    with pytest.raises(ValueError, match="redis://, rediss://, unix:// or sentinel://"):
        make_client(url)


async def test_tls_of_a_sentinel_url_is_for_the_sentinels_too():
    client = make_client("sentinel://h/main?ssl=true&ssl_ca_certs=ca.pem&ssl_check_hostname=no")
    pools = [client.connection_pool, client.connection_pool.sentinel_manager.sentinels[0].connection_pool]
    for pool in pools:
        assert issubclass(pool.connection_class, SSLConnection)
        assert pool.connection_kwargs["ssl_ca_certs"] == "ca.pem"
        assert not pool.connection_kwargs["ssl_check_hostname"]
    await close_client(client)


async def test_the_name_in_a_certificate_is_checked_unless_the_url_says_otherwise():
    for url, is_checked in (
        ("rediss://h", True),
        ("sentinel://h/main?ssl=true", True),
        ("rediss://h?ssl_check_hostname=no", False),
    ):
        client = make_client(url)
        assert client.connection_pool.connection_kwargs["ssl_check_hostname"] is is_checked
        await close_client(client)


def test_a_transport_that_closed_before_it_was_written_to_is_a_loss():
    async def main():
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        await reader.read()
        writer.transport.abort()
        await writer.wait_closed()
        server.close()
        with pytest.raises(RuntimeError) as caught:
            writer.transport.write(b"x")
        return caught.value

    assert is_loss(uvloop.run(main()))
    assert not is_loss(RuntimeError("something else"))
