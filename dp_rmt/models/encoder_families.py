"""Says how the kinds of BERT-type encoders differ, and how their `config.json` says so, in one row for each kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

_BERT_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
    "type_vocab_size": "type_vocab_size",
    "layer_norm_eps": "layer_norm_eps",
    "pad_token_id": "pad_token_id",
    "hidden_act": "hidden_act",
    "tie_word_embeddings": "tie_word_embeddings",
}
_BERT_DEFAULTS = {
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "hidden_act": "gelu",
    "tie_word_embeddings": True,
}


@dataclasses.dataclass(frozen=True)
class EncoderFamily:
    """One kind of encoder. What is not given is as in BERT.

    Attributes:
        hf_prefix: the beginning of the names of transformers' classes.
        prefix: the beginning of the names of all tensors but the head's.
        keys: maps fields of `EncoderConfig` to keys of `config.json`.
        defaults: what transformers assumes if a `config.json` leaves a key out.
        fixed: fields of `EncoderConfig` that always have these values, since no key says them.
        positions_after_padding: positions count the tokens from pad_token_id + 1 on; otherwise they are 0, 1, 2, ...
        pooler_act: the activation of the pooler.
        word_act: the activation of the masked language model's head; None for `hidden_act`.
    """

    hf_prefix: str
    prefix: str = "bert."
    keys: Mapping[str, str] = dataclasses.field(default_factory=lambda: _BERT_KEYS)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=lambda: _BERT_DEFAULTS)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    positions_after_padding: bool = False
    pooler_act: str = "tanh"
    word_act: str | None = None


def _like_roberta(hf_prefix: str, **defaults: Any) -> EncoderFamily:
    defaults = {**_BERT_DEFAULTS, "pad_token_id": 1, **defaults}
    return EncoderFamily(hf_prefix, "roberta.", defaults=defaults, positions_after_padding=True, word_act="gelu")


ENCODER_FAMILIES: dict[str, EncoderFamily] = {
    "bert": EncoderFamily("Bert"),
    "roberta": _like_roberta("Roberta"),
    "xlm-roberta": _like_roberta("XLMRoberta"),
    "camembert": _like_roberta("Camembert"),
    "distilbert": EncoderFamily(
        "DistilBert",
        "distilbert.",
        {
            "vocab_size": "vocab_size",
            "hidden_size": "dim",
            "num_layers": "n_layers",
            "num_heads": "n_heads",
            "intermediate_size": "hidden_dim",
            "max_position_embeddings": "max_position_embeddings",
            "pad_token_id": "pad_token_id",
            "hidden_act": "activation",
            "tie_word_embeddings": "tie_word_embeddings",
        },
        {"pad_token_id": 0, "activation": "gelu", "tie_word_embeddings": True},
        {"type_vocab_size": 0, "layer_norm_eps": 1e-12},
        pooler_act="relu",
    ),
}


def fields_from_hf(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the fields of an `EncoderConfig` from a `config.json`.

    Args:
        hf_config: the parsed JSON.

    Returns:
        Field names and values.

    Raises:
        ValueError: the model type or variant is not supported, or a key is missing.
    """
    model_type = hf_config.get("model_type")
    if model_type not in ENCODER_FAMILIES:
        raise ValueError(
            f"model_type {model_type!r} in the Hugging Face config is not supported; supported: "
            f"{', '.join(ENCODER_FAMILIES)}"
        )
    for key, plain in (("position_embedding_type", "absolute"), ("is_decoder", False), ("add_cross_attention", False)):
        if hf_config.get(key, plain) != plain and (key, hf_config[key]) != ("position_embedding_type", None):
            raise ValueError(
                f"{key}={hf_config[key]!r} in the Hugging Face config is not supported; use a model with {plain!r}"
            )
    family = ENCODER_FAMILIES[model_type]
    # A null is taken for the default. RoBERTa's positions count from the padding token, which every such model has.
    values = {**family.defaults, **{key: value for key, value in hf_config.items() if value is not None}}
    missing = [key for key in family.keys.values() if key not in values]
    if missing:
        raise ValueError(
            f"the Hugging Face config lacks {', '.join(missing)}; take config.json from the model's own folder"
        )
    return {"architecture": model_type, **family.fixed, **{field: values[key] for field, key in family.keys.items()}}


def fields_to_hf(config: Any) -> dict[str, Any]:
    """Writes an `EncoderConfig` as keys of a `config.json`.

    Raises:
        ValueError: the family has no such model.
    """
    family = ENCODER_FAMILIES[config.architecture]
    for field, value in family.fixed.items():
        if getattr(config, field) != value:
            raise ValueError(
                f"a {config.architecture} model with {field}={getattr(config, field)!r} cannot be saved: the family "
                f"has {value!r}; set architecture to a family that has it"
            )
    return {"model_type": config.architecture, **{key: getattr(config, field) for field, key in family.keys.items()}}
