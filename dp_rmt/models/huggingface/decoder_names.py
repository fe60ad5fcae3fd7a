"""Says where the Hugging Face files of each family of decoders keep what, and takes fused projections apart."""

from __future__ import annotations

from typing import NamedTuple

from dp_rmt.models.decoder.config import DecoderConfig
from dp_rmt.models.huggingface.tensor_layouts import (
    PLAIN,
    THIRDS,
    TRANSPOSED,
    Layout,
    heads_interleaved,
    stacked_rows,
)


class ModuleName(NamedTuple):
    """A Flax module, and the Hugging Face module that holds its parameters.

    Attributes:
        path: path of the Flax module, with slashes.
        hf_name: name of the Hugging Face module, in which "{layer}" stands for the layer's number.
        leaves: for each leaf the Flax name, the Hugging Face suffix, the layout, and the part of the tensor.
    """

    path: str
    hf_name: str
    leaves: tuple[tuple[str, str, Layout, int], ...]


PREFIXES = {"gpt2": "transformer.", "gpt_neox": "gpt_neox."}
"""The prefix of the tensors below the head; it is "model." for all other families."""

_HEADS = {"gpt_neox": "embed_out"}
_TRUNKS = {
    "gpt2": {"word_embeddings": "wte", "position_embeddings": "wpe", "final_norm": "ln_f"},
    "gpt_neox": {"word_embeddings": "embed_in", "final_norm": "final_layer_norm"},
}
_LLAMA_TRUNK = {"word_embeddings": "embed_tokens", "final_norm": "norm"}
_LLAMA_LAYER = {
    "attention_norm": "input_layernorm",
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/query_norm": "self_attn.q_norm",
    "attention/key_norm": "self_attn.k_norm",
    "attention/output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_GEMMA_LAYER = {
    **_LLAMA_LAYER,
    "attention_output_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}
_LAYERS = {
    "phi3": {
        **_LLAMA_LAYER,
        "attention/query": "self_attn.qkv_proj",
        "attention/key": "self_attn.qkv_proj",
        "attention/value": "self_attn.qkv_proj",
        "gate": "mlp.gate_up_proj",
        "up": "mlp.gate_up_proj",
    },
    "gemma2": _GEMMA_LAYER,
    "gemma3_text": _GEMMA_LAYER,
    "gpt_neox": {
        "attention_norm": "input_layernorm",
        "attention/query": "attention.query_key_value",
        "attention/key": "attention.query_key_value",
        "attention/value": "attention.query_key_value",
        "attention/output": "attention.dense",
        "mlp_norm": "post_attention_layernorm",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    },
    "gpt2": {
        "attention_norm": "ln_1",
        "attention/query": "attn.c_attn",
        "attention/key": "attn.c_attn",
        "attention/value": "attn.c_attn",
        "attention/output": "attn.c_proj",
        "mlp_norm": "ln_2",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    },
}
_STACKS = {"gpt2": "h"}
_GATED = ("gate", "up")
_FUSED = ("attention/query", "attention/key", "attention/value")

BUFFERS = r"rotary_emb\.inv_freq|(attn|attention)\.(bias|masked_bias)|attention\.rotary_emb\.inv_freq"
"""What older files hold besides parameters: constants that no model has to read."""


OTHER_PARTS = {"gemma3_text": ("vision_tower.", "multi_modal_projector.")}
"""The beginnings of tensors beside the text part, in a file of a model with images."""


def prefix(architecture: str) -> str:
    """The beginning of the names of all tensors but the head's, in a file of a causal language model."""
    return PREFIXES.get(architecture, "model.")


def module_names(config: DecoderConfig) -> list[ModuleName]:
    """Lists every module that a decoder of the family may have. The names are without the `prefix`.

    Args:
        config: the decoder's configuration.

    Returns:
        One entry for each module, those of the trunk first.
    """
    family = config.architecture
    stack, layer_modules = _STACKS.get(family, "layers"), _LAYERS.get(family, _LLAMA_LAYER)
    trunk = _TRUNKS.get(family, _LLAMA_TRUNK)
    names = [ModuleName(f"decoder/{path}", name, _leaves(config, path)) for path, name in trunk.items()]
    names += [
        ModuleName(f"decoder/layers/{path}", f"{stack}.{{layer}}.{name}", _leaves(config, path))
        for path, name in layer_modules.items()
    ]
    return [*names, ModuleName("lm_head", _HEADS.get(family, "lm_head"), (("kernel", "weight", TRANSPOSED, 0),))]


def _leaves(config: DecoderConfig, path: str) -> tuple[tuple[str, str, Layout, int], ...]:
    if path.endswith("embeddings"):
        return (("embedding", "weight", PLAIN, 0),)
    if path.endswith("norm"):
        return (("scale", "weight", PLAIN, 0), ("bias", "bias", PLAIN, 0))
    if path in _FUSED and config.architecture == "gpt2":
        return (("kernel", "weight", THIRDS, _FUSED.index(path)), ("bias", "bias", THIRDS, _FUSED.index(path)))
    if path in _FUSED and config.architecture == "gpt_neox":
        layout, part = heads_interleaved(config.num_heads), _FUSED.index(path)
        return (("kernel", "weight", layout, part), ("bias", "bias", layout, part))
    if config.architecture == "phi3" and path in _FUSED:
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        return (("kernel", "weight", stacked_rows(queries, keys, keys), _FUSED.index(path)),)
    if config.architecture == "phi3" and path in _GATED:
        return (("kernel", "weight", stacked_rows(*[config.intermediate_size] * 2), _GATED.index(path)),)
    kernel = PLAIN if config.architecture == "gpt2" else TRANSPOSED  # GPT-2 stores (in, out), torch.nn.Linear (out, in)
    return (("kernel", "weight", kernel, 0), ("bias", "bias", PLAIN, 0))
