"""An adapter and its merged model are the same function in `peft` and `transformers`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from adapted_models import (
    FAMILIES,
    KEY,
    LABELS,
    SIZES,
    TARGETS,
    is_classifier,
    lora_of,
)
from flax.traverse_util import flatten_dict, unflatten_dict

from dp_rmt import models
from dp_rmt.models import tuning
from dp_rmt.models.peft.adapter import load_adapter, save_adapter


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
