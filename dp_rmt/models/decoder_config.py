"""The configuration of a Llama-type decoder."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from dp_rmt.models.layers import ACTIVATIONS
from dp_rmt.models.lora import LoRAConfig

PROJECTIONS = ("query", "key", "value", "output", "gate", "up", "down")
"""The dense layers of a decoder layer, all of which LoRA can target."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder and how it computes.

    Attributes:
        vocab_size: rows of the word embedding.
        hidden_size: width of the hidden states.
        num_layers: transformer layers, scanned and stacked.
        num_heads: heads of the queries.
        num_kv_heads: heads of the keys and values, each shared by num_heads / num_kv_heads heads of the queries.
        head_dim: width of a head; even, since rotary embeddings turn pairs.
        intermediate_size: width inside the feed-forward part.
        max_position_embeddings: longest sequence in tokens.
        rope_theta: base of the rotary embedding's wavelengths.
        rms_norm_eps: added to the mean square in normalisation.
        hidden_act: Hugging Face name of the activation of the gate.
        tie_word_embeddings: the word embedding is also the matrix of the word scores.
        attention_bias: query, key, value and output have biases.
        lora: low-rank updates of some of `PROJECTIONS`; None for none.
        dtype: compute dtype; parameters are float32 whatever it is.
        remat: recompute each layer in the backward pass instead of keeping its activations.

    Raises:
        ValueError: for sizes that do not fit together, or an unknown activation or LoRA target.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    lora: LoRAConfig | None = None
    dtype: Any = jnp.float32
    remat: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and value < 1:
                raise ValueError(f"{field.name} is {value}; give 1 or more")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}; "
                "each key and value head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embeddings turn pairs, so give an even width")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is not supported; choose one of {', '.join(ACTIVATIONS)}")
        unknown = sorted(set(self.lora.targets) - set(PROJECTIONS)) if self.lora else []
        if unknown:
            raise ValueError(
                f"LoRA targets {', '.join(unknown)} are no dense layers of a decoder; "
                f"choose among {', '.join(PROJECTIONS)}"
            )
