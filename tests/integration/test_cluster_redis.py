"""Redis as it is run in earnest: with a password, with TLS, with Sentinels. Real servers."""

from __future__ import annotations

import asyncio
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from certificates import Certificates
from network import (
    LOST,
    RECOVERY_SECONDS,
    STALE_SECONDS,
    entries,
    exchange_soon,
    redis_state,
    wait_until_confirmed,
)
from redis_server import RedisServer, Sentinel, check_tls
from searches import dids, found
from wire import Agent, assert_exchange, wait_until

from gateway.redis_line import RedisLine, close_client, make_client
from gateway.rights import RedisRefusalError, try_redis
from gateway.tasks import end

PASSWORD = "p@ss:w/rd%"  # a URL has it in another form


@pytest.fixture
def make_redis(tmp_path: Path, need_redis: None) -> Iterator[Callable[..., RedisServer]]:
    servers: list[RedisServer] = []

    def make(*arguments: Any, kind: type[RedisServer] = RedisServer, **keywords: Any) -> RedisServer:
        folder = tmp_path / f"redis-{len(servers)}"
        folder.mkdir()
        servers.append(kind(folder, *arguments, **keywords))
        return servers[-1]

    yield make
    for server in servers:
        server.kill()


UNREACHABLE = ("cannot reach Redis at ", "Redis lost")
REFUSED = ("cannot work with Redis at ", "Redis refuses")


def reasons(node: Any, event: str) -> list[str]:
    """Why it cannot use Redis, as its log has it."""
    return [line["reason"] for line in node.log_lines() if line["event"] == event]


def assert_refused(
    run_gateway: Any, start_gateway: Any, url: str, reason: str, how: tuple[str, str] = UNREACHABLE
) -> None:
    """A gateway that must have Redis says why it cannot, and ends; another says it once and goes on."""
    sentence, event = how
    done = run_gateway("--redis", url, "--redis-required")
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith(f"aiconexus-gateway: {sentence}")
    assert reason in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    node = start_gateway("--redis", url, "--workers", "1")
    node.forgive(event)
    with Agent(node.port) as one, Agent(node.port) as other:
        wait_until(lambda: reasons(node, event))
        assert_exchange(one, other)
    node.stop()
    (told,) = reasons(node, event)
    assert reason in told
    for text in (done.stderr, node.log):
        assert PASSWORD not in text
        assert quote(PASSWORD, safe="") not in text


async def test_a_line_sends_a_few_commands_together_if_told_so(redis_server):
    client = make_client(redis_server.url)
    rounds = 0

    def after() -> None:
        nonlocal rounds
        rounds += 1

    for together, expected in ((0, 1), (8, 3), (1, 20)):
        rounds = 0
        line = RedisLine(client, after, together)
        serving = asyncio.create_task(line.serve())
        answers = await asyncio.gather(*(line.ask("ECHO", number) for number in range(20)))
        assert [int(answer) for answer in answers] == list(range(20))
        assert rounds == expected
        await end([serving])
    await close_client(client)


async def test_two_lines_do_not_wait_for_each_other_and_outlive_their_idle_connections(make_redis):
    redis = make_redis("--timeout", "1")
    client = make_client(redis.url)
    lines = [RedisLine(client, lambda: None) for _ in range(2)]
    serving = [asyncio.create_task(line.serve()) for line in lines]

    def connections() -> int:
        return redis.command("CLIENT LIST").count(b" cmd=") - 1  # without the one that asks

    for _ in range(2):
        long = asyncio.create_task(lines[0].ask("BLPOP", "nothing", 2))
        await asyncio.to_thread(wait_until, lambda: b" cmd=blpop " in redis.command("CLIENT LIST"))
        assert await lines[1].ask("PING")
        assert not long.done()
        assert await asyncio.to_thread(connections) == 2
        assert await long is None
        await asyncio.to_thread(wait_until, lambda: connections() == 0)
    assert not any(task.done() for task in serving)
    await end(serving)
    await close_client(client)


# --- password ----------------------------------------------------------------------------------

OPERATIONS = Path(__file__).parents[2] / "OPERATIONS.md"


def least_rights() -> str:
    """Return those that OPERATIONS.md says are enough."""
    found = re.search(r"ACL SETUSER gateway on >password (.+?)```", OPERATIONS.read_text(), re.DOTALL)
    assert found is not None
    return " ".join(found[1].split())


@pytest.mark.parametrize("user", ["default", "gateway"])
def test_nodes_are_one_network_through_a_redis_with_a_password(user, make_redis, start_node):
    redis = make_redis(password=PASSWORD)
    secret = quote(PASSWORD, safe="")
    url = redis.url.replace("://", f"://:{secret}@")
    if user != "default":
        assert redis.command(f"ACL SETUSER {user} on >{PASSWORD} {least_rights()}") == b"+OK\r\n"
        url = redis.url.replace("://", f"://{user}:{secret}@")
    first, second = (start_node("--redis-prefix", "aiconexus", url=url) for _ in range(2))
    with Agent(first.port) as one, Agent(first.port) as leaves, Agent(second.port) as far:
        assert_exchange(one, far)
        assert dids(found(one, dids=[far.did])) == [far.did]
        assert len(found(one)) == 3
        assert found(one, text="nothing") == []
        leaves.close()
        wait_until(lambda: entries(redis) == 2)
        wait_until_confirmed(first, second)
        second.kill()
        wait_until(lambda: entries(redis) == 1, STALE_SECONDS)


@pytest.mark.parametrize(
    ("credentials", "reason"),
    [
        ("", "Authentication required"),
        (":wrong", "invalid username-password pair"),
        ("nobody:wrong", "invalid username-password pair"),
    ],
)
def test_a_wrong_password_is_one_clear_line(credentials, reason, make_redis, run_gateway, start_gateway):
    redis = make_redis(password=PASSWORD)
    url = redis.url.replace("://", f"://{credentials}@") if credentials else redis.url
    assert_refused(run_gateway, start_gateway, url, reason)


# --- rights ------------------------------------------------------------------------------------


def url_of_user(redis: RedisServer, rights: str) -> str:
    """Let a user have some rights only; return the URL of Redis for it."""
    assert redis.command(f"ACL SETUSER gateway reset on >{PASSWORD} {rights}") == b"+OK\r\n"
    return redis.url.replace("://", f"://gateway:{quote(PASSWORD, safe='')}@")


def test_a_right_that_is_not_given_is_noticed_at_the_start_whichever_it_is(redis_server):
    rights = least_rights().split()
    url = url_of_user(redis_server, " ".join(rights))
    try_redis(url, "aiconexus")
    assert redis_server.command("KEYS *rights*") == b"*0\r\n"
    for right in rights:
        if right != "resetchannels":
            url_of_user(redis_server, " ".join(other for other in rights if other != right))
            with pytest.raises(
                RedisRefusalError, match=r"its user lacks a right .+ ~{aiconexus}:\*"
            ) as caught:
                try_redis(url, "aiconexus")
            command = right.removeprefix("+").partition("|")[0]
            assert right[0] != "+" or command in str(caught.value).lower()
    with pytest.raises(RedisRefusalError, match=r"&{other}:\*"):
        try_redis(url, "other")


@pytest.mark.parametrize("lacks", ["+zadd", "+subscribe"])
def test_a_user_that_lacks_a_right_is_one_clear_line(lacks, make_redis, run_gateway, start_gateway):
    redis = make_redis(password=PASSWORD)
    url = url_of_user(redis, least_rights().replace(f" {lacks}", ""))
    assert_refused(run_gateway, start_gateway, url, "OPERATIONS.md", REFUSED)


def test_rights_that_come_later_let_a_node_join(make_redis, start_gateway):
    redis = make_redis()
    node = start_gateway("--redis", url_of_user(redis, "+ping"), "--workers", "1")
    node.forgive("Redis refuses")
    wait_until(lambda: reasons(node, "Redis refuses"))
    url_of_user(redis, least_rights())
    wait_until(lambda: redis_state(node) == "connected", RECOVERY_SECONDS)


def test_a_replica_is_one_clear_line(make_redis, run_gateway, start_gateway):
    replica = make_redis("--replicaof", "127.0.0.1", str(make_redis().port))
    assert_refused(run_gateway, start_gateway, replica.url, "it is a replica", REFUSED)


def test_a_redis_without_memory_is_one_clear_line(make_redis, run_gateway, start_gateway):
    redis = make_redis("--maxmemory", "1")
    assert_refused(run_gateway, start_gateway, redis.url, "OOM command not allowed", REFUSED)


# --- TLS ---------------------------------------------------------------------------------------


@pytest.fixture
def certificates(tmp_path: Path, need_redis: None) -> Certificates:
    try:
        check_tls()
    except LookupError as error:
        pytest.skip(str(error))
    return Certificates(tmp_path)


def tls_url(redis: RedisServer, certificates: Certificates) -> str:
    """Return a URL with all that it takes: a trusted authority, and a certificate of one's own."""
    certificate, key = certificates.issue("gateway")
    files = f"ssl_ca_certs={certificates.authority}&ssl_certfile={certificate}&ssl_keyfile={key}"
    return f"{redis.url.replace('redis://', 'rediss://')}?{files}"


@pytest.mark.parametrize("fault", ["killed", "stopped"])
def test_nodes_are_one_network_through_a_redis_with_tls(fault, certificates, make_redis, start_node):
    redis = make_redis(certificates=certificates)
    url = tls_url(redis, certificates)
    first, second = start_node(url=url), start_node(url=url)
    for node in (first, second):
        node.forgive(*LOST)
    with Agent(first.port) as one, Agent(first.port) as two, Agent(second.port) as far:
        assert_exchange(one, far)
        assert len(found(one)) == 3
        wait_until_confirmed(first, second)
        if fault == "killed":
            redis.kill()
        else:
            redis.signal(signal.SIGSTOP)
        wait_until(lambda: redis_state(first) == redis_state(second) == "lost")
        assert_exchange(one, two)
        if fault == "killed":
            redis.start()
        else:
            redis.signal(signal.SIGCONT)
        exchange_soon(one, far)
        wait_until(lambda: entries(redis) == 3, RECOVERY_SECONDS)


def test_a_certificate_that_nobody_trusts_is_one_clear_line(
    certificates, make_redis, run_gateway, start_gateway
):
    redis = make_redis("--tls-auth-clients", "no", certificates=certificates)
    url = redis.url.replace("redis://", "rediss://")
    assert_refused(run_gateway, start_gateway, url, "certificate verify failed")


def test_a_certificate_of_another_host_is_one_clear_line(
    certificates, make_redis, run_gateway, start_gateway
):
    redis = make_redis("--tls-auth-clients", "no", certificates=certificates)
    url = f"rediss://localhost:{redis.port}?ssl_ca_certs={certificates.authority}"
    assert_refused(run_gateway, start_gateway, url, "Hostname mismatch")


def test_tls_with_a_redis_that_has_none_is_one_clear_line(make_redis, run_gateway, start_gateway):
    redis = make_redis()
    url = redis.url.replace("redis://", "rediss://")
    assert_refused(run_gateway, start_gateway, url, "Timeout connecting to server")


# --- Sentinel ----------------------------------------------------------------------------------


def test_sentinels_that_know_no_primary_are_one_clear_line(make_redis, run_gateway, start_gateway):
    redis = make_redis()
    sentinel = make_redis(redis.port, kind=Sentinel)
    nobody = make_redis()
    nobody.kill()
    url = f"sentinel://127.0.0.1:{nobody.port},127.0.0.1:{sentinel.port}/other"
    assert_refused(run_gateway, start_gateway, url, "No master found for 'other'")


@pytest.mark.parametrize("how", ["plain", "password", "TLS"])
def test_when_a_primary_dies_the_nodes_follow_the_sentinels_to_the_next(how, request, make_redis, start_node):
    options: dict[str, Any] = {}
    secret, query = "", ""
    if how == "TLS":
        certificates = request.getfixturevalue("certificates")
        options = {"certificates": certificates}
        query = "?ssl=true&" + tls_url(make_redis(**options), certificates).partition("?")[2]
    elif how == "password":
        options = {"password": PASSWORD}
        secret = f":{quote(PASSWORD, safe='')}@"
    primary = make_redis(**options)
    replica = make_redis("--replicaof", "127.0.0.1", str(primary.port), **options)
    sentinels = [make_redis(primary.port, kind=Sentinel, **options) for _ in range(3)]
    for sentinel in sentinels:
        wait_until(lambda sentinel=sentinel: sentinel.knows(others=2, replicas=1), 30)
    hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in sentinels)
    url = f"sentinel://{secret}{hosts}/main{query}"
    first, second = start_node(url=url), start_node(url=url)
    for node in (first, second):
        node.forgive(*LOST)
    with ExitStack() as stack:
        near = [stack.enter_context(Agent(first.port)) for _ in range(10)]
        far = [stack.enter_context(Agent(second.port)) for _ in range(10)]
        assert_exchange(near[0], far[0])
        wait_until(lambda: entries(primary) == entries(replica) == 20)
        wait_until_confirmed(first, second)
        sentinels[0].kill()  # a Sentinel goes with its primary
        primary.kill()
        assert_exchange(near[0], near[1])
        wait_until(lambda: b"role:master" in replica.command("INFO replication"), 30)
        promoted_at = time.monotonic()

        def left() -> float:
            return RECOVERY_SECONDS - (time.monotonic() - promoted_at)

        for one, other in zip(near, far, strict=True):
            exchange_soon(one, other, left())
        wait_until(lambda: len(found(near[0])) == len(found(far[0])) == entries(replica) == 20, left())
