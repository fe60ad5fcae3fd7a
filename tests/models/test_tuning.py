"""Ways of tuning: what trains, what is clipped, noised and denoised, and what stays as it is, bit for bit."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from dp_rmt import clipped_grad, ghost_clipped_grad, models
from dp_rmt.clipping.execution import Execution
from dp_rmt.mechanism import DPSGD
from dp_rmt.models import tuning
from dp_rmt.models.lora import with_config
from dp_rmt.training.losses import causal_lm_loss, classifier_logits, label_losses
from dp_rmt.training.train_state import TrainState, Transforms
from dp_rmt.training.train_step import make_train_step
from dp_rmt.trees import merge_params, split_params

BATCH, LENGTH = 4, 6
CLIP_NORM = 0.5
LORA = models.LoRAConfig(rank=4, alpha=8.0, targets=("query", "output"))
KINDS = ("decoder", "encoder")
ENCODER = models.EncoderConfig("roberta", 30, 16, 2, 2, 24, 10, 1, 1e-5, pad_token_id=1)
DECODER = models.DecoderConfig(
    vocab_size=30,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=24,
    max_position_embeddings=8,
    attention_bias=True,
)


@functools.cache
def model(kind: str, has_lora: bool) -> tuple[Any, Any]:
    """With everything random, as after some training: at first B is 0, and so is A's gradient."""
    module: Any = models.CausalLanguageModel(DECODER) if kind == "decoder" else models.SequenceClassifier(ENCODER, 3)
    module, rng = with_config(module, lora=LORA if has_lora else None), np.random.default_rng(0)
    shapes = tuning.parameter_shapes(module).items()
    return module, unflatten_dict(
        {path: 0.2 * rng.standard_normal(leaf.shape, np.float32) + (path[-1] == "scale") for path, leaf in shapes}
    )


def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    mask = (np.arange(LENGTH) < np.array([6, 4, 3, 2])[:, None]).astype(np.int32)
    ids = np.where(mask, rng.integers(2, 30, (BATCH, LENGTH)), 1)
    return {
        "input_ids": ids.astype(np.int32),
        "attention_mask": mask,
        "token_type_ids": np.zeros_like(mask),
        "label": np.array([0, 1, 2, 1], np.int32),
    }


def losses_of(kind: str, has_lora: bool) -> Any:
    module, _ = model(kind, has_lora)

    def losses(params: Any, batch: Any) -> jax.Array:
        if kind == "encoder":
            return label_losses(classifier_logits(module)(params, batch), batch["label"])
        ids, mask = batch["input_ids"], batch["attention_mask"]
        return causal_lm_loss(module.apply({"params": params}, ids, mask), ids, mask)

    return losses


def flat(tree: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(tree, sep="/").items()}


def split(kind: str, how: str) -> tuple[Any, Any]:
    """``(trained, frozen)``"""
    module, params = model(kind, "lora" in how)
    return split_params(params, tuning.trainable_pattern(how, module))


ATTENTION = {"decoder": "decoder/layers/attention", "encoder": "encoder/layers/attention"}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


@EVERY_KIND
def test_what_trains(kind: str) -> None:
    """By hand, all of it."""
    head = {f"{part}/{leaf}" for part in ("pooler", "classifier") for leaf in ("kernel", "bias")}
    head = head if kind == "encoder" else set()
    targets = [f"{ATTENTION[kind]}/{name}_lora" for name in LORA.targets]
    targets += ["encoder/layers/output_lora"] if kind == "encoder" else []
    ffa = {f"{target}/lora_b/kernel" for target in targets}
    biases = {path for path in flat(model(kind, False)[1]) if path.endswith("bias")}
    assert len(biases) == {"decoder": 4, "encoder": 11}[kind]
    expected = {
        "full": set(flat(model(kind, False)[1])),
        "lora": {f"{target}/lora_a/kernel" for target in targets} | ffa | head,
        "ffa_lora": ffa | head,
        "bias": biases | head,
    }
    assert {how: set(flat(split(kind, how)[0])) for how in tuning.PATTERNS} == expected


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("full", "decoder"),
        ("lora", "encoder"),
        *(pytest.param(how, "decoder", marks=pytest.mark.slow) for how in ("lora", "ffa_lora", "bias")),
        pytest.param("bias", "encoder", marks=pytest.mark.slow),
    ],
)
def test_clipping_is_of_what_trains_and_of_nothing_else(how: str, kind: str) -> None:
    """Norms and sums of `clipped_grad` and both ghost methods, from each example's gradient, plainly differentiated."""
    trained, frozen = split(kind, how)
    losses_of_all = losses_of(kind, "lora" in how)

    @jax.jit
    def everything(trained: Any, frozen: Any, batch: Any) -> Any:
        def losses(trained: Any, batch: Any) -> jax.Array:
            return losses_of_all(merge_params(trained, frozen), batch)

        def one_gradient(trained: Any, example: Any) -> Any:
            return jax.grad(lambda trained: losses(trained, jax.tree.map(lambda x: x[None], example))[0])(trained)

        ways: list[Any] = [functools.partial(ghost_clipped_grad, method=name) for name in ("bookkeeping", "ghost")]
        functions = [way(losses, l2_clip_norm=CLIP_NORM) for way in (clipped_grad, *ways)]
        clipped = [function(trained, batch, is_padding_example=None) for function in functions]
        return clipped, jax.vmap(one_gradient, in_axes=(None, 0))(trained, batch)

    clipped, gradients = everything(trained, frozen, batch())
    gradients = {path: leaf.astype(np.float64) for path, leaf in flat(gradients).items()}
    norms = np.sqrt(sum(np.sum(leaf.reshape(BATCH, -1) ** 2, 1) for leaf in gradients.values()))
    assert (norms > CLIP_NORM).any()
    weights = np.minimum(1, CLIP_NORM / norms)
    expected = {path: np.einsum("b,b...->...", weights, leaf) for path, leaf in gradients.items()}
    # Without rotary embeddings a bias of the keys changes nothing, so that its gradient is rounding alone.
    rounding = 1e-7 * max(np.abs(leaf).max() for leaf in expected.values())
    for gradient, per_example in clipped:
        np.testing.assert_allclose(per_example.grad_norm, norms, rtol=2e-5)  # ghost norms are rounded upwards
        assert flat(gradient).keys() == gradients.keys()
        for path, leaf in flat(gradient).items():
            limit = 1e-5 * np.abs(expected[path]).max() + rounding
            np.testing.assert_allclose(leaf, expected[path], rtol=0, atol=limit, err_msg=path)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("how", "kind"),
    [("lora", "encoder"), *(pytest.param(how, "decoder", marks=pytest.mark.slow) for how in ("ffa_lora", "bias"))],
)
def test_a_private_denoised_step_moves_what_trains_and_nothing_else(how: str, kind: str) -> None:
    trained, frozen = split(kind, how)
    mechanism = DPSGD(
        num_examples=100,
        expected_batch_size=BATCH,
        num_steps=2,
        noise_multiplier=1e-2,
        l2_clip_norm=1.0,
        max_batch_size=BATCH,
    )
    transforms = Transforms(mechanism.noise(jax.random.key(2)), mechanism.denoiser(), optax.sgd(0.1))
    before = TrainState.create(transforms, trained, frozen)
    step = jax.jit(make_train_step(mechanism, losses_of(kind, "lora" in how), transforms, execution=Execution("ghost")))
    after, _ = step(before, [(batch(), np.zeros(BATCH, bool))])
    for path, leaf in flat(after.params).items():
        assert (leaf != flat(trained)[path]).mean() > 0.9, path
    assert flat(after.frozen).keys() == flat(frozen).keys()
    assert any("lora_a" in path for path in flat(frozen)) == (how == "ffa_lora")
    jax.tree.map(np.testing.assert_array_equal, after.frozen, frozen)
    matrices = {path for path, leaf in flat(trained).items() if path.endswith("kernel") and min(leaf.shape[-2:]) >= 4}
    assert after.denoise.diagnostics.keys() == matrices
    if how in ("lora", "ffa_lora"):  # factors with one side of 4
        assert sum("_lora/" in path for path in matrices) == len(flat(trained)) - 4 * (kind == "encoder")
    kept = [np.sum(matrix.kept_rank) for matrix in after.denoise.diagnostics.values()]
    assert all(kept) or not matrices  # the noise is small: something of each stands above it


@EVERY_KIND
def test_putting_lora_in_and_merging_it(kind: str) -> None:
    module, params = model(kind, False)
    with_updates, with_factors = tuning.with_lora(module, params, LORA, jax.random.key(1))
    assert with_updates.config.lora == LORA
    assert type(with_updates) is type(module)
    added = {path: leaf for path, leaf in flat(with_factors).items() if path not in flat(params)}
    assert all(re.search("_lora/lora_[ab]/kernel$", path) for path in added)
    for path, leaf in flat(params).items():
        np.testing.assert_array_equal(flat(with_factors)[path], leaf, err_msg=path)
    # The factors are those that the module itself initialises from the key; B is zero.
    of_the_module = flat(models.init_params(with_updates, jax.random.key(1)))
    for path, leaf in added.items():
        np.testing.assert_array_equal(leaf, of_the_module[path], err_msg=path)
        assert (np.std(leaf) > 0.05) == ("lora_a" in path)
    # There and back: the same bits, since B is zero.
    back, merged = tuning.without_lora(with_updates, with_factors)
    assert back == module
    jax.tree.map(np.testing.assert_array_equal, merged, params)
    assert tuning.without_lora(module, params) == (module, params)


def test_also_adds_a_head_and_must_match() -> None:
    module, params = model("decoder", True)
    trained, _ = split_params(params, tuning.trainable_pattern("ffa_lora", module, also="^lm_head/"))
    assert {path for path in flat(trained) if "lora_b" not in path} == {"lm_head/kernel"}
    with pytest.raises(ValueError, match=r"also='\^head/' matches no parameter; there are .*lm_head/kernel"):
        tuning.trainable_pattern("ffa_lora", module, also="^head/")


def test_berts_pooler_is_no_fresh_head() -> None:
    bert = models.SequenceClassifier(models.EncoderConfig("bert", 30, 16, 1, 2, 24, 8, 1, 1e-12, 0), 2)
    shapes = jax.eval_shape(lambda key: models.init_params(bert, key), jax.random.key(0))
    parts = split_params(shapes, tuning.trainable_pattern("bias", bert))
    trained, frozen = (flatten_dict(part, sep="/") for part in parts)
    assert {path for path in trained if not path.startswith("encoder")} == {
        "classifier/kernel",
        "classifier/bias",
        "pooler/bias",
    }
    assert "pooler/kernel" in frozen


@pytest.mark.parametrize("how", tuning.PATTERNS)
def test_what_was_drawn_at_random_trains_in_every_tuning(how: str) -> None:
    config = models.EncoderConfig("bert", 30, 16, 1, 2, 24, 8, 1, 1e-12, 0, lora=LORA if "lora" in how else None)
    for module, part in (
        (models.SequenceClassifier(config, 2, fresh=("classifier", "pooler")), "pooler"),
        (models.MaskedLanguageModel(config, fresh=("mlm_head",)), "mlm_head"),
    ):
        paths = ["/".join(path) for path in tuning.parameter_shapes(module) if path[0] == part]
        assert paths
        assert all(re.search(tuning.trainable_pattern(how, module), path) for path in paths)
        loaded = module.clone(fresh=())
        assert how == "full" or not all(re.search(tuning.trainable_pattern(how, loaded), path) for path in paths)


@pytest.mark.parametrize(
    ("how", "has_lora", "message"),
    [
        ("head", False, "tuning 'head' is not known; choose one of full, lora, ffa_lora, bias"),
        ("lora", False, r"tuning 'lora' trains low-rank updates, but the model has none; put them in with with_lora\("),
        ("ffa_lora", False, "tuning 'ffa_lora' trains low-rank updates, but"),
        ("full", True, "tuning 'full' has no use for the model's low-rank updates .*choose 'lora' or 'ffa_lora'"),
        ("bias", True, "tuning 'bias' has no use for"),
    ],
)
def test_tunings_that_do_not_fit_are_refused(how: str, has_lora: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tuning.trainable_pattern(how, model("decoder", has_lora)[0])


def test_a_model_without_biases_is_refused_for_bias_tuning() -> None:
    llama = models.CausalLanguageModel(models.DecoderConfig(30, 16, 1, 2, 1, 8, 24, 8))
    with pytest.raises(ValueError, match="trains biases, but this model has none; choose 'full', or 'lora'"):
        tuning.trainable_pattern("bias", llama)


def test_lora_is_not_put_in_twice_nor_where_there_is_nothing() -> None:
    module, params = model("decoder", True)
    with pytest.raises(ValueError, match=r"has low-rank updates already .*merge them .*without_lora\("):
        tuning.with_lora(module, params, LORA, jax.random.key(0))
    module, params = model("decoder", False)
    with pytest.raises(ValueError, match="LoRA targets dense"):
        tuning.with_lora(module, params, models.LoRAConfig(2, 2.0, ("dense",)), jax.random.key(0))
