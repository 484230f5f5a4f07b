"""Finding agents by what they can do, and hearing who comes and goes.

The gateway tells what it knows; what an agent says of itself is signed by that agent, and checked here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from pydantic import JsonValue

from aiconexus.client.backoff import Backoff
from aiconexus.protocol import (
    AIConexusError,
    Capability,
    DiscoverPayload,
    ErrorCode,
    Message,
    MessageType,
    PresencePayload,
    decode_did,
)
from aiconexus.protocol.cards import Card, verify_card
from aiconexus.protocol.errors import (
    GatewayUnreachableError,
    IncompleteAnswerError,
    NotConnectedError,
    RemoteError,
)

if TYPE_CHECKING:
    from aiconexus.client.handshake import Session
    from aiconexus.client.socket import ClientState, GatewayClient

PAGE_SIZE: Final = 100  # agents of one page; with small cards two thirds of a message
EVENTS_MAX: Final = 1024  # unread of one watch; then it asks who is there instead
RETRY_SECONDS: Final = 1.0  # at least, until a gateway that was busy, or could not ask all, is asked again

_log: Final = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """An agent that the gateway knows.

    Attributes:
        did: Its DID.
        status: "online"; "away": its connection broke, and it may come back; "offline".
        card: What it says of itself, signed; None if it says nothing.
    """

    did: str
    status: Literal["online", "away", "offline"]
    card: Card | None

    @property
    def capabilities(self) -> list[Capability]:
        """What it can do."""
        return [] if self.card is None else self.card.capabilities


@dataclass(frozen=True)
class PresenceEvent:
    """What has happened to an agent.

    Attributes:
        event: "join": it is there; "leave": it is not there any more; "away": its connection broke; "update":
            it is back after that or registered anew, or it shows another card (`GatewayClient.update`).
        agent: The agent, as it is now.
    """

    event: Literal["join", "leave", "away", "update"]
    agent: Found


def question(
    capability: str | None, tag: str | None, text: str | None, dids: Sequence[str] | None
) -> DiscoverPayload:
    """Build the question after these agents; see `GatewayClient.discover`.

    Raises:
        DIDError: One of `dids` is no did:key: nobody would ever be found.
    """
    for did in dids or ():
        decode_did(did)
    return DiscoverPayload(
        capability=capability, tag=tag, text=text, dids=None if dids is None else list(dids)
    )


def _read(client: GatewayClient, entry: dict[str, JsonValue]) -> Found | None:
    """Return an agent of a PRESENCE; None, and it is counted, if the gateway tells lies about it."""
    did, status, value = entry.get("did"), entry.get("status", "online"), entry.get("card")
    try:
        if not isinstance(did, str):
            raise ValueError("an agent has no DID")
        card = None if value is None else verify_card(value, did)
    except (AIConexusError, ValueError) as error:
        client.stats.cards_rejected += 1
        level = logging.WARNING if client.stats.cards_rejected == 1 else logging.DEBUG
        _log.log(level, "an agent of the gateway's directory is left out: %s", error)
        return None
    return Found(did, "away" if status == "away" else "offline" if status == "offline" else "online", card)


async def _ask(
    client: GatewayClient, query: DiscoverPayload, timeout: float, id_: str = ""
) -> PresencePayload:
    answer = await client.ask_gateway(query, timeout=timeout, id_=id_ or None)
    if not isinstance(answer.payload, PresencePayload):
        text = f"the gateway answered DISCOVER with {answer.type.value}"
        raise RemoteError(ErrorCode.MALFORMED_MESSAGE, text)
    return answer.payload


async def _pages(
    client: GatewayClient, query: DiscoverPayload, timeout: float, id_: str = ""
) -> AsyncGenerator[PresencePayload, None]:
    page = await _ask(client, query, timeout, id_)
    yield page
    while page.cursor is not None:
        page = await _ask(client, query.model_copy(update={"cursor": page.cursor, "watch": None}), timeout)
        yield page


async def discover(
    client: GatewayClient, query: DiscoverPayload, limit: int | None, timeout: float
) -> AsyncGenerator[Found, None]:
    """Yield the agents that fit, page by page; see `GatewayClient.discover`."""
    size = PAGE_SIZE if limit is None else max(1, min(limit, PAGE_SIZE))
    count = 0
    is_whole = True
    pages = _pages(client, query.model_copy(update={"limit": size}), timeout)
    async for page in pages:
        is_whole = is_whole and not page.partial
        for entry in page.agents:
            if limit is not None and count >= limit:
                return
            found = _read(client, entry)
            if found is not None:
                count += 1
                yield found
    if not is_whole and (limit is None or count < limit):
        raise IncompleteAnswerError(f"{client.url} could not ask all of its workers and nodes who is there")


async def watch(
    client: GatewayClient, query: DiscoverPayload, timeout: float
) -> AsyncGenerator[PresenceEvent, None]:
    """Yield what happens to the agents that fit; see `GatewayClient.watch`."""
    watching = _Watch(client, query.model_copy(update={"limit": PAGE_SIZE}), timeout)
    try:
        async for event in watching.events():
            yield event
    finally:
        await watching.close()


class _Watch:
    """One watch, over as many connections as it takes."""

    def __init__(self, client: GatewayClient, query: DiscoverPayload, timeout: float) -> None:
        self._client = client
        self._query = query
        self._timeout = timeout
        self._id = ""  # of the DISCOVER that began it on the present connection
        self._session: Session | None = None  # in which it has begun: it ends with that
        self._known: dict[str, Found] = {}
        self._told: set[str] = set()  # of agents: something was told since the queue was last read
        # Payloads of events; None: the connection is another one.
        self._queue: asyncio.Queue[PresencePayload | None] = asyncio.Queue()
        self._backoff = Backoff()
        self._retry: asyncio.TimerHandle | None = None
        self._off = (client.on(MessageType.PRESENCE, self._receive), client.on_state(self._state_changed))

    def _receive(self, message: Message) -> None:
        payload = message.payload
        if message.correlation_id == self._id and isinstance(payload, PresencePayload):
            if self._queue.qsize() < EVENTS_MAX:
                self._told.update(str(entry.get("did")) for entry in payload.agents)
                self._queue.put_nowait(payload)
                return
            _log.warning("%r: %d events of a watch were not read in time", self._client, EVENTS_MAX)
            is_new = None in self._take_unread()
            self._queue.put_nowait(None if is_new else PresencePayload(event="missed"))

    def _state_changed(self, state: ClientState) -> None:
        if state.value == "registered":
            self._take_unread()  # how it is now is asked for
        if state.value in ("registered", "closed"):
            self._queue.put_nowait(None)

    def _take_unread(self) -> list[PresencePayload | None]:
        self._told.clear()
        return [self._queue.get_nowait() for _ in range(self._queue.qsize())]

    async def events(self) -> AsyncIterator[PresenceEvent]:
        """Yield what happens."""
        async for event in self._begin():
            yield event
        while True:
            payload = await self._queue.get()
            self._told.clear()
            if payload is None and self._client.state.value == "closed":
                return
            if payload is None and self._client.state.value != "registered":
                continue
            if payload is None and self._client.session is not self._session:
                async for event in self._begin():
                    yield event
            elif payload is None or payload.event == "missed":
                async for event in self._compare(self._query, ""):
                    yield event
            else:
                for entry in payload.agents:
                    found = _read(self._client, entry)
                    change = None if found is None else self._apply(found)
                    if change is not None:
                        yield change

    async def _begin(self) -> AsyncIterator[PresenceEvent]:
        """Watch on the present connection."""
        id_ = Message.create(self._client.did, self._client.did, self._query).id
        self._id = id_
        async for event in self._compare(self._query.model_copy(update={"watch": True}), id_):
            yield event

    async def _compare(self, query: DiscoverPayload, id_: str) -> AsyncIterator[PresenceEvent]:
        """Ask who is there, and yield what is new. Of whom is told meanwhile, the queue knows better."""
        present: set[str] = set()
        is_whole = True
        try:
            async for page in _pages(self._client, query, self._timeout, id_):
                if id_:  # the first page says that the watch is; later ones may come in a later session
                    self._session, id_ = self._client.session, ""
                is_whole = is_whole and not page.partial
                for entry in page.agents:
                    present.add(str(entry.get("did")))
                    found = _read(self._client, entry)
                    if found is None or found.did in self._told:
                        continue
                    if (event := self._apply(found)) is not None:
                        yield event
        except NotConnectedError:
            return  # it begins again with the next connection
        except (RemoteError, GatewayUnreachableError) as error:
            if not error.temporary:
                raise
            if id_ and isinstance(error, GatewayUnreachableError):
                await self._end()  # it may have begun, though nobody said so
            self._try_again(is_new=bool(id_))
            return
        if not is_whole:
            self._try_again(is_new=False)
            return
        self._backoff.attempts = 0
        for did in [did for did in self._known if did not in present and did not in self._told]:
            if (event := self._apply(Found(did, "offline", self._known[did].card))) is not None:
                yield event

    def _try_again(self, *, is_new: bool) -> None:
        """Ask once more in a while; `is_new`: to watch, too."""
        if self._retry is not None:
            self._retry.cancel()
        again = None if is_new else PresencePayload(event="missed")
        loop = asyncio.get_running_loop()
        self._retry = loop.call_later(self._backoff.next(RETRY_SECONDS), self._queue.put_nowait, again)

    def _apply(self, found: Found) -> PresenceEvent | None:
        """Take note of how an agent is now; return what that means, if anything."""
        before = self._known.get(found.did)
        if found.status == "offline":
            if self._known.pop(found.did, None) is None:
                return None
            return PresenceEvent("leave", found)
        self._known[found.did] = found
        if before == found:
            return None
        if found.status == "away":
            return PresenceEvent("away", found)
        return PresenceEvent("join" if before is None else "update", found)

    async def close(self) -> None:
        """End it; the gateway is told if that is possible."""
        for off in self._off:
            off()
        if self._retry is not None:
            self._retry.cancel()
        await self._end()

    async def _end(self) -> None:
        session = self._client.session
        if session is not None and self._client.state.value == "registered":
            end = Message.create(
                self._client.did, session.gateway_did, DiscoverPayload(watch=False), correlation_id=self._id
            )
            with suppress(AIConexusError):
                await self._client.request(end, timeout=self._timeout)
