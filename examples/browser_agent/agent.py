"""A Python agent for the page to talk to, and one that talks to the page.

python examples/browser_agent/agent.py
"""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from hashlib import sha256
from typing import Annotated

from pydantic import BaseModel, Field

from aiconexus import Agent, Intent, Quote, capability, current_call
from aiconexus.protocol.errors import CallError

STORY = (
    "Nobody remembered who had put {topic} into the lighthouse.",
    "It stood there one morning, still warm, and hummed.",
    "The keeper wrote a letter to the ministry, and the ministry wrote back: “What about it?”",
    "So the keeper taught it the names of the ships.",
    "By autumn it knew them all, and called each one home in its own voice.",
    "When the fog came, nobody was afraid of it any more.",
    "And the ministry? It asked whether there were two of them.",
)


class Word(BaseModel):
    """A word and how often it stands in a text."""

    word: str
    count: int


class File(BaseModel):
    """What can be told of a file without opening it."""

    bytes: int
    sha256: str


class Workshop(Agent):
    """Does small things for whoever asks."""

    @capability(tags=["text"])
    async def count_words(
        self, text: Annotated[str, Field(min_length=1)], top: Annotated[int, Field(ge=1, le=50)] = 5
    ) -> list[Word]:
        """Return the words that stand most often in a text."""
        words = Counter(word.strip(".,:;!?…“”\"'()").lower() for word in text.split())
        return [Word(word=word, count=count) for word, count in words.most_common(top) if word]

    @capability(tags=["text", "stream"])
    async def tell_story(
        self, topic: str = "the machine", pause: Annotated[float, Field(ge=0, le=5)] = 0.4
    ) -> AsyncIterator[str]:
        """Tell a short story, sentence by sentence, with a pause of some seconds behind each."""
        for number, sentence in enumerate(STORY):
            if number:
                await asyncio.sleep(pause)
            yield sentence.format(topic=topic)

    @capability(tags=["numbers"])
    async def find_primes(self, below: Annotated[int, Field(ge=2, le=200_000)] = 50_000) -> dict[str, int]:
        """Count the primes below a number, and tell how far it is."""
        call = current_call()
        primes: list[int] = []
        for number in range(2, below):
            if all(number % prime for prime in primes if prime * prime <= number):
                primes.append(number)
            if number % 500 == 0:
                call.progress({"done": number, "total": below})
                await asyncio.sleep(0.02)
        return {"primes": len(primes), "largest": primes[-1]}

    @capability(tags=["files"])
    async def inspect_file(self, file: AsyncIterator[bytes]) -> File:
        """Read a file of any size as it comes, and return its size and SHA-256."""
        call, size, digest = current_call(), 0, sha256()
        async for chunk in file:
            size += len(chunk)
            digest.update(chunk)
            call.progress(f"{size:,} bytes read")
        return File(bytes=size, sha256=digest.hexdigest())

    @capability(tags=["people"])
    async def interview(self, topic: str = "browsers") -> str:
        """Ask the person in front of your page a question, by calling its `ask_human`."""
        caller = current_call().caller
        async with self.connect(caller) as peer:
            try:
                answer = await peer.execute("ask_human", question=f"What do you like about {topic}?")
            except CallError as error:
                return f"They did not want to say: {error}"
        return f"They said: “{answer}”"

    async def on_intent(self, intent: Intent) -> Quote:
        """Say which capability would help."""
        words = (intent.query or intent.task or "").lower()
        known = {
            "word": ("count_words", "text"),
            "story": ("tell_story", "topic"),
            "prime": ("find_primes", "below"),
            "file": ("inspect_file", "file"),
            "ask": ("interview", "topic"),
        }
        for sign, (name, needed) in known.items():
            if sign in words:
                return Quote(status=f"understood: {name}", required_input=needed, cost="nothing")
        return Quote(status="not_understood")

    async def start(self) -> None:
        """Tell the DID once others can use it."""
        await super().start()
        print(f"is registered as {self.did}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="An agent for the page to talk to.")
    parser.add_argument("--gateway", default="ws://127.0.0.1:8000/ws", help="default: %(default)s")
    parser.add_argument("--identity", help="key file, made if there is none; default: a new key")
    parser.add_argument("--host-address", action="append", help="address to offer; default: all")
    options = parser.parse_args()
    Workshop(options.gateway, options.identity, host_addresses=options.host_address).run()


if __name__ == "__main__":
    main()
