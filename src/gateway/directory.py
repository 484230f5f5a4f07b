"""What the agents of one worker can do, and who of them can do what somebody asks for.

Agents that offer the same (name, description and tags) share one Offer, so a search compares texts once for
all of them. Every list of agents is in the order of their DIDs: a page begins behind the last DID of the one
before, so agents that come and go meanwhile make no other appear twice, or not at all.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from aiconexus.protocol import Capability, DiscoverPayload

# What is looked at before others may get their turn: about 30 microseconds.
STEP = 64
# Agents that are looked at one by one first, if there are more than so many offers to look at: about half a
# millisecond. If a fortieth of all fits, a page of 50 is full by then.
PROBE = 2_000
OFFERS_MIN = 256


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
        return
    position = bisect_left(dids, did)
    if dids[position] != did:
        dids.insert(position, did)


def _discard(dids: list[str], did: str) -> None:
    position = bisect_left(dids, did)
    if position < len(dids) and dids[position] == did:
        del dids[position]


def _behind(dids: list[str], cursor: str) -> Iterator[str]:
    for position in range(bisect_right(dids, cursor), len(dids)):
        yield dids[position]


class Directory:
    """The agents of one worker that may be found.

    Args:
        offers_of: Returns what `put` returned for an agent that is listed.
    """

    def __init__(self, offers_of: Callable[[str], Iterable[Offer]]) -> None:
        self._offers_of = offers_of
        self._offers: dict[tuple[str, tuple[str, ...], str], Offer] = {}
        # Ordered sets: their values mean nothing.
        self._by_name: dict[str, dict[Offer, None]] = {}
        self._by_tag: dict[str, dict[Offer, None]] = {}
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
                self._by_name.setdefault(offer.name, {})[offer] = None
                for tag in offer.tags:
                    self._by_tag.setdefault(tag, {})[offer] = None
            _add(shared.dids, did)
            kept.append(shared)
        return tuple(kept)

    def remove(self, did: str, offers: Iterable[Offer]) -> None:
        """List an agent no more."""
        _discard(self._listed, did)
        self._withdraw(did, offers)

    def replace(self, did: str, before: tuple[Offer, ...], offers: tuple[Offer, ...]) -> tuple[Offer, ...]:
        """List an agent with other offers, or the same: a search that goes on meanwhile does not miss it."""
        kept = self.put(did, offers)
        self._withdraw(did, (offer for offer in before if offer not in kept))
        return kept

    def _withdraw(self, did: str, offers: Iterable[Offer]) -> None:
        for offer in offers:
            _discard(offer.dids, did)
            if offer.dids or self._offers.get((offer.name, offer.tags, offer.text)) is not offer:
                continue
            del self._offers[offer.name, offer.tags, offer.text]
            for index, name in ((self._by_name, offer.name), *((self._by_tag, tag) for tag in offer.tags)):
                del index[name][offer]
                if not index[name]:
                    del index[name]

    def search(self, query: Query, cursor: str, limit: int) -> Generator[None, None, list[str]]:
        """Find up to `limit` agents behind `cursor`, in the order of their DIDs.

        A generator that yields whenever others may get their turn, and returns the DIDs.
        """
        if not query.names_capabilities:
            return list(islice(_behind(self._listed, cursor), limit))
        offers = self._candidates(query)
        found: list[str] = []
        if len(offers) > OFFERS_MIN:
            found, cursor = yield from self._probe(query, cursor, limit)
            if not cursor or len(found) == limit:
                return found
        return found + (yield from self._look_up(offers, query, cursor, limit - len(found)))

    def _probe(self, query: Query, cursor: str, limit: int) -> Generator[None, None, tuple[list[str], str]]:
        """Look at agents one by one: the shortest way if many fit.

        Returns:
            Who was found, and the DID behind which nobody was looked at; none if nobody is left.
        """
        found: list[str] = []
        for _ in range(PROBE // STEP):
            # Where to go on: the list may be another one after each turn.
            dids = list(islice(_behind(self._listed, cursor), STEP))
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
        for number, offer in enumerate(offers, 1):
            if number % STEP == 0:
                yield
            if not query.fits(offer):
                continue
            for did in islice(_behind(offer.dids, cursor), limit):
                if end and did > end:
                    break
                nearest.add(did)
            if len(nearest) >= 2 * limit:
                nearest = set(sorted(nearest)[:limit])
                end = max(nearest)
        return sorted(nearest)[:limit]

    def _candidates(self, query: Query) -> list[Offer]:
        if query.capability is not None:
            return list(self._by_name.get(query.capability, ()))
        if query.tag is not None:
            return list(self._by_tag.get(query.tag, ()))
        return list(self._offers.values())
