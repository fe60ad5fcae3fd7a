"""The task that needs no download: the project's own reviews, and a small encoder pre-trained on their public part.

It writes files of the ordinary kind (a GLUE folder and a Hugging Face folder). The private run that reads them is like
any other.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dp_rmt.data import build_word_tokenizer, gather_batch, get_task, read_tsv, tokenize_classification, write_corpus
from dp_rmt.extras import extra
from dp_rmt.finetuning.settings import Settings, Synthetic
from dp_rmt.models import EncoderConfig, SequenceClassifier, init_params, save_pretrained
from dp_rmt.training.losses import classifier_logits, label_losses

with extra("finetune"):
    import tqdm

DATA_FOLDER, MODEL_FOLDER = "data", "encoder"


def prepare(arms: Mapping[str, Settings], folder: Path) -> dict[str, Settings]:
    """Generates text, pre-trains the encoder on its public part (once), and points the arms at both.

    Args:
      arms: settings by arm; the arms share those under ``synthetic``.
      folder: the folder of data and model; both are made if they are missing.

    Returns:
      The arms' settings with ``data.path`` and ``model.path`` set.
    """
    first = next(iter(arms.values()))
    if not (folder / MODEL_FOLDER).exists():
        assert first.synthetic is not None  # only such settings come here
        _generate(first.synthetic, first.data.max_length, first.seed, folder)
    return {
        name: dataclasses.replace(
            settings,
            data=dataclasses.replace(settings.data, path=str(folder / DATA_FOLDER)),
            model=dataclasses.replace(settings.model, path=str(folder / MODEL_FOLDER)),
        )
        for name, settings in arms.items()
    }


def _generate(settings: Synthetic, max_length: int, seed: int, folder: Path) -> None:
    task = get_task("sst2")
    corpus = write_corpus(
        folder / DATA_FOLDER,
        num_public=settings.num_public,
        num_private_train=settings.num_private_train,
        num_private_dev=settings.num_private_dev,
        seed=seed,
    )
    public = read_tsv(task, corpus / "public.tsv")
    tokenizer = build_word_tokenizer(public.texts, folder / "tokenizer")
    arrays = tokenize_classification(public, tokenizer, max_length=max_length)
    config = EncoderConfig(
        architecture="bert",
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        num_layers=settings.num_layers,
        num_heads=settings.num_heads,
        intermediate_size=4 * settings.hidden_size,
        max_position_embeddings=max_length,
        type_vocab_size=2,
        layer_norm_eps=1e-12,
        pad_token_id=tokenizer.pad_token_id,
    )
    module = SequenceClassifier(config, task.num_labels)
    params = _pretrain(module, arrays, settings, seed)
    save_pretrained(folder / MODEL_FOLDER, module, params, tokenizer=tokenizer, label_names=task.label_names)


def _pretrain(module: SequenceClassifier, arrays: Mapping[str, np.ndarray], settings: Synthetic, seed: int) -> Any:
    """Trains the sentiment of PUBLIC reviews by ordinary AdamW, without privacy."""
    params = init_params(module, jax.random.key(seed))
    logits = classifier_logits(module)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, settings.num_steps // 10, settings.num_steps
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: Mapping[str, jax.Array]) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(lambda p: jnp.mean(label_losses(logits(p, batch), batch["label"])))(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, rng = optimizer.init(params), np.random.default_rng(seed)
    with tqdm.trange(settings.num_steps, desc="pre-training on public text", unit="step") as bar:
        for index in bar:
            batch, _ = gather_batch(arrays, rng.integers(len(arrays["label"]), size=settings.batch_size))
            params, state, loss = step(params, state, batch)
            if index % 20 == 0:
                bar.set_postfix(loss=f"{float(loss):.3f}")
    return params
