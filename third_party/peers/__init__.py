"""Adapters that drive other implementations of per-example clipping, for side-by-side benchmarks.

The implementations are installed from their packages, unchanged; nothing of theirs is copied here. Each driver of a JAX
peer is a module with ``make(per_example_losses, l2_clip_norm, microbatch_size) -> function`` where
``function(params, batch)`` is the SUM of the clipped gradients, as `dp_rmt.clipped_grad` gives it, and
``microbatch_size`` is the number of examples differentiated at once (None for all). Torch peers run in a process of
their own: `third_party.peers.torch_profile`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

MakeClippedSum = Callable[[Callable[..., Any], float, int | None], Callable[[Any, Any], Any]]


class Peer(NamedTuple):
    """Where a peer is driven, and what has to be installed for that."""

    driver: str  # module
    packages: tuple[str, ...]  # by the names they are imported under
    extra: str  # of setup.py


JAX_PEERS: dict[str, Peer] = {
    "jax_privacy": Peer("third_party.peers.jax_privacy_driver", ("jax_privacy",), "peers"),
    "optax": Peer("third_party.peers.optax_driver", ("optax",), "peers"),
}
TORCH = Peer("third_party.peers.torch_profile", ("torch",), "peers-torch")
OPACUS = Peer("third_party.peers.torch_profile", ("torch", "opacus"), "peers-torch")


class NotInstalledError(ImportError):
    """A peer's package is missing; the message says how to get it."""


def require(peer: Peer) -> None:
    """Raises NotInstalledError unless the peer's packages are there."""
    if any(importlib.util.find_spec(package) is None for package in peer.packages):
        raise NotInstalledError(f"not installed: pip install -e .[{peer.extra}]")


def jax_driver(name: str) -> MakeClippedSum:
    """The ``make`` of a JAX peer.

    Args:
      name: a key of `JAX_PEERS`.

    Returns:
      ``make(per_example_losses, l2_clip_norm, microbatch_size)``.

    Raises:
      NotInstalledError: the peer's package is missing.
    """
    require(JAX_PEERS[name])
    return importlib.import_module(JAX_PEERS[name].driver).make
