"""Packets of GDB's remote protocol (GDB manual, appendix E): bytes to packets and back."""

from __future__ import annotations

PACKET_SIZE = 0x4000  # of a payload, as told to the client
INTERRUPT = b"\x03"


def frame(payload: bytes) -> bytes:
    """``$payload#checksum``, escaped where the payload has the protocol's own bytes."""
    escaped = bytearray()
    for byte in payload:
        if byte in b"#$}*":
            escaped += bytes((0x7D, byte ^ 0x20))
        else:
            escaped.append(byte)
    return b"$%b#%02x" % (bytes(escaped), sum(escaped) & 0xFF)


def unescape(payload: bytes) -> bytes:
    """A payload as it was meant."""
    parts = payload.split(b"}")
    return parts[0] + b"".join(bytes((part[0] ^ 0x20,)) + part[1:] for part in parts[1:] if part)


class Reader:
    """Takes bytes as they come; gives what they hold, and what the other side is to be told of it.

    Whatever a client sends, memory is bounded by one packet: what is too long, or not a packet, is skipped up to the
    next ``$``.
    """

    def __init__(self) -> None:
        self.acknowledge = True
        self._buffer = bytearray()

    def feed(self, data: bytes) -> tuple[list[bytes], bytes]:
        """Packets that are whole now (an interrupt is ``b"\\x03"``), and the acknowledgements to send for them."""
        self._buffer += data
        packets: list[bytes] = []
        answers = bytearray()
        while self._buffer:
            if self._buffer[0] == 3:
                packets.append(INTERRUPT)
                del self._buffer[0]
            elif self._buffer[0] != ord("$"):
                del self._buffer[: self._next_start()]  # '+' and '-' too: TCP loses nothing
            else:
                end = self._buffer.find(b"#")
                if end < 0 or len(self._buffer) < end + 3:
                    if len(self._buffer) > 2 * PACKET_SIZE + 4:  # every byte may be escaped
                        del self._buffer[0]
                        continue
                    break
                payload, told = bytes(self._buffer[1:end]), bytes(self._buffer[end + 1 : end + 3])
                del self._buffer[: end + 3]
                good = not self.acknowledge or told.lower() == b"%02x" % (sum(payload) & 0xFF)
                if self.acknowledge:
                    answers += b"+" if good else b"-"
                if good:
                    packets.append(unescape(payload))
        return packets, bytes(answers)

    def _next_start(self) -> int:
        starts = [at for at in (self._buffer.find(b"$"), self._buffer.find(INTERRUPT)) if at >= 0]
        return min(starts, default=len(self._buffer))
