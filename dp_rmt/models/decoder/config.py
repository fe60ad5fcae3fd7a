"""The configuration of a decoder. It is one list of features, of which every family has some."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from dp_rmt.models.decoder import hf_fields
from dp_rmt.models.decoder.rope_scaling import RopeScaling
from dp_rmt.models.layers import ACTIVATIONS
from dp_rmt.models.lora import LoRAConfig

PROJECTIONS = ("query", "key", "value", "output", "gate", "up", "down")
"""The dense layers of a decoder layer. LoRA can target all of them. Without `gated` there is no gate."""

NORMS = ("rms_norm", "rms_norm_around_one", "layer_norm")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder and how it computes. What is not given is as in Llama.

    Attributes:
        vocab_size: rows of the word embedding.
        hidden_size: width of the hidden states.
        num_layers: transformer layers, scanned and stacked.
        num_heads: heads of the queries.
        num_kv_heads: heads of the keys and values, each shared by num_heads / num_kv_heads heads of the queries.
        head_dim: width of a head.
        intermediate_size: width inside the feed-forward part.
        max_position_embeddings: longest sequence in tokens.
        rope_theta: base of the rotary embedding's wavelengths.
        rms_norm_eps: added to the mean square, or the variance, in normalisation.
        hidden_act: Hugging Face name of the activation.
        tie_word_embeddings: the word embedding is also the matrix of the word scores.
        attention_bias: query, key and value have biases.
        lora: low-rank updates of some of `PROJECTIONS`; None for none.
        dtype: compute dtype; parameters are float32 whatever it is.
        remat: recompute each layer in the backward pass instead of keeping its activations.
        flash_attention: cuDNN's fused attention, which keeps no array of (tokens, tokens). It is for NVIDIA GPUs and a
            half precision `dtype`. Generation, with its cache, does not use it.
        architecture: the family by the `model_type` of its Hugging Face files, one of
            `dp_rmt.models.decoder.families.FAMILIES`.
        attention_output_bias: the output projection has a bias; None for what `attention_bias` says.
        mlp_bias: the dense layers of the feed-forward part have biases.
        norm: one of `NORMS`; "rms_norm_around_one" multiplies by 1 + scale.
        qk_norm: the heads of queries and keys are normalised before they are turned.
        sandwich_norms: the results of attention and of the feed-forward part are normalised too.
        gated: the feed-forward part is W_down (act(W_gate x) * W_up x); without it, W_down act(W_up x).
        parallel_residual: attention and the feed-forward part both read the layer's input.
        learned_positions: positions are rows of a table that are added to the word embedding; False for rotary
          embeddings.
        rope_scaling: how the rotary embedding's wavelengths are stretched; None if they are not.
        rotary_dim: how many of a head's first entries are turned; None for all.
        sliding_window: how many tokens, itself included, a query of a sliding layer sees; None for all.
        sliding_layers: for each layer, whether it has the window; () if all layers have it.
        local_rope_theta: `rope_theta` of the sliding layers, which is never stretched; None for the same as elsewhere.
        query_pre_attn_scalar: the attention scores are divided by its square root; None for head_dim.
        attention_softcap: scores s become c tanh(s / c) with this c.
        logits_softcap: the cap of the logits, likewise.
        scale_embedding: the word embedding is multiplied by sqrt(hidden_size) where it is looked up.
        bos_token_id: the token that starts a text, as the file says; it is only passed on.
        eos_token_id: the token, or tokens, that end a text.
        pad_token_id: the token that fills up.
        is_text_part: the model was read from a folder of a model with images, whose adapters have other names.

    Raises:
        ValueError: sizes do not fit together, or an activation or a LoRA target is unknown.
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
    flash_attention: bool = False
    architecture: str = "llama"
    attention_output_bias: bool | None = None
    mlp_bias: bool = False
    norm: str = "rms_norm"
    qk_norm: bool = False
    sandwich_norms: bool = False
    gated: bool = True
    parallel_residual: bool = False
    learned_positions: bool = False
    rope_scaling: RopeScaling | None = None
    rotary_dim: int | None = None
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    local_rope_theta: float | None = None
    query_pre_attn_scalar: float | None = None
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    scale_embedding: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    is_text_part: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and value < 1:
                raise ValueError(f"{field.name} is {value}; give 1 or more")
        self._check_heads()
        self._check_windows()
        self._check_flash_attention()
        for name, known in (("hidden_act", ACTIVATIONS), ("norm", NORMS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is not supported; choose one of {', '.join(known)}")
        projections = [name for name in PROJECTIONS if self.gated or name != "gate"]
        unknown = sorted(set(self.lora.targets) - set(projections)) if self.lora else []
        if unknown:
            raise ValueError(
                f"LoRA targets {', '.join(unknown)} are no dense layers of a decoder; "
                f"choose among {', '.join(projections)}"
            )

    def _check_heads(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}; "
                "each key and value head serves the same number of query heads"
            )
        turned = self.head_dim if self.rotary_dim is None else self.rotary_dim
        if not self.learned_positions and (turned % 2 or not 2 <= turned <= self.head_dim):
            name = "head_dim" if self.rotary_dim is None else "rotary_dim"
            what = "odd" if turned % 2 else f"not between 2 and head_dim {self.head_dim}"
            raise ValueError(f"{name} {turned} is {what}; rotary embeddings turn pairs, so give an even width")

    def _check_windows(self) -> None:
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window is {self.sliding_window}; give 1 or more, or None for no window")
        if self.sliding_layers and len(self.sliding_layers) != self.num_layers:
            raise ValueError(
                f"sliding_layers tells {len(self.sliding_layers)} layers apart, but there are {self.num_layers}; "
                "give one entry for each layer"
            )

    def _check_flash_attention(self) -> None:
        if self.flash_attention and self.dtype not in (jnp.bfloat16, jnp.float16):
            raise ValueError(f"flash_attention is for bfloat16 and float16, but dtype is {self.dtype}; change either")
        if self.flash_attention and self.attention_softcap is not None:
            raise ValueError(
                f"flash_attention has no soft cap, but attention_softcap is {self.attention_softcap} (the model is a "
                f"{self.architecture}); switch flash_attention off"
            )

    @property
    def output_bias(self) -> bool:
        """Tells whether the output projection of attention has a bias."""
        return self.attention_bias if self.attention_output_bias is None else self.attention_output_bias

    @property
    def layer_is_sliding(self) -> tuple[bool, ...]:
        """Tells for each layer whether its queries see a window only."""
        if self.sliding_window is None:
            return (False,) * self.num_layers
        return self.sliding_layers or (True,) * self.num_layers

    @classmethod
    def from_hf_config(
        cls,
        hf_config: Mapping[str, Any],
        *,
        dtype: Any = jnp.float32,
        remat: bool = False,
        flash_attention: bool = False,
        lora: LoRAConfig | None = None,
    ) -> DecoderConfig:
        """Reads the content of a Hugging Face `config.json`, old or new.

        Args:
            hf_config: the parsed JSON.
            dtype: compute dtype.
            remat: recompute layers in the backward pass.
            flash_attention: compute attention by cuDNN, on an NVIDIA GPU.
            lora: low-rank updates.

        Returns:
            The configuration.

        Raises:
            ValueError: the family is unknown, or the file lacks a key or asks for what is not supported.
        """
        chosen: dict[str, Any] = {"dtype": dtype, "remat": remat, "flash_attention": flash_attention, "lora": lora}
        return cls(**hf_fields.fields_from_hf(hf_config), **chosen)

    def to_hf_config(self) -> dict[str, Any]:
        """The keys of a Hugging Face `config.json` that describe the decoder."""
        return hf_fields.fields_to_hf(self)
