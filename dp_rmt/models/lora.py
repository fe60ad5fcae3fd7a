"""Low-rank adaptation: a frozen dense layer plus a trained product of two thin matrices (Hu et al. 2021)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

SUFFIX = "_lora"
"""A dense layer `query` keeps its name, and so its pretrained weights. What is added to it is `query_lora`."""

# This is W[i, j] ~ U(-1/sqrt(in), 1/sqrt(in)), peft's kaiming_uniform_ with a = sqrt(5).
_INIT_A = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Says which dense layers of a model get low-rank updates, and how large these are.

    The parameters are `.../query_lora/lora_a/kernel` and `.../query_lora/lora_b/kernel`, so the regular expression
    `lora_` selects them and nothing else.

    Attributes:
        rank: columns of A and rows of B.
        alpha: the update is scaled by alpha / rank.
        targets: names of the dense layers, e.g. ("query", "value").

    Raises:
        ValueError: the rank is below 1, or there are no targets.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            raise ValueError(f"LoRA targets must be a tuple of names, got the text {self.targets!r}; add a comma")
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 1:
            raise ValueError(f"LoRA rank is {self.rank}; give 1 or more, or lora=None to train without LoRA")
        if not self.targets:
            raise ValueError('LoRA has no targets; name dense layers, e.g. ("query", "value"), or give lora=None')

    @property
    def scale(self) -> float:
        """The factor alpha / rank of the update."""
        return self.alpha / self.rank


class LoRADense(nn.Module):
    """The layer y = base(x) + (alpha / r) (x A) B, with A (in, r) uniform and B (r, out) zero at initialisation.

    A and B are stock dense layers, so that whatever clips or denoises a dense layer takes them as they are. The caller
    makes `base`, which keeps its own name next to this module. If the two shared one scope (flax's `share_scope`), the
    function would be the same, but A and B would be among the parameters that `base` itself shows.

    Attributes:
        base: the dense layer.
        config: the rank and the scale.
    """

    base: nn.Dense
    config: LoRAConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., in) to (..., out) in the compute dtype of `base`."""
        base, rank = self.base, self.config.rank
        down = nn.Dense(
            rank, use_bias=False, dtype=base.dtype, param_dtype=base.param_dtype, kernel_init=_INIT_A, name="lora_a"
        )
        up = nn.Dense(
            base.features,
            use_bias=False,
            dtype=base.dtype,
            param_dtype=base.param_dtype,
            kernel_init=nn.initializers.zeros,
            name="lora_b",
        )
        return base(x) + self.config.scale * up(down(x))


def merge_lora(params: Mapping[str, Any], config: LoRAConfig) -> dict[str, Any]:
    """Makes parameters of the plain model that computes the same function: W + (alpha / r) A B for every target.

    Args:
        params: nested dicts of arrays. Stacked layers, with A (layers, in, r), are merged layer by layer.
        config: the LoRA configuration of the model that the parameters belong to.

    Returns:
        Nested dicts without LoRA parameters, in the dtype of W.

    Raises:
        ValueError: the parameters have another rank than the configuration.

    >>> dense = {"kernel": jnp.zeros((2, 3))}
    >>> update = {"lora_a": {"kernel": jnp.ones((2, 1))}, "lora_b": {"kernel": jnp.ones((1, 3))}}
    >>> merged = merge_lora({"query": dense, "query_lora": update}, LoRAConfig(1, 2.0, ("query",)))
    >>> jax.tree.map(lambda leaf: leaf.tolist(), merged)
    {'query': {'kernel': [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]}}
    """
    merged = {}
    for name, child in params.items():
        if name.removesuffix(SUFFIX) in config.targets and name.endswith(SUFFIX):
            continue
        if not isinstance(child, Mapping):
            merged[name] = child
            continue
        merged[name] = merge_lora(child, config)
        update = params.get(name + SUFFIX)
        if name in config.targets and update is not None:
            a, b = update["lora_a"]["kernel"], update["lora_b"]["kernel"]
            if a.shape[-1] != config.rank:
                raise ValueError(
                    f"the low-rank update of {name} has rank {a.shape[-1]}, the LoRA configuration {config.rank}; give "
                    "the configuration of the model that the parameters belong to: alpha is divided by its rank"
                )
            product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
            merged[name]["kernel"] = (child["kernel"] + config.scale * product).astype(child["kernel"].dtype)
    return merged


def with_config(module: nn.Module, **changes: Any) -> Any:
    """Returns the same module with fields of its configuration changed, such as `lora=None`."""
    return module.clone(config=dataclasses.replace(module.config, **changes))
