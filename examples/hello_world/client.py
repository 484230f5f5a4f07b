"""An agent that has a contract read. All it knows is the notary's DID.

python examples/hello_world/client.py did:key:z6Mk...
"""

from __future__ import annotations

import argparse
import asyncio
from time import perf_counter

from aiconexus import Agent

CONTRACT = (
    "The employee starts on 1 March. For two years after the end of this contract the employee will not "
    "compete with the company. All drawings stay secret. Either side may terminate with a notice of three "
    "months. The employee will not work for a competitor in the same town."
)


async def main() -> None:
    parser = argparse.ArgumentParser(description="An agent that has a contract read.")
    parser.add_argument("did", help="DID of the notary")
    parser.add_argument("--gateway", default="ws://127.0.0.1:8000/ws", help="default: %(default)s")
    parser.add_argument("--host-address", action="append", help="address to offer; default: all")
    options = parser.parse_args()

    async with Agent(options.gateway, host_addresses=options.host_address) as me:
        print(f"is registered as {me.did}")

        begin = perf_counter()
        async with me.connect(options.did) as notary:
            print(f"is connected with {notary.did[:16]}… over {notary.path} {since(begin)}")

            question = "Extract the non-compete clauses of this contract"
            print(f"sends an INTENT: “{question}”")
            begin = perf_counter()
            quote = await notary.intent(question)
            print(f"gets a quote: {quote.status}, needs {quote.required_input}, {quote.cost} {since(begin)}")

            print(f"sends an EXEC_REQUEST: extract_clauses, {len(CONTRACT)} characters")
            begin = perf_counter()
            clauses = await notary.execute(
                "extract_clauses", text=CONTRACT, kinds=["non-compete"], timeout=30
            )
            print(f"gets the result, signed by the notary {since(begin)}:")
            for clause in clauses:
                print(f"  § {clause['sentence']}  {clause['text']}")


def since(begin: float) -> str:
    return f"({(perf_counter() - begin) * 1e3:.0f} ms)"


if __name__ == "__main__":
    asyncio.run(main())
