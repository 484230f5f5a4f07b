"""The line of one worker to Redis: what is asked while one round trip is under way leaves with the next.

One pipeline at a time keeps the order of all commands, and makes batches of them just when there are many.
A line that broke is made anew by its owner (gateway.cluster): whether Redis has done what it was asked last
is then not known, and everybody who asked is told so.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from importlib import resources
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import structlog
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
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
    """Return a client of the Redis at a URL.

    Args:
        url: As redis-py knows it (redis://, rediss://, unix://), or
            sentinel://[user:password@]host[:port][,host[:port]...]/service[?db=0&ssl=true].
        place: Host and port to connect to instead, where a Redis Cluster has the keys. An empty host is that
            of the URL.

    Raises:
        ValueError: It is none.
    """
    options: dict[str, Any] = {
        "socket_timeout": REPLY_SECONDS,
        "socket_connect_timeout": CONNECT_SECONDS,
        # What may have been done is not done twice.
        "retry": Retry(NoBackoff(), 0),
    }
    if not url.startswith("sentinel://"):
        if not url.startswith(_SCHEMES):
            raise ValueError(f"a Redis URL begins with {', '.join(_SCHEMES)} or sentinel://")
        client = Redis.from_url(url, **options)
        if place is not None:
            host = place[0] or client.connection_pool.connection_kwargs.get("host")
            client.connection_pool.connection_kwargs.update(host=host, port=place[1])
        return client
    parts = urlsplit(url)
    service = parts.path.strip("/")
    if not service:
        raise ValueError("a sentinel URL names the service: sentinel://host:26379/mymaster")
    query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    sentinels = []
    for each in parts.netloc.rpartition("@")[2].split(","):
        address = urlsplit(f"//{each}")  # an IPv6 address stands in brackets
        if address.hostname is None:
            raise ValueError(f"{each!r} is no host:port of a Sentinel")
        sentinels.append((address.hostname, address.port or 26379))
    options.update(
        username=None if parts.username is None else unquote(parts.username),
        password=None if parts.password is None else unquote(parts.password),
        db=int(query.get("db", 0)),
        ssl=query.get("ssl", "") == "true",
    )
    sentinel = Sentinel(sentinels, socket_timeout=CONNECT_SECONDS)  # type: ignore[no-untyped-call]
    master: Redis = sentinel.master_for(service, **options)
    return master


def ping(url: str) -> None:
    """Try the Redis at a URL once.

    Raises:
        LineLostError: It cannot be reached.
    """

    async def main() -> None:
        client = make_client(url)
        try:
            await client.ping()
        finally:
            await client.aclose()

    try:
        asyncio.run(main())
    except (RedisError, OSError, asyncio.TimeoutError) as error:
        raise LineLostError(str(error) or type(error).__name__) from error


def without_password(url: str) -> str:
    """Return a URL as it may be shown."""
    scheme, _, rest = url.partition("://")
    credentials, at, place = rest.rpartition("@")
    user = credentials.partition(":")[0]
    place = re.sub(r"([?&]password=)[^&]*", r"\1***", place)
    return f"{scheme}://{user}{':***' if ':' in credentials else ''}{at}{place}"


def read_script(name: str) -> str:
    """Return the source of one of SCRIPTS."""
    return (resources.files("gateway") / "lua" / f"{name}.lua").read_text()


class RedisLine:
    """Commands to one Redis, in the order in which they were given.

    Args:
        client: Of redis-py. The line uses it for commands only and does not close it.
        after: Called when the answers of a round trip have been given out.
    """

    def __init__(self, client: Redis, after: Callable[[], None]) -> None:
        self._client = client
        self._after = after
        self._waiting: list[tuple[tuple[Any, ...], Done]] = []
        self._wanted = asyncio.Event()
        self._digests: dict[str, str] = {}
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
            await self._load_scripts()
            while True:
                await self._wanted.wait()
                self._wanted.clear()
                batch, self._waiting = self._waiting, []
                answers = await self._execute([command for command, _ in batch])
                if any(isinstance(answer, NoScriptError) for answer in answers):
                    # Redis was started anew behind a proxy, or another one has taken over.
                    await self._load_scripts()
                    missing = [i for i, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
                    again = await self._execute([batch[i][0] for i in missing])
                    for i, answer in zip(missing, again, strict=True):
                        answers[i] = answer
                done, batch = batch, []
                for (_, tell), answer in zip(done, answers, strict=True):
                    self._give(tell, answer)
                self._after()
        except (RedisError, OSError, asyncio.TimeoutError) as error:
            reason = LineLostError(str(error) or type(error).__name__)
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

    async def _load_scripts(self) -> None:
        for name in SCRIPTS:
            self._digests[name] = await self._client.script_load(read_script(name))

    async def _execute(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        pipeline = self._client.pipeline(transaction=False)
        for command in commands:
            if command[0] == "EVALSHA":
                pipeline.execute_command("EVALSHA", self._digests[command[1]], *command[2:])
            else:
                pipeline.execute_command(*command)
        answers: list[Any] = await pipeline.execute(raise_on_error=False)
        return answers
