"""The line of one worker to Redis: what is asked while one round trip is under way leaves with the next.

One pipeline at a time keeps the order of all commands, and makes batches of them just when there are many.
A line that broke is made anew by its owner (gateway.cluster): whether Redis has done what it was asked last
is then not known, and everybody who asked is told so.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from functools import cache
from importlib import resources
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import structlog
from redis.asyncio import Redis
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError

SCRIPTS = (
    "heartbeat",
    "register",
    "unregister",
    "away",
    "locate",
    "purge",
    "disown",
    "bury",
    "leave",
    "discover",
    "describe",
)
# After which Redis counts as lost. Its slowest answer is that to a purge, of milliseconds.
REPLY_SECONDS = 3.0
CONNECT_SECONDS = 3.0

_SCHEMES = ("redis://", "rediss://", "unix://")

Done = Callable[[Any], None]


class LineLostError(Exception):
    """Redis cannot be reached. The text is for the operator."""


def make_client(url: str, place: tuple[str, int] | None = None) -> Redis:
    """Return a client of the Redis at a URL; to be closed with `close_client`.

    Args:
        url: As redis-py knows it (redis://, rediss://, unix://), or
            sentinel://[user:password@]host[:port][,host[:port]...]/service[?db=0&ssl=true]: user and password
            are those of the primary, TLS is for Sentinels too.
        place: Host and port to connect to instead, where a Redis Cluster has the keys. An empty host is that
            of the URL.

    Raises:
        ValueError: It is none.
    """
    common: dict[str, Any] = {
        "socket_connect_timeout": CONNECT_SECONDS,
        # What may have been done is not done twice.
        "retry": Retry(NoBackoff(), 0),
        # The default is not that of every redis-py. With 3, who lacks a password is told about HELLO only.
        "protocol": 2,
    }
    options = {"socket_timeout": REPLY_SECONDS, **common}
    if not url.startswith("sentinel://"):
        if not url.startswith(_SCHEMES):
            raise ValueError(f"a Redis URL begins with {', '.join(_SCHEMES)} or sentinel://")
        if url.startswith("rediss://"):
            options["ssl_check_hostname"] = True  # not the default of every redis-py
        client = Redis.from_url(url, **options)
        if place is not None:
            host = place[0] or client.connection_pool.connection_kwargs.get("host")
            client.connection_pool.connection_kwargs.update(host=host, port=place[1])
        return client
    parts = urlsplit(url)
    service = parts.path.strip("/")
    if not service:
        raise ValueError("a sentinel URL names the service: sentinel://host:26379/mymaster")
    credentials, at, hosts = parts.netloc.rpartition("@")
    sentinels = []
    for each in hosts.split(","):
        address = urlsplit(f"//{each}")  # an IPv6 address stands in brackets
        if address.hostname is None:
            raise ValueError(f"{each!r} is no host:port of a Sentinel")
        sentinels.append((address.hostname, address.port or 26379))
    given: dict[str, Any] = {**parse_url(f"redis://{credentials}{at}/?{parts.query}")}
    tls = {name: given.pop(name) for name in list(given) if name.startswith("ssl")}
    if tls:
        tls = {"ssl_check_hostname": True, **tls, "ssl": tls.get("ssl") == "true"}
    sentinel = Sentinel(  # type: ignore[no-untyped-call]
        sentinels, sentinel_kwargs={"socket_timeout": CONNECT_SECONDS, **common, **tls}
    )
    primary: Redis = sentinel.master_for(service, **{**options, **given, **tls})
    return primary


async def close_client(client: Redis) -> None:
    """End the connections of a client, also those to Sentinels; where the other end is silent, without it."""
    clients = [client]
    if isinstance(client.connection_pool, SentinelConnectionPool):
        clients += client.connection_pool.sentinel_manager.sentinels
    await asyncio.gather(*(each.aclose() for each in clients), return_exceptions=True)


def key_prefix(prefix: str) -> str:
    """Return what the keys and channels of a network begin with: one hash tag, so one Redis has all."""
    return f"{{{prefix}}}:"


def is_loss(error: Exception) -> bool:
    """Tell whether an exception says that Redis cannot be reached, not that something is wrong here."""
    # uvloop says this of a transport that has closed just before redis-py writes to it.
    is_closed = isinstance(error, RuntimeError) and "the handler is closed" in str(error)
    return is_closed or isinstance(error, LineLostError | RedisError | OSError | asyncio.TimeoutError)


def reason_of(error: Exception) -> str:
    """Return what an operator should know of why Redis cannot be reached."""
    # Behind that, Sentinels are described by all their settings.
    return str(error).partition(" : <")[0] or type(error).__name__


class Script(NamedTuple):
    """One of gateway/lua, and the digest by which Redis knows it once it is loaded."""

    source: str
    digest: str


@cache
def read_script(name: str) -> Script:
    """Return one of the scripts in gateway/lua."""
    source = (resources.files("gateway") / "lua" / f"{name}.lua").read_text()
    return Script(source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


class RedisLine:
    """Commands to one Redis, in the order in which they were given.

    It takes a connection of the client when it has something to send; two lines never wait for each other.

    Args:
        client: Of redis-py. The line uses it for commands only and does not close it.
        after: Called when the answers of a round trip have been given out.
        together: How many commands leave together at most; 0 for all that wait. Redis does them at one go.
    """

    def __init__(self, client: Redis, after: Callable[[], None], together: int = 0) -> None:
        self._client = client
        self._after = after
        self._together = together
        self._waiting: list[tuple[tuple[Any, ...], Done]] = []
        self._wanted = asyncio.Event()
        self._is_open = True

    def send(self, *command: Any, done: Done) -> None:
        """Give a command; `done` gets the answer, an exception of Redis, or a LineLostError."""
        if not self._is_open:
            done(LineLostError("the line to Redis is closed"))
            return
        self._waiting.append((command, done))
        self._wanted.set()

    def run(self, script: str, keys: tuple[str, ...], *arguments: Any, done: Done) -> None:
        """Run one of SCRIPTS, see `send`."""
        self.send("EVALSHA", script, len(keys), *keys, *arguments, done=done)

    async def ask(self, *command: Any) -> Any:
        """Give a command and return its answer.

        Raises:
            LineLostError: Redis cannot be reached.
            RedisError: It refuses.
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def done(answer: Any) -> None:
            if not future.done():
                future.set_result(answer)

        self.send(*command, done=done)
        answer = await future
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def ask_script(self, script: str, keys: tuple[str, ...], *arguments: Any) -> Any:
        """Run one of SCRIPTS and return its answer, see `ask`."""
        return await self.ask("EVALSHA", script, len(keys), *keys, *arguments)

    async def serve(self) -> None:
        """Send what is given, until the line breaks.

        Raises:
            LineLostError: It has broken.
        """
        batch: list[tuple[tuple[Any, ...], Done]] = []
        reason = LineLostError("the line to Redis is closed")
        try:
            while True:
                await self._wanted.wait()
                count = self._together or len(self._waiting)
                batch, self._waiting = self._waiting[:count], self._waiting[count:]
                if not self._waiting:
                    self._wanted.clear()
                answers = await self._execute([command for command, _ in batch])
                if any(isinstance(answer, NoScriptError) for answer in answers):
                    # Redis is new: just met, started anew behind a proxy, or another one has taken over.
                    for loaded in await self._execute(
                        [("SCRIPT LOAD", read_script(name).source) for name in SCRIPTS]
                    ):
                        if isinstance(loaded, Exception):
                            raise loaded
                    missing = [i for i, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
                    again = await self._execute([batch[i][0] for i in missing])
                    for i, answer in zip(missing, again, strict=True):
                        answers[i] = answer
                done, batch = batch, []
                for (_, tell), answer in zip(done, answers, strict=True):
                    self._give(tell, answer)
                self._after()
        except Exception as error:
            if not is_loss(error):
                raise
            reason = LineLostError(reason_of(error))
            raise reason from error
        finally:
            self._is_open = False
            for _, tell in [*batch, *self._waiting]:
                self._give(tell, reason)
            self._after()

    @staticmethod
    def _give(tell: Done, answer: Any) -> None:
        try:
            tell(answer)
        except Exception:
            # What goes wrong with one answer must not keep the others from coming.
            structlog.get_logger("gateway").exception("fault")

    async def _execute(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        pipeline = self._client.pipeline(transaction=False)
        for command in commands:
            if command[0] == "EVALSHA":
                pipeline.execute_command("EVALSHA", read_script(command[1]).digest, *command[2:])
            else:
                pipeline.execute_command(*command)
        answers: list[Any] = await pipeline.execute(raise_on_error=False)
        return answers
