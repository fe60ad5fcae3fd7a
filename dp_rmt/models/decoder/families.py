"""Says which features each family of decoders has, and how its `config.json` says so, in one row for each family."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

_LLAMA_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "hidden_act": "hidden_act",
    "tie_word_embeddings": "tie_word_embeddings",
}
_LLAMA_DEFAULTS = {"num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": False}
_BIAS = {"attention_bias": "attention_bias"}
_GEMMA_KEYS = {
    **_LLAMA_KEYS,
    **_BIAS,
    "hidden_act": "hidden_activation",
    "query_pre_attn_scalar": "query_pre_attn_scalar",
    "logits_softcap": "final_logit_softcapping",
}
_GEMMA_DEFAULTS = {"tie_word_embeddings": True, "attention_bias": False, "hidden_activation": "gelu_pytorch_tanh"}
_GEMMA_FEATURES = {"norm": "rms_norm_around_one", "sandwich_norms": True, "scale_embedding": True}
_LAYER_NORM_FEATURES = {"norm": "layer_norm", "gated": False, "mlp_bias": True}


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of decoders.

    Attributes:
        hf_class: the transformers class of its causal language models.
        keys: maps fields of `DecoderConfig` to keys of `config.json`.
        defaults: values of keys that a `config.json` may leave out.
        features: fields of `DecoderConfig` that always have these values.
        only: keys that change the model in ways that are not supported, each with the one value that is supported.
        theta: default of the base of the rotary embedding's wavelengths; None for learned positions.
        theta_key: the key of theta in older files.
        local_theta: default of that base for the sliding layers, if they have one of their own.
        rotary_fraction: default of the part of a head that is turned; None if it is always the whole.
        rope_types: names of kinds of `RopeScaling` in older files, and their names now.
        window: which layers have a sliding window: "none", "all", "last" (from `max_window_layers` on) or "pattern"
            (all but every n-th).
        window_size: how many tokens it has, unless the file gives it.
        window_pattern: that n, unless the file gives it.
    """

    hf_class: str
    keys: Mapping[str, str]
    defaults: Mapping[str, Any]
    features: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    only: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    theta: float | None = 10_000.0
    theta_key: str = "rope_theta"
    local_theta: float | None = None
    rotary_fraction: float | None = None
    rope_types: Mapping[str, str] = dataclasses.field(default_factory=dict)
    window: str = "none"
    window_size: int | None = 4096
    window_pattern: int = 1


FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        {**_LLAMA_KEYS, **_BIAS, "mlp_bias": "mlp_bias"},
        {**_LLAMA_DEFAULTS, "attention_bias": False, "mlp_bias": False},
    ),
    "mistral": Family("MistralForCausalLM", _LLAMA_KEYS, _LLAMA_DEFAULTS, window="all"),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        _LLAMA_KEYS,
        _LLAMA_DEFAULTS,
        {"attention_bias": True, "attention_output_bias": False},
        window="last",
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {**_LLAMA_KEYS, **_BIAS},
        {**_LLAMA_DEFAULTS, "head_dim": 128, "attention_bias": False},
        {"qk_norm": True},
        window="last",
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        {**_GEMMA_KEYS, "attention_softcap": "attn_logit_softcapping"},
        {**_GEMMA_DEFAULTS, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
        _GEMMA_FEATURES,
        {"use_bidirectional_attention": None},
        window="pattern",
        window_pattern=2,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _GEMMA_KEYS,
        {**_GEMMA_DEFAULTS, "final_logit_softcapping": None},
        {**_GEMMA_FEATURES, "qk_norm": True},
        {"use_bidirectional_attention": False, "attn_logit_softcapping": None},
        theta=1_000_000.0,
        local_theta=10_000.0,
        window="pattern",
        window_pattern=6,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        _LLAMA_KEYS,
        _LLAMA_DEFAULTS,
        only={"attention_bias": False},
        rotary_fraction=1.0,
        rope_types={"su": "longrope", "yarn": "longrope"},
        window="all",
        window_size=None,
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        {
            **{field: key for field, key in _LLAMA_KEYS.items() if field not in ("num_kv_heads", "head_dim")},
            **_BIAS,
            "rms_norm_eps": "layer_norm_eps",
            "parallel_residual": "use_parallel_residual",
        },
        {"tie_word_embeddings": False, "attention_bias": True, "use_parallel_residual": True},
        _LAYER_NORM_FEATURES,
        theta_key="rotary_emb_base",
        rotary_fraction=0.25,
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        {
            "vocab_size": "vocab_size",
            "hidden_size": "n_embd",
            "num_layers": "n_layer",
            "num_heads": "n_head",
            "intermediate_size": "n_inner",
            "max_position_embeddings": "n_positions",
            "rms_norm_eps": "layer_norm_epsilon",
            "hidden_act": "activation_function",
            "tie_word_embeddings": "tie_word_embeddings",
        },
        {"n_inner": None, "tie_word_embeddings": True},
        {**_LAYER_NORM_FEATURES, "attention_bias": True, "learned_positions": True},
        {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        theta=None,
    ),
}
