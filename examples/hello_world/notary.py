"""An agent that reads contracts. Start it and give its DID to whoever needs a notary.

python examples/hello_world/notary.py
"""

from __future__ import annotations

import argparse

from pydantic import BaseModel

from aiconexus import Agent, Intent, Peer, Quote, capability

# What a clause of each kind says; a real notary would ask a language model.
SIGNS = {
    "non-compete": ("compete", "competitor"),
    "confidentiality": ("confidential", "secret"),
    "termination": ("terminate", "notice"),
}


class Clause(BaseModel):
    """A clause of a contract."""

    kind: str
    sentence: int
    text: str


class Notary(Agent):
    """Reads contracts."""

    @capability(tags=["legal", "contracts"])
    async def extract_clauses(self, text: str, kinds: list[str]) -> list[Clause]:
        """Return the sentences of `text` that are clauses of one of `kinds`."""
        unknown = [kind for kind in kinds if kind not in SIGNS]
        if unknown:
            raise ValueError(f"I know no clauses of kind {unknown}, only {sorted(SIGNS)}")
        print(f"executes extract_clauses for {', '.join(kinds)}")
        sentences = [sentence.strip() + "." for sentence in text.split(".") if sentence.strip()]
        return [
            Clause(kind=kind, sentence=number, text=sentence)
            for number, sentence in enumerate(sentences, 1)
            for kind in kinds
            if any(sign in sentence.lower() for sign in SIGNS[kind])
        ]

    async def on_intent(self, intent: Intent) -> Quote:
        """Offer to read any contract, at a price."""
        print(f"is asked: “{intent.query}”")
        if intent.query and "clause" in intent.query.lower():
            return Quote(status="understood", required_input=["text", "kinds"], cost="0.50 EUR")
        return Quote(status="not_understood")

    async def on_peer(self, peer: Peer) -> None:
        """Tell who has connected."""
        print(f"is connected with {peer.did[:16]}… over {peer.path}")

    async def on_peer_lost(self, peer: Peer, reason: str) -> None:
        """Tell why a connection ended."""
        print(f"is no longer connected with {peer.did[:16]}…: {reason}")

    async def start(self) -> None:
        """Tell the DID once others can use it."""
        await super().start()
        print(f"is registered as {self.did}")


def main() -> None:
    parser = argparse.ArgumentParser(description="An agent that reads contracts.")
    parser.add_argument("--gateway", default="ws://127.0.0.1:8000/ws", help="default: %(default)s")
    parser.add_argument("--identity", help="key file, made if there is none; default: a new key")
    parser.add_argument("--host-address", action="append", help="address to offer; default: all")
    options = parser.parse_args()
    Notary(options.gateway, options.identity, host_addresses=options.host_address).run()


if __name__ == "__main__":
    main()
