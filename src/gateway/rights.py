"""What a gateway must be allowed to do in Redis: tried before it joins, not when the first agent comes."""

from __future__ import annotations

import asyncio
import re

from redis.asyncio import Redis
from redis.exceptions import MovedError, NoPermissionError, RedisError

from gateway.redis_line import (
    REPLY_SECONDS,
    LineLostError,
    close_client,
    key_prefix,
    make_client,
    read_script,
    reason_of,
)

# From one node of a Redis Cluster to the one that has the keys, which may be moving.
REDIRECTIONS_MAX = 5

# What Redis puts in front of its reason if a script meets it.
_IN_SCRIPT = re.compile(r"^(@user_script: \d+: )?-?(ERR )?")


class RedisRefusalError(LineLostError):
    """Redis is there and does not let the gateway do its work. The text says why, and what to do."""


def _refusal(reason: str, prefix: str) -> RedisRefusalError:
    if "READONLY " in reason:
        return RedisRefusalError(
            "it is a replica, which takes no writes: name its primary, or Sentinels that know it "
            "(sentinel://host:26379/service)"
        )
    if "user" not in reason.lower():
        return RedisRefusalError(reason)  # such as OOM
    keys = key_prefix(prefix)
    return RedisRefusalError(
        f"its user lacks a right ({reason}): give it those that OPERATIONS.md lists in its section Redis, "
        f"for the keys ~{keys}* and the channels &{keys}*"
    )


async def check_rights(client: Redis, prefix: str) -> None:
    """Try all that a gateway does in Redis. It leaves nothing there.

    Args:
        client: Of the Redis.
        prefix: What the keys of this network of nodes begin with.

    Raises:
        RedisRefusalError: Something of it is not allowed.
        LineLostError: Redis does not answer.
        RedisError: It cannot be reached, or another one has the keys.
    """
    name = f"{key_prefix(prefix)}rights"
    pubsub = client.pubsub()
    try:
        # What Redis wants before, such as a password, it says in a sentence to a PING; but not to a script.
        await client.ping()
        digest = await client.script_load(read_script("rights").source)
        refused = await client.evalsha(digest, 1, name, name)
        if refused:
            command, text = (part.decode() for part in refused)
            raise _refusal(f"{command}: {_IN_SCRIPT.sub('', text).strip()}", prefix)
        for ask in (pubsub.subscribe, pubsub.unsubscribe):
            await ask(name)
            if await pubsub.get_message(timeout=REPLY_SECONDS) is None:
                raise LineLostError("Redis does not answer a SUBSCRIBE")
    except NoPermissionError as error:
        raise _refusal(str(error), prefix) from error
    finally:
        await pubsub.aclose()  # type: ignore[no-untyped-call]


def try_redis(url: str, prefix: str) -> None:
    """See that a gateway can work with the Redis at a URL, see `check_rights`.

    Raises:
        RedisRefusalError: It is there and does not allow that.
        LineLostError: It cannot be reached.
    """

    async def main() -> None:
        place: tuple[str, int] | None = None
        for _ in range(REDIRECTIONS_MAX):
            client = make_client(url, place)
            try:
                await check_rights(client, prefix)
            except MovedError as error:
                place = (error.host, error.port)
            else:
                return
            finally:
                await close_client(client)
        raise LineLostError("the nodes of the Redis Cluster redirect to each other")

    try:
        asyncio.run(main())
    except (RedisError, OSError, asyncio.TimeoutError) as error:
        raise LineLostError(reason_of(error)) from error
