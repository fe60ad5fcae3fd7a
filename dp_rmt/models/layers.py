"""Stock layers, and the layers of a BERT-type encoder. Parameters are float32, whatever the compute dtype is.

Nothing here mixes examples. Every operation acts on one sequence at a time, so `jax.vmap` over a batch of one gives
per-example gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dp_rmt.models.activations import divided_by_example
from dp_rmt.models.lora import SUFFIX, LoRAConfig, LoRADense

# These are Hugging Face's `hidden_act` names. "gelu" is the erf form; the tanh forms differ from it by up to 5e-4.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "gelu_fast": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}

_INIT = nn.initializers.normal(stddev=0.02)  # BERT's initializer_range


def dense(
    features: int, *, dtype: jnp.dtype, name: str, use_bias: bool = True, lora: LoRAConfig | None = None
) -> nn.Dense | LoRADense:
    """An affine map y = x W + b, where W is `kernel` of shape (in, features), N(0, 0.02^2) at initialisation.

    A low-rank update stands next to it if `name` is among the targets of `lora`.
    """
    base = nn.Dense(features, use_bias=use_bias, dtype=dtype, param_dtype=jnp.float32, kernel_init=_INIT, name=name)
    return base if lora is None or name not in lora.targets else LoRADense(base, lora, name=name + SUFFIX)


def embedding(num_embeddings: int, features: int, *, dtype: jnp.dtype, name: str) -> nn.Embed:
    """A table lookup: the rows `ids` of `embedding`, which has the shape (num_embeddings, features)."""
    return nn.Embed(num_embeddings, features, dtype=dtype, param_dtype=jnp.float32, embedding_init=_INIT, name=name)


def layer_norm(*, eps: float, name: str) -> nn.LayerNorm:
    """Layer normalisation in float32, because its mean and variance lose too much in bfloat16."""
    return nn.LayerNorm(epsilon=eps, dtype=jnp.float32, param_dtype=jnp.float32, use_fast_variance=False, name=name)


def stacked(layer: type[nn.Module], *, length: int, remat: bool, in_axes: Any = nn.broadcast) -> type[nn.Module]:
    """Makes `length` layers in a row one scanned module, whose leaves are (length, ...).

    All layers get the same other inputs. Where `in_axes` (one entry for each other input) is 0, each layer gets its own
    entry of the input's first axis instead.
    """
    # prevent_cse is for remat outside of scan. Inside of scan it only slows the loop down.
    return nn.scan(
        nn.remat(layer, prevent_cse=False) if remat else layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=length,
    )


class SelfAttention(nn.Module):
    """Multi-head self-attention softmax(Q K^T / sqrt(d) + mask) V W_o (Vaswani et al. 2017).

    The projections are plain (hidden, hidden) matrices, so that each is one matrix to clip and to denoise. Heads are
    split by a reshape.
    """

    num_heads: int
    dtype: jnp.dtype
    lora: LoRAConfig | None = None

    @nn.compact
    def __call__(self, hidden_BxLxD: jax.Array, attention_mask_BxL: jax.Array) -> jax.Array:
        """Attends within each sequence. Keys where the mask is 0 get no weight.

        Args:
            hidden_BxLxD: hidden states.
            attention_mask_BxL: 1 for a token, 0 for padding.

        Returns:
            (B, L, D) array in the compute dtype.
        """
        batch, length, hidden = hidden_BxLxD.shape
        project = partial(dense, hidden, dtype=self.dtype, lora=self.lora)

        def split_heads(x_BxLxD: jax.Array) -> jax.Array:
            return x_BxLxD.reshape(batch, length, self.num_heads, hidden // self.num_heads)

        query, key, value = (split_heads(project(name=name)(hidden_BxLxD)) for name in ("query", "key", "value"))
        # Scores and softmax are float32 inside. A fully padded row gets uniform weights, never NaN.
        mixed = jax.nn.dot_product_attention(query, key, value, mask=(attention_mask_BxL != 0)[:, None, None, :])
        return project(name="output")(mixed.reshape(batch, length, hidden))


class EncoderLayer(nn.Module):
    """A post-norm transformer layer: x = LN(x + attention(x)), then x = LN(x + mlp(x)).

    The layer returns `(hidden, None)`, the form of a scan body.
    """

    num_heads: int
    intermediate_size: int
    layer_norm_eps: float
    hidden_act: str
    dtype: jnp.dtype
    lora: LoRAConfig | None = None

    @nn.compact
    def __call__(self, hidden_BxLxD: jax.Array, attention_mask_BxL: jax.Array) -> tuple[jax.Array, None]:
        """Maps hidden states (B, L, D) to hidden states (B, L, D)."""
        hidden_BxLxD = divided_by_example(hidden_BxLxD)
        normalise = partial(layer_norm, eps=self.layer_norm_eps)
        project = partial(dense, dtype=self.dtype, lora=self.lora)
        attended = SelfAttention(self.num_heads, self.dtype, self.lora, name="attention")(
            hidden_BxLxD, attention_mask_BxL
        )
        hidden_BxLxD = normalise(name="attention_layer_norm")(hidden_BxLxD + attended).astype(self.dtype)
        inner = project(self.intermediate_size, name="intermediate")(hidden_BxLxD)
        outer = project(hidden_BxLxD.shape[-1], name="output")(ACTIVATIONS[self.hidden_act](inner))
        hidden_BxLxD = normalise(name="output_layer_norm")(hidden_BxLxD + outer).astype(self.dtype)
        return hidden_BxLxD, None
