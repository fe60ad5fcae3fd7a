"""What every family of decoders keeps to: causality, examples apart, ghost clipping, configurations."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dp_rmt import clipped_grad, ghost_clipped_grad, models
from dp_rmt.clipping.example_mixing import mixed_examples
from dp_rmt.models.decoder.families import FAMILIES
from dp_rmt.models.decoder.rope_scaling import RopeScaling
from dp_rmt.training.losses import causal_lm_loss

pytestmark = pytest.mark.thorough

_tiny = runpy.run_path(str(Path(__file__).parents[1] / "tiny_decoders.py"))
CONFIGS, LENGTH, build, padded_batch = (_tiny[name] for name in ("CONFIGS", "LENGTH", "build", "padded_batch"))


# Each family by one of the two methods, whose rules are the same: compiling is what takes the time.
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("llama_tied_biases", "ghost"),
        pytest.param("qwen2", "bookkeeping", marks=pytest.mark.slow),
        pytest.param("qwen3", "ghost", marks=pytest.mark.slow),
        ("gemma2", "bookkeeping"),
        pytest.param("gemma3_untied", "bookkeeping", marks=pytest.mark.slow),
        pytest.param("gpt_neox", "ghost", marks=pytest.mark.slow),
        ("gpt2", "bookkeeping"),
        pytest.param("mistral", "bookkeeping", marks=pytest.mark.slow),
        pytest.param("gemma3_text", "ghost", marks=pytest.mark.slow),
        pytest.param("gpt2_untied", "ghost", marks=pytest.mark.slow),
    ],
)
def test_ghost_clipping_is_clipping(name: str, method: str) -> None:
    """Of every leaf; the last example is padding alone."""
    module, params = build(name)
    ids, mask = (array[:, :7] for array in padded_batch())
    batch = {"ids": ids, "mask": mask * np.array([1, 1, 1, 0])[:, None]}

    def losses(params: Any, batch: Any) -> jax.Array:
        ids, mask = batch["ids"], batch["mask"]
        return causal_lm_loss(module.apply({"params": params}, ids, mask), ids, mask)

    expected, per_example = jax.jit(clipped_grad(losses, l2_clip_norm=0.5))(params, batch, is_padding_example=None)
    assert (np.asarray(per_example.grad_norm)[:2] > 0.5).all()  # they are clipped
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    ours, ghost = jax.jit(ghost_clipped_grad(losses, l2_clip_norm=0.5, method=method))(
        params, batch, is_padding_example=None
    )
    np.testing.assert_allclose(ghost.grad_norm, per_example.grad_norm, rtol=1e-5, atol=1e-6)
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(expected)):
        np.testing.assert_allclose(leaf, other, rtol=0, atol=1e-5 * largest, err_msg=str(path))
        if not jax.tree_util.keystr(path).endswith("['key']['bias']"):  # which softmax does not notice without rotation
            assert np.abs(other).max() > 1e-3 * largest, f"{path} has no gradient to speak of"


@pytest.mark.parametrize(
    ("name", "window", "num_layers"), [("mistral", 4, 1), ("gemma3_text", None, 3), ("gpt2", None, 2)]
)
def test_gradients_are_causal_and_stay_in_the_window(name: str, window: int | None, num_layers: int) -> None:
    """Each token is another word, so the gradient of the word embedding shows which tokens a logit uses."""
    module, params = build(name)
    if num_layers != module.config.num_layers:
        module = models.CausalLanguageModel(dataclasses.replace(module.config, num_layers=num_layers))
        layers = jax.tree.map(lambda leaf: leaf[:num_layers], params["decoder"]["layers"])
        params = {**params, "decoder": {**params["decoder"], "layers": layers}}
    length, padding = 9, 2
    ids, mask = np.arange(10, 10 + length)[None], (np.arange(length) >= padding).astype(np.int32)[None]

    def logits(table: jax.Array) -> jax.Array:
        """Of a word that is not read: its own row, where the embedding is tied, is not among those looked at."""
        changed = {**params, "decoder": {**params["decoder"], "word_embeddings": {"embedding": table}}}
        return module.apply({"params": changed}, ids, mask)[0, :, 5]

    jacobian = jax.jit(jax.jacobian(logits))(params["decoder"]["word_embeddings"]["embedding"])
    uses = np.abs(jacobian).max(axis=-1)[:, ids[0]] > 0
    position, key = np.ogrid[:length, :length]
    visible = (key <= position) & ((key >= padding) | (key == position))
    if window is not None:
        visible &= position - key < window
    np.testing.assert_array_equal(uses, visible)


def test_one_query_reads_the_cache_through_the_window() -> None:
    """Token by token over twice the window, with padding in front."""
    module, params = build("gemma3_text")
    ids, mask = padded_batch()
    step = jax.jit(module.apply)
    expected = np.asarray(step({"params": params}, ids, mask))
    cache, logits = models.init_cache(module.config, len(ids), LENGTH), []
    for token in range(LENGTH):
        some, cache = step({"params": params}, ids[:, token : token + 1], mask[:, token : token + 1], cache)
        logits.append(some)
    np.testing.assert_allclose(np.concatenate(logits, 1)[mask == 1], expected[mask == 1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["gemma2", "gpt_neox"])
def test_bfloat16_and_remat_are_near_the_exact_values(name: str) -> None:
    module, params = build(name)
    half = models.CausalLanguageModel(dataclasses.replace(module.config, dtype=jnp.bfloat16, remat=True))
    ids, mask = padded_batch()
    exact, rounded = (np.asarray(jax.jit(m.apply)({"params": params}, ids, mask))[mask == 1] for m in (module, half))
    assert rounded.dtype == np.float32
    assert 1e-4 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 0.05


@pytest.mark.parametrize("name", ["mistral", "gemma3_text", "gpt2"])
def test_the_trace_mixes_no_examples(name: str) -> None:
    module, params = build(name)
    prime = 7919

    def losses(params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        return causal_lm_loss(module.apply({"params": params}, ids, mask), ids, mask)

    shape = jax.ShapeDtypeStruct((prime, 6), jnp.int32)
    inputs = [*[False] * len(jax.tree.leaves(params)), True, True]
    jaxpr = jax.make_jaxpr(losses)(params, shape, shape).jaxpr
    assert mixed_examples(jaxpr, batch_size=prime, depends_on_batch=inputs) is None


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_says_the_same_when_it_is_read_again(name: str) -> None:
    config = models.DecoderConfig.from_hf_config(CONFIGS[name])
    again = models.DecoderConfig.from_hf_config(json.loads(json.dumps(config.to_hf_config())))
    assert again == dataclasses.replace(config, sliding_layers=again.sliding_layers)
    assert again.layer_is_sliding == config.layer_is_sliding


_ROTARY = ("rope_theta", "rotary_emb_base", "rope_local_base_freq", "rotary_pct", "partial_rotary_factor")
_OTHERS = (
    *("rope_scaling", "rope_parameters", "layer_types", "sliding_window_pattern", "max_window_layers"),
    *("use_sliding_window", "bos_token_id", "eos_token_id", "pad_token_id", "quantization_config"),
)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt_neox", "gpt2"])
def test_a_null_is_the_default_or_none_or_refused(name: str) -> None:
    """Every key that is read, one after the other: nothing crashes, and nothing is guessed."""
    given = {**CONFIGS[name], **({"hidden_size": 24} if name == "llama" else {})}  # heads of 4 by head_dim or without
    family = FAMILIES[given["model_type"]]
    for key in {*family.keys.values(), *family.only, *_ROTARY, *_OTHERS}:
        null, without = {**given, key: None}, {other: value for other, value in given.items() if other != key}
        if key in family.keys.values() and family.defaults.get(key, "needed") and "softcapping" not in key:
            with pytest.raises(
                ValueError, match=f"{key} is null in this {given['model_type']} config, which says noth"
            ):
                models.DecoderConfig.from_hf_config(null)
        elif family.only.get(key):
            with pytest.raises(ValueError, match=f"{key}=None is not supported"):
                models.DecoderConfig.from_hf_config(null)
        elif "softcapping" in key:
            config = models.DecoderConfig.from_hf_config(null)
            assert (config.attention_softcap if key.startswith("attn") else config.logits_softcap) is None
        else:
            assert models.DecoderConfig.from_hf_config(null) == models.DecoderConfig.from_hf_config(without), key
    if "sliding_window" in given:  # a window of null is none, not the default
        assert models.DecoderConfig.from_hf_config({**given, "sliding_window": None}).sliding_window is None


def test_nulls_inside_of_the_rotary_parameters_are_defaults() -> None:
    given = {**CONFIGS["llama"], "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    config = models.DecoderConfig.from_hf_config(given)
    nulls = {"rope_theta": None, "partial_rotary_factor": None, "original_max_position_embeddings": None}
    rope = {"type": "linear", "rope_type": None, "factor": 2.0, **nulls}
    assert models.DecoderConfig.from_hf_config({**given, "rope_scaling": rope}) == config


_HUB = {
    "vocab_size": 10,
    "hidden_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "intermediate_size": 9,
    "max_position_embeddings": 99,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


@pytest.mark.parametrize(
    ("hf_config", "expected"),
    [
        # As in meta-llama/Llama-3.2-1B
        (
            {
                "model_type": "llama",
                **_HUB,
                "num_key_value_heads": 2,
                "rope_theta": 500000.0,
                "eos_token_id": 128001,
                "rope_scaling": {
                    "factor": 32.0,
                    "high_freq_factor": 4.0,
                    "low_freq_factor": 1.0,
                    "rope_type": "llama3",
                    "original_max_position_embeddings": 8192,
                },
            },
            {
                "rope_theta": 500000.0,
                "num_kv_heads": 2,
                "head_dim": 8,
                "eos_token_id": 128001,
                "rope_scaling": RopeScaling(32.0, "llama3", 1.0, 4.0, 8192),
            },
        ),
        # As in Qwen/Qwen2.5-0.5B: a window that is switched off, biases that it does not mention
        (
            {"model_type": "qwen2", **_HUB, "use_sliding_window": False, "sliding_window": 32768, "rope_theta": 1e6},
            {"sliding_window": None, "attention_bias": True, "output_bias": False, "num_kv_heads": 8},
        ),
        # As in google/gemma-3-1b-pt
        (
            {
                "model_type": "gemma3_text",
                **_HUB,
                "hidden_activation": "gelu_pytorch_tanh",
                "head_dim": 256,
                "num_key_value_heads": 1,
                "query_pre_attn_scalar": 256,
                "rope_local_base_freq": 10000,
                "rope_theta": 1000000,
                "rope_scaling": None,
                "sliding_window": 512,
                "sliding_window_pattern": 6,
                "final_logit_softcapping": None,
                "attn_logit_softcapping": None,
                "attention_bias": False,
            },
            {
                "layer_is_sliding": (True,) * 5 + (False,) + (True,) * 2,
                "tie_word_embeddings": True,
                "rope_theta": 1000000,
                "local_rope_theta": 10000,
                "sliding_window": 512,
                "logits_softcap": None,
            },
        ),
        # As in EleutherAI/pythia-160m
        (
            {
                "model_type": "gpt_neox",
                **_HUB,
                "layer_norm_eps": 1e-5,
                "rotary_pct": 0.25,
                "rotary_emb_base": 10000,
                "use_parallel_residual": True,
                "tie_word_embeddings": False,
            },
            {"rotary_dim": 2, "attention_bias": True, "mlp_bias": True, "parallel_residual": True, "gated": False},
        ),
        (
            {"model_type": "mistral", **_HUB, "num_key_value_heads": 4, "sliding_window": 4096},
            {"layer_is_sliding": (True,) * 8, "sliding_window": 4096},
        ),
    ],
    ids=["llama", "qwen2", "gemma3", "gpt_neox", "mistral"],
)
def test_configs_as_on_the_hub(hf_config: dict[str, Any], expected: dict[str, Any]) -> None:
    config = models.DecoderConfig.from_hf_config(hf_config)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"model_type": "opt"}, "model_type 'opt' is not a supported family of decoders; supported: llama"),
        ("llama", {"rope_scaling": {"rope_type": "ntk", "factor": 2}}, "rope_type 'ntk' is not supported;"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True is not supported"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        ("qwen3", {"quantization_config": {"bits": 4}}, "quantization_config=.* is not supported"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 3}, "layer_types chunked_attention are not supported"),
        ("gemma2", {"layer_types": ["full_attention"]}, "sliding_layers tells 1 layers apart, but there are 3"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0; give 1 or more, or None"),
        ("gpt_neox", {"rotary_pct": 0.4}, "rotary_dim 3 is odd; rotary embeddings turn pairs"),
    ],
)
def test_configs_that_are_not_supported(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.DecoderConfig.from_hf_config({**CONFIGS[name], **changes})


def test_a_config_without_a_key() -> None:
    hf_config = {key: value for key, value in CONFIGS["llama"].items() if key != "intermediate_size"}
    with pytest.raises(ValueError, match=r"the llama config lacks intermediate_size; take config\.json from"):
        models.DecoderConfig.from_hf_config(hf_config)


def test_what_no_file_can_hold_is_not_saved() -> None:
    config = dataclasses.replace(models.DecoderConfig.from_hf_config(CONFIGS["llama"]), qk_norm=True)
    with pytest.raises(ValueError, match="a llama model with qk_norm=True cannot be saved: the family has False"):
        config.to_hf_config()
