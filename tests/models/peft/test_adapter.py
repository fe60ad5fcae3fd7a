"""Adapter folders: what is in them, and there and back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from adapted_models import (
    ALPHA,
    FAMILIES,
    KEY,
    LABELS,
    RANK,
    SIZES,
    adapted,
    flat,
    lora_of,
    saved,
)

from dp_rmt import models
from dp_rmt.models import tuning
from dp_rmt.models.peft.adapter import load_adapter, save_adapter
from dp_rmt.models.peft.names import shortest_endings


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    module, _ = adapted(family)
    params, _, _ = saved(tmp_path / "adapter", family)
    found, expected = flat(load_adapter(tmp_path / "adapter", module)), flat(params)
    assert {path for path in found if "_lora/" in path} == {path for path in expected if "_lora/" in path}
    heads = {"bert": {"classifier"}, "roberta": {"classifier", "pooler"}}.get(family, set())
    assert {path.split("/")[0] for path in found if "_lora/" not in path} == heads
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
    again = flat(tuning.with_leaves(jax.tree.map(np.zeros_like, params), load_adapter(tmp_path / "adapter", module)))
    assert {path for path, leaf in again.items() if leaf.any()} == set(found)


def test_names_shapes_and_values_of_llama(tmp_path: Path) -> None:
    params, config, tensors = saved(tmp_path / "adapter", "llama")
    sides = {"self_attn.q_proj": (16, 12), "self_attn.v_proj": (16, 6), "mlp.down_proj": (24, 16)}
    expected = {}
    for layer in range(2):
        for name, (rows, cols) in sides.items():
            expected[f"base_model.model.model.layers.{layer}.{name}.lora_A.weight"] = (RANK, rows)
            expected[f"base_model.model.model.layers.{layer}.{name}.lora_B.weight"] = (cols, RANK)
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    value = params["decoder"]["layers"]["attention"]["value_lora"]
    for name, factor in (("lora_A", "lora_a"), ("lora_B", "lora_b")):
        tensor = tensors[f"base_model.model.model.layers.1.self_attn.v_proj.{name}.weight"]
        np.testing.assert_array_equal(tensor, value[factor]["kernel"][1].T)
    assert sorted(config.pop("target_modules")) == ["down_proj", "q_proj", "v_proj"]
    assert config == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "inference_mode": True,
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }


def test_fused_projections_are_one_update_of_the_sum_of_the_ranks(tmp_path: Path) -> None:
    """GPT-2's query and value, by hand: the rows of A one after the other, B block by block, nothing for the key."""
    params, config, tensors = saved(tmp_path / "adapter", "gpt2")
    assert sorted(config["target_modules"]) == ["attn.c_proj", "c_attn", "c_fc"]
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"c_attn": 2 * RANK}, {"c_attn": 2 * ALPHA})
    assert config["fan_in_fan_out"] is True
    attention = params["decoder"]["layers"]["attention"]
    for layer in range(2):
        a, b = (tensors[f"base_model.model.transformer.h.{layer}.attn.c_attn.lora_{x}.weight"] for x in "AB")
        assert (a.shape, b.shape) == ((2 * RANK, 16), (48, 2 * RANK))
        expected = np.zeros_like(b)
        for index, (name, start) in enumerate((("query", 0), ("value", 32))):
            some = slice(index * RANK, (index + 1) * RANK)
            factors = attention[f"{name}_lora"]
            np.testing.assert_array_equal(a[some], factors["lora_a"]["kernel"][layer].T)
            expected[start : start + 16, some] = factors["lora_b"]["kernel"][layer].T
        np.testing.assert_array_equal(b, expected)


def test_whatever_else_was_trained_goes_along_whole(tmp_path: Path) -> None:
    module, params = adapted("llama")
    save_adapter(tmp_path / "a", module, params, base_model_name_or_path="base", trained="lora_|/final_norm/|lm_head")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    # "norm" alone would match input_layernorm, too.
    assert sorted(config["modules_to_save"]) == ["lm_head", "model.norm"]
    found = {path: leaf for path, leaf in flat(load_adapter(tmp_path / "a", module)).items() if "_lora/" not in path}
    assert found.keys() == {"decoder/final_norm/scale", "lm_head/kernel"}
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, flat(params)[path])


@pytest.mark.parametrize(
    ("kind", "part", "names"),
    [("classifier", "pooler", ["classifier", "pooler.dense"]), ("mlm", "mlm_head", ["predictions"])],
)
def test_what_was_drawn_at_random_goes_along(kind: str, part: str, names: list[str], tmp_path: Path) -> None:
    """Without being asked: nobody else can have a layer that no file holds."""
    config = models.EncoderConfig.from_hf_config({"model_type": "bert", **SIZES, **FAMILIES["bert"]})
    module: Any = models.SequenceClassifier(config, LABELS, fresh=("classifier", "pooler"))
    if kind == "mlm":
        module = models.MaskedLanguageModel(config, fresh=("mlm_head",))
    module, params = tuning.with_lora(module, models.init_params(module, KEY), lora_of("bert"), KEY)
    save_adapter(tmp_path / "a", module, params, base_model_name_or_path="base")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["modules_to_save"] == names
    found = flat(load_adapter(tmp_path / "a", module.clone(fresh=())))
    expected = {path: leaf for path, leaf in flat(params).items() if path.startswith(part)}
    assert expected
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf)


def test_the_logits_of_an_adapter_are_in_the_order_of_its_base_model(tmp_path: Path) -> None:
    """The adapter is put on the file that was loaded, whose names are in another order than those of the data."""
    module, params = adapted("roberta")
    save_adapter(tmp_path / "a", module.clone(label_rows=(1, 2, 0)), params, base_model_name_or_path="base")
    stored = load_adapter(tmp_path / "a", module)["classifier"]["kernel"]
    for logit, row in enumerate((1, 2, 0)):
        np.testing.assert_array_equal(stored[:, row], params["classifier"]["kernel"][:, logit])
    again = load_adapter(tmp_path / "a", module.clone(label_rows=(1, 2, 0)))
    np.testing.assert_array_equal(again["classifier"]["kernel"], params["classifier"]["kernel"])


@pytest.mark.parametrize(
    ("family", "trained", "path"),
    [
        ("gpt2", "bias$", "decoder/layers/attention/query/bias"),
        ("bert", "query/bias", "encoder/layers/attention/query/bias"),
        ("bert", "key/bias|word", "encoder/embeddings/word_embeddings/embedding"),
    ],
)
def test_what_an_adapter_cannot_hold_is_refused(family: str, trained: str, path: str, tmp_path: Path) -> None:
    module, params = adapted(family)
    with pytest.raises(ValueError, match=rf"{path} was trained beside low-rank updates.*merge .*save_pretrained\("):
        save_adapter(tmp_path / "adapter", module, params, base_model_name_or_path="base", trained=trained)
    assert not any(tmp_path.iterdir())


def test_endings_tell_apart() -> None:
    names = ["encoder.layer.0.attention.output.dense", "encoder.layer.0.output.dense"]
    assert shortest_endings(names, ["pooler.dense"], dot=".") == ["output.dense"]
    assert shortest_endings(["h.0.c_proj"], ["h.0.xc_proj"], dot=".") == ["c_proj"]
    assert shortest_endings(["h.0.c_proj"], ["h.0.xc_proj"], dot="") == ["0.c_proj"]


def test_an_adapter_is_replaced_by_a_later_one(tmp_path: Path) -> None:
    saved(tmp_path / "adapter", "bert")
    saved(tmp_path / "adapter", "llama")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "adapter",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
