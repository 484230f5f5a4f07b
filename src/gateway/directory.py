"""What the agents of one worker can do, and who of them can do what somebody asks for.

Agents that offer the same (name, description and tags) share one Offer, so a search compares texts once for
all of them. Every list of agents is in the order of their DIDs: a page begins behind the last DID of the one
before, so agents that come and go meanwhile make no other appear twice, or not at all.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from heapq import merge
from itertools import groupby, islice

from aiconexus.protocol import Capability, DiscoverPayload

# Offers that are looked at before others get their turn: about half a millisecond.
SLICE = 2_000


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


@dataclass(slots=True, eq=False)
class Offer:
    """One capability, as a search sees it, and the agents that have it."""

    name: str
    tags: tuple[str, ...]
    text: str  # name and description, casefolded
    dids: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, capability: Capability) -> Offer:
        """Return what a search sees of a capability."""
        return cls.read(capability.name, capability.tags, capability.description)

    @classmethod
    def read(cls, name: str, tags: Iterable[str], description: str) -> Offer:
        """Return what a search sees of the capability with this name, these tags and this description."""
        return cls(name, tuple(sorted(set(tags))), f"{name}\n{description}".casefold())


def _add(dids: list[str], did: str) -> None:
    if not dids or dids[-1] < did:
        dids.append(did)
    else:
        insort(dids, did)


def _discard(dids: list[str], did: str) -> None:
    position = bisect_left(dids, did)
    if position < len(dids) and dids[position] == did:
        del dids[position]


def _behind(dids: list[str], cursor: str) -> Iterator[str]:
    for position in range(bisect_right(dids, cursor), len(dids)):
        yield dids[position]


class Directory:
    """The agents of one worker that may be found."""

    def __init__(self) -> None:
        self._offers: dict[tuple[str, tuple[str, ...], str], Offer] = {}
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
            key = (offer.name, offer.tags, offer.text)
            shared = self._offers.get(key)
            if shared is None:
                shared = self._offers[key] = offer
                self._by_name.setdefault(offer.name, []).append(offer)
                for tag in offer.tags:
                    self._by_tag.setdefault(tag, []).append(offer)
            _add(shared.dids, did)
            kept.append(shared)
        return tuple(kept)

    def remove(self, did: str, offers: Iterable[Offer]) -> None:
        """List an agent no more."""
        _discard(self._listed, did)
        for offer in offers:
            _discard(offer.dids, did)
            if offer.dids or self._offers.get((offer.name, offer.tags, offer.text)) is not offer:
                continue
            del self._offers[offer.name, offer.tags, offer.text]
            for index, name in ((self._by_name, offer.name), *((self._by_tag, tag) for tag in offer.tags)):
                index[name].remove(offer)
                if not index[name]:
                    del index[name]

    def search(self, query: Query, cursor: str, limit: int) -> Generator[None, None, list[str]]:
        """Find up to `limit` agents behind `cursor`, in the order of their DIDs.

        A generator that yields whenever others should get their turn, and returns the DIDs.
        """
        if not query.names_capabilities:
            return list(islice(_behind(self._listed, cursor), limit))
        fitting: list[Offer] = []
        for number, offer in enumerate(self._candidates(query)):
            if number % SLICE == SLICE - 1:
                yield
            if query.fits(offer):
                fitting.append(offer)
        if len(fitting) <= SLICE:
            dids = merge(*(_behind(offer.dids, cursor) for offer in fitting))
            # One agent may have several.
            return [did for did, _ in islice(groupby(dids), limit)]
        # Many offers of few agents each: to sort them is less than to merge them.
        every: set[str] = set()
        for number, offer in enumerate(fitting):
            if number % SLICE == SLICE - 1:
                yield
            every.update(_behind(offer.dids, cursor))
        yield
        return sorted(every)[:limit]

    def _candidates(self, query: Query) -> list[Offer]:
        if query.capability is not None:
            return list(self._by_name.get(query.capability, ()))
        if query.tag is not None:
            return list(self._by_tag.get(query.tag, ()))
        return list(self._offers.values())
