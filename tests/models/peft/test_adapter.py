"""Adapter folders: what is in them, there and back bit for bit, and the same function in `peft` and `transformers`."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from dp_rmt import models
from dp_rmt.models import tuning
from dp_rmt.models.lora import with_config
from dp_rmt.models.peft.adapter import load_adapter, save_adapter
from dp_rmt.models.peft.names import shortest_endings

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
    "initializer_range": 0.3,
}
_LLAMA: dict[str, Any] = {"num_key_value_heads": 1, "head_dim": 6, "rms_norm_eps": 1e-3, "hidden_act": "silu"}
_GEMMA: dict[str, Any] = {
    **_LLAMA,
    "hidden_act": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 9,
    "sliding_window": 4,
    "final_logit_softcapping": 4.0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": 4},
    "qwen2": {**{key: _LLAMA[key] for key in _LLAMA if key != "head_dim"}, "use_sliding_window": False},
    "qwen3": {**_LLAMA, "tie_word_embeddings": True},
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 3.0},
    "gemma3_text": {**_GEMMA, "rope_local_base_freq": 20.0, "sliding_window_pattern": 2},
    "gpt2": {
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 12,
        "n_inner": 24,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
    },
    "gpt_neox": {"layer_norm_eps": 1e-5, "hidden_act": "gelu"},
    "phi3": {**{key: _LLAMA[key] for key in _LLAMA if key != "head_dim"}, "pad_token_id": 0},
    "bert": {"pad_token_id": 0, "type_vocab_size": 2, "layer_norm_eps": 1e-12},
    "roberta": {"pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
}
TARGETS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"), ("query", "value", "down")),
    "gpt2": ("query", "value", "output", "up"),
    "gpt_neox": ("query", "key", "value", "down"),
    "phi3": ("query", "value", "up", "down"),
    "bert": ("query", "value", "output"),
    "roberta": ("key", "intermediate"),
}
RANK, ALPHA, LABELS = 3, 7.5, 3
KEY = jax.random.key(2)


def lora_of(family: str) -> models.LoRAConfig:
    return models.LoRAConfig(RANK, ALPHA, TARGETS[family])


def is_classifier(family: str) -> bool:
    return family in ("bert", "roberta")


@functools.cache
def adapted(family: str) -> tuple[Any, Any]:
    """A model with LoRA, without files of anybody, with every leaf random, so that one in the wrong place shows."""
    hf_config = {"model_type": family, **SIZES, **FAMILIES[family]}
    if is_classifier(family):
        module: Any = models.SequenceClassifier(models.EncoderConfig.from_hf_config(hf_config), LABELS)
    else:
        module = models.CausalLanguageModel(models.DecoderConfig.from_hf_config(hf_config))
    module, rng = with_config(module, lora=lora_of(family)), np.random.default_rng(0)
    shapes = tuning.parameter_shapes(module).items()
    return module, unflatten_dict({path: rng.standard_normal(leaf.shape, np.float32) for path, leaf in shapes})


def flat(tree: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(tree, sep="/").items()}


def saved(folder: Path, family: str) -> tuple[Any, dict[str, Any], dict[str, np.ndarray]]:
    """``(params, adapter_config.json, tensors)`` of a saved adapter."""
    module, params = adapted(family)
    save_adapter(folder, module, params, base_model_name_or_path="base")
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    return params, json.loads((folder / "adapter_config.json").read_text()), tensors


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


# ---- Bad input ------------------------------------------------------------------------------------------------------


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


def test_an_adapter_is_replaced_by_a_later_one(tmp_path: Path) -> None:
    saved(tmp_path / "adapter", "bert")
    saved(tmp_path / "adapter", "llama")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "adapter",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


# ---- Against peft and transformers ----------------------------------------------------------------------------------


def against_peft(test: Any) -> Any:
    """Marks a test; peft reads a property that transformers is about to rename."""
    ignore = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
    return pytest.mark.oracle(ignore(test))


def batch(family: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    mask = (np.arange(7) < np.array([7, 4, 2])[:, None]).astype(np.int32)
    found = {"input_ids": np.where(mask, rng.integers(2, 40, (3, 7)), 1).astype(np.int32), "attention_mask": mask}
    return found | ({"token_type_ids": np.zeros_like(mask)} if is_classifier(family) else {})


def ours(module: Any, params: Any, family: str) -> np.ndarray:
    return np.asarray(jax.jit(module.apply)({"params": params}, *batch(family).values()))


def theirs(model: Any, family: str) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.eval()(**{name: torch.tensor(x).long() for name, x in batch(family).items()}).logits.numpy()


def auto_class(family: str) -> Any:
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, f"AutoModelFor{'SequenceClassification' if is_classifier(family) else 'CausalLM'}")


def torch_base(folder: Path, family: str) -> None:
    """A random model of transformers, saved."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    labels = {"num_labels": LABELS} if is_classifier(family) else {}
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]}, **labels)
    auto_class(family).from_config(config).save_pretrained(folder)


def load_base(folder: Path, family: str) -> tuple[Any, Any]:
    head = "classification" if is_classifier(family) else "causal_lm"
    return models.load_pretrained(folder, head=head, num_labels=LABELS, key=jax.random.key(0))


def assert_same_logits(found: np.ndarray, expected: np.ndarray, family: str) -> None:
    is_token = ... if is_classifier(family) else batch(family)["attention_mask"] == 1
    np.testing.assert_allclose(found[is_token], expected[is_token], rtol=0, atol=1e-4)


@against_peft
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_and_transformers_compute_the_same(family: str, tmp_path: Path) -> None:
    """The adapter on the base model in `peft`, and the merged model in plain `transformers`."""
    peft = pytest.importorskip("peft")
    torch_base(tmp_path / "base", family)
    module, params = tuning.with_lora(*load_base(tmp_path / "base", family), lora_of(family), jax.random.key(1))
    rng = np.random.default_rng(0)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            leaf + 0.3 * rng.standard_normal(leaf.shape, np.float32)
            if any(name in str(path) for name in ("_lora", "classifier"))
            else leaf
        ),
        params,
    )
    expected = ours(module, params, family)
    save_adapter(tmp_path / "adapter", module, params, base_model_name_or_path=str(tmp_path / "base"))
    labels = {"num_labels": LABELS} if is_classifier(family) else {}
    model = auto_class(family).from_pretrained(tmp_path / "base", **labels)
    assert np.abs(expected - theirs(model, family)).max() > 0.1
    assert_same_logits(theirs(peft.PeftModel.from_pretrained(model, tmp_path / "adapter"), family), expected, family)
    models.save_pretrained(tmp_path / "merged", *tuning.without_lora(module, params))
    assert_same_logits(theirs(auto_class(family).from_pretrained(tmp_path / "merged"), family), expected, family)


@against_peft
@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_an_adapter_that_peft_saved(family: str, tmp_path: Path) -> None:
    """With its own way to scale (rslora), and with the head that it saves along."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    torch_base(tmp_path / "base", family)
    model = auto_class(family).from_pretrained(tmp_path / "base")
    names = {"llama": ["q_proj", "v_proj", "down_proj"], "roberta": ["key", "intermediate.dense"]}[family]
    task = "SEQ_CLS" if is_classifier(family) else "CAUSAL_LM"
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=names, task_type=task, use_rslora=True)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    module, params = load_base(tmp_path / "base", family)
    lora = models.LoRAConfig(4, 6 * 4**0.5, TARGETS[family])
    module, params = tuning.with_lora(module, params, lora, jax.random.key(1))
    params = tuning.with_leaves(params, load_adapter(tmp_path / "adapter", module))
    assert_same_logits(ours(module, params, family), theirs(model, family), family)


@against_peft
@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"use_dora": True},
        {"trainable_token_indices": [3, 4]},
        {"init_lora_weights": "pissa_niter_2"},
    ],
    ids=lambda options: str(*options.values()),
)
def test_the_advice_for_an_adapter_of_another_kind_gives_its_function(options: dict[str, Any], tmp_path: Path) -> None:
    """Merged as the message says, loaded again or in the process that trained it, and then read here."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    torch_base(tmp_path / "base", "llama")
    model = auto_class("llama").from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    expected = theirs(model, "llama")
    model.save_pretrained(tmp_path / "adapter")
    plain = models.LoRAConfig(4, 6, ("query", "value"))
    module, _ = tuning.with_lora(*load_base(tmp_path / "base", "llama"), plain, jax.random.key(1))
    with pytest.raises(ValueError, match=r"merge_and_unload\(\)") as refused:
        load_adapter(tmp_path / "adapter", module)
    if "in the process that trained it" not in str(refused.value):
        model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert_same_logits(ours(*load_base(tmp_path / "merged", "llama"), "llama"), expected, "llama")


@against_peft
@pytest.mark.parametrize("head", ["classification", "masked_lm"])
def test_a_base_model_without_pooler_or_head(head: str, tmp_path: Path) -> None:
    """BERT's files lack the pooler (or the word scores' head): the adapter brings what was drawn at random here."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model("bert", **{**SIZES, **FAMILIES["bert"]}, num_labels=LABELS)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "base")
    module, params = models.load_pretrained(tmp_path / "base", head=head, num_labels=LABELS, key=KEY)
    module, params = tuning.with_lora(module, params, lora_of("bert"), KEY)
    rng, pattern = np.random.default_rng(0), re.compile(tuning.trainable_pattern("lora", module))
    params = unflatten_dict(
        {
            path: leaf + 0.3 * rng.standard_normal(leaf.shape, np.float32) if pattern.search("/".join(path)) else leaf
            for path, leaf in flatten_dict(params).items()
        }
    )
    save_adapter(tmp_path / "adapter", module, params, base_model_name_or_path=str(tmp_path / "base"))
    kind = {"classification": "BertForSequenceClassification", "masked_lm": "BertForMaskedLM"}[head]
    labels = {"num_labels": LABELS} if head == "classification" else {}
    base = getattr(transformers, kind).from_pretrained(tmp_path / "base", **labels)
    found = theirs(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"), "bert")
    expected, is_token = ours(module, params, "bert"), batch("bert")["attention_mask"] == 1
    is_token = ... if head == "classification" else is_token
    np.testing.assert_allclose(found[is_token], expected[is_token], rtol=0, atol=1e-4)
