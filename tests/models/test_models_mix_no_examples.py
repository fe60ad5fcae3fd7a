"""Law 8 for this project's models: nothing in them or in their losses mixes examples."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dp_rmt.clipping.example_mixing import mixed_examples
from dp_rmt.models import EncoderConfig, MaskedLanguageModel, SequenceClassifier
from dp_rmt.training.losses import classifier_logits, infilling_logits, label_losses

PRIME, BATCH, TOKENS, WORDS, LABELS = 7919, 4, 6, 11, 3


def draw(seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, WORDS, (BATCH, TOKENS)).astype(np.int32)
    return {
        "input_ids": ids,
        "attention_mask": (ids != 1).astype(np.int32),
        "token_type_ids": ids % 2,
        "mask_position": ids[:, 0] % TOKENS,
        "label": rng.integers(0, LABELS, BATCH).astype(np.int32),
    }


def losses_and_params(head, architecture, *, remat):
    config = EncoderConfig(
        architecture=architecture,
        vocab_size=WORDS,
        hidden_size=8,
        num_layers=2,
        num_heads=2,
        intermediate_size=12,
        max_position_embeddings=TOKENS + 2,
        type_vocab_size=2,
        layer_norm_eps=1e-5,
        pad_token_id=1,
        remat=remat,
    )
    classifier, language_model = SequenceClassifier(config, num_labels=LABELS), MaskedLanguageModel(config)
    module = {"classification": classifier, "infilling": language_model}[head]
    logits = classifier_logits(module) if head == "classification" else infilling_logits(module, np.arange(LABELS))
    ids, rng = jnp.zeros((1, TOKENS), jnp.int32), np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), ids, ids, ids)["params"]
    params = jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(np.float32), shapes)
    return lambda params, batch: label_losses(logits(params, batch), batch["label"]), params


def traced(losses, params):
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct((PRIME, *a.shape[1:]), a.dtype), draw(0))
    inputs = [*[False] * len(jax.tree.leaves(params)), *[True] * len(batch)]
    return mixed_examples(jax.make_jaxpr(losses)(params, batch).jaxpr, batch_size=PRIME, depends_on_batch=inputs)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("architecture", ["roberta", "bert"])
@pytest.mark.parametrize("head", ["classification", "infilling"])
def test_the_trace_mixes_nothing(head, architecture, remat):
    losses, params = losses_and_params(head, architecture, remat=remat)
    assert traced(losses, params) is None
    assert traced(lambda params, batch: losses(params, batch) - jnp.mean(losses(params, batch)), params) is not None


@pytest.mark.parametrize(("head", "architecture"), [("classification", "roberta"), ("infilling", "bert")])
def test_another_example_leaves_the_loss_as_it_is(head, architecture):
    losses, params = losses_and_params(head, architecture, remat=False)
    losses, batch, others = jax.jit(losses), draw(0), draw(1)
    for j in range(BATCH):
        one_other = {name: np.concatenate([a[:j], others[name][j : j + 1], a[j + 1 :]]) for name, a in batch.items()}
        changed = losses(params, one_other) != losses(params, batch)
        np.testing.assert_array_equal(changed, np.arange(BATCH) == j)
