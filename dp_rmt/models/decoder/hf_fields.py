"""Reads and writes a decoder's `config.json`, old or new, by the table of families."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dp_rmt.models.decoder.families import FAMILIES, Family
from dp_rmt.models.decoder.rope_scaling import RopeScaling

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
_NULL_IS_NONE = ("sliding_window", "final_logit_softcapping", "attn_logit_softcapping")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


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
