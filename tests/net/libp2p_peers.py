"""Real libp2p peers for tests: `python libp2p_peers.py '{"seed": 1}'` is one; `peer_process` starts and ends it."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from subprocess import PIPE
from typing import Any

import trio

from swarmlm.protocol import Address, HostRecord, PeerId, SignedRecord
from swarmlm.transport.identity import Identity
from swarmlm.transport.libp2p import open_kademlia, open_libp2p
from swarmlm.transport.records import sign_record

START_SECONDS = 40.0  # importing libp2p on a machine that is busy with other tests
ANSWER_SECONDS = 20.0  # for one command
MODEL = "tiny"


def identity(seed: int) -> Identity:
    return Identity.from_seed(seed.to_bytes(32, "big"))


def record_of(who: Identity, addresses: Any, sequence: int, model: str = MODEL, lease: float = 60.0) -> SignedRecord:
    record = HostRecord(
        peer=who.peer_id,
        addresses=tuple(addresses),
        model=model,
        fingerprint="f",
        blocks=4,
        start=0,
        end=2,
        sequence=sequence,
        issued=time.time(),
        lease=lease,
    )
    signed: SignedRecord = sign_record(record, who)
    return signed


class PeerProcess:
    def __init__(self, process: trio.Process, seed: int) -> None:
        self.process = process
        self.identity = identity(seed)
        self.peer_id: PeerId = self.identity.peer_id
        self.addresses: list[Address] = []
        self._unread = b""

    async def line(self, seconds: float = ANSWER_SECONDS) -> Any:
        assert self.process.stdout is not None
        with trio.fail_after(seconds):
            while b"\n" not in self._unread:
                data = await self.process.stdout.receive_some()
                assert data, "the peer process has ended"
                self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)

    async def tell(self, **command: Any) -> Any:
        assert self.process.stdin is not None
        await self.process.stdin.send_all(json.dumps(command).encode() + b"\n")
        return await self.line()

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)


@asynccontextmanager
async def peer_process(seed: int, **options: Any) -> AsyncIterator[PeerProcess]:
    """Options: `listen`, `kademlia` (serve a table), `peers` (join through them)."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "tests.net.libp2p_peers", json.dumps(options | {"seed": seed})],
        stdin=PIPE,
        stdout=PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    peer = PeerProcess(process, seed)
    try:
        peer.addresses = await peer.line(START_SECONDS)
        yield peer
    finally:
        with trio.CancelScope(shield=True):
            if process.returncode is None:
                process.kill()
            await process.wait()


# ---- the process itself


async def serve(stream: Any) -> None:
    """The first byte says what: e(cho), s(ink: 8 bytes of length, then that much), f(lood), n(ever read), q(uit)."""
    data = bytes(await stream.receive())
    kind, data = data[:1], data[1:]
    if kind == b"e":
        if data:
            await stream.send([data])
        while data := bytes(await stream.receive()):
            await stream.send([data])
    elif kind == b"s":
        while len(data) < 8:
            data += bytes(await stream.receive())
        left = int.from_bytes(data[:8], "big") - (len(data) - 8)
        checksum = sum(data[8:])
        while left:
            data = bytes(await stream.receive())
            left -= len(data)
            checksum += sum(data[::4099])
        await stream.send([b"done"])
        await stream.receive()
    elif kind == b"f":
        while True:
            await stream.send([bytes(16384)])
    elif kind == b"q":
        await stream.send([b"bye"])
    elif kind == b"n":
        await trio.sleep_forever()
    elif kind == b"x":
        raise ValueError("a bug in the handler")


async def main(options: dict[str, Any]) -> None:
    who = identity(options["seed"])
    async with AsyncExitStack() as stack:
        transport = await stack.enter_async_context(
            open_libp2p(who, listen=options.get("listen", ["/ip4/127.0.0.1/tcp/0"]))
        )
        transport.set_handler(serve)
        kademlia = None
        if options.get("kademlia"):
            kademlia = await stack.enter_async_context(open_kademlia(transport, server=True))
            await kademlia.bootstrap(options.get("peers", []))
        print(json.dumps(list(transport.addresses)), flush=True)
        unread = b""
        async for data in trio.lowlevel.FdStream(os.dup(0)):
            *lines, unread = (unread + data).split(b"\n")
            for line in lines:
                command = json.loads(line)
                assert kademlia is not None
                await kademlia.publish(MODEL, record_of(who, transport.addresses, command["sequence"]))
                print("true", flush=True)


if __name__ == "__main__":
    trio.run(main, json.loads(sys.argv[1]))
