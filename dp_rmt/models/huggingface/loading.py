"""Loads models from Hugging Face folders, which hold `config.json` and `model.safetensors` or its shards."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from dp_rmt.models.decoder.config import DecoderConfig
from dp_rmt.models.decoder.model import CausalLanguageModel
from dp_rmt.models.encoder import EncoderConfig
from dp_rmt.models.heads import MaskedLanguageModel, SequenceClassifier, init_params
from dp_rmt.models.huggingface import decoder_names
from dp_rmt.models.huggingface import names as hf_names
from dp_rmt.models.huggingface.folder import CONFIG_FILE, WEIGHTS_FILE, read_config, resolve_folder
from dp_rmt.models.huggingface.labels import in_label_order, label_rows
from dp_rmt.models.huggingface.names import LeafName, Model
from dp_rmt.models.huggingface.weights import Weights

_HEADS = ("classification", "masked_lm", "causal_lm")
_PAIR_ADVICE = f"check that {CONFIG_FILE} and {WEIGHTS_FILE} belong to the same model, or download both again"


def load_pretrained(
    folder_or_hub_name: str | os.PathLike[str],
    *,
    head: str = "classification",
    num_labels: int = 2,
    label_names: Sequence[str] | None = None,
    key: jax.Array | None = None,
    dtype: Any = jnp.float32,
    remat: bool = False,
    flash_attention: bool = False,
) -> tuple[Model, dict[str, Any]]:
    """Loads a Hugging Face encoder or decoder. An encoder's head that the file lacks is initialised from `key`.

    The folder may be that of a bare model or of one with a head. Heads of another kind in the file are ignored, with a
    log line. All names and shapes are checked before any tensor is read. Tensors are read one at a time, so only a
    piece of one is in memory beside the parameters themselves.

    Args:
        folder_or_hub_name: a local folder, or a hub name such as "roberta-base".
        head: "classification" or "masked_lm" for a BERT or RoBERTa; "causal_lm" for a decoder of one of the
            `dp_rmt.models.decoder.families.FAMILIES`.
        num_labels: logits of the classification head; the other heads do not use it.
        label_names: the name of each logit of the classification head. The logits of a classifier that was trained
            before are put into this order by the names in its `config.json`; None leaves them as they are.
        key: PRNG key of a fresh head, with matrices N(0, 0.02^2) and biases 0. "causal_lm" does not need it.
        dtype: compute dtype. Parameters are float32 whatever it is.
        remat: recompute layers in the backward pass, to save memory.
        flash_attention: compute a decoder's attention by cuDNN, on an NVIDIA GPU in half precision.

    Returns:
        The module, and its parameters as a nested dict of float32 arrays. The module's `fresh` names the parts that
        were initialised.

    Raises:
        FileNotFoundError: the folder or one of its files is absent, or the download failed.
        ValueError: the model is not supported, a tensor is missing, unknown or of another shape, the file names other
            labels, or a fresh head has no key.
    """
    if head not in _HEADS:
        raise ValueError(f"head {head!r} is not known; choose one of {', '.join(_HEADS)}")
    if num_labels < 1:
        raise ValueError(f"num_labels is {num_labels}; a classifier needs 1 (regression) or more")
    if label_names is not None and (head != "classification" or len(label_names) != num_labels):
        raise ValueError(f"label_names {list(label_names)} must name the {num_labels} logits of a classification head")
    folder = resolve_folder(folder_or_hub_name)
    hf_config = read_config(folder)
    options: dict[str, Any] = {"dtype": dtype, "remat": remat}
    if head == "causal_lm":
        options["flash_attention"] = flash_attention
    elif flash_attention:
        raise ValueError(f"flash_attention is for decoders, but the head is {head!r}; switch it off")
    module = _module(folder, hf_config, head, num_labels, options)
    architecture = module.config.architecture
    weights = Weights.open(folder, lambda name: hf_names.canonical_name(architecture, name))
    if isinstance(module, MaskedLanguageModel) and not module.config.tie_word_embeddings:
        weights = weights.preferring(hf_names.tied_copies(module))
    table = hf_names.leaf_names(module)
    fresh_groups = _absent_groups(table, weights, hf_config.get("architectures") or [])
    loaded = [leaf for leaf in table if leaf.group not in fresh_groups]
    fresh = [leaf for leaf in table if leaf.group in fresh_groups]
    _check_tensors(module, loaded, weights)
    if fresh:
        absent = " and no ".join(sorted(fresh_groups))
        if key is None:
            raise ValueError(f"{weights.path} has no {absent}; give a key to initialise it from")
        logging.info("%s has no %s; initialised from the key", weights.path, absent)
        module = module.clone(fresh=tuple(sorted({leaf.path[0] for leaf in fresh})))
    if label_names is not None and any(leaf.path[0] == "classifier" for leaf in loaded):
        rows = label_rows(hf_config, label_names, str(folder / CONFIG_FILE))
        module = module if rows == tuple(range(num_labels)) else module.clone(label_rows=rows)
    flat = {leaf.path: in_label_order(module, leaf, _read(leaf, weights)) for leaf in loaded}
    _check_tied_copies(module, loaded, weights)
    flat |= _initialise(module, fresh, key)
    return module, unflatten_dict({leaf.path: flat[leaf.path] for leaf in table})


def _module(folder: Path, hf_config: dict[str, Any], head: str, num_labels: int, options: dict[str, Any]) -> Model:
    try:
        if head == "causal_lm":
            return CausalLanguageModel(DecoderConfig.from_hf_config(hf_config, **options))
        config = EncoderConfig.from_hf_config(hf_config, **options)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from error
    return SequenceClassifier(config, num_labels) if head == "classification" else MaskedLanguageModel(config)


def _absent_groups(table: list[LeafName], weights: Weights, architectures: Sequence[str]) -> set[str]:
    """The groups of the head of which no tensor is in the file."""
    groups = {leaf.group for leaf in table} - {"encoder", "decoder", "lm_head"}
    present = {leaf.group for leaf in table if any(name in weights.tensors for name in leaf.hf_names)}
    # BERT's token and choice classifiers have the same tensor names as the sequence classifier.
    if architectures and not any(name.endswith("ForSequenceClassification") for name in architectures):
        present.discard("classifier")
    return groups - present


def _check_tensors(module: Model, loaded: list[LeafName], weights: Weights) -> None:
    """Raises unless the file holds exactly the loaded leaves, buffers and heads of other kinds."""
    expected = {name: leaf for leaf in loaded for name in leaf.hf_names}
    for name, leaf in expected.items():
        if name not in weights.tensors:
            raise ValueError(
                f"{weights.path} has no tensor {name} of shape {leaf.hf_shape}, which {CONFIG_FILE} calls for; "
                + _PAIR_ADVICE
            )
        found = weights.tensors[name]
        if found.shape != leaf.hf_shape:
            advice = _shape_advice(module, leaf, found.shape)
            raise ValueError(
                f"{found.path}: tensor {found.name} has shape {found.shape}, expected {leaf.hf_shape}; {advice}"
            )
    others = [name for name in weights.tensors if name not in expected and not hf_names.is_buffer(name)]
    heads = hf_names.HEAD_PARTS
    if isinstance(module, CausalLanguageModel):
        heads = (*hf_names.tied_copies(module), *decoder_names.OTHER_PARTS.get(module.config.architecture, ()))
    unknown = [name for name in others if not name.startswith(heads)]
    if unknown:
        found = weights.tensors[unknown[0]]
        raise ValueError(
            f"{found.path} has {len(unknown)} tensor(s) that the model in {CONFIG_FILE} lacks, the first "
            f"is {found.name} of shape {found.shape}; expected none. Check num_hidden_layers in {CONFIG_FILE} and "
            "that both files belong to the same plain model"
        )
    ignored = sorted(set(others) - set(hf_names.tied_copies(module)))
    if ignored:
        some = ", ".join(ignored[:8]) + (f" and {len(ignored) - 8} more" if len(ignored) > 8 else "")
        logging.info("%s: ignored tensors of heads that are not used here: %s", weights.path, some)


def _shape_advice(module: Model, leaf: LeafName, found: tuple[int, ...]) -> str:
    if isinstance(module, SequenceClassifier) and leaf.path[0] == "classifier" and found[1:] == leaf.hf_shape[1:]:
        return (
            f"this folder holds a classifier of {found[0]} labels: pass num_labels={found[0]} to go on with "
            "it, or load the pre-trained model that it was fine-tuned from to start a new one"
        )
    return _PAIR_ADVICE


def _read(leaf: LeafName, weights: Weights) -> jax.Array:
    """Reads one leaf in float32, tensor by tensor."""
    values = _aligned(leaf.shape)
    for name, target in leaf.slices(values).items():
        if leaf.layout.by_rows:
            rows = leaf.layout.join([target])
            for some, piece in weights.pieces(name):
                rows[some] = piece
        else:
            target[...] = leaf.layout.take(weights.read(name), leaf.part)
    return jax.device_put(values)  # a CPU takes aligned memory as it is; jnp.asarray would copy


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Makes an uninitialised float32 array, aligned as jax on a CPU needs it."""
    size = int(np.prod(shape))
    buffer = np.empty(size + 16, np.float32)
    start = -buffer.ctypes.data % 64 // 4
    return buffer[start : start + size].reshape(shape)


def _check_tied_copies(module: Model, loaded: list[LeafName], weights: Weights) -> None:
    """Raises unless the file's copies of tied weights, if it has any, equal the originals."""
    expected = {name for leaf in loaded for name in leaf.hf_names}
    for copy, original in hf_names.tied_copies(module).items():
        used = not isinstance(module, SequenceClassifier) and copy in weights.tensors and original in expected
        if used and not _equal(weights, copy, original):
            found = weights.tensors[copy]
            raise ValueError(
                f"{found.path}: {found.name} differs from {weights.tensors[original].name}, but {CONFIG_FILE} says "
                'that the two are tied; if they are not, write "tie_word_embeddings": false into it'
            )


def _equal(weights: Weights, one: str, other: str) -> bool:
    if weights.tensors[one].shape != weights.tensors[other].shape:
        return False
    return all(np.array_equal(a, b) for (_, a), (_, b) in zip(weights.pieces(one), weights.pieces(other)))


def _initialise(module: Model, fresh: list[LeafName], key: jax.Array | None) -> dict[tuple[str, ...], jax.Array]:
    """The values that `init_params(module, key)` gives these leaves, without making the others."""
    if not fresh:
        return {}

    @jax.jit
    def init(key: jax.Array) -> dict[tuple[str, ...], jax.Array]:
        flat = flatten_dict(init_params(module, key))
        return {leaf.path: flat[leaf.path] for leaf in fresh}

    return init(key)
