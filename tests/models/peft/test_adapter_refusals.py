"""Adapters that are not what the model has: every mistake is refused in words that help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from adapted_models import (
    ALPHA,
    RANK,
    TARGETS,
    adapted,
    flat,
    saved,
)

from dp_rmt import models
from dp_rmt.models import tuning
from dp_rmt.models.lora import with_config
from dp_rmt.models.peft.adapter import load_adapter, save_adapter


def rewrite(folder: Path, change: Any) -> None:
    """The same folder with other tensors."""
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


Q1 = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("changes", "file", "message"),
    [
        (
            {"rank": 4},
            "config.json",
            r"the update of model.layers.0.self_attn.q_proj has rank 3, the model's has 4; "
            r"load the base model with LoRAConfig\(rank=3",
        ),
        (
            {"alpha": 8.0},
            "config.json",
            r".*q_proj is scaled by 2.5, the model's by alpha / rank = 2.66667; load the "
            r"base model with LoRAConfig\(alpha=7.5",
        ),
        (
            {"targets": ("query", "value")},
            "model.safetensors",
            r"tensor .*layers.0.mlp.down_proj.lora_A.weight of shape \(3, 24\), which the model has no place for",
        ),
        (
            {"targets": ("query", "value", "down", "key")},
            "model.safetensors",
            r"no tensor .*layers.0.self_attn.k_proj.lora_A.weight of shape \(3, 16\)",
        ),
    ],
)
def test_an_adapter_of_another_configuration_is_refused(
    changes: dict[str, Any], file: str, message: str, tmp_path: Path
) -> None:
    saved(tmp_path / "adapter", "llama")
    module, _ = adapted("llama")
    lora = models.LoRAConfig(**{"rank": RANK, "alpha": ALPHA, "targets": TARGETS["llama"], **changes})
    with pytest.raises(ValueError, match=rf"adapter_{file}(:| has) {message}"):
        load_adapter(tmp_path / "adapter", with_config(module, lora=lora))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(Q1), rf"adapter_model.safetensors has no tensor {Q1} of shape \(3, 16\)"),
        (
            lambda tensors: tensors.update({Q1: np.ones((3, 15), np.float32)}),
            rf"adapter_model.safetensors: tensor {Q1} has shape \(3, 15\), expected \(3, 16\)",
        ),
        (
            lambda tensors: tensors.update({"base_model.model.lm_head.bias": np.ones(40, np.float32)}),
            r"adapter_model.safetensors has tensor base_model.model.lm_head.bias of shape \(40,\), which the model has",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    saved(tmp_path / "adapter", "llama")
    rewrite(tmp_path / "adapter", change)
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path / "adapter", adapted("llama")[0])


def test_an_update_of_a_fused_module_as_a_whole_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "adapter", "gpt2")
    name = "base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"
    rewrite(tmp_path / "adapter", lambda tensors: tensors[name].__setitem__((20, 0), 1.0))
    with pytest.raises(ValueError, match=rf"safetensors: tensor {name} is not block-diagonal: .*merge_and_unload"):
        load_adapter(tmp_path / "adapter", adapted("gpt2")[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "adapter_config.json: peft_type is 'IA3'; only LORA adapters"),
        ({"use_dora": True}, r"adapter_config.json: use_dora=True is not supported.*; merge .*merge_and_unload\(\)"),
        ({"bias": "lora_only"}, r"bias='lora_only' is not supported.*; merge .*merge_and_unload\(\)"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa' trains .*; merge .*merge_and_unload\(\)"),
        ({"init_lora_weights": "OLoRA"}, r"init_lora_weights='olora' trains .*; merge .*merge_and_unload\(\)"),
        # Loaded again, peft draws another decomposition.
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' trains .* only in the process that trained it"),
        ({"init_lora_weights": "corda", "corda_config": {}}, "'corda' trains .* only in the process that trained it"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "'loftq' trains .* only in the process"),
        ({"alora_invocation_tokens": [5, 6]}, r"alora_invocation_tokens=\[5, 6\] .* cannot merge .* without this key"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication=.* cannot merge .* without this key"),
        # Something that a later version of peft brings.
        ({"use_xlora_gate": {"depth": 2}}, r"use_xlora_gate=\{'depth': 2\} is not supported.* only in the process"),
        ({"r": None}, "adapter_config.json: r is None, expected a number"),
        # alpha / sqrt(rank)
        ({"use_rslora": True}, "is scaled by 4.33013, the model's by"),
    ],
)
def test_adapters_of_another_kind_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    _, config, _ = saved(tmp_path / "adapter", "llama")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path / "adapter", adapted("llama")[0])


def test_everything_that_peft_writes_for_plain_updates_passes(tmp_path: Path) -> None:
    """The file of peft 0.21, its defaults and what leaves the function alone; and a key of tomorrow, switched off."""
    params, config, _ = saved(tmp_path / "adapter", "llama")
    of_peft = """{"alora_invocation_tokens": null, "arrow_config": null, "auto_mapping": null, "corda_config": null,
        "ensure_weight_tying": false, "eva_config": null, "exclude_modules": null, "init_lora_weights": "gaussian",
        "kasa_config": null, "layer_replication": null, "layers_pattern": null, "layers_to_transform": null,
        "loftq_config": {}, "lora_bias": false, "lora_dropout": 0.1, "lora_ga_config": null, "megatron_config": null,
        "megatron_core": "megatron.core", "monteclora_config": null, "peft_version": "0.21.2", "qalora_group_size": 16,
        "revision": "main", "target_parameters": null, "trainable_token_indices": null, "use_bdlora": null,
        "use_dora": false, "use_qalora": false, "use_rslora": false, "velora_config": null}"""
    tomorrow = {"some_config": None, "some_list": [], "use_something": False}
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({**json.loads(of_peft), **config, "lora_dropout": 0.1, **tomorrow})
    )
    found = flat(load_adapter(tmp_path / "adapter", adapted("llama")[0]))
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, flat(params)[path])


def test_broken_and_absent_files(tmp_path: Path) -> None:
    module, params = adapted("llama")
    with pytest.raises(FileNotFoundError, match=r"there is no .*adapter_config.json; give the folder of an adapter"):
        load_adapter(tmp_path, module)
    saved(tmp_path / "adapter", "llama")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is not a readable safetensors file"):
        load_adapter(tmp_path / "adapter", module)
    with pytest.raises(FileExistsError, match="holds files that were not written by dp_rmt"):
        save_adapter(tmp_path / "adapter", module, params, base_model_name_or_path="base")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json is not valid JSON"):
        load_adapter(tmp_path / "adapter", module)


def test_parameters_of_another_model_are_refused(tmp_path: Path) -> None:
    module, params = adapted("llama")
    wider = with_config(module, lora=models.LoRAConfig(RANK + 1, ALPHA, TARGETS["llama"]))
    path = "decoder/layers/attention/query_lora/lora_a/kernel"
    with pytest.raises(ValueError, match=rf"params has {path} of shape \(2, 16, 3\), the module expects \(2, 16, 4\)"):
        save_adapter(tmp_path / "adapter", wider, params, base_model_name_or_path="base")
    plain, merged = tuning.without_lora(module, params)
    with pytest.raises(ValueError, match=f"params has no {path}"):
        save_adapter(tmp_path / "adapter", module, merged, base_model_name_or_path="base")
    has_none = "the model has no low-rank updates; put them in with with_lora"
    with pytest.raises(ValueError, match=has_none):
        save_adapter(tmp_path / "adapter", plain, merged, base_model_name_or_path="base")
    with pytest.raises(ValueError, match=has_none):
        load_adapter(tmp_path / "adapter", plain)
