"""TCP below libp2p. Used by `network.py` only.

Every write either happens whole or is queued whole, synchronously: cancelling a writer can therefore never leave half
an encrypted record on the wire, which would end the connection for all its streams. Reads are buffered, because the
layers above ask for two bytes at a time.
"""

from __future__ import annotations

import ipaddress
import socket
from collections import deque
from contextlib import suppress

import trio
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError
from multiaddr import Multiaddr

from swarmlm.errors import ConfigError
from swarmlm.protocol import Address

READ_BYTES = 256 * 1024  # bytes a read: one yamux window, so a burst costs one system call
QUEUE_BYTES = 1024 * 1024  # bytes queued before writers wait: a few frames, so that latency stays low
MAX_QUEUE_BYTES = 96 * 1024 * 1024  # a peer that makes us answer but does not read; above one frame of every stream
STALL_SECONDS = 20.0  # a peer that takes no byte for that long is gone; TCP itself would wait 15 minutes
DRAIN_SECONDS = 0.5  # to hand the kernel what was sent before an orderly close
BACKLOG = 1024  # connections the kernel keeps until we accept them
MAX_BUFFERS = 64  # buffers a sendmsg; well below any IOV_MAX


class TcpStream(ReadWriteCloser):  # type: ignore[misc]
    """A connected, non-blocking socket. One reader; any number of writers."""

    def __init__(self, sock: socket.socket, nursery: trio.Nursery) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._fd = sock.fileno()
        self._nursery = nursery
        self._peer: tuple[str, int] | None = None
        with suppress(OSError):  # already reset: the first read says so
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            host, port = sock.getpeername()[:2]
            self._peer = (str(host), int(port))
        self._buffer = memoryview(b"")
        self._queue: deque[memoryview] = deque()
        self._queued = 0
        self._moved = trio.Event()
        self._flushing = False
        self._closed = False

    def get_remote_address(self) -> tuple[str, int] | None:
        return self._peer

    async def write(self, data: bytes) -> None:
        """Send or queue all of `data`, without ever suspending. Raises `ConnectionClosedError`."""
        if self._closed:
            raise ConnectionClosedError("the connection is closed", transport="tcp")
        rest = memoryview(data)
        if not self._queue:
            try:
                rest = rest[self._sock.send(rest) :]
            except BlockingIOError:
                pass
            except OSError as error:
                self._break()
                raise ConnectionClosedError(f"connection lost: {error.strerror}", transport="tcp") from error
        if rest:
            if self._queued > MAX_QUEUE_BYTES:
                self._break()
                raise ConnectionClosedError("the peer does not read", transport="tcp")
            self._queue.append(rest)
            self._queued += len(rest)
            if not self._flushing:
                self._flushing = True
                self._nursery.start_soon(self._flush)

    async def drained(self) -> None:
        """Wait while the queue is long. Frames that answer the peer never wait: two full queues would deadlock."""
        while self._queued > QUEUE_BYTES and not self._closed:
            await self._moved.wait()

    async def _flush(self) -> None:
        while self._queue and not self._closed:
            try:
                with trio.move_on_after(STALL_SECONDS) as stall:
                    await trio.lowlevel.wait_writable(self._fd)
                if stall.cancelled_caught:
                    return self._break()
                sent = self._sock.sendmsg([self._queue[i] for i in range(min(len(self._queue), MAX_BUFFERS))])
            except BlockingIOError:
                continue
            except (OSError, trio.ClosedResourceError):
                return self._break()
            self._queued -= sent
            while sent:
                head = self._queue.popleft()
                if sent < len(head):
                    self._queue.appendleft(head[sent:])
                    break
                sent -= len(head)
            self._wake()
        self._flushing = False

    def _wake(self) -> None:
        self._moved.set()
        self._moved = trio.Event()

    async def read(self, n: int | None = None) -> bytes:
        """Up to `n` bytes; b"" at the end of the stream."""
        if n == 0:
            return b""
        while not self._buffer:
            if self._closed:
                raise ConnectionClosedError("the connection is closed", transport="tcp")
            try:
                data = self._sock.recv(READ_BYTES)
            except BlockingIOError:
                with suppress(trio.ClosedResourceError):
                    await trio.lowlevel.wait_readable(self._fd)
                continue
            except OSError as error:
                self._break()
                raise ConnectionClosedError(f"connection lost: {error.strerror}", transport="tcp") from error
            if not data:
                return b""
            self._buffer = memoryview(data)
            await trio.lowlevel.checkpoint()
        taken = self._buffer[:n]
        self._buffer = self._buffer[len(taken) :]
        return bytes(taken)

    def _break(self) -> None:
        """Close the socket at once; readers and writers wake up to find it closed."""
        if self._closed:
            return
        self._closed = True
        self._queue.clear()
        self._queued = 0
        trio.lowlevel.notify_closing(self._fd)
        self._sock.close()
        self._wake()

    async def close(self) -> None:
        if self._queue and not self._closed:
            with trio.CancelScope(deadline=trio.current_time() + DRAIN_SECONDS, shield=True):
                while self._queue and not self._closed:
                    await self._moved.wait()
        self._break()

    abort = _break


def endpoint(address: Address) -> tuple[str, int]:
    """(host or IP, port) of a "/ip4|ip6|dns/.../tcp/..." multiaddr. Raises `ConfigError`."""
    try:
        parts = Multiaddr(address).items()
        (first, host), (second, port) = list(parts)[:2]
        if first.name not in ("ip4", "ip6", "dns", "dns4", "dns6") or second.name != "tcp":
            raise ValueError("not TCP")
        return str(host), int(str(port))
    except Exception as error:  # the parser of a hostile address raises whatever it likes
        raise ConfigError(f"{address!r} is no address such as /ip4/192.168.1.7/tcp/4001") from error


async def connect(host: str, port: int, nursery: trio.Nursery) -> TcpStream:
    """A connected stream. Raises `OSError` with the reason."""
    failure: OSError = OSError(f"{host} has no address")
    for family, kind, proto, _, where in await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, proto)
        connecting = trio.socket.from_stdlib_socket(sock)
        try:
            await connecting.connect(where)
            return TcpStream(sock, nursery)
        except OSError as error:
            failure = error
            connecting.close()
        except BaseException:
            connecting.close()
            raise
    raise failure


def bind(address: Address) -> socket.socket:
    """A listening socket. Raises `ConfigError` if the address is malformed, foreign or taken."""
    host, port = endpoint(address)
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        raise ConfigError(f"cannot listen on {address}: use an IP address, not a name") from None
    sock = socket.socket(socket.AF_INET6 if ip.version == 6 else socket.AF_INET, socket.SOCK_STREAM)
    try:
        # SO_REUSEADDR lets a restarted node have its port back at once; SO_REUSEPORT would hide a port in use.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if ip.version == 6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise ConfigError(f"cannot listen on {address}: {(error.strerror or str(error)).lower()}") from error
    return sock


def local_addresses(sock: socket.socket) -> list[Address]:
    """Where others can dial a listening socket: the real port, and a wildcard expanded to this machine's addresses."""
    host, port = sock.getsockname()[:2]
    kind = "ip6" if sock.family == socket.AF_INET6 else "ip4"
    if ipaddress.ip_address(host).is_unspecified:
        hosts = [*_interface_addresses(sock.family), "::1" if kind == "ip6" else "127.0.0.1"]
    else:
        hosts = [host]
    return [Address(f"/{kind}/{each}/tcp/{port}") for each in dict.fromkeys(hosts)]


def _interface_addresses(family: int) -> list[str]:
    import psutil  # type: ignore[import-untyped,unused-ignore]

    found: list[str] = []
    for name, entries in sorted(psutil.net_if_addrs().items()):
        for entry in entries:
            if entry.family == family and name != "lo":
                ip = ipaddress.ip_address(entry.address.split("%")[0])
                if not ip.is_link_local and not ip.is_loopback:
                    found.append(str(ip))
    return found
