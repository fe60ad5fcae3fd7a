"""What the decoder computes: torch's recorded logits, causality, padding, transformations."""

from __future__ import annotations

import dataclasses
import functools
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_rmt import models
from dp_rmt.models.decoder.positions import rotary_embedding, rotate
from dp_rmt.training.losses import causal_lm_loss
from dp_rmt.trees import leaves_by_path

pytestmark = pytest.mark.thorough

GOLDENS = Path(__file__).parents[1] / "goldens"
read_llama = runpy.run_path(str(Path(__file__).parents[2] / "oracle" / "llama_folder.py"))["read_llama"]

both_heads = pytest.mark.parametrize("name", ["llama", "llama_tied"])


@functools.cache
def load(name: str, **options: Any) -> Any:
    return read_llama(GOLDENS / name, **options)


@functools.cache
def apply(module: Any) -> Any:
    return jax.jit(module.apply)


def golden(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, mask and logits: four rows padded on the right, four on the left."""
    arrays = np.load(GOLDENS / name / "inputs_outputs.npz")
    return arrays["input_ids"], arrays["attention_mask"], arrays["logits"]


@both_heads
def test_logits_are_those_of_torch(name: str) -> None:
    module, params = load(name)
    ids, mask, expected = golden(name)
    logits = apply(module)({"params": params}, ids, mask)
    assert logits.dtype == jnp.float32
    is_token = mask == 1
    np.testing.assert_allclose(np.asarray(logits)[is_token], expected[is_token], atol=1e-4, rtol=0)


def test_parameters_are_stacked_float32_matrices_by_name() -> None:
    config = dataclasses.replace(load("llama_tied")[0].config, dtype=jnp.bfloat16)
    params = models.init_params(models.CausalLanguageModel(config), jax.random.key(0))
    shapes = {path: leaf.shape for path, leaf in leaves_by_path(params)}
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    attention = {
        f"decoder/layers/attention/{name}/{leaf}": shape
        for name, sizes in {"query": (16, 24), "key": (16, 12), "value": (16, 12), "output": (24, 16)}.items()
        for leaf, shape in {"kernel": (2, *sizes), "bias": (2, sizes[1])}.items()
    }
    assert shapes == attention | {
        "decoder/word_embeddings/embedding": (50, 16),
        "decoder/layers/attention_norm/scale": (2, 16),
        "decoder/layers/mlp_norm/scale": (2, 16),
        "decoder/layers/gate/kernel": (2, 16, 24),
        "decoder/layers/up/kernel": (2, 16, 24),
        "decoder/layers/down/kernel": (2, 24, 16),
        "decoder/final_norm/scale": (16,),
    }
    untied = dataclasses.replace(config, tie_word_embeddings=False, attention_bias=False)
    params = models.init_params(models.CausalLanguageModel(untied), jax.random.key(0))
    assert params["lm_head"]["kernel"].shape == (16, 50)
    assert not [path for path, _ in leaves_by_path(params) if path.endswith("bias")]


@pytest.mark.parametrize("padding", [0, 3])
def test_logits_depend_on_no_later_token(padding: int) -> None:
    """Each token is another word, so the gradient of the word embedding shows which tokens a logit uses."""
    module, params = load("llama")
    length = 8
    ids = np.arange(10, 10 + length)[None]
    mask = (np.arange(length) >= padding).astype(np.int32)[None]

    def logits(table: jax.Array) -> jax.Array:
        changed = {**params, "decoder": {**params["decoder"], "word_embeddings": {"embedding": table}}}
        return module.apply({"params": changed}, ids, mask)[0, :, 5]

    jacobian = jax.jit(jax.jacobian(logits))(params["decoder"]["word_embeddings"]["embedding"])
    uses = np.abs(jacobian).max(axis=-1) > 0  # (position of the logit, word)
    position, key = np.ogrid[:length, :length]
    expected = (key <= position) & ((key >= padding) | (key == position))  # padding sees itself alone
    np.testing.assert_array_equal(uses[:, ids[0]], expected)
    assert uses.sum() == expected.sum()  # and no other word


@both_heads
def test_further_padding_on_either_side_changes_nothing(name: str) -> None:
    module, params = load(name)
    ids, mask, _ = golden(name)
    logits = np.asarray(apply(module)({"params": params}, ids, mask))
    widths = ((0, 0), (5, 4))
    wide_ids, wide_mask = np.pad(ids, widths, constant_values=7), np.pad(mask, widths)
    wide = np.asarray(apply(module)({"params": params}, wide_ids, wide_mask))[:, 5:-4]
    np.testing.assert_allclose(wide[mask == 1], logits[mask == 1], atol=1e-5, rtol=0)


def test_an_example_s_logits_ignore_the_other_examples() -> None:
    module, params = load("llama")
    ids, mask, _ = golden("llama")
    before = np.asarray(apply(module)({"params": params}, ids, mask))
    ids, mask = np.vstack([ids[:1], ids[1:, ::-1]]), np.vstack([mask[:1], np.ones_like(mask[1:])])
    after = np.asarray(apply(module)({"params": params}, ids, mask))
    np.testing.assert_array_equal(after[0], before[0])
    assert (after[1:] != before[1:]).any(axis=(1, 2)).all()


@both_heads
def test_bfloat16_compute_gives_float32_logits_near_the_exact_ones(name: str) -> None:
    module, params = load(name, dtype=jnp.bfloat16)
    ids, mask, expected = golden(name)
    logits = apply(module)({"params": params}, ids, mask)
    assert logits.dtype == jnp.float32
    # Eight bits of mantissa through 2 layers: about a percent, and not the exact values.
    difference = np.asarray(logits)[mask == 1] - expected[mask == 1]
    assert 1e-4 < np.linalg.norm(difference) / np.linalg.norm(expected[mask == 1]) < 0.03


@pytest.mark.parametrize(("name", "remat"), [("llama", True), ("llama_tied", False)])
def test_vmap_over_batches_of_one_gives_the_per_example_gradients(name: str, remat: bool) -> None:
    """Against one row's loss within the whole batch, without remat; the last row is nothing but padding."""
    module, params = load(name, remat=remat)
    ids, mask, _ = golden(name)
    ids, mask = (np.vstack([array, np.zeros_like(array[:1])]) for array in (ids, mask))
    target = mask * (ids % 3 > 0)  # the rows have different numbers of targets

    def losses(module: Any, params: Any, ids: Any, mask: Any, target: Any) -> jax.Array:
        return causal_lm_loss(module.apply({"params": params}, ids, mask), ids, target)

    def loss(params: Any, *example: jax.Array) -> jax.Array:
        return losses(module, params, *(array[None] for array in example))[0]

    together = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0, 0)))(params, ids, mask, target)
    plain, _ = load(name)
    alone = jax.jit(jax.grad(lambda params, row: losses(plain, params, ids, mask, target)[row]))
    for row in (0, 1, 5, 8):  # without padding, padded on the right, on the left, nothing but padding
        for (path, expected), ours in zip(
            jax.tree_util.tree_leaves_with_path(alone(params, row)), jax.tree.leaves(together)
        ):
            atol = 2e-5 * max(1.0, float(jnp.abs(expected).max()))
            np.testing.assert_allclose(ours[row], expected, rtol=0, atol=atol, equal_nan=False, err_msg=str(path))
    assert all((np.asarray(leaf[8]) == 0).all() for leaf in jax.tree.leaves(together))


@both_heads
def test_a_row_of_padding_has_finite_logits(name: str) -> None:
    module, params = load(name)
    ids = np.zeros((2, 5), np.int32)
    assert np.isfinite(apply(module)({"params": params}, ids, ids)).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500), st.integers(0, 2**31 - 1))
def test_rotary_products_depend_on_the_distance_alone(first: int, second: int, shift: int, seed: int) -> None:
    """<R_p q, R_s k> = <R_{p+t} q, R_{s+t} k>, and the norms stay; angles up to 1000 round by 6e-5."""
    vectors = np.random.default_rng(seed).standard_normal((1, 2, 1, 8)).astype(np.float32)

    def turned(positions: list[int]) -> np.ndarray:
        rotary = rotary_embedding(jnp.array([positions]), head_dim=8, theta=100.0)
        return np.asarray(rotate(jnp.asarray(vectors), rotary))[0, :, 0]

    here, there = turned([first, second]), turned([first + shift, second + shift])
    scale = np.linalg.norm(vectors[0, 0, 0]) * np.linalg.norm(vectors[0, 1, 0])
    assert abs(here[0] @ here[1] - there[0] @ there[1]) < 3e-4 * scale
    np.testing.assert_allclose(np.linalg.norm(here, axis=-1), np.linalg.norm(vectors[0, :, 0], axis=-1), rtol=1e-5)


def test_longest_sequence() -> None:
    module, params = load("llama")
    ids = np.full((1, module.config.max_position_embeddings + 1), 5)
    with pytest.raises(ValueError, match="sequences of 41 tokens, but this model has positions for 40; tokenise with"):
        module.apply({"params": params}, ids, np.ones_like(ids))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers is 0; give 1 or more"),
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"head_dim": 5}, "head_dim 5 is odd; rotary embeddings turn pairs"),
        ({"flash_attention": True}, "flash_attention is for bfloat16 and float16, but dtype is float32"),
        ({"flash_attention": True, "dtype": "bfloat16", "attention_softcap": 3.0}, "has no soft cap, but attention_"),
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported; choose one of gelu,"),
        ({"lora": models.LoRAConfig(2, 2.0, ("query", "q_proj"))}, "LoRA targets q_proj are no dense layers of a dec"),
    ],
)
def test_bad_configurations_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(load("llama")[0].config, **changes)


@both_heads
def test_flash_attention_is_the_same_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no cuDNN here: jax.nn's own implementation gets the call that it would get."""
    module, params = load(name, dtype=jnp.bfloat16)
    flash = models.CausalLanguageModel(dataclasses.replace(module.config, flash_attention=True))
    ids, mask, exact = golden(name)
    with pytest.raises(ValueError, match="flash_attention is cuDNN's, for NVIDIA GPUs, but JAX computes on 'cpu'"):
        flash.apply({"params": params}, ids, mask)

    calls, attention = [], jax.nn.dot_product_attention

    def without_cudnn(*arrays: jax.Array, implementation: str, **options: Any) -> jax.Array:
        calls.append(implementation)
        return attention(*arrays, **options)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", without_cudnn)
    logits = flash.apply({"params": params}, ids, mask)
    assert set(calls) == {"cudnn"}
    difference = (np.asarray(logits) - exact)[mask == 1]
    assert np.linalg.norm(difference) / np.linalg.norm(exact[mask == 1]) < 0.03  # as without it
