"""transformers' way in: a model whose blocks are elsewhere, with transformers' own `generate()`.

    model = swarmlm.AutoDistributedModelForCausalLM.from_pretrained("smollm2", initial_peers=PEERS)
    out = model.generate(ids, max_new_tokens=32)
    model(inputs_embeds=prompts, labels=labels).loss.backward()      # what is trained stays here; blocks are fixed

The node lives in a portal thread that ends with the process, or with `model.close_swarm()`.
"""

from __future__ import annotations

import atexit
import functools
import logging
from collections.abc import Sequence
from typing import Any

from swarmlm.bridge import Bridge, PassesBridge
from swarmlm.config import parse_codec
from swarmlm.hosting import resolve_dtype
from swarmlm.node import Node, open_node
from swarmlm.portal import Portal
from swarmlm.routing.passes import open_training
from swarmlm.routing.session import SessionEvent, SessionOptions, open_session
from swarmlm.view import SwarmView

log = logging.getLogger("swarmlm")


class AutoDistributedModelForCausalLM:
    """Not to be made directly: see `from_pretrained`."""

    def __init__(self) -> None:
        raise OSError("use AutoDistributedModelForCausalLM.from_pretrained(MODEL, initial_peers=[...])")

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        initial_peers: Sequence[str],
        dtype: Any = None,
        codec: str = "none",
        revision: str | None = None,
    ) -> Any:
        """The family's own `*ForCausalLM` with embeddings, norm and head here and all blocks in the swarm.

        `initial_peers` are full multiaddrs of swarm members. `dtype` (a torch dtype or its name) is the client half's;
        float32 by default. `codec` compresses the hidden states of generation on the wire, see
        `Node.session`; those of training travel as they are. Raises `ModelNotFound`,
        `ModelUnsupported`, `CheckpointCorrupt`, `ConfigError`.
        """
        from swarmlm.models.client import load_client_model
        from swarmlm.models.source import open_source

        options = SessionOptions(codec=parse_codec(codec))
        source = open_source(model, revision=revision)
        portal = Portal()
        try:
            node: Node = portal.enter(open_node(initial_peers))
            view = SwarmView(node, source.name)

            def open_bridge(batch: int, max_length: int) -> Bridge:
                session = portal.enter(
                    open_session(
                        view,
                        model=source.name,
                        fingerprint=source.fingerprint,
                        blocks=source.num_blocks,
                        max_length=max_length,
                        batch=batch,
                        options=options,
                        on_event=_log_event,
                    )
                )
                return Bridge(session, portal.token, functools.partial(portal.leave, session))

            route = portal.enter(
                open_training(
                    view,
                    model=source.name,
                    fingerprint=source.fingerprint,
                    blocks=source.num_blocks,
                    on_event=_log_event,
                )
            )
            name = str(dtype).removeprefix("torch.") if dtype is not None else None
            client = load_client_model(
                source,
                dtype=resolve_dtype(name, "cpu", source.checkpoint_dtype),
                open_session=open_bridge,
                passes=PassesBridge(route, portal.token),
            )
        except BaseException:
            portal.close()
            raise

        def close() -> None:
            atexit.unregister(close)
            portal.close()

        client.close_swarm = close
        atexit.register(close)
        return client


def _log_event(event: SessionEvent) -> None:
    log.warning("%s", event.text)
