"""Load models from Hugging Face folders: `config.json` and `model.safetensors`."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax.traverse_util import flatten_dict, unflatten_dict

from dp_rmt.models import hf_names
from dp_rmt.models.encoder import EncoderConfig
from dp_rmt.models.heads import MaskedLanguageModel, SequenceClassifier
from dp_rmt.models.hf_folder import CONFIG_FILE, WEIGHTS_FILE, read_config, resolve_folder
from dp_rmt.models.hf_names import LeafName, Model

logger = logging.getLogger(__name__)

_HEADS = ("classification", "masked_lm")
_PAIR_ADVICE = f"check that {CONFIG_FILE} and {WEIGHTS_FILE} belong to the same model, or download both again"


@dataclasses.dataclass(frozen=True)
class _File:
    """What a safetensors file holds: canonical name -> (name in the file, shape)."""

    path: Path
    tensors: dict[str, tuple[str, tuple[int, ...]]]

    @classmethod
    def open(cls, path: Path, architecture: str) -> _File:
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        try:
            with safetensors.safe_open(path, "numpy") as file:
                for name in file.keys():  # noqa: SIM118  (not a dict)
                    canonical = hf_names.canonical_name(architecture, name)
                    if canonical in tensors:
                        raise ValueError(
                            f"{path} holds {canonical} twice, as {tensors[canonical][0]} and {name}; "
                            "remove one of them"
                        )
                    tensors[canonical] = (name, tuple(file.get_slice(name).get_shape()))
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{path} is not a readable safetensors file ({error}); download it again"
            ) from error
        return cls(path, tensors)


def load_pretrained(
    folder_or_hub_name: str | os.PathLike[str],
    *,
    head: str = "classification",
    num_labels: int = 2,
    key: jax.Array,
    dtype: Any = jnp.float32,
    remat: bool = False,
) -> tuple[Model, dict[str, Any]]:
    """Loads a Hugging Face BERT or RoBERTa model; a head that the file lacks is initialised from `key`.

    Reads `config.json` and `model.safetensors`, of a bare encoder or of a model with a head. Heads of another
    kind in the file are ignored, with a log line. All names and shapes are checked before any tensor is read.

    Args:
        folder_or_hub_name: a local folder, or a hub name such as "roberta-base".
        head: "classification" or "masked_lm".
        num_labels: logits of the classification head (unused by "masked_lm").
        key: PRNG key of a fresh head: matrices N(0, 0.02^2), biases 0.
        dtype: compute dtype; parameters are float32 whatever it is.
        remat: recompute layers in the backward pass, to save memory.

    Returns:
        The module, and its parameters as a nested dict of float32 arrays.

    Raises:
        FileNotFoundError: if the folder or one of its files is absent, or the download failed.
        ValueError: if the model is unsupported, or a tensor is missing, unknown or of another shape.
    """
    if head not in _HEADS:
        raise ValueError(f"head {head!r} is not known; choose one of {', '.join(_HEADS)}")
    if num_labels < 1:
        raise ValueError(f"num_labels is {num_labels}; a classifier needs 1 (regression) or more")
    folder = resolve_folder(folder_or_hub_name)
    hf_config = read_config(folder)
    try:
        config = EncoderConfig.from_hf_config(hf_config, dtype=dtype, remat=remat)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from error
    module: Model = (
        SequenceClassifier(config, num_labels) if head == "classification" else MaskedLanguageModel(config)
    )
    file = _File.open(folder / WEIGHTS_FILE, config.architecture)
    table = hf_names.leaf_names(module)
    fresh_groups = _absent_groups(table, file, hf_config.get("architectures") or [])
    loaded = [leaf for leaf in table if leaf.group not in fresh_groups]
    fresh = [leaf for leaf in table if leaf.group in fresh_groups]
    _check_tensors(module, loaded, file)
    if fresh:
        logger.info(
            "%s has no %s; initialised from the key", file.path, " and no ".join(sorted(fresh_groups))
        )
    flat = {**_read(module, loaded, file), **_initialise(module, fresh, key)}
    return module, unflatten_dict({leaf.path: flat[leaf.path] for leaf in table})


def _absent_groups(table: list[LeafName], file: _File, architectures: Sequence[str]) -> set[str]:
    """Groups of the head, none of whose tensors is in the file."""
    groups = {leaf.group for leaf in table} - {"encoder"}
    present = {leaf.group for leaf in table if any(name in file.tensors for name in leaf.hf_names)}
    # BERT's token and choice classifiers have the same tensor names as the sequence classifier.
    if architectures and not any(name.endswith("ForSequenceClassification") for name in architectures):
        present.discard("classifier")
    return groups - present


def _check_tensors(module: Model, loaded: list[LeafName], file: _File) -> None:
    """Raises unless the file holds exactly the loaded leaves, buffers and heads of other kinds."""
    expected = {name: leaf for leaf in loaded for name in leaf.hf_names}
    for name, leaf in expected.items():
        if name not in file.tensors:
            raise ValueError(
                f"{file.path} has no tensor {name} of shape {leaf.hf_shape}, which {CONFIG_FILE} calls for; "
                + _PAIR_ADVICE
            )
        found_name, found = file.tensors[name]
        if found != leaf.hf_shape:
            advice = _shape_advice(module, leaf, found)
            raise ValueError(
                f"{file.path}: tensor {found_name} has shape {found}, expected {leaf.hf_shape}; {advice}"
            )
    others = [name for name in file.tensors if name not in expected and name not in hf_names.BUFFERS]
    unknown = [name for name in others if not name.startswith(hf_names.HEAD_PARTS)]
    if unknown:
        found_name, found = file.tensors[unknown[0]]
        raise ValueError(
            f"{file.path} has {len(unknown)} tensor(s) that the model in {CONFIG_FILE} lacks, the first "
            f"is {found_name} of shape {found}; expected none. Check num_hidden_layers in {CONFIG_FILE} and "
            "that both files belong to the same plain BERT or RoBERTa model"
        )
    ignored = sorted(set(others) - set(hf_names.TIED_COPIES[module.config.architecture]))
    if ignored:
        logger.info("%s: ignored tensors of heads that are not used here: %s", file.path, ", ".join(ignored))


def _shape_advice(module: Model, leaf: LeafName, found: tuple[int, ...]) -> str:
    if (
        isinstance(module, SequenceClassifier)
        and leaf.path[0] == "classifier"
        and found[1:] == leaf.hf_shape[1:]
    ):
        return (
            f"this folder holds a classifier of {found[0]} labels: pass num_labels={found[0]} to go on with "
            "it, or load the pre-trained model that it was fine-tuned from to start a new one"
        )
    return _PAIR_ADVICE


def _read(module: Model, loaded: list[LeafName], file: _File) -> dict[tuple[str, ...], jax.Array]:
    """Reads the leaves, and checks that copies of tied weights are copies."""
    flat = {}
    with safetensors.safe_open(file.path, "numpy") as opened:

        def read(name: str) -> np.ndarray:
            return opened.get_tensor(file.tensors[name][0])

        for leaf in loaded:
            flat[leaf.path] = jnp.asarray(leaf.from_tensors([read(name) for name in leaf.hf_names]))
        expected = {name for leaf in loaded for name in leaf.hf_names}
        for copy, original in hf_names.TIED_COPIES[module.config.architecture].items():
            tied = isinstance(module, MaskedLanguageModel) and copy in file.tensors and original in expected
            if tied and not np.array_equal(read(copy), read(original)):
                raise ValueError(
                    f"{file.path}: {file.tensors[copy][0]} differs from {file.tensors[original][0]}, but the "
                    "decoder is tied to the word embedding here; load a model with tied embeddings, or use "
                    "head='classification'"
                )
    return flat


def _initialise(module: Model, fresh: list[LeafName], key: jax.Array) -> dict[tuple[str, ...], jax.Array]:
    """The values that `init_params(module, key)` gives these leaves, without making the others."""
    if not fresh:
        return {}
    ids_BxL = jnp.zeros((1, 1), jnp.int32)

    def init(key: jax.Array) -> dict[tuple[str, ...], jax.Array]:
        flat = flatten_dict(module.init(key, ids_BxL, ids_BxL, ids_BxL)["params"])
        return {leaf.path: flat[leaf.path] for leaf in fresh}

    return jax.jit(init)(key)
