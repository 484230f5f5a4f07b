"""One exchange: an OFFER, its ANSWER, and the candidates of both sides."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import gevent
from gevent.event import Event

from aiconexus.protocol import AnswerPayload, IceCandidatePayload, OfferPayload, Payload
from signaling.ledger import DeliveryError, Sent

if TYPE_CHECKING:
    from signaling.agent import Agent

EXCHANGE_TIMEOUT = 10.0  # s, from when both agents are connected; a loaded client is slow, too
_SDP = (
    "v=0\r\no=- 3978880800 1 IN IP4 192.0.2.1\r\ns=-\r\nt=0 0\r\na=group:BUNDLE 0\r\n"
    "m=application 9 UDP/DTLS/SCTP webrtc-datachannel\r\nc=IN IP4 0.0.0.0\r\na=mid:0\r\na=sctp-port:5000\r\n"
    "a=max-message-size:262144\r\na=ice-ufrag:aaaa\r\na=ice-pwd:aaaaaaaaaaaaaaaaaaaaaaaa\r\n"
    "a=fingerprint:sha-256 " + ":".join(["AA"] * 32) + "\r\na=setup:{setup}\r\n"
)


class Exchange:
    """Runs in the greenlet of the user that wants it; the agents tell it what arrives.

    Args:
        initiator: Sends the OFFER.
        responder: Answers it.
        candidates: Of each side, before its end-of-candidates.
        was_away: Whether the responder is away when it begins.
    """

    def __init__(
        self, initiator: Agent, responder: Agent, candidates: int, *, was_away: bool = False
    ) -> None:
        self.initiator = initiator
        self.responder = responder
        self.was_away = was_away
        self.offered_at = time.monotonic()
        self._candidates = candidates
        self._awaited = 2 * (1 + candidates + 1)  # a description, candidates and their end from each side
        self._on_its_way: dict[str, Sent] = {}
        self._over = Event()
        self._is_interrupted = False
        self._has_failed = False
        for agent in (initiator, responder):
            agent.join(self)

    @property
    def is_over(self) -> bool:
        """Whether there is nothing more to say."""
        return self._over.is_set()

    def begin(self) -> None:
        """Send the OFFER and trickle the candidates."""
        # A user may be killed at any moment, and half a frame would break the agent's connection.
        gevent.spawn(self._offer).join()

    def _offer(self) -> None:
        self.offered_at = time.monotonic()
        payload = OfferPayload(sdp=_SDP.replace("{setup}", "actpass"))
        offer = self.initiator.send(self.responder, payload, self, None)
        self._trickle(self.initiator, self.responder, offer)

    def answer(self, offer: str) -> None:
        """Answer the OFFER with this id, as the responder."""
        payload = AnswerPayload(sdp=_SDP.replace("{setup}", "active"))
        self.responder.send(self.initiator, payload, self, offer)
        self._trickle(self.responder, self.initiator, offer)

    def _trickle(self, sender: Agent, target: Agent, offer: str) -> None:
        for number in range(1, self._candidates + 1):
            text = f"candidate:{number} 1 udp {2130706431 - number} 192.0.2.1 {50000 + number} typ host"
            sender.send(target, _candidate(text), self, offer)
        sender.send(target, _candidate(""), self, offer)

    def finish(self) -> None:
        """Wait until every message has arrived; report those that have not."""
        statistics = self.initiator.swarm.statistics
        try:
            self._over.wait(EXCHANGE_TIMEOUT)
            if self._is_interrupted:
                statistics.interrupted(time.monotonic() - self.offered_at)
            elif self._awaited and not self._has_failed:
                self._report_lost()
        finally:
            self.close()

    def _report_lost(self) -> None:
        statistics = self.initiator.swarm.statistics
        lost = [sent for sent in self._on_its_way.values() if not sent.excused]
        for sent in lost:
            failure = DeliveryError(f"{sent.kind} not delivered within {EXCHANGE_TIMEOUT:g} s")
            statistics.undelivered(sent.kind, failure, was_away=self.was_away)
        if not lost:
            failure = DeliveryError(f"not complete within {EXCHANGE_TIMEOUT:g} s")
            statistics.undelivered("OFFER", failure, was_away=self.was_away)

    def sent(self, sent: Sent) -> None:
        """Note a message on its way."""
        self._on_its_way[sent.id] = sent

    def returned(self, sent: Sent) -> None:
        """Note that the gateway has given it back."""
        self._on_its_way.pop(sent.id, None)

    def arrived(self, sent: Sent) -> None:
        """Note that it has arrived."""
        self._on_its_way.pop(sent.id, None)
        self._awaited -= 1
        if self._awaited == 0:
            self._over.set()

    def fail(self) -> None:
        """End it; the cause is reported elsewhere."""
        self._has_failed = True
        self._over.set()

    def interrupt(self, *, is_reported: bool = False) -> None:
        """End it because an agent is gone; what is on its way may be lost."""
        if not self.is_over:
            self._is_interrupted = not is_reported
            self._has_failed = is_reported
        for sent in self._on_its_way.values():
            self.initiator.swarm.ledger.excuse(sent)
        self._over.set()

    def close(self) -> None:
        """Let the agents go."""
        self.interrupt(is_reported=True)
        for agent in (self.initiator, self.responder):
            agent.release(self)


def _candidate(text: str) -> Payload:
    return IceCandidatePayload(candidate=text, sdp_mid="0", sdp_mline_index=0)
