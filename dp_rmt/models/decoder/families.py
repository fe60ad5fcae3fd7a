"""Says which features each family of decoders has, and how its `config.json` says so, in one row for each family."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dp_rmt.models.decoder.rope_scaling import RopeScaling

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
_GEMMA3_SIZES = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_GEMMA_FEATURES = {"norm": "rms_norm_around_one", "sandwich_norms": True, "scale_embedding": True}
_LAYER_NORM_FEATURES = {"norm": "layer_norm", "gated": False, "mlp_bias": True}
_NULL_IS_NONE = ("sliding_window", "final_logit_softcapping", "attn_logit_softcapping")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


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


def fields_from_hf(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the fields of a `DecoderConfig` from a `config.json`, old or new.

    Args:
        hf_config: the parsed JSON.

    Returns:
        Field names and values.

    Raises:
        ValueError: the family is unknown, or the file lacks a key or asks for what is not supported.
    """
    is_text_part = hf_config.get("model_type") == "gemma3"
    if is_text_part:
        hf_config = _text_part(hf_config)
    model_type = hf_config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_type {model_type!r} is not a supported family of decoders; supported: {', '.join(FAMILIES)}, and "
            "the text part of gemma3, which has images"
        )
    family = FAMILIES[model_type]
    for key, value in {**family.only, "quantization_config": None}.items():
        if hf_config.get(key, value) != value and (value or hf_config[key] is not None):
            raise ValueError(f"{key}={hf_config[key]!r} is not supported; use a {model_type} model with {value!r}")
    hf_config = _without_nulls(family, model_type, hf_config)
    values = {**family.defaults, **hf_config}
    missing = [key for key in family.keys.values() if key not in values]
    if missing:
        raise ValueError(
            f"the {model_type} config lacks {', '.join(missing)}; take config.json from the model's own folder"
        )
    fields = {**family.features, **{field: values[key] for field, key in family.keys.items()}}
    width, heads = fields["hidden_size"], fields["num_heads"]
    for field, value in (("num_kv_heads", heads), ("head_dim", width // heads), ("intermediate_size", 4 * width)):
        if fields.get(field) is None:
            fields[field] = value
    fields |= {key: hf_config[key] for key in _TOKENS if key in hf_config}
    if isinstance(fields.get("eos_token_id"), list):
        fields["eos_token_id"] = tuple(fields["eos_token_id"])
    rotary = {} if family.theta is None else _rotary_from_hf(family, hf_config, fields)
    windows = _windows_from_hf(family, hf_config, fields["num_layers"])
    return {"architecture": model_type, "is_text_part": is_text_part, **fields, **rotary, **windows}


def _text_part(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a gemma3_text model in that of a gemma3, which leaves out what transformers takes by default."""
    text = {key: value for key, value in (hf_config.get("text_config") or {}).items() if value is not None}
    outside = {key: hf_config[key] for key in (*_TOKENS, "tie_word_embeddings") if key in hf_config}
    return {**_GEMMA3_SIZES, **outside, **text, "model_type": "gemma3_text"}


def _without_nulls(family: Family, model_type: str, hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Takes a null for the key's default, unless it says "none" (no window, no cap) or cannot mean anything."""
    for key in family.keys.values():
        is_null = key in hf_config and hf_config[key] is None and key not in _NULL_IS_NONE
        if is_null and family.defaults.get(key, "needed"):
            raise ValueError(
                f"{key} is null in this {model_type} config, which says nothing; write the value that the model was "
                "trained with, or take config.json from the model's own folder"
            )
    return {key: value for key, value in hf_config.items() if value is not None or key in _NULL_IS_NONE}


def _rotary_from_hf(family: Family, hf_config: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Reads `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before)."""
    given = hf_config.get("rope_scaling") or hf_config.get("rope_parameters") or {}
    local, given = (
        {key: value for key, value in part.items() if value is not None}
        for part in (given.get("sliding_attention") or {}, given.get("full_attention") or given)
    )
    read: dict[str, Any] = {"rope_theta": given.get("rope_theta", hf_config.get(family.theta_key, family.theta))}
    if family.local_theta is not None:
        old = hf_config.get("rope_local_base_freq", family.local_theta)
        read["local_rope_theta"] = local.get("rope_theta", old)
    if local.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type {local['rope_type']!r} of sliding layers is not supported; supported: default")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind != "default":
        kind = family.rope_types.get(kind, kind)
        original, longest = hf_config.get("original_max_position_embeddings"), fields["max_position_embeddings"]
        read["rope_scaling"] = RopeScaling.from_hf(given, kind=kind, original=original, longest=longest)
    default = hf_config.get("rotary_pct", family.rotary_fraction or 1)
    fraction = given.get("partial_rotary_factor", hf_config.get("partial_rotary_factor", default))
    if fraction != 1 and family.rotary_fraction is None:
        raise ValueError(f"partial_rotary_factor={fraction} is not supported for this family; use a model without it")
    turned = int(fields["head_dim"] * fraction)
    return read | ({} if turned == fields["head_dim"] else {"rotary_dim": turned})


def _windows_from_hf(family: Family, hf_config: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    window = hf_config.get("sliding_window", family.window_size)
    switched_off = family.window == "last" and not hf_config.get("use_sliding_window")
    if family.window == "none" or window is None or switched_off:
        return {}
    if family.window == "all":
        return {"sliding_window": window}
    types = hf_config.get("layer_types")
    if types is not None:
        unknown = set(types) - {"sliding_attention", "full_attention"}
        if unknown:
            raise ValueError(f"layer_types {', '.join(sorted(unknown))} are not supported; use a model without them")
        sliding = [kind == "sliding_attention" for kind in types]
    elif family.window == "last":
        sliding = [layer >= hf_config.get("max_window_layers", 28) for layer in range(num_layers)]
    else:
        every = hf_config.get("sliding_window_pattern", hf_config.get("_sliding_window_pattern", family.window_pattern))
        sliding = [(layer + 1) % every != 0 for layer in range(num_layers)]
    return {"sliding_window": window, "sliding_layers": tuple(sliding)}


def fields_to_hf(config: Any) -> dict[str, Any]:
    """Writes a `DecoderConfig` as keys of a `config.json`, old and new.

    Args:
        config: the configuration.

    Returns:
        What transformers reads as the same model.

    Raises:
        ValueError: the family has no such model.
    """
    if config.architecture not in FAMILIES:
        raise ValueError(f"architecture {config.architecture!r} is not known; choose one of {', '.join(FAMILIES)}")
    family = FAMILIES[config.architecture]
    hf_config = {key: getattr(config, field) for field, key in family.keys.items()}
    hf_config |= {"model_type": config.architecture, **family.only}
    hf_config |= {key: getattr(config, key) for key in _TOKENS if getattr(config, key) is not None}
    if isinstance(config.eos_token_id, tuple):
        hf_config["eos_token_id"] = list(config.eos_token_id)
    if family.theta is not None:
        hf_config |= _rotary_to_hf(family, config)
    if family.window != "none":
        hf_config["sliding_window"] = config.sliding_window
    if family.window in ("last", "pattern"):
        names = {True: "sliding_attention", False: "full_attention"}
        hf_config["layer_types"] = [names[is_sliding] for is_sliding in config.layer_is_sliding]
    if family.window == "last":
        hf_config["use_sliding_window"] = config.sliding_window is not None
    again = type(config).from_hf_config(
        hf_config,
        dtype=config.dtype,
        remat=config.remat,
        flash_attention=config.flash_attention,
        lora=config.lora,
    )
    kept = [field.name for field in dataclasses.fields(config) if field.name != "is_text_part"]
    lost = [name for name in kept if not _same(config, again, name)]
    if lost:
        name = lost[0]
        raise ValueError(
            f"a {config.architecture} model with {name}={getattr(config, name)!r} cannot be saved: the family has "
            f"{getattr(again, name)!r}; set architecture to a family that has it"
        )
    return hf_config


def _same(config: Any, other: Any, name: str) -> bool:
    name = "layer_is_sliding" if name == "sliding_layers" else name
    return getattr(config, name) == getattr(other, name)


def _rotary_to_hf(family: Family, config: Any) -> dict[str, Any]:
    scaling, turned = config.rope_scaling, config.rotary_dim or config.head_dim
    stretched: dict[str, Any] = {"rope_type": "default"} if scaling is None else scaling.to_hf()
    parameters = {**stretched, "rope_theta": config.rope_theta}
    old = {family.theta_key: config.rope_theta, "rope_scaling": None if scaling is None else stretched}
    if family.rotary_fraction is not None:
        parameters["partial_rotary_factor"] = old["partial_rotary_factor"] = turned / config.head_dim
        old["rotary_pct"] = turned / config.head_dim
    if scaling is not None and scaling.kind == "longrope":  # Phi-3 has it there, and would take its default
        old["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    if family.local_theta is not None:
        local = {"rope_type": "default", "rope_theta": config.local_rope_theta}
        old["rope_local_base_freq"] = config.local_rope_theta
        return {"rope_parameters": {"full_attention": parameters, "sliding_attention": local}, **old}
    return {"rope_parameters": parameters, **old}
