"""DISCOVER: who can do what is asked for, of all workers of the node, or of all nodes.

Each worker knows its own agents only (gateway.directory). A question goes to all of them, and each answers
with a page at most; what they answer is merged. With other nodes, the shared registry has the index.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
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
# That searches take of one loop pass: what a message waits for them at most.
TURN_SECONDS = 0.000_5
# Of one session, at the same time.
QUESTIONS_MAX = 4
# Of all sessions of one worker.
QUESTIONS_MAX_TOGETHER = 256
# That wait for their turn at one worker.
SEARCHES_MAX = 1_024
# Of the agents in one page: the envelope and the payload around them fit into the rest of a message.
PAGE_MAX_BYTES = 60_000


@dataclass(slots=True)
class Page:
    """Some agents in the order of their DIDs, each as JSON.

    `cursor` is the DID behind which there may be others: that of the last, or one that has gone meanwhile;
    empty if there are none.
    """

    agents: list[tuple[str, bytes]] = field(default_factory=list)
    cursor: str = ""

    @classmethod
    def of(cls, agents: Iterable[tuple[str, bytes]], limit: int, cursor: str = "") -> Page:
        """Return the first of `agents`, as many as a page takes; behind all of them is `cursor`."""
        page = cls(cursor=cursor)
        size = 0
        for did, data in agents:
            size += len(data) + 1
            if len(page.agents) == limit or (size > PAGE_MAX_BYTES and page.agents):
                page.cursor = page.agents[-1][0]
                break
            page.agents.append((did, data))
        return page

    @classmethod
    def merged(cls, pages: Iterable[Page], limit: int) -> Page:
        """Return the first page of several: what lies behind the cursor of one of them is not known."""
        pages = list(pages)
        cursor = min((page.cursor for page in pages if page.cursor), default="")
        # An agent that has moved just now may stand in two.
        every = {did: data for page in pages for did, data in page.agents if not cursor or did <= cursor}
        return cls.of(sorted(every.items()), limit, cursor)


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


@dataclass(slots=True)
class Search:
    """What is looked for among the agents of this worker, in steps; `done` gets the page."""

    steps: Generator[None, None, Page]
    done: Callable[[Page], None]
    deadline: float


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
        self._count: dict[Session, int] = {}  # of the questions
        self._searches: deque[Search] = deque()

    def ask(self, session: Session, message_id: str, payload: DiscoverPayload) -> bool:
        """Answer a DISCOVER in a while; False if there are too many."""
        count = self._count.get(session, 0)
        if count >= QUESTIONS_MAX or len(self._questions) >= QUESTIONS_MAX_TOGETHER:
            return False
        self._count[session] = count + 1
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
        session = question.session
        self._count[session] -= 1
        if not self._count[session]:
            del self._count[session]
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
        for number in list(self._questions):
            self._go_on_without(number, worker)

    def _go_on_without(self, number: int, worker: int) -> None:
        question = self._questions.get(number)
        if question is not None and worker in question.waits:
            question.is_partial = True
            self._take(number, worker, Page())

    # --- at every worker -----------------------------------------------------------------------

    def on_ask(self, worker: int, number: int, data: bytes) -> None:
        """Answer another worker; with nothing, if too many ask."""
        if len(self._searches) >= SEARCHES_MAX:
            self._tell(worker, ANSWER, self._worker, number, b"")
            return
        query, cursor, limit = orjson.loads(data)
        if query["dids"] is not None:
            query["dids"] = tuple(query["dids"])

        def answer(page: Page) -> None:
            listed = [orjson.Fragment(data) for _, data in page.agents]
            self._tell(worker, ANSWER, self._worker, number, orjson.dumps([listed, page.cursor]))
            self._settle()

        self._search(Query(**query), cursor, limit, answer)

    def on_answer(self, worker: int, number: int, data: bytes) -> None:
        """Take the answer of another worker."""
        if not data:
            self._go_on_without(number, worker)
            return
        agents, cursor = orjson.loads(data)
        self._take(number, worker, Page([(agent["did"], orjson.dumps(agent)) for agent in agents], cursor))

    def _search(self, query: Query, cursor: str, limit: int, done: Callable[[Page], None]) -> None:
        """Look among the agents of this worker, when it is this search's turn."""
        if not self._searches:
            asyncio.get_running_loop().call_soon(self._go_on)
        self._searches.append(
            Search(self._find(query, cursor, limit), done, time.monotonic() + ANSWER_SECONDS)
        )

    def _go_on(self) -> None:
        """Let the searches go on, in turn, for a moment; messages that wait come first then."""
        now = time.monotonic()
        end = now + TURN_SECONDS
        while self._searches and now < end:
            search = self._searches.popleft()
            if search.deadline < now:
                continue  # whoever asked has gone on
            try:
                next(search.steps)
            except StopIteration as found:
                search.done(found.value)
            else:
                self._searches.append(search)
            now = time.monotonic()
        if self._searches:
            asyncio.get_running_loop().call_soon(self._go_on)

    def _find(self, query: Query, cursor: str, limit: int) -> Generator[None, None, Page]:
        if query.dids is None:
            dids = yield from self._directory.search(query, cursor, limit + 1)
        else:
            dids = [did for did in query.dids if did > cursor and self._fits(query, did)]
        agents = (self._registry.get(did) for did in dids[:limit] if self._fits(query, did))
        return Page.of(
            (
                (agent.did, replies.agent(agent.did, agent.status, agent.card))
                for agent in agents
                if agent is not None
            ),
            limit,
            dids[limit - 1] if len(dids) > limit else "",
        )

    def _fits(self, query: Query, did: str) -> bool:
        session = self._registry.get(did)
        return session is not None and query.matches(did, session.offers, hidden=session.hidden)
