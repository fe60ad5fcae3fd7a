"""Chooses which parameters train: all, low-rank updates, or biases. It also puts low-rank updates into a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from dp_rmt.models.decoder.model import CausalLanguageModel
from dp_rmt.models.heads import SequenceClassifier, init_params
from dp_rmt.models.huggingface import names as hf_names
from dp_rmt.models.huggingface.names import Model
from dp_rmt.models.lora import LoRAConfig, merge_lora, with_config

PATTERNS = {
    "full": ".*",
    "lora": "_lora/lora_[ab]/kernel$",
    "ffa_lora": "_lora/lora_b/kernel$",
    "bias": "(^|/)bias$",
}
"""For each tuning, a regular expression over paths of parameters: what trains besides a fresh head."""


def trainable_pattern(tuning: str, module: Model, *, also: str | None = None) -> str:
    """Makes the regular expression of a way of tuning, for `dp_rmt.trees.split_params`.

    - "full" trains everything.
    - "lora" trains the factors A and B of each low-rank update (Hu et al. 2021).
    - "ffa_lora" trains B alone, and A stays as it was initialised (Sun et al. 2024). The update is then linear in what
      trains, so that noise adds noise only. In (A + N_A)(B + N_B) it would also add the product N_A N_B of two noises.
    - "bias" trains the biases, those of layer normalisation included (Zaken et al. 2022; privately Bu et al. 2022).

    A classification head starts afresh, and trains with every tuning. For BERT that is the classifier; for RoBERTa it
    is the pooler, too (transformers has both in one head). Whatever else `load_pretrained` drew at random
    (`module.fresh`) trains with every tuning as well: a random layer that nobody trains and no adapter holds would make
    another model of every folder that it is put on.

    Args:
        tuning: "full", "lora", "ffa_lora" or "bias".
        module: the model. It has a LoRA configuration for the two that train low-rank updates, and none for the others.
        also: a regular expression of further paths that train.

    Returns:
        The regular expression.

    Raises:
        ValueError: the tuning is unknown or does not fit the model, or `also` matches no parameter.

    >>> from dp_rmt.models import EncoderConfig
    >>> bert = SequenceClassifier(EncoderConfig("bert", 30, 16, 2, 2, 24, 8, 1, 1e-12, 0), num_labels=2)
    >>> trainable_pattern("bias", bert)
    '(^|/)bias$|^(classifier)/'
    """
    if tuning not in PATTERNS:
        raise ValueError(f"tuning {tuning!r} is not known; choose one of {', '.join(PATTERNS)}")
    has_lora, needs_lora = module.config.lora is not None, tuning in ("lora", "ffa_lora")
    if needs_lora and not has_lora:
        raise ValueError(
            f"tuning {tuning!r} trains low-rank updates, but the model has none; put them in with "
            'with_lora(module, params, LoRAConfig(rank=8, alpha=16, targets=("query", "value")), key), or choose '
            "another tuning"
        )
    if has_lora and not needs_lora:
        raise ValueError(
            f"tuning {tuning!r} has no use for the model's low-rank updates ({module.config.lora}); choose 'lora' or "
            "'ffa_lora', or load the model without them (merge those that were trained: without_lora(module, params))"
        )
    if tuning == "full":
        return PATTERNS[tuning]
    paths, head = ["/".join(path) for path in parameter_shapes(module)], _head_pattern(module)
    if not any(re.search(PATTERNS[tuning], path) for path in paths):
        raise ValueError(
            f"tuning {tuning!r} trains biases, but this model has none; choose 'full', or 'lora' with a LoRA "
            "configuration"
        )
    if also is not None and not any(re.search(also, path) for path in paths):
        raise ValueError(f"also={also!r} matches no parameter; there are {', '.join(paths)}")
    return "|".join(filter(None, (PATTERNS[tuning], head, also)))


def with_lora(
    module: Model, params: Mapping[str, Any], config: LoRAConfig, key: jax.Array
) -> tuple[Model, dict[str, Any]]:
    """Puts low-rank updates into a model. It stays the same function until they train, since B is zero.

    Args:
        module: a model without LoRA.
        params: its parameters.
        config: describes the updates.
        key: PRNG key of the factors A.

    Returns:
        The module with `config.lora` set, and its parameters, which are the given ones, as they are, and fresh A and B.

    Raises:
        ValueError: the model has LoRA already, or lacks a target.
    """
    if module.config.lora is not None:
        raise ValueError(
            f"the model has low-rank updates already ({module.config.lora}); merge them into its weights first: "
            "without_lora(module, params)"
        )
    adapted, base = with_config(module, lora=config), flatten_dict(params)

    @jax.jit  # only the leaves that are kept are computed, so there is no second copy of the base model
    def fresh(key: jax.Array) -> dict[tuple[str, ...], jax.Array]:
        leaves = flatten_dict(init_params(adapted, key))
        return {path: leaf for path, leaf in leaves.items() if path[-2] in ("lora_a", "lora_b")}

    return adapted, unflatten_dict(base | fresh(key))


def without_lora(module: Model, params: Mapping[str, Any]) -> tuple[Model, dict[str, Any]]:
    """Makes the plain model that computes the same function, by `merge_lora`, as `save_pretrained` takes it.

    Args:
        module: a model with or without LoRA.
        params: its parameters.

    Returns:
        The module with `config.lora=None`, and its parameters.
    """
    if module.config.lora is None:
        return module, dict(params)
    return with_config(module, lora=None), merge_lora(params, module.config.lora)


def with_leaves(params: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters with some leaves replaced, such as those that `load_adapter` returns.

    Args:
        params: a nested dict of arrays.
        leaves: a nested dict of some of them.

    Returns:
        A nested dict.

    Raises:
        ValueError: a leaf is not among the parameters, or has another shape.

    >>> with_leaves({"head": {"bias": jnp.zeros(2), "kernel": jnp.ones(1)}}, {"head": {"bias": jnp.ones(2)}})
    {'head': {'bias': Array([1., 1.], dtype=float32), 'kernel': Array([1.], dtype=float32)}}
    """
    flat = flatten_dict(params)
    for path, leaf in flatten_dict(leaves).items():
        if path not in flat:
            raise ValueError(f"{'/'.join(path)} is not among the parameters; put LoRA in with with_lora first")
        if flat[path].shape != leaf.shape:
            raise ValueError(f"{'/'.join(path)} has shape {leaf.shape}, the parameters have {flat[path].shape} there")
        flat[path] = jnp.asarray(leaf)
    return unflatten_dict(flat)


def parameter_shapes(module: Model) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Shapes of the parameters by path, without their values."""
    return flatten_dict(jax.eval_shape(lambda key: init_params(module, key), jax.random.key(0)))


def fresh_parts(module: Model) -> tuple[str, ...]:
    """The parts of the head that were drawn at random, because the file that was loaded lacks them."""
    return () if isinstance(module, CausalLanguageModel) else module.fresh


def with_fresh_parts(trainable: str, module: Model) -> str:
    """Adds to a regular expression over paths the fresh parts of a model that it does not match.

    >>> from dp_rmt.models import EncoderConfig
    >>> config = EncoderConfig("bert", 30, 16, 2, 2, 24, 8, 1, 1e-12, 0)
    >>> with_fresh_parts("^classifier/", SequenceClassifier(config, num_labels=2, fresh=("classifier", "pooler")))
    '^classifier/|^(pooler)/'
    """
    paths = ["/".join(path) for path in parameter_shapes(module)]
    try:
        matched = {path for path in paths if re.search(trainable, path)}
    except re.error:
        matched = set()
    if not matched:  # a pattern that is none, or that matches nothing, is refused where it is used
        return trainable
    left_out = {path.split("/")[0] for path in paths if path not in matched}
    missed = sorted(left_out & set(fresh_parts(module)))
    return f"{trainable}|^({'|'.join(missed)})/" if missed else trainable


def _head_pattern(module: Model) -> str | None:
    """The paths of what was initialised, and of the head that is initialised as one with the classifier."""
    parts = set(fresh_parts(module))
    if isinstance(module, SequenceClassifier):
        table = hf_names.leaf_names(with_config(module, lora=None))
        group = {leaf.group for leaf in table if leaf.path[0] == "classifier"}
        parts |= {leaf.path[0] for leaf in table if leaf.group in group}
    return f"^({'|'.join(sorted(parts))})/" if parts else None
