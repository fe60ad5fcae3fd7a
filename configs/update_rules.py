"""How an update is made of noisy gradients, for the recipes of this folder: experiments/README.md says why."""

from typing import Any


def adam(b1: float) -> tuple[str, dict[str, Any]]:
    """Adam without weight decay."""
    return ("adamw", {"b1": b1, "weight_decay": 0.0})


WHITENED: dict[str, Any] = {
    "denoise": (),
    "optimizer": adam(0.5),
    "whitening": {"where": "before_clipping"},
}
"""Gradients are clipped, noised and given to Adam in coordinates in which each layer's inputs are nearly white."""
