from socket import socket
from typing import Final

ROUTED_KIND: Final[int]
FIRST_OTHER_KIND: Final[int]
NODE_WORKERS: Final[int]

def socket_pair() -> tuple[socket, socket]: ...
def source_of(piece: bytes) -> int | None: ...
