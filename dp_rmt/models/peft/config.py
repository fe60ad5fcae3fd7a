"""Writes and reads the PEFT library's `adapter_config.json`, which describes a folder of low-rank updates."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from dp_rmt.models.huggingface import names as hf_names
from dp_rmt.models.huggingface.names import LeafName, Model
from dp_rmt.models.peft.names import Adapted, adapted_config, matches, module_of, pattern_value, shortest_endings

CONFIG_FILE = "adapter_config.json"
_TASK_TYPES = {"classification": "SEQ_CLS", "masked_lm": None, "causal_lm": "CAUSAL_LM"}
# What `check_is_plain` lets pass. The first change nothing that an adapter computes once it is trained, or are read
# elsewhere, or show in the names of the tensors, all of which must have a place, or belong to a way to start.
_NEUTRAL = frozenset(
    [
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "lora_dropout",
        "fan_in_fan_out",
        "target_modules",
        "exclude_modules",
        "modules_to_save",
        "layers_to_transform",
        "layers_pattern",
        "megatron_core",
        "runtime_config",
        "eva_config",
        "qalora_group_size",
        "init_lora_weights",
        "loftq_config",
        "corda_config",
        "lora_ga_config",
    ]
)
# Ways to start that leave the base model as it is. The others (PiSSA, OLoRA, CorDA, LoftQ, ...) take a part out of its
# weights, so that the trained A and B belong to other weights than those of the base model.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_MERGE = (
    "merge that adapter into its base model with peft, save that, and load it: "
    "AutoPeftModelForCausalLM (or ...ForSequenceClassification).from_pretrained(folder).merge_and_unload()"
    ".save_pretrained(new_folder)"
)
_MERGE_IN_MEMORY = (
    "peft finds the weights that it belongs to again only in the process that trained it: there, save "
    "model.merge_and_unload().save_pretrained(new_folder), and load that"
)
_RETRAIN = "peft cannot merge it into a plain model either: train an adapter without this key"
# What was seen to give the same logits with peft 0.21; anything else gets the advice that is always right.
_ADVICE = {
    **dict.fromkeys(("use_dora", "bias", "lora_bias", "trainable_token_indices", "target_parameters"), _MERGE),
    **dict.fromkeys(("alora_invocation_tokens", "layer_replication", "arrow_config"), _RETRAIN),
}
_START_ADVICE = {"pissa": _MERGE, "olora": _MERGE}
_FUSED = (
    "its module fuses {count} matrices that have updates of their own here, whose ranks add up; give the LoRAConfig "
    "that it was saved with, or merge an adapter of the fused module into its base model with peft (merge_and_unload)"
)


def adapter_config(
    module: Model, table: list[LeafName], adapted: list[Adapted], whole: list[LeafName]
) -> dict[str, Any]:
    """Makes what `adapter_config.json` says, besides the base model.

    Args:
        module: a model with LoRA.
        table: the names of the model without LoRA.
        adapted: its low-rank updates.
        whole: the leaves of the modules that are saved whole.

    Returns:
        A JSON object.
    """
    lora = adapted_config(module)
    everything = {module_of(module, name) for leaf in table for name in leaf.hf_names}
    targets = {one.name for one in adapted}
    saved = {module_of(module, name) for leaf in whole for name in leaf.hf_names}
    fused = {one.name: len(one.parts) for one in adapted if len(one.parts) > 1}
    parts = {
        ending: next(count for name, count in fused.items() if matches(name, [ending]))
        for ending in shortest_endings(sorted(fused), sorted(everything - set(fused)), dot=".")
    }
    # All of a classification head goes under the name that peft gives it, whatever the configuration says.
    head = {name for name in saved if name.startswith("classifier")}
    # A module is saved with all that is below it: a masked language model's head is one module with others inside.
    tops = {name for name in saved - head if not any(name.startswith(f"{other}.") for other in saved)}
    others = shortest_endings(sorted(tops), sorted(everything - saved), dot="")
    return {
        "peft_type": "LORA",
        "task_type": _TASK_TYPES[hf_names.head_of(module)],
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "target_modules": shortest_endings(sorted(targets), sorted(everything - targets), dot="."),
        "rank_pattern": {ending: count * lora.rank for ending, count in parts.items()},
        "alpha_pattern": {ending: count * lora.alpha for ending, count in parts.items()},
        "fan_in_fan_out": all(one.is_conv1d for one in adapted),
        "modules_to_save": (["classifier"] if head else []) + others or None,
    }


def read_adapter_config(path: Path) -> dict[str, Any]:
    """Reads an `adapter_config.json` of low-rank updates.

    Args:
        path: the file.

    Returns:
        The JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON, or belongs to another kind of adapter.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; give the folder of an adapter that peft or save_adapter saved")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); save or download the adapter again") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise ValueError(f"{path}: peft_type is {kind!r}; only LORA adapters can be loaded")
    check_is_plain(config, path)
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float):
            raise ValueError(f"{path}: {key} is {config.get(key)!r}, expected a number; save the adapter again")
    return config


def check_is_plain(config: dict[str, Any], path: Path) -> None:
    """Raises unless every key is known to leave the function (alpha / r) B A x beside each weight of the base model.

    It is a list of what passes, so that what a later version of peft adds is refused and not read as plain LoRA. A key
    that is unknown passes if it is switched off: null, false, "none" or empty.

    Args:
        config: the content of an `adapter_config.json`.
        path: the file, for the message.

    Raises:
        ValueError: a key may change the function; the message says which, and how to get a model that can be loaded.
    """
    start = config.get("init_lora_weights")
    start = start.lower() if isinstance(start, str) else start
    if start not in _STARTS:
        raise ValueError(
            f"{path}: init_lora_weights={start!r} trains A and B beside changed weights of the base model, which the "
            f"adapter does not hold; {_START_ADVICE.get(start, _MERGE_IN_MEMORY)}"
        )
    for key, value in sorted(config.items()):
        if key in _NEUTRAL or not value or value == "none":
            continue
        raise ValueError(
            f"{path}: {key}={value!r} is not supported, since it may change what the adapter computes; "
            + _ADVICE.get(key, _MERGE_IN_MEMORY)
        )


def check_scale(module: Model, one: Adapted, config: dict[str, Any], path: Path) -> None:
    """Raises ValueError unless rank and alpha / rank of an update are those of the module, whatever alpha is."""
    lora, count = adapted_config(module), len(one.parts)
    rank = pattern_value(config.get("rank_pattern") or {}, one.name, config["r"])
    alpha = pattern_value(config.get("alpha_pattern") or {}, one.name, config["lora_alpha"])
    # Kalajdzievski (2023) takes alpha / sqrt(rank) in the place of alpha / rank.
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if rank != count * lora.rank:
        raise ValueError(
            f"{path}: the update of {one.name} has rank {rank}, the model's has {count * lora.rank}; "
            + (f"load the base model with LoRAConfig(rank={rank}, ...)" if count == 1 else _FUSED.format(count=count))
        )
    if not math.isclose(scale, lora.scale, rel_tol=1e-6):
        raise ValueError(
            f"{path}: the update of {one.name} is scaled by {scale:g}, the model's by alpha / rank = {lora.scale:g}; "
            f"load the base model with LoRAConfig(alpha={scale * lora.rank:g}, ...)"
        )
