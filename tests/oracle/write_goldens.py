"""Writes tests/models/goldens: tiny random torch transformers models with their inputs and logits.

Run from the repository root, where torch and transformers are installed:
`python tests/oracle/write_goldens.py [FOLDER ...]`.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

GOLDENS = Path(__file__).resolve().parents[1] / "models" / "goldens"
AUTO_CLASSES = {
    "classification": "AutoModelForSequenceClassification",
    "masked_lm": "AutoModelForMaskedLM",
    "causal_lm": "AutoModelForCausalLM",
}
FOLDERS = {
    "bert_classifier": ("bert", "classification"),
    "roberta_classifier": ("roberta", "classification"),
    "bert_mlm": ("bert", "masked_lm"),
    "roberta_mlm": ("roberta", "masked_lm"),
    "distilbert_classifier": ("distilbert", "classification"),
    "distilbert_mlm_untied": ("distilbert", "masked_lm"),
    "llama": ("llama", "causal_lm"),
    "llama_tied": ("llama", "causal_lm"),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama_tied": {"tie_word_embeddings": True, "attention_bias": True},
    "distilbert_mlm_untied": {"tie_word_embeddings": False},
}
SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,  # far from linear, so that a wrong activation or scale shows
}
_ROBERTA = {"pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bert": {"pad_token_id": 0, "type_vocab_size": 2, "layer_norm_eps": 1e-12},
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "distilbert": {"pad_token_id": 0, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64},
    "llama": {
        "pad_token_id": 0,
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "head_dim": 6,  # not hidden_size / num_attention_heads
        "intermediate_size": 24,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "rms_norm_eps": 1e-3,  # large enough to show
    },
}
NUM_LABELS = 3


def torch_config(architecture: str, **overrides: Any) -> Any:
    """A tiny transformers configuration."""
    import transformers  # torch and transformers may be absent where tests are only collected

    config = transformers.AutoConfig.for_model(architecture, **{**SIZES, **ARCHITECTURES[architecture], **overrides})
    config.num_labels = NUM_LABELS
    return config


def torch_model(auto_class: str, config: Any, *, seed: int = 0) -> Any:
    """A random torch model whose biases and normalisation scales are random too, so that a swap shows."""
    import torch
    import transformers

    torch.manual_seed(seed)
    model = getattr(transformers, auto_class).from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def padded_batch(config: Any, length: int, *, rows: int = 4, left: bool = False) -> dict[str, np.ndarray]:
    """Random rows of falling length: the first without padding, the last (of several) with one token.

    Padded on the right, or on the left; with token types if the model has any.
    """
    rng = np.random.default_rng(length)
    lengths = np.linspace(length, 1, rows).astype(int)
    mask = (np.arange(length) < lengths[:, None]).astype(np.int32)
    mask = mask[:, ::-1].copy() if left else mask  # torch takes no negative strides
    ids = rng.integers(5, config.vocab_size, (rows, length))
    batch = {"input_ids": np.where(mask == 1, ids, config.pad_token_id).astype(np.int32), "attention_mask": mask}
    if hasattr(config, "type_vocab_size"):
        types = rng.integers(0, config.type_vocab_size, (rows, length))
        batch["token_type_ids"] = (types * mask).astype(np.int32)
    return batch


def golden_batch(config: Any, head: str) -> dict[str, np.ndarray]:
    """Rows padded on the right and, where a model can take that, rows padded on the left."""
    batch = padded_batch(config, length=12)
    if head != "causal_lm":
        return batch
    lefts = padded_batch(config, length=12, left=True)
    return {name: np.concatenate([array, lefts[name]]) for name, array in batch.items()}


def torch_logits(model: Any, batch: dict[str, np.ndarray]) -> np.ndarray:
    """The model's logits for a batch."""
    import torch

    with torch.no_grad():
        return model(**{name: torch.tensor(array).long() for name, array in batch.items()}).logits.numpy()


def main(names: Sequence[str]) -> None:
    """Writes golden folders anew."""
    for name in names:
        architecture, head = FOLDERS[name]
        folder = GOLDENS / name
        shutil.rmtree(folder, ignore_errors=True)
        model = torch_model(AUTO_CLASSES[head], torch_config(architecture, **VARIANTS.get(name, {})))
        model.save_pretrained(folder)
        batch = golden_batch(model.config, head)
        arrays: dict[str, Any] = {"logits": torch_logits(model, batch), **batch}
        np.savez(folder / "inputs_outputs.npz", **arrays)
        print(f"wrote {folder}")


if __name__ == "__main__":
    main(sys.argv[1:] or list(FOLDERS))
