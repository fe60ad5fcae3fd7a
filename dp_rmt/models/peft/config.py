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
# The keys that change the function of an adapter and are not supported, with the values that do not change it.
_PLAIN = {"use_dora": False, "bias": "none", "lora_bias": False, "use_qalora": False, "layer_replication": None}
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
    others = shortest_endings(sorted(saved - head), sorted(everything - saved), dot="")
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
    for key, value in _PLAIN.items():
        if config.get(key) not in (value, None):
            raise ValueError(
                f"{path}: {key}={config[key]!r} is not supported; merge that adapter into its base model with peft "
                "(merge_and_unload), save that, and load it"
            )
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float):
            raise ValueError(f"{path}: {key} is {config.get(key)!r}, expected a number; save the adapter again")
    return config


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
