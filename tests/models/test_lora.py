"""LoRA: the base model at initialisation, named beside it, merged into it."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from dp_rmt import models
from dp_rmt.models.decoder.config import PROJECTIONS
from dp_rmt.models.lora import with_config
from dp_rmt.models.tuning import parameter_shapes
from dp_rmt.trees import split_params

pytestmark = pytest.mark.thorough

LORA = models.LoRAConfig(rank=3, alpha=6.0, targets=("query", "value", "output", "down"))


def build(lora: models.LoRAConfig | None) -> tuple[models.CausalLanguageModel, dict[str, Any]]:
    config = models.DecoderConfig(
        vocab_size=30,
        hidden_size=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=24,
        max_position_embeddings=16,
        attention_bias=True,
        lora=lora,
    )
    module = models.CausalLanguageModel(config)
    return module, models.init_params(module, jax.random.key(0))


@functools.cache
def plain_and_adapted() -> Any:
    """The plain model, and one with the same base parameters, as after loading them, and A, B of its own."""
    plain, base = build(None)
    adapted, params = build(LORA)
    return plain, base, adapted, unflatten_dict({**flatten_dict(params), **flatten_dict(base)})


def trained(params: Any, *, scale: float = 0.2) -> Any:
    """The parameters with everything random, as after training."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: leaf + scale * rng.standard_normal(leaf.shape, np.float32), params)


def random_params(module: Any) -> Any:
    rng = np.random.default_rng(0)
    return unflatten_dict(
        {
            path: 0.2 * rng.standard_normal(leaf.shape, np.float32) + (path[-1] == "scale")
            for path, leaf in parameter_shapes(module).items()
        }
    )


def make_batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "input_ids": rng.integers(0, 30, (4, 7)),
        "attention_mask": (np.arange(7) < np.array([7, 5, 3, 0])[:, None]).astype(np.int32),
    }


def logits(module: Any, params: Any) -> np.ndarray:
    batch = make_batch()
    return np.asarray(jax.jit(module.apply)({"params": params}, batch["input_ids"], batch["attention_mask"]))


def test_base_parameters_keep_their_paths() -> None:
    _, base, _, params = plain_and_adapted()
    plain_shapes, shapes = (
        {"/".join(path): leaf.shape for path, leaf in flatten_dict(tree).items()} for tree in (base, params)
    )
    layers = "decoder/layers"
    assert {path: shape for path, shape in shapes.items() if path not in plain_shapes} == {
        f"{layers}/attention/query_lora/lora_a/kernel": (2, 16, 3),
        f"{layers}/attention/query_lora/lora_b/kernel": (2, 3, 32),
        f"{layers}/attention/value_lora/lora_a/kernel": (2, 16, 3),
        f"{layers}/attention/value_lora/lora_b/kernel": (2, 3, 16),
        f"{layers}/attention/output_lora/lora_a/kernel": (2, 32, 3),
        f"{layers}/attention/output_lora/lora_b/kernel": (2, 3, 16),
        f"{layers}/down_lora/lora_a/kernel": (2, 24, 3),
        f"{layers}/down_lora/lora_b/kernel": (2, 3, 16),
    }
    assert {path: shapes[path] for path in plain_shapes} == plain_shapes


def test_at_initialisation_it_is_the_base_model() -> None:
    plain, base, adapted, params = plain_and_adapted()
    np.testing.assert_array_equal(logits(adapted, params), logits(plain, base))


def test_a_is_initialised_as_in_peft() -> None:
    """kaiming_uniform_ with a = sqrt(5): U(-1/sqrt(in), 1/sqrt(in)), whatever the rank."""
    module = models.LoRADense(nn.Dense(4), models.LoRAConfig(50, 1.0, ("query",)))
    a = np.asarray(module.init(jax.random.key(0), jnp.ones((1, 100)))["params"]["lora_a"]["kernel"])
    assert a.shape == (100, 50)
    assert 0.099 < np.abs(a).max() <= 0.1
    assert np.std(a) == pytest.approx(0.1 / np.sqrt(3), rel=0.04)  # 5,000 entries: 6 standard errors


def test_merged_parameters_are_the_same_function() -> None:
    plain, base, adapted, params = plain_and_adapted()
    params = trained(params)
    merged = models.merge_lora(params, LORA)
    assert flatten_dict(merged).keys() == flatten_dict(base).keys()
    expected = logits(adapted, params)
    assert np.abs(expected - logits(plain, split_params(params, "lora_")[1])).max() > 0.1
    np.testing.assert_allclose(logits(plain, merged), expected, rtol=0, atol=1e-5)
    # By hand, one layer of one target, with alpha / rank = 2.
    attention = params["decoder"]["layers"]["attention"]
    a, b = (np.asarray(attention["value_lora"][name]["kernel"][1], np.float64) for name in ("lora_a", "lora_b"))
    kernel = merged["decoder"]["layers"]["attention"]["value"]["kernel"][1]
    np.testing.assert_allclose(kernel, attention["value"]["kernel"][1] + 2 * a @ b, rtol=0, atol=1e-6)


def test_every_projection_can_be_a_target() -> None:
    lora = models.LoRAConfig(rank=2, alpha=1.0, targets=PROJECTIONS)
    plain, *_ = plain_and_adapted()
    adapted = with_config(plain, lora=lora)
    params = random_params(adapted)
    assert len(jax.tree.leaves(split_params(params, "lora_")[0])) == 2 * len(PROJECTIONS)
    np.testing.assert_allclose(
        logits(plain, models.merge_lora(params, lora)), logits(adapted, params), rtol=0, atol=1e-5
    )


def test_an_encoder_takes_lora_too() -> None:
    """Its parameters unchanged in name and shape, and the merged ones the same function."""
    lora = models.LoRAConfig(rank=3, alpha=6.0, targets=("query", "value", "intermediate", "output"))
    plain = models.SequenceClassifier(models.EncoderConfig("bert", 30, 16, 2, 2, 24, 8, 1, 1e-12, pad_token_id=0), 2)
    adapted = with_config(plain, lora=lora)
    base, shapes = (parameter_shapes(module) for module in (plain, adapted))
    added = {"/".join(path[2:]): leaf.shape for path, leaf in shapes.items() if path not in base}
    expected = {f"attention/{name}": (16, 16) for name in ("query", "value", "output")}
    expected |= {"intermediate": (16, 24), "output": (24, 16)}
    assert added == {f"{name}_lora/lora_a/kernel": (2, sides[0], 3) for name, sides in expected.items()} | {
        f"{name}_lora/lora_b/kernel": (2, 3, sides[1]) for name, sides in expected.items()
    }
    assert all(shapes[path] == leaf for path, leaf in base.items())
    ids = np.random.default_rng(1).integers(0, 30, (4, 7))

    def logits(module: Any, params: Any) -> np.ndarray:
        return np.asarray(jax.jit(module.apply)({"params": params}, ids, np.ones_like(ids), np.zeros_like(ids)))

    params = random_params(adapted)
    with_updates = logits(adapted, params)
    assert np.abs(with_updates - logits(plain, split_params(params, "lora_")[1])).max() > 0.01
    np.testing.assert_allclose(logits(plain, models.merge_lora(params, lora)), with_updates, rtol=0, atol=1e-5)


def test_an_encoder_has_no_other_targets() -> None:
    lora = models.LoRAConfig(rank=2, alpha=2.0, targets=("query", "down"))
    with pytest.raises(ValueError, match="LoRA targets down are no dense layers of an encoder; choose among query, "):
        models.EncoderConfig("bert", 30, 16, 2, 2, 24, 8, 1, 1e-12, 0, lora=lora)


def test_lora_is_what_the_regular_expression_selects() -> None:
    _, base, _, params = plain_and_adapted()
    train, frozen = split_params(params, "lora_")
    assert len(jax.tree.leaves(train)) == 2 * len(LORA.targets)
    assert flatten_dict(frozen).keys() == flatten_dict(base).keys()


def test_parameters_of_another_rank_are_not_merged() -> None:
    _, _, _, params = plain_and_adapted()
    with pytest.raises(ValueError, match=r"low-rank update of \w+ has rank 3, the LoRA configuration 2"):
        models.merge_lora(params, models.LoRAConfig(2, LORA.alpha, LORA.targets))


def test_merged_weights_keep_their_dtype() -> None:
    params = {"query": {"kernel": jnp.ones((2, 3), jnp.bfloat16)}}
    params["query_lora"] = {"lora_a": {"kernel": jnp.ones((2, 1))}, "lora_b": {"kernel": jnp.ones((1, 3))}}  # type: ignore
    kernel = models.merge_lora(params, models.LoRAConfig(1, 2.0, ("query",)))["query"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(kernel.astype(jnp.float32), 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "LoRA rank is 0; give 1 or more, or lora=None"),
        ({"targets": ()}, "LoRA has no targets; name dense layers"),
        ({"targets": "query"}, "must be a tuple of names, got the text 'query'; add a comma"),
    ],
)
def test_bad_configurations_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.LoRAConfig(**{"rank": 2, "alpha": 2.0, "targets": ("query",), **fields})
