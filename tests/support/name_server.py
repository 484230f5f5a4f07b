"""A name server for tests, which knows the names of a few servers as Docker's does those of containers."""

from __future__ import annotations

import ipaddress
import socket
import struct
import threading

_A = 1
_RESPONSE, _NXDOMAIN = 0x8180, 3  # RFC 1035 section 4.1.1
_SECONDS = 1  # that an answer holds for


class NameServer:
    """Answers on a UDP port of 127.0.0.1, in a thread of its own.

    `addresses` are those of the names, IPv4, and may be changed; of other names it says that there are none.
    """

    def __init__(self) -> None:
        self.addresses: dict[str, str] = {}
        self._socket = socket.socket(type=socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End it, by a packet that is no question."""
        with socket.socket(type=socket.SOCK_DGRAM) as end:
            end.sendto(b"", ("127.0.0.1", self.port))
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            packet, sender = self._socket.recvfrom(4096)
            if not packet:
                return
            self._socket.sendto(self._answer(packet), sender)

    def _answer(self, packet: bytes) -> bytes:
        labels = []
        at = 12
        while size := packet[at]:
            labels.append(packet[at + 1 : at + 1 + size].decode())
            at += 1 + size
        question = packet[12 : at + 5]
        (kind,) = struct.unpack_from("!H", packet, at + 1)
        address = self.addresses.get(".".join(labels))
        record = b""
        if address is not None and kind == _A:
            # The name is that of the question, which stands behind the header (section 4.1.4).
            record = struct.pack("!HHHIH", 0xC00C, _A, 1, _SECONDS, 4) + ipaddress.IPv4Address(address).packed
        flags = _RESPONSE | (_NXDOMAIN if address is None else 0)
        return packet[:2] + struct.pack("!HHHHH", flags, 1, bool(record), 0, 0) + question + record
