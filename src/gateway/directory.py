"""What the agents of one worker can do, and who of them can do what somebody asks for.

Agents that offer the same (name, description and tags) share one Offer, so a search compares texts once for
all of them. Every list of agents is in the order of their DIDs: a page begins behind the last DID of the one
before, so agents that come and go meanwhile make no other appear twice, or not at all.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from aiconexus.protocol import Capability, DiscoverPayload

# What is looked at before others may get their turn: about 30 microseconds.
STEP = 64
# Agents that are looked at one by one first: a millisecond. A page of 50 is full then if a fortieth fits.
PROBE_MAX = 2_048


def probe_size(offers: int) -> int:
    """Return how many agents are worth a look before that many offers: one costs as much as four of them."""
    return min(offers // 4, PROBE_MAX)


class View(NamedTuple):
    """What may be seen of an agent; `card` is JSON or empty, and nothing is listed if hidden."""

    card: bytes
    hidden: bool


@dataclass(frozen=True, slots=True)
class Query:
    """What is asked for. All conditions must hold for one capability; without any, every agent fits."""

    capability: str | None = None
    tag: str | None = None
    text: str | None = None  # casefolded
    dids: tuple[str, ...] | None = None  # sorted

    @classmethod
    def of(cls, payload: DiscoverPayload) -> Query:
        """Return the query of a DISCOVER."""
        return cls(
            capability=payload.capability,
            tag=payload.tag,
            text=payload.text.casefold() if payload.text is not None else None,
            dids=tuple(sorted(set(payload.dids))) if payload.dids is not None else None,
        )

    @property
    def names_capabilities(self) -> bool:
        """Whether it asks for more than who is there."""
        return self.capability is not None or self.tag is not None or self.text is not None

    def fits(self, offer: Offer) -> bool:
        """Whether a capability is what is asked for."""
        return (
            (self.capability is None or offer.name == self.capability)
            and (self.tag is None or self.tag in offer.tags)
            and (self.text is None or self.text in offer.text)
        )

    def matches(self, did: str, offers: Iterable[Offer], *, hidden: bool = False) -> bool:
        """Whether an agent is what is asked for; a hidden one must be asked for by its DID."""
        if self.dids is not None:
            if did not in self.dids:
                return False
        elif hidden:
            return False
        return not self.names_capabilities or any(self.fits(offer) for offer in offers)


@dataclass(slots=True, order=True)
class Offer:
    """One capability, as a search sees it, and the agents that have it."""

    name: str
    tags: tuple[str, ...]
    text: str  # name and description, casefolded
    dids: list[str] = field(default_factory=list, compare=False)

    @classmethod
    def of(cls, capability: Capability) -> Offer:
        """Return what a search sees of a capability."""
        return cls.read(capability.name, capability.tags, capability.description)

    @classmethod
    def read(cls, name: str, tags: Iterable[str], description: str) -> Offer:
        """Return what a search sees of the capability with this name, these tags and this description."""
        return cls(name, tuple(sorted(set(tags))), f"{name}\n{description}".casefold())


_Item = TypeVar("_Item", str, Offer)


def _add(items: list[_Item], item: _Item) -> _Item:
    """Put an item into its place, unless an equal one is there; return which is there now."""
    if not items or items[-1] < item:
        items.append(item)
        return item
    position = bisect_left(items, item)
    if items[position] != item:
        items.insert(position, item)
    return items[position]


def _discard(items: list[_Item], item: _Item) -> bool:
    """Take out the item that is equal; tell whether there was one."""
    position = bisect_left(items, item)
    if position == len(items) or items[position] != item:
        return False
    del items[position]
    return True


def _behind(items: list[_Item], cursor: _Item | None, count: int) -> list[_Item]:
    """Return the next few items of a list that may change between any two turns."""
    position = 0 if cursor is None else bisect_right(items, cursor)
    return items[position : position + count]


class Directory:
    """The agents of one worker that may be found.

    Args:
        offers_of: Returns what `put` returned for an agent that is listed.
    """

    def __init__(self, offers_of: Callable[[str], Iterable[Offer]]) -> None:
        self._offers_of = offers_of
        self._offers: list[Offer] = []
        self._by_name: dict[str, list[Offer]] = {}
        self._by_tag: dict[str, list[Offer]] = {}
        self._listed: list[str] = []

    def __len__(self) -> int:
        return len(self._listed)

    def put(self, did: str, offers: tuple[Offer, ...]) -> tuple[Offer, ...]:
        """List an agent; return its offers, to be given to `remove`."""
        _add(self._listed, did)
        kept = []
        for offer in offers:
            shared = _add(self._offers, offer)
            if not shared.dids:
                _add(self._by_name.setdefault(offer.name, []), shared)
                for tag in offer.tags:
                    _add(self._by_tag.setdefault(tag, []), shared)
            _add(shared.dids, did)
            kept.append(shared)
        return tuple(kept)

    def remove(self, did: str, offers: Iterable[Offer]) -> None:
        """List an agent no more."""
        _discard(self._listed, did)
        self._withdraw(did, offers)

    def replace(self, did: str, before: tuple[Offer, ...], offers: tuple[Offer, ...]) -> tuple[Offer, ...]:
        """List an agent with other offers, or the same: a search that goes on meanwhile finds those."""
        kept = self.put(did, offers)
        self._withdraw(did, (offer for offer in before if offer not in kept))
        return kept

    def _withdraw(self, did: str, offers: Iterable[Offer]) -> None:
        for offer in offers:
            _discard(offer.dids, did)
            if offer.dids or not _discard(self._offers, offer):
                continue
            for index, name in ((self._by_name, offer.name), *((self._by_tag, tag) for tag in offer.tags)):
                _discard(index[name], offer)
                if not index[name]:
                    del index[name]

    def search(self, query: Query, cursor: str, limit: int) -> Generator[None, None, list[str]]:
        """Find up to `limit` agents behind `cursor`, in the order of their DIDs.

        A generator that yields whenever others may get their turn, and returns the DIDs.
        """
        if not query.names_capabilities:
            return _behind(self._listed, cursor, limit)
        offers = self._candidates(query)
        agents = probe_size(len(offers))
        found: list[str] = []
        if agents >= STEP:
            found, cursor = yield from self._probe(query, cursor, limit, agents)
            if not cursor or len(found) == limit:
                return found
        return found + (yield from self._look_up(offers, query, cursor, limit - len(found)))

    def _probe(
        self, query: Query, cursor: str, limit: int, agents: int
    ) -> Generator[None, None, tuple[list[str], str]]:
        """Look at some agents one by one: the shortest way if many fit.

        Returns:
            Who was found, and the DID behind which nobody was looked at; none if nobody is left.
        """
        found: list[str] = []
        for _ in range(agents // STEP):
            dids = _behind(self._listed, cursor, STEP)
            for did in dids:
                if any(query.fits(offer) for offer in self._offers_of(did)):
                    found.append(did)
                    if len(found) == limit:
                        return found, did
            if len(dids) < STEP:
                return found, ""
            cursor = dids[-1]
            yield
        return found, cursor

    def _look_up(
        self, offers: list[Offer], query: Query, cursor: str, limit: int
    ) -> Generator[None, None, list[str]]:
        """Look at what is offered, and who offers it: the shortest way if few fit."""
        nearest: set[str] = set()
        end = ""  # the last of the nearest, once there are enough
        seen: Offer | None = None
        while looked_at := _behind(offers, seen, STEP):
            seen = looked_at[-1]
            for offer in looked_at:
                if not query.fits(offer):
                    continue
                for did in _behind(offer.dids, cursor, limit):
                    if end and did > end:
                        break
                    nearest.add(did)
                if len(nearest) >= 2 * limit:
                    nearest = set(sorted(nearest)[:limit])
                    end = max(nearest)
            yield
        return sorted(nearest)[:limit]

    def _candidates(self, query: Query) -> list[Offer]:
        if query.capability is not None:
            return self._by_name.get(query.capability, [])
        if query.tag is not None:
            return self._by_tag.get(query.tag, [])
        return self._offers
