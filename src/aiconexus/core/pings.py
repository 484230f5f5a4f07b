"""PING and PONG as texts.

Neither is signed, and there is hardly anything in them: the models of the protocol would be most of what a
round trip costs on top of the DataChannel. So those of the usual form are written and read here as they are.
Others are as good, with a `sequence`, an `ext` or a blank, and go the way of all messages.
"""

from __future__ import annotations

import re
from datetime import datetime, timezone
from typing import Final
from uuid import uuid4

from aiconexus.protocol.limits import PROTOCOL_VERSION
from aiconexus.protocol.models import UUID_PATTERN, MessageType, format_timestamp, parse_timestamp

_END: Final = f'","payload":{{}},"version":"{PROTOCOL_VERSION}"}}'
# One for all: to compile one for each pair of agents would take a millisecond of their connecting.
_USUAL: Final = re.compile(
    rf'\{{"id":"(?P<id>{UUID_PATTERN})","correlation_id":(null|"(?P<asked>{UUID_PATTERN})")'
    r',"timestamp":"(?P<timestamp>[^"]+)","from":"(?P<sender>[^"]+)","to":"(?P<recipient>[^"]+)"'
    rf',"type":"(?P<type>PING|PONG){re.escape(_END)}'
)


class PingTexts:
    """The texts between two agents."""

    def __init__(self, own: str, peer: str) -> None:
        """Make them for this agent's DID and the other's."""
        self._own = own
        self._peer = peer
        self._middle = f'","from":"{own}","to":"{peer}","type":"'

    def ping(self) -> tuple[str, str]:
        """Return the id of a new PING, and its text."""
        id_ = str(uuid4())
        return id_, self._text(id_, "null", MessageType.PING)

    def pong(self, asked: str) -> str:
        """Return the text that answers the PING of this id."""
        return self._text(str(uuid4()), f'"{asked}"', MessageType.PONG)

    def read(self, text: str) -> tuple[MessageType, str] | None:
        """Return what `text` is, and the id of the PING; None if it is not of the usual form."""
        match = _USUAL.fullmatch(text)
        if match is None or match["sender"] != self._peer or match["recipient"] != self._own:
            return None
        try:
            parse_timestamp(match["timestamp"])
        except ValueError:
            return None
        if match["type"] == MessageType.PING:
            return MessageType.PING, match["id"]
        return None if match["asked"] is None else (MessageType.PONG, match["asked"])

    def _text(self, id_: str, asked: str, type_: MessageType) -> str:
        now = format_timestamp(datetime.now(timezone.utc))
        return f'{{"id":"{id_}","correlation_id":{asked},"timestamp":"{now}{self._middle}{type_.value}{_END}'
