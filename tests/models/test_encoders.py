"""What the encoders compute: torch's recorded logits, no mixing of examples, transformations."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dp_rmt import clipped_grad, ghost_clipped_grad, models
from dp_rmt.models.encoder import position_ids
from dp_rmt.training.losses import infilling_logits, label_losses

pytestmark = pytest.mark.thorough

GOLDENS = Path(__file__).parent / "goldens"
FOLDERS = {
    "bert_classifier": "classification",
    "roberta_classifier": "classification",
    "bert_mlm": "masked_lm",
    "roberta_mlm": "masked_lm",
    "distilbert_classifier": "classification",
    "distilbert_mlm_untied": "masked_lm",
}
every_model = pytest.mark.parametrize("name", FOLDERS)
# Between them both architectures and both heads, for what takes long to compile.
two_models = pytest.mark.parametrize("name", ["bert_classifier", "roberta_mlm"])


@functools.cache
def load(name: str, **options: Any) -> Any:
    return models.load_pretrained(GOLDENS / name, head=FOLDERS[name], num_labels=3, key=jax.random.key(0), **options)


def golden(name: str) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    arrays = np.load(GOLDENS / name / "inputs_outputs.npz")
    types = arrays.get("token_type_ids", np.zeros_like(arrays["input_ids"]))
    return (arrays["input_ids"], arrays["attention_mask"], types), arrays["logits"]


@every_model
def test_logits_are_those_of_torch(name: str) -> None:
    module, params = load(name)
    batch, expected = golden(name)
    logits = jax.jit(module.apply)({"params": params}, *batch)
    assert logits.dtype == jnp.float32
    is_token = batch[1] == 1
    if FOLDERS[name] == "masked_lm":
        logits, expected = np.asarray(logits)[is_token], expected[is_token]
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", [pytest.param("bookkeeping", marks=pytest.mark.slow), "ghost"])
def test_ghost_clipping_counts_a_matrix_of_word_scores_and_no_token_types(method: str) -> None:
    module, params = load("distilbert_mlm_untied")
    assert params["mlm_head"]["decoder"]["kernel"].shape == (32, 100)
    assert "token_type_embeddings" not in params["encoder"]["embeddings"]
    (ids, mask, types), _ = golden("distilbert_mlm_untied")
    batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "mask_position": np.array([3, 0, 2, 0])}
    batch = {name: array[:, :6] if array.ndim == 2 else array for name, array in batch.items()}
    batch["label"] = np.array([0, 1, 1, 0], np.int32)
    logits = infilling_logits(module, np.array([5, 9]))

    def losses(params: Any, batch: Any) -> jax.Array:
        return label_losses(logits(params, batch), batch["label"])

    expected, plain = jax.jit(clipped_grad(losses, l2_clip_norm=0.5))(params, batch, is_padding_example=None)
    found, ghost = jax.jit(ghost_clipped_grad(losses, l2_clip_norm=0.5, method=method))(
        params, batch, is_padding_example=None
    )
    assert (np.asarray(plain.grad_norm) > 0.5).all()
    np.testing.assert_allclose(ghost.grad_norm, plain.grad_norm, rtol=2e-5)  # ghost norms are rounded upwards
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    assert float(jnp.abs(expected["mlm_head"]["decoder"]["kernel"]).max()) > 1e-2 * largest
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest), found, expected)


def test_masked_lm_at_positions_is_the_whole_at_positions() -> None:
    module, params = load("bert_mlm")
    batch, _ = golden("bert_mlm")
    positions = np.array([3, 0, 2, 0])
    apply = jax.jit(module.apply)
    everywhere, there = apply({"params": params}, *batch), apply({"params": params}, *batch, positions)
    assert there.shape == (4, 100)
    np.testing.assert_allclose(there, np.asarray(everywhere)[np.arange(4), positions], atol=1e-5, rtol=0)


@every_model
def test_layers_are_stacked_float32_kernels(name: str) -> None:
    _, params = load(name, dtype=jnp.bfloat16)
    layers = params["encoder"]["layers"]
    assert layers["attention"]["query"]["kernel"].shape == (3, 32, 32)
    assert layers["intermediate"]["kernel"].shape == (3, 32, 64)
    assert layers["output"]["kernel"].shape == (3, 64, 32)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@two_models
def test_bfloat16_compute_gives_float32_logits_near_the_exact_ones(name: str) -> None:
    module, params = load(name, dtype=jnp.bfloat16)
    batch, expected = golden(name)
    logits = jax.jit(module.apply)({"params": params}, *batch)
    assert logits.dtype == jnp.float32
    is_token = batch[1] == 1
    if FOLDERS[name] == "masked_lm":
        logits, expected = np.asarray(logits)[is_token], expected[is_token]
    # Eight bits of mantissa through 3 layers: a few percent, and not the exact values.
    error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    assert 1e-5 < error < 0.1


@two_models
def test_an_example_s_logits_ignore_the_other_examples(name: str) -> None:
    module, params = load(name)
    batch, _ = golden(name)
    apply = jax.jit(module.apply)
    before = np.asarray(apply({"params": params}, *batch))
    ids, mask, types = (array.copy() for array in batch)
    ids[1:], mask[1:], types[1:] = ids[1:, ::-1], 1, 0
    after = np.asarray(apply({"params": params}, ids, mask, types))
    np.testing.assert_array_equal(after[0], before[0])
    assert (after[1:] != before[1:]).any(axis=tuple(range(1, after.ndim))).all()


def test_the_gradient_of_an_example_s_logits_reaches_only_its_own_words() -> None:
    """Each example has words of its own, so the word embedding's gradient shows whose words were used."""
    module, params = load("roberta_mlm")
    words_BxL = np.arange(10, 34).reshape(4, 6)
    ones, zeros = np.ones_like(words_BxL), np.zeros_like(words_BxL)

    def logit(table: jax.Array, example: int) -> jax.Array:
        embeddings = {**params["encoder"]["embeddings"], "word_embeddings": {"embedding": table}}
        changed = {**params, "encoder": {**params["encoder"], "embeddings": embeddings}}
        logits = module.apply({"params": changed}, words_BxL, ones, zeros)
        return logits[example, 0, 5]  # word 5 is in no example: the tied decoder reaches its row

    table = params["encoder"]["embeddings"]["word_embeddings"]["embedding"]
    gradient = jax.jit(jax.vmap(jax.grad(logit), (None, 0)))(table, np.arange(4))
    reached = np.abs(np.asarray(gradient)).max(axis=-1) > 0
    for example in range(4):
        others = np.setdiff1d(words_BxL, words_BxL[example])
        assert reached[example, words_BxL[example]].all()
        assert not reached[example, others].any()


@pytest.mark.parametrize(("name", "remat"), [("bert_classifier", False), ("roberta_mlm", True)])
def test_vmap_over_batches_of_one_gives_the_per_example_gradients(name: str, remat: bool) -> None:
    module, params = load(name, remat=remat)
    (ids, mask, types), _ = golden(name)
    padding = module.config.pad_token_id  # the last row is a padding example, without any token
    batch = tuple(np.vstack([a, np.full_like(a[:1], v)]) for a, v in ((ids, padding), (mask, 0), (types, 0)))

    def losses(params: Any, *batch: Any) -> jax.Array:
        logits = module.apply({"params": params}, *batch)
        return jax.nn.logsumexp(logits if logits.ndim == 2 else logits[:, 0], axis=-1)

    def loss(params: Any, *example: jax.Array) -> jax.Array:
        return losses(params, *(array[None] for array in example))[0]

    together = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0, 0)))(params, *batch)
    # Reference: the gradient of one row's loss within the whole batch.
    alone = jax.jit(jax.grad(lambda params, row: losses(params, *batch)[row]))
    for row in (0, 3, 4):  # without padding, with a single token, the padding example
        for path, expected in jax.tree_util.tree_leaves_with_path(alone(params, row)):
            ours = functools.reduce(lambda tree, key: tree[key.key], path, together)[row]
            atol = 2e-5 * max(1.0, float(jnp.abs(expected).max()))
            np.testing.assert_allclose(ours, expected, rtol=0, atol=atol, equal_nan=False, err_msg=str(path))


@pytest.mark.parametrize("name", ["bert_classifier", "roberta_classifier"])
def test_padding_further_changes_nothing(name: str) -> None:
    module, params = load(name)
    batch, expected = golden(name)
    wide = [
        np.pad(array, ((0, 0), (0, 9)), constant_values=value)
        for array, value in zip(batch, (module.config.pad_token_id, 0, 0))
    ]
    logits = jax.jit(module.apply)({"params": params}, *wide)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


def test_position_ids_count_from_after_the_padding_id() -> None:
    roberta, bert = load("roberta_mlm")[0].config, load("bert_mlm")[0].config
    ids = jnp.array([[0, 7, 7, 2, 1, 1], [1, 0, 5, 1, 2, 1]])  # padding (1) at the end, at the front, inside
    np.testing.assert_array_equal(position_ids(roberta, ids), [[2, 3, 4, 5, 1, 1], [1, 2, 3, 1, 4, 1]])
    np.testing.assert_array_equal(position_ids(bert, ids), [[0, 1, 2, 3, 4, 5]] * 2)


@pytest.mark.parametrize(("name", "longest"), [("bert_classifier", 40), ("roberta_classifier", 38)])
def test_longest_sequence(name: str, longest: int) -> None:
    """40 positions: all for BERT; RoBERTa's tokens start at pad + 1 = 2."""
    module, params = load(name)
    assert module.config.max_sequence_length == longest
    apply = jax.jit(module.apply)
    ids = np.full((1, longest), 5)
    assert np.isfinite(apply({"params": params}, ids, np.ones_like(ids), np.zeros_like(ids))).all()
    ids = np.full((1, longest + 1), 5)
    message = f"sequences of {longest + 1} tokens, but this model has positions for {longest}; tokenise with"
    with pytest.raises(ValueError, match=message):
        apply({"params": params}, ids, np.ones_like(ids), np.zeros_like(ids))


def test_init_params_is_bert_s_initialisation() -> None:
    config = dataclasses.replace(load("bert_mlm")[0].config, vocab_size=2000)
    params = models.init_params(models.MaskedLanguageModel(config), jax.random.key(1))
    kernel = np.asarray(params["encoder"]["layers"]["attention"]["value"]["kernel"])
    table = np.asarray(params["encoder"]["embeddings"]["word_embeddings"]["embedding"])
    assert np.std(kernel) == pytest.approx(0.02, rel=0.1)  # 3,072 entries: 8 standard errors
    assert np.std(table) == pytest.approx(0.02, rel=0.03)  # 64,000 entries: 10 standard errors
    assert not np.array_equal(kernel[0], kernel[1])  # the layers have keys of their own
    assert (np.asarray(params["mlm_head"]["layer_norm"]["scale"]) == 1).all()
    assert (np.asarray(params["mlm_head"]["bias"]) == 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gpt2"}, "architecture 'gpt2' is not supported; choose one of bert, roberta"),
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported; choose one of gelu,"),
        ({"num_heads": 5}, "hidden_size 32 is not a multiple of num_heads 5"),
        ({"max_position_embeddings": 2}, "leaves no position for a token: RoBERTa spends"),
    ],
)
def test_bad_configurations_are_refused(changes: dict[str, Any], message: str) -> None:
    config = load("roberta_classifier")[0].config
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)


def test_importing_models_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, dp_rmt.models; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    root = Path(models.__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (result.stdout.strip(), result.returncode) == ("[]", 0), result.stderr


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_a_null_in_the_config_is_the_default(architecture: str) -> None:
    sizes = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    given = {"model_type": architecture, **sizes, "intermediate_size": 24, "max_position_embeddings": 8}
    config = models.EncoderConfig.from_hf_config(given)
    for key in ("pad_token_id", "type_vocab_size", "layer_norm_eps", "hidden_act", "position_embedding_type"):
        assert models.EncoderConfig.from_hf_config({**given, key: None}) == config
    for key in sizes:
        with pytest.raises(ValueError, match=f"lacks {key}"):
            models.EncoderConfig.from_hf_config({**given, key: None})
