"""Checks of a config that need no data and no model: every message names the key and says what to give."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from ml_collections import ConfigDict

from dp_rmt.data import DOCUMENT_TASKS, GLUE_TASKS, SENSITIVE, TABLE_TO_TEXT_TASKS
from dp_rmt.denoising.first_moment import SecondMoment
from dp_rmt.denoising.matrix_denoiser import Backend, BelowEdge, Blend, Rescale, Shrinker
from dp_rmt.finetuning.texts import decoding
from dp_rmt.finetuning.transforms import STRUCTURES
from dp_rmt.mechanism import ClippingMethod
from dp_rmt.models.tuning import PATTERNS

FOLDER_NAME = re.compile(r"\w[\w.-]*")
"""Of arms and jobs; neither "..", nor what a command takes for a flag."""

_CAUSAL = (*TABLE_TO_TEXT_TASKS, *DOCUMENT_TASKS)
_CHOICES = {
    "data.task": (*GLUE_TASKS, *_CAUSAL),
    "model.head": ("classification", "infilling", "causal_lm"),
    "model.tuning": tuple(PATTERNS),
    "data.train_split": ("train", "dev"),
    "generation.split": ("dev", "test"),
    "generation.method": ("greedy", "beam", "sampling"),
    "model.dtype": ("float32", "bfloat16"),
    "privacy.clip": ("flat", "automatic"),
    "privacy.accountant": ("pld", "rdp"),
    "denoise.method": ("rmt", "low_pass", "kalman", "truncate_rank"),
    "denoise.target": ("gradient", "first_moment"),
    "denoise.shrinker": get_args(Shrinker),
    "denoise.gate": ("kappa", "tracy_widom"),
    "denoise.gate_per": ("layer", "component"),
    "denoise.rescale": get_args(Rescale),
    "denoise.below_edge": get_args(BelowEdge),
    "denoise.blend": get_args(Blend),
    "denoise.svd": get_args(Backend),
    "denoise.structure": tuple(STRUCTURES),
    "optimizer.name": ("adamw", "muon"),
    "optimizer.second_moment": get_args(SecondMoment),
    "optimizer.schedule": ("linear", "constant"),
    "train.clipping_method": get_args(ClippingMethod),
}
_POSITIVE = (
    "denoise.rank",
    "denoise.kalman_gain",
    "denoise.false_alarm",
    "data.max_length",
    "privacy.epsilon",
    "privacy.l2_clip_norm",
    "privacy.expected_batch_size",
    "privacy.max_batch_size",
    "optimizer.learning_rate",
    "optimizer.eps",
    "optimizer.noise_correction",
    "train.epochs",
    "train.num_steps",
    "train.eval_every",
    "train.eval_batch_size",
    "train.checkpoint_every",
    "data.max_train_examples",
    "data.max_eval_documents",
    "model.lora.alpha",
    "generation.max_prompts",
    "generation.batch_size",
)
_NOT_NEGATIVE = (
    "data.skip_lines",
    "train.microbatch_size",
    "denoise.kappa",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
)


# `jax.random.key` keeps 32 bits of a seed, so that of longer ones two could be the same.
_SEED_BITS = {"seed": 32, "generation.seed": 32, "privacy.sampling_seed": 128, "privacy.noise_seed": 128}


def arm_configs(config: ConfigDict) -> dict[str, ConfigDict]:
    """The validated config of every arm; a config without arms is its own only arm, named after it.

    Args:
      config: as `configs.base.get_config` builds it.

    Returns:
      name -> frozen config without arms, in order.

    Raises:
      ValueError: a key is unknown or a value is out of range.
    """
    arms = {}
    for name, changes in (dict(config.arms) or {config.name: {}}).items():
        if not FOLDER_NAME.fullmatch(name):
            raise ValueError(
                f"config.arms: the name {name!r} becomes a folder; use letters, digits, '.', '_' and '-', the first "
                "a letter, a digit or '_'"
            )
        arm = ConfigDict(config.copy_and_resolve_references()).lock()
        _check_keys(arm, changes, f"config.arms.{name}")
        try:
            arm.update(changes)
        except TypeError as error:
            raise ValueError(f"config.arms.{name} does not fit the config: {error}") from error
        with arm.unlocked():
            arm.arms = ConfigDict()
        _validate(arm)
        arms[name] = arm
    return arms


def _check_keys(config: ConfigDict, changes: Any, where: str) -> None:
    """Raises ValueError unless changes are nested keys of the config."""
    if not isinstance(changes, Mapping | ConfigDict):
        raise ValueError(f"{where} is {changes!r}; give the keys that differ, as in {{'denoise': {{'kappa': 2.0}}}}")
    for key, value in changes.items():
        if key not in config:
            raise ValueError(f"{where}.{key}: there is no such key; choose from {', '.join(config)}")
        if isinstance(config[key], ConfigDict):
            _check_keys(config[key], value, f"{where}.{key}")


def _validate(config: ConfigDict) -> None:
    """Raises ValueError for the first key whose value cannot be used."""
    for complaint in _complaints(config):
        raise ValueError(complaint)


def _complaints(config: ConfigDict) -> Iterator[str]:
    for key, allowed in _CHOICES.items():
        if _get(config, key) not in allowed:
            yield f"config.{key} must be one of {', '.join(allowed)}, got {_get(config, key)!r}"
    for key in _POSITIVE:
        value = _get(config, key)
        if value is not None and not value > 0:
            yield f"config.{key} must be above 0, got {value}"
    for key in _NOT_NEGATIVE:
        value = _get(config, key)
        if value is not None and not value >= 0:
            yield f"config.{key} must not be negative, got {value}"
    for key, bits in _SEED_BITS.items():
        value = _get(config, key)
        if value is not None and not 0 <= value < 2**bits:
            yield f"config.{key} must be in [0, 2^{bits}), got {value}"
    delta = config.privacy.delta
    if delta is not None and not 0 < delta < 1:
        yield f"config.privacy.delta must be above 0 and below 1, got {delta}; leave it out for N^-1.1"
    for key in ("b1", "b2"):
        if not 0 <= config.optimizer[key] < 1:
            yield f"config.optimizer.{key} must be at least 0 and below 1, got {config.optimizer[key]}"
    if (config.train.epochs is None) == (config.train.num_steps is None):
        yield "give exactly one of config.train.epochs and config.train.num_steps"
    if math.isinf(config.privacy.epsilon) and config.privacy.clip == "automatic":
        yield "config.privacy.epsilon=inf switches clipping off; config.privacy.clip='automatic' needs a finite one"
    if (config.data.task in _CAUSAL) != (config.model.head == "causal_lm"):
        yield (
            f"config.data.task={config.data.task!r} and config.model.head={config.model.head!r} do not go together: "
            f"{', '.join(_CAUSAL)} need 'causal_lm', the others one of the encoder's heads"
        )
    if unknown := sorted(set(config.data.sensitive) - set(SENSITIVE)):
        yield f"config.data.sensitive: {unknown[0]!r} is unknown; choose from {', '.join(SENSITIVE)}"
    if config.model.tuning != "full" and config.model.trainable != ".*":
        yield (
            f"config.model.trainable={config.model.trainable!r} belongs to config.model.tuning='full'; "
            f"{config.model.tuning!r} says itself what trains, so leave config.model.trainable out"
        )
    if config.model.flash_attention and config.train.clipping_method == "vmap":
        yield (
            "config.model.flash_attention does not go with config.train.clipping_method='vmap', under which cuDNN's "
            "kernel cannot be traced; choose another method"
        )
    try:
        decoding(config.generation)
    except ValueError as error:
        yield f"config.generation: {error}"
    denoise, optimizer = config.denoise, config.optimizer
    if denoise.kalman_gain > 1:
        yield (
            "config.denoise.kalman_gain must be at most 1, which trusts every gradient alone; "
            f"got {denoise.kalman_gain}"
        )
    if denoise.enabled and denoise.target == "first_moment" and (denoise.method, optimizer.name) != ("rmt", "adamw"):
        yield (
            "config.denoise.target='first_moment' denoises Adam's moment: it goes with config.denoise.method='rmt' and "
            f"config.optimizer.name='adamw', got {denoise.method!r} and {optimizer.name!r}"
        )
    if denoise.target == "gradient" and (optimizer.second_moment, optimizer.noise_correction) != ("noisy", None):
        yield (
            "config.optimizer.second_moment and config.optimizer.noise_correction belong to a denoised first moment: "
            "give config.denoise.target='first_moment', or leave them out"
        )
    if not all(isinstance(length, int) and length > 0 for length in config.data.length_groups):
        yield f"config.data.length_groups must be positive lengths in tokens, got {config.data.length_groups}"


def _get(config: ConfigDict, dotted: str) -> Any:
    for part in dotted.split("."):
        config = config[part]
    return config
