"""One Kademlia lookup: ask ever closer peers, several at once. Used by `kademlia.py` only.

py-libp2p's own lookups wait up to 20 s for a peer that has stopped, and answer from a local copy that may be stale.
Here every question has its own deadline, a peer that let one pass is left alone for a while, and nothing is cached.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import trio
import varint  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError
from libp2p.exceptions import BaseLibp2pError
from libp2p.kad_dht.common import MAX_DHT_MESSAGE_SIZE
from libp2p.kad_dht.common import PROTOCOL_ID as KADEMLIA
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.kad_dht.routing_table import RoutingTable
from libp2p.kad_dht.utils import sort_peer_ids_by_distance
from libp2p.peer.id import ID
from libp2p.peer.peerstore import env_to_send_in_RPC
from libp2p.utils.varint import read_varint_prefixed_bytes_limited
from multiaddr import Multiaddr

from swarmlm.transport.libp2p.host import Libp2pTransport
from swarmlm.transport.libp2p.network import ADDRESS_SECONDS, MAX_DIALLED

log = logging.getLogger(__name__)

ANSWER_SECONDS = 1.0  # for one question, dial included; a live peer takes 5-200 ms
WALK_SECONDS = 2.0  # for a whole lookup: one round of silent peers, and one of answers
SUSPECT_SECONDS = 30.0  # a silent peer is not asked again for that long
ALPHA = 10  # questions under way at once, as in the libp2p specification
CLOSEST = 20  # peers that make up the neighbourhood of a key: k of the Kademlia paper
MAX_LEARNED = 40  # peers taken from one answer: providers and neighbours, CLOSEST each


class Walker:
    """Asks and walks on behalf of one node. `seeds` are asked whatever the routing table holds."""

    def __init__(self, transport: Libp2pTransport, table: RoutingTable) -> None:
        self._host = transport.host
        self._network = transport.network
        self._table = table
        self._suspects: dict[ID, float] = {}  # until trio's clock says so
        self.seeds: set[ID] = set()

    async def ask(self, peer: ID, question: Message) -> Message | None:
        """The peer's answer, or None if it has none in time."""
        reached = False
        answer: Message | None = None
        with trio.move_on_after(ANSWER_SECONDS):
            try:
                stream = await self._network.open(peer, (), KADEMLIA, ANSWER_SECONDS)
                reached = True
                try:
                    body = question.SerializeToString()
                    await stream.send([varint.encode(len(body)), body])
                    reply = await read_varint_prefixed_bytes_limited(stream, MAX_DHT_MESSAGE_SIZE)
                    answer = Message.FromString(reply)
                finally:
                    stream.end()
            except (BaseLibp2pError, EOFError, ValueError) as error:
                log.debug("%s did not answer: %r", peer, error)
                if reached:
                    return None  # it is there, and says no
            except DecodeError as error:
                log.debug("%s answered nonsense: %r", peer, error)
        if answer is None:
            self._suspects[peer] = trio.current_time() + SUSPECT_SECONDS
            self._table.remove_peer(peer)
            return None
        self._suspects.pop(peer, None)
        with trio.move_on_after(ANSWER_SECONDS):  # a full bucket is asked first who of it is still there
            await self._table.add_peer(peer)
        return answer

    async def walk(self, question: Message, enough: Callable[[ID, Message], bool]) -> list[ID]:
        """Put `question` to the peers around its key; the peers that answered, closest first.

        Ends when `enough(peer, answer)` says so, when the neighbourhood has answered, or after `WALK_SECONDS`.
        """
        key = question.key
        known: set[ID] = {*self._table.find_local_closest_peers(key, CLOSEST), *self.seeds}
        asked: set[ID] = set()
        answered: set[ID] = set()
        running = 0
        progress = trio.Event()
        done = False

        async def one(peer: ID) -> None:
            nonlocal running, done
            answer = await self.ask(peer, question)
            running -= 1
            if answer is not None:
                answered.add(peer)
                known.update(self.learn([*answer.closerPeers, *answer.providerPeers]))
                done = enough(peer, answer) or done
            progress.set()

        with trio.move_on_after(WALK_SECONDS):
            async with trio.open_nursery() as nursery:
                while not done:
                    near = sort_peer_ids_by_distance(key, [p for p in known if p in answered or self._worth(p)])
                    waiting = [peer for peer in near[:CLOSEST] if peer not in asked]
                    for peer in waiting[: ALPHA - running]:
                        asked.add(peer)
                        running += 1
                        nursery.start_soon(one, peer)
                    if not running:
                        break
                    progress = trio.Event()
                    await progress.wait()
                nursery.cancel_scope.cancel()
        nearest: list[ID] = sort_peer_ids_by_distance(key, list(answered))
        return nearest

    def _worth(self, peer: ID) -> bool:
        until = self._suspects.get(peer)
        return peer != self._network.self_id and (until is None or until < trio.current_time())

    def suspected(self, peer: ID) -> bool:
        return not self._worth(peer)

    def learn(self, entries: Iterable[Message.Peer]) -> list[ID]:
        """Remember the addresses of the peers in an answer; whoever answers there has to prove who he is."""
        found = []
        for entry in list(entries)[:MAX_LEARNED]:
            try:
                peer = ID(entry.id)
                addresses = [Multiaddr(raw) for raw in entry.addrs[:MAX_DIALLED]]
            except Exception as error:  # the parsers of a hostile address raise whatever they like
                log.debug("a peer with a malformed address: %r", error)
                continue
            if peer != self._network.self_id and addresses:
                self._host.get_peerstore().add_addrs(peer, addresses, ADDRESS_SECONDS)
            found.append(peer)
        return found

    def question(self, kind: Message.MessageType, key: bytes) -> Message:
        return Message(type=kind, key=key, senderRecord=env_to_send_in_RPC(self._host)[0])
