"""Settings: every option has a doc and a default of its type, every check is seen to fail, and a config is the same."""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any

import pytest

from configs import base
from dp_rmt.clipping.execution import ClippingMethod
from dp_rmt.data import DOCUMENT_TASKS, GLUE_TASKS, SENSITIVE, TABLE_TO_TEXT_TASKS
from dp_rmt.data.readers import tables
from dp_rmt.finetuning import data_settings
from dp_rmt.finetuning.options import Group, fitted, kinds, parsed, walk
from dp_rmt.finetuning.settings import Model, Privacy, Settings, Synthetic, Train
from dp_rmt.finetuning.workdir import as_json
from dp_rmt.models.tuning import PATTERNS
from dp_rmt.random_bits import NoiseGenerator

OPTIONS = {key: (kind, field) for key, kind, field in walk(Settings)}


@pytest.mark.parametrize("key", OPTIONS)
def test_every_option_has_a_doc_and_a_default_of_its_type(key: str) -> None:
    kind, field = OPTIONS[key]
    assert field.metadata["doc"][0].isupper()
    assert field.metadata["doc"].endswith(".")
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    assert fitted(kind, default, key) == default
    check = field.metadata["check"]
    assert check is None or default is None or check.holds(default)


def test_every_group_says_where_it_stands() -> None:
    for name, kind in kinds(Settings).items():
        for group in (kind, *typing.get_args(kind)):
            if isinstance(group, type) and issubclass(group, Group):
                assert f"config.{name}" == group.WHERE
    assert kinds(Model)["lora"].WHERE == "config.model.lora"


def test_the_words_of_an_option_are_those_that_the_library_knows() -> None:
    assert data_settings.HUB == tables.HUB
    assert typing.get_args(data_settings.GlueTaskName) == tuple(GLUE_TASKS)
    assert typing.get_args(data_settings.TextTaskName) == tuple(TABLE_TO_TEXT_TASKS)
    assert typing.get_args(data_settings.DocumentTaskName) == DOCUMENT_TASKS
    assert typing.get_args(data_settings.SensitiveKind) == SENSITIVE
    assert set(typing.get_args(kinds(Train)["clipping_method"])) == set(typing.get_args(ClippingMethod))
    assert typing.get_args(kinds(Privacy)["noise_generator"]) == typing.get_args(NoiseGenerator)
    assert typing.get_args(kinds(Model)["tuning"]) == tuple(PATTERNS)


BAD: dict[str, Any] = {
    "data.dev_share": 0.0,
    "data.max_length": 0,
    "data.length_groups": (12, 0),
    "data.max_train_examples": 0,
    "data.skip_lines": -1,
    "data.max_eval_documents": 0,
    "model.lora.rank": 0,
    "model.lora.alpha": 0.0,
    "privacy.epsilon": math.nan,
    "privacy.delta": 1.0,
    "privacy.l2_clip_norm": -0.1,
    "privacy.clip_quantile": 1.0,
    "privacy.clip_quantile_share": 0.0,
    "privacy.clip_quantile_rate": 0.0,
    "privacy.noise_bands": 0,
    "privacy.evaluation_epsilon": 0.0,
    "privacy.expected_batch_size": 0,
    "privacy.max_batch_size": 0,
    "privacy.rows_per_user": 0,
    "privacy.sampling_seed": -1,
    "privacy.noise_seed": 2**128,
    "train.epochs": 0.0,
    "train.num_steps": 0,
    "train.learning_rate": 0.0,
    "train.warmup_steps": -1,
    "train.average_iterates": 1.0,
    "train.microbatch_size": 0,
    "train.eval_every": 0,
    "train.eval_batch_size": 0,
    "train.checkpoint_every": 0,
    "whitening.ridge": 0.0,
    "whitening.power": 0.1,
    "whitening.rank": 0,
    "whitening.rows": 0,
    "generation.max_prompts": 0,
    "generation.batch_size": 0,
    "generation.seed": 2**32,
    "seed": 2**32,
    **{f"synthetic.{name}": 0 for name in kinds(Synthetic)},
}
"""A value just out of range for every option that has a check."""


def test_every_check_has_a_value_that_it_refuses() -> None:
    assert set(BAD) == {key for key, (_, field) in OPTIONS.items() if field.metadata["check"] is not None}


@pytest.mark.parametrize("key", BAD)
def test_a_value_out_of_range_is_refused_by_its_key(key: str) -> None:
    with pytest.raises(ValueError, match=f"^config.{key} must .*, got "):
        Settings().changed({key: BAD[key]})
    if key.startswith("train."):  # whoever makes the group
        with pytest.raises(ValueError, match=f"^config.{key} must .*, got "):
            Train(**{key.removeprefix("train."): BAD[key]})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.num_steps", 2.5, "config.train.num_steps must be an integer or None, got 2.5"),
        ("train.num_steps", True, "config.train.num_steps must be an integer or None, got True"),
        ("privacy.epsilon", "small", "config.privacy.epsilon must be a number, got 'small'"),
        ("privacy.clip", "per_layer", "config.privacy.clip must be one of flat, automatic, got 'per_layer'"),
        ("model.remat", 1, "config.model.remat must be True or False, got 1"),
        ("model.path", None, "config.model.path must be text, got None"),
        ("data.length_groups", (8, "long"), r"config.data.length_groups\[1\] must be an integer, got 'long'"),
        ("data.length_groups", 8, "config.data.length_groups must be a tuple of which each is an integer, got 8"),
        ("data.sensitive", ("names",), r"config.data.sensitive\[0\] must be one of attributes, .* got 'names'"),
        ("train.microbatch_size", "most", "config.train.microbatch_size must be 'auto' or an integer, got 'most'"),
        ("denoise", "truncate_rank", "config.denoise must be a tuple .* got 'truncate_rank'"),
        ("privacy", 3, "config.privacy is 3; give the keys that differ"),
        ("privacy.epsilonn", 3, "config.privacy.epsilonn: there is no such key; did you mean 'epsilon'.* epsilon, del"),
        ("denoise.enabled", False, "config.denoise has no keys below it, such as 'enabled'; give denoise as a whole"),
        ("arms.noisy.seed", 3, "config.arms has no keys below it"),
        ("nonsense.key", 3, "config.nonsense: there is no such key; choose from name, seed, data"),
    ],
)
def test_a_wrong_type_or_key_is_refused_by_name(key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings.from_config({key: value})


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("privacy.epsilon", "3", 3.0),
        ("privacy.epsilon", "inf", math.inf),
        ("privacy.delta", "None", None),
        ("privacy.delta", "1e-5", 1e-5),
        ("train.num_steps", "7", 7),
        ("train.microbatch_size", "auto", "auto"),
        ("train.microbatch_size", "8", 8),
        ("model.remat", "true", True),
        ("data.path", "/data/2026", "/data/2026"),
        ("name", "2026", "2026"),
        ("data.length_groups", "(16, 32)", (16, 32)),
        ("denoise", "()", ()),
        ("denoise", "('low_pass_filter',)", ("low_pass_filter",)),
        ("denoise", "[['truncate_rank', {'rank': 2}]]", (("truncate_rank", {"rank": 2}),)),
        ("optimizer", "adamw", "adamw"),
        ("optimizer", "('adamw', {'b1': 0.5})", ("adamw", {"b1": 0.5})),
    ],
)
def test_what_a_command_line_gives_is_read_by_the_type_of_the_option(key: str, text: str, value: Any) -> None:
    read = parsed(OPTIONS[key][0], text, f"config.{key}")
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("text", ["", "2.5", "many", "(1, 2)"])
def test_text_that_is_no_value_is_refused_as_it_was_given(text: str) -> None:
    with pytest.raises(ValueError, match=r"config.train.num_steps must be an integer or None, got "):
        parsed(OPTIONS["train.num_steps"][0], text, "config.train.num_steps")


CHANGED = Settings().changed(
    {
        "privacy": {"epsilon": 3, "delta": 1e-5},
        "model.lora.targets": ["query"],
        "denoise": (("denoise_matrices", {"gate": ("kappa", {"kappa": 2.0})}),),
        "synthetic": {"num_steps": 3},
        "arms": {"noisy": {"denoise": ()}},
    }
)


@pytest.mark.parametrize("settings", [Settings(), CHANGED], ids=["default", "changed"])
def test_config_json_and_dictionaries_give_the_same_settings_again(settings: Settings) -> None:
    assert Settings.from_config(base.as_config(settings)) == settings
    assert Settings.from_config(as_json(settings)) == settings
    assert Settings.from_config(settings.as_dict()) == settings


def test_a_config_takes_what_the_settings_take() -> None:
    """ConfigDict holds a key to the type of its first value, which for some options is one of several."""
    config = base.get_config()
    config.train.microbatch_size, config.train.num_steps, config.privacy.delta = 8, 5, 1e-5
    config.optimizer, config.denoise, config.privacy.epsilon = "adamw", (), 3
    config.synthetic = base.as_config(Synthetic(num_steps=3))
    settings = Settings.from_config(config)
    assert (settings.train.microbatch_size, settings.optimizer, settings.denoise) == (8, "adamw", ())
    assert settings.synthetic == Synthetic(num_steps=3)
    with pytest.raises(TypeError):
        config.privacy.epsilon = "small"


def test_whole_numbers_become_floats_and_lists_tuples() -> None:
    assert repr(Settings().changed({"privacy.epsilon": 3}).privacy.epsilon) == "3.0"
    assert Settings().changed({"data.length_groups": [8]}).data.length_groups == (8,)
    assert CHANGED.denoise == (("denoise_matrices", {"gate": ("kappa", {"kappa": 2.0})}),)
