"""DISCOVER: who can do what is asked for, of all workers of the node, or of all nodes.

Each worker knows its own agents only (gateway.directory). A question goes to all of them, and each answers
with a page at most; what they answer is merged. With other nodes, the shared registry has the index.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import orjson

from aiconexus.protocol import DiscoverPayload
from gateway import replies
from gateway.directory import Directory, Query
from gateway.kinds import ANSWER, ASK

if TYPE_CHECKING:
    from gateway.cluster import Cluster
    from gateway.registry import Registry, Session

# A worker that is alive answers within a few loop passes.
ANSWER_SECONDS = 2.0
# Of one session, at the same time.
QUESTIONS_MAX = 4
# Of all sessions of one worker.
QUESTIONS_MAX_TOGETHER = 256
# Of the agents in one page: the envelope and the payload around them fit into the rest of a message.
PAGE_MAX_BYTES = 60_000


@dataclass(slots=True)
class Page:
    """Some agents in the order of their DIDs, each as JSON; `more` if there are others behind them."""

    agents: list[tuple[str, bytes]] = field(default_factory=list)
    more: bool = False

    @classmethod
    def of(cls, agents: Iterable[tuple[str, bytes]], limit: int) -> Page:
        """Return the first of `agents`, as many as a page takes."""
        page = cls()
        size = 0
        for did, data in agents:
            size += len(data) + 1
            if len(page.agents) == limit or (size > PAGE_MAX_BYTES and page.agents):
                page.more = True
                break
            page.agents.append((did, data))
        return page

    @classmethod
    def merged(cls, pages: Iterable[Page], limit: int) -> Page:
        """Return the first page of several: what lies behind the end of one that has more is not known."""
        pages = list(pages)
        ends = [page.agents[-1][0] for page in pages if page.more and page.agents]
        end = min(ends) if ends else None
        # An agent that has moved just now may stand in two.
        every = {did: data for page in pages for did, data in page.agents if end is None or did <= end}
        merged = cls.of(sorted(every.items()), limit)
        merged.more = merged.more or bool(ends)
        return merged


@dataclass(slots=True)
class Question:
    """A DISCOVER that is not answered yet. `waits`: the workers whose answer is missing."""

    session: Session
    message_id: str
    query: Query
    cursor: str
    limit: int
    deadline: float
    waits: set[int] = field(default_factory=set)
    pages: list[Page] = field(default_factory=list)
    is_partial: bool = False


class Discovery:
    """The questions of the agents of one worker, and its answers to those of others.

    Args:
        worker: The number of this worker.
        directory: Of its agents.
        registry: Their sessions.
        cluster: The other nodes, if there are any.
        others: Returns the other workers of this node.
        tell: Sends a record to another worker, as `Router.tell`.
        reply: Called with a session, the id of its DISCOVER, the page and whether it is partial.
        settle: Called when something was sent outside of a pass of the router.
    """

    def __init__(
        self,
        worker: int,
        directory: Directory,
        registry: Registry,
        cluster: Cluster | None,
        *,
        others: Callable[[], list[int]],
        tell: Callable[[int, int, int, int, bytes], bool],
        reply: Callable[[Session, str, Page, bool], None],
        settle: Callable[[], None],
    ) -> None:
        self._worker = worker
        self._directory = directory
        self._registry = registry
        self._cluster = cluster
        self._others = others
        self._tell = tell
        self._reply = reply
        self._settle = settle
        self._questions: dict[int, Question] = {}
        self._number = 0
        self._count: dict[str, int] = {}  # of the questions, by session

    def ask(self, session: Session, message_id: str, payload: DiscoverPayload) -> bool:
        """Answer a DISCOVER in a while; False if there are too many."""
        count = self._count.get(session.id, 0)
        if count >= QUESTIONS_MAX or len(self._questions) >= QUESTIONS_MAX_TOGETHER:
            return False
        self._count[session.id] = count + 1
        self._number += 1
        number = self._number
        question = self._questions[number] = Question(
            session,
            message_id,
            Query.of(payload),
            payload.cursor or "",
            payload.limit,
            time.monotonic() + ANSWER_SECONDS,
        )
        if self._cluster is not None and self._cluster.is_connected:
            self._cluster.discover(
                question.query, question.cursor, question.limit, lambda page: self._take_all(number, page)
            )
            return True
        question.is_partial = self._cluster is not None  # the other nodes cannot be asked
        question.waits = {self._worker, *self._others()}
        request = orjson.dumps([asdict(question.query), question.cursor, question.limit])
        for worker in question.waits - {self._worker}:
            if not self._tell(worker, ASK, self._worker, number, request):
                question.waits.discard(worker)
                question.is_partial = True
        self._search(
            question.query,
            question.cursor,
            question.limit,
            lambda page: self._take(number, self._worker, page),
        )
        return True

    # --- at the worker that asks ---------------------------------------------------------------

    def _take(self, number: int, worker: int, page: Page) -> None:
        question = self._questions.get(number)
        if question is None or worker not in question.waits:
            return
        question.waits.discard(worker)
        question.pages.append(page)
        if not question.waits:
            self._finish(number)

    def _take_all(self, number: int, page: Page | None) -> None:
        question = self._questions.get(number)
        if question is not None:
            question.pages = [page or Page()]
            question.is_partial = page is None
            self._finish(number)

    def _finish(self, number: int) -> None:
        question = self._questions.pop(number)
        key = question.session.id
        self._count[key] -= 1
        if not self._count[key]:
            del self._count[key]
        page = Page.merged(question.pages, question.limit)
        self._reply(question.session, question.message_id, page, question.is_partial)
        self._settle()

    def expire(self) -> None:
        """Go on without the workers that do not answer."""
        now = time.monotonic()
        for number, question in list(self._questions.items()):
            if question.deadline > now:
                break
            question.is_partial = True
            self._finish(number)

    def on_link_lost(self, worker: int) -> None:
        """Another worker will not answer."""
        for number, question in list(self._questions.items()):
            if worker in question.waits:
                question.is_partial = True
                self._take(number, worker, Page())

    # --- at every worker -----------------------------------------------------------------------

    def on_ask(self, worker: int, number: int, data: bytes) -> None:
        """Answer another worker."""
        query, cursor, limit = orjson.loads(data)
        if query["dids"] is not None:
            query["dids"] = tuple(query["dids"])

        def answer(page: Page) -> None:
            listed = [orjson.Fragment(data) for _, data in page.agents]
            self._tell(worker, ANSWER, self._worker, number, orjson.dumps([listed, page.more]))
            self._settle()

        self._search(Query(**query), cursor, limit, answer)

    def on_answer(self, worker: int, number: int, data: bytes) -> None:
        """Take the answer of another worker."""
        agents, more = orjson.loads(data)
        self._take(number, worker, Page([(agent["did"], orjson.dumps(agent)) for agent in agents], more))

    def _search(self, query: Query, cursor: str, limit: int, done: Callable[[Page], None]) -> None:
        """Look among the agents of this worker."""
        if query.dids is not None:
            dids = [
                did
                for did in query.dids
                if did > cursor
                and (session := self._registry.get(did)) is not None
                and query.matches(did, session.offers)
            ]
            done(self._page(dids, limit))
            return
        search = self._directory.search(query, cursor, limit + 1)
        loop = asyncio.get_running_loop()

        def go_on() -> None:
            try:
                next(search)
            except StopIteration as found:
                done(self._page(found.value, limit))
            else:
                loop.call_soon(go_on)

        go_on()

    def _page(self, dids: list[str], limit: int) -> Page:
        sessions = [session for did in dids if (session := self._registry.get(did)) is not None]
        return Page.of(
            ((session.did, replies.agent(session.did, session.status, session.card)) for session in sessions),
            limit,
        )
