"""The numbers of yamux (https://github.com/hashicorp/yamux/blob/master/spec.md) for `muxer.py` and `stream.py`."""

import struct

PROTOCOL = "/yamux/1.0.0"

HEADER = struct.Struct("!BBHII")  # version 0, type, flags, stream id, length
DATA, WINDOW, PING, GO_AWAY = range(4)  # types
SYN, ACK, FIN, RST = 1, 2, 4, 8  # flags

FIRST_WINDOW = 256 * 1024  # bytes; the specification fixes it
MAX_PAYLOAD = 65_519 - HEADER.size  # bytes; a frame fills one noise message and never spills into a second
