"""Reads a Hugging Face folder of a Llama model into this project's decoder, by one table of names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from flax.traverse_util import unflatten_dict

from dp_rmt import models

LAYER = "model.layers.{layer}."
NAMES = {  # Flax module -> Hugging Face module
    "decoder/word_embeddings": "model.embed_tokens",
    "decoder/layers/attention_norm": LAYER + "input_layernorm",
    "decoder/layers/attention/query": LAYER + "self_attn.q_proj",
    "decoder/layers/attention/key": LAYER + "self_attn.k_proj",
    "decoder/layers/attention/value": LAYER + "self_attn.v_proj",
    "decoder/layers/attention/output": LAYER + "self_attn.o_proj",
    "decoder/layers/mlp_norm": LAYER + "post_attention_layernorm",
    "decoder/layers/gate": LAYER + "mlp.gate_proj",
    "decoder/layers/up": LAYER + "mlp.up_proj",
    "decoder/layers/down": LAYER + "mlp.down_proj",
    "decoder/final_norm": "model.norm",
    "lm_head": "lm_head",
}


def read_llama(folder: Path, **options: Any) -> tuple[models.CausalLanguageModel, dict[str, Any]]:
    """The module, with further `DecoderConfig` fields from `options`, and its parameters."""
    hf = json.loads((folder / "config.json").read_text())
    config = models.DecoderConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf["num_key_value_heads"],
        head_dim=hf["head_dim"],
        intermediate_size=hf["intermediate_size"],
        max_position_embeddings=hf["max_position_embeddings"],
        rope_theta=hf["rope_parameters"]["rope_theta"],
        rms_norm_eps=hf["rms_norm_eps"],
        hidden_act=hf["hidden_act"],
        tie_word_embeddings=hf["tie_word_embeddings"],
        attention_bias=hf["attention_bias"],
        **options,
    )
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    return models.CausalLanguageModel(config), params_from_tensors(tensors, config.num_layers)


def params_from_tensors(tensors: dict[str, np.ndarray], num_layers: int) -> dict[str, Any]:
    """Nested parameters from Hugging Face tensors, all of which must have a name here."""
    tensors = dict(tensors)
    leaves = {}
    for flax_module, hf_module in NAMES.items():
        for suffix in ("weight", "bias"):
            names = [f"{hf_module.format(layer=layer)}.{suffix}" for layer in range(num_layers)]
            if names[0] not in tensors:
                continue
            parts = [tensors.pop(name) for name in dict.fromkeys(names)]
            leaf = suffix
            if suffix == "weight":
                leaf = "scale" if flax_module.endswith("norm") else "kernel"
                leaf = "embedding" if flax_module.endswith("embeddings") else leaf
            if leaf == "kernel":  # torch.nn.Linear stores (out, in)
                parts = [part.T for part in parts]
            leaves[(*flax_module.split("/"), leaf)] = np.stack(parts) if "{layer}" in hf_module else parts[0]
    assert not tensors, f"tensors without a name here: {sorted(tensors)}"
    return unflatten_dict(leaves)
