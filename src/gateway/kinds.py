"""Kinds of records between workers (ext/gateway/_mesh.pxd) that are no agent's message on its way."""

from __future__ import annotations

from typing import Final

from gateway._mesh import FIRST_OTHER_KIND

# Sessions that move, see gateway.moves.
MOVE: Final = FIRST_OTHER_KIND
FENCE: Final = FIRST_OTHER_KIND + 1
MARK: Final = FIRST_OTHER_KIND + 2
HANDED: Final = FIRST_OTHER_KIND + 3
HELD: Final = FIRST_OTHER_KIND + 4
FORWARDED: Final = FIRST_OTHER_KIND + 5
# To another node: what it has cached of an agent is not so any more.
ROUTE: Final = FIRST_OTHER_KIND + 6
# Who can do what, see gateway.discovery; who comes and goes, see gateway.watches.
ASK: Final = FIRST_OTHER_KIND + 7
ANSWER: Final = FIRST_OTHER_KIND + 8
WATCHING: Final = FIRST_OTHER_KIND + 9
CHANGED: Final = FIRST_OTHER_KIND + 10
# To another node: what waits here of its messages, see gateway.custody.
HELLO: Final = FIRST_OTHER_KIND + 11
ACCOUNT: Final = FIRST_OTHER_KIND + 12
KEPT: Final = FIRST_OTHER_KIND + 13
FREED: Final = FIRST_OTHER_KIND + 14
# To a worker of the same node: what waited here and cannot be delivered any more is back, as this one ends.
GIVEN_BACK: Final = FIRST_OTHER_KIND + 15

# Of records that hold an agent's message.
MESSAGE_KINDS: Final = frozenset({HELD, FORWARDED})
# Of those that are for gateway.custody.
CUSTODY_KINDS: Final = frozenset({HELLO, ACCOUNT, KEPT, FREED})
