"""Tiny decoders of every family, sizes different in every axis: what `config.json` holds, and random parameters."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from dp_rmt import models

_LLAMA = {
    "vocab_size": 41,
    "hidden_size": 18,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 28,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-3,
    "rope_theta": 50.0,
}
_GEMMA = {
    **_LLAMA,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "query_pre_attn_scalar": 9,
    "sliding_window": 4,
    "final_logit_softcapping": 4.0,
}
_NEOX = {
    "vocab_size": 41,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 28,
    "max_position_embeddings": 32,
    "layer_norm_eps": 1e-3,
    "rotary_emb_base": 50,
    "hidden_act": "gelu",
}
_GPT2 = {
    "vocab_size": 41,
    "n_embd": 21,
    "n_layer": 3,
    "n_head": 3,
    "n_positions": 32,
    "layer_norm_epsilon": 1e-3,
    "activation_function": "gelu_new",
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 3.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_LLAMA, "hidden_act": "silu", "rope_scaling": _LLAMA3_ROPE},
    "llama_tied_biases": {
        "model_type": "llama",
        **_LLAMA,
        "hidden_act": "gelu",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "eos_token_id": [3, 5],
        "pad_token_id": 0,
    },
    "llama_yarn": {
        "model_type": "llama",
        **_LLAMA,
        "hidden_size": 30,
        "head_dim": 12,
        "rope_theta": 1000.0,
        "hidden_act": "silu",
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 4.0,
            "mscale": 0.7,
            "mscale_all_dim": 0.5,
        },
    },
    "llama_dynamic": {
        "model_type": "llama",
        **_LLAMA,
        "hidden_act": "silu",
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
    },
    "phi3": {
        "model_type": "phi3",
        **{key: _LLAMA[key] for key in _LLAMA if key != "head_dim"},
        "hidden_size": 48,
        "hidden_act": "silu",
        "partial_rotary_factor": 0.5,
        "sliding_window": 5,
        "pad_token_id": 0,
        "original_max_position_embeddings": 16,
        "rope_scaling": {"rope_type": "longrope", "short_factor": [1.1, 1.7], "long_factor": [2.0, 3.0]},
    },
    "mistral": {"model_type": "mistral", **_LLAMA, "hidden_act": "silu", "sliding_window": 4},
    "qwen2": {
        "model_type": "qwen2",
        **{key: _LLAMA[key] for key in _LLAMA if key != "head_dim"},
        "hidden_size": 24,
        "hidden_act": "silu",
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", **_LLAMA, "hidden_act": "silu", "tie_word_embeddings": True},
    "gemma2": {"model_type": "gemma2", **_GEMMA, "hidden_size": 15, "attn_logit_softcapping": 3.0},
    "gemma3_text": {
        "model_type": "gemma3_text",
        **_GEMMA,
        "hidden_size": 15,
        "rope_local_base_freq": 20.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "sliding_window_pattern": 2,
    },
    "gemma3_untied": {
        "model_type": "gemma3_text",
        **_GEMMA,
        "hidden_size": 15,
        "tie_word_embeddings": False,
        "final_logit_softcapping": None,
        "sliding_window_pattern": 3,
    },
    "gpt_neox": {"model_type": "gpt_neox", **_NEOX, "rotary_pct": 0.25},
    "gpt_neox_in_sequence": {
        "model_type": "gpt_neox",
        **_NEOX,
        "rotary_pct": 0.5,
        "use_parallel_residual": False,
        "attention_bias": False,
        "tie_word_embeddings": True,
    },
    "gpt2": {"model_type": "gpt2", **_GPT2},
    "gpt2_untied": {"model_type": "gpt2", **_GPT2, "n_inner": 30, "tie_word_embeddings": False},
}

LENGTH = 12


def padded_batch(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask: a row without padding, two padded on the left, one on the right."""
    index, starts, ends = np.arange(LENGTH), np.array([0, 3, 7, 0])[:, None], np.array([12, 12, 12, 8])[:, None]
    ids = np.random.default_rng(seed).integers(0, 41, (4, LENGTH))
    return ids, ((starts <= index) & (index < ends)).astype(np.int32)


def build(name: str, **options: Any) -> tuple[models.CausalLanguageModel, dict[str, Any]]:
    """The module, and parameters all of which are random."""
    module = models.CausalLanguageModel(models.DecoderConfig.from_hf_config(CONFIGS[name], **options))
    shapes = jax.eval_shape(lambda key: models.init_params(module, key), jax.random.key(0))
    rng = np.random.default_rng(1)
    return module, jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape).astype(np.float32), shapes)
