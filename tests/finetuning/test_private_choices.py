"""The program with a clip norm that follows a quantile and with private evaluation data: trained, and asked again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from dp_rmt.finetuning.checks import arm_settings
from dp_rmt.finetuning.door import finetune_with, load_finetuned
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.trained import read_trained
from dp_rmt.finetuning.workdir import as_json


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_run_with_both_is_trained_and_asked_again(make_config: Callable[..., Settings], tmp_path: Path) -> None:
    settings = make_config(
        {
            "privacy.clip_quantile": 0.5,
            "privacy.evaluation_epsilon": 2.0,
            "privacy.sampling_seed": None,
            "privacy.noise_seed": None,
        }
    )
    tuned = finetune_with(settings, tmp_path / "run")
    again = load_finetuned(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, tuned.params, again.params)
    assert tuned.scores.keys() == again.scores.keys() == {"dev/accuracy"}
    assert tuned.scores == again.scores
    assert tuned.privacy["clip_quantile"] == [0.5, 0.01]
    assert tuned.privacy["evaluation_guarantee"][:2] == [2.0, 1e-3]


def test_scores_on_private_data_are_not_shown_as_those_of_other_data(
    make_config: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = make_config({"privacy.evaluation_epsilon": 2.0})
    (tmp_path / "config.json").write_text(json.dumps(as_json(settings)))
    with pytest.raises(ValueError, match="has none on other data"):
        read_trained(tmp_path, None, lambda settings: settings.changed({"data.max_length": 20}))
    with pytest.raises(ValueError, match=r"config\.privacy\.evaluation_epsilon was fixed by training"):
        read_trained(tmp_path, None, lambda settings: settings.changed({"privacy.evaluation_epsilon": None}))
    with pytest.raises(FileNotFoundError, match="train the run first"):
        read_trained(tmp_path, None, lambda settings: settings)


def test_a_decoder_has_no_accuracy_to_give_noise(make_config: Callable[..., Settings]) -> None:
    settings = make_config(
        {"privacy.evaluation_epsilon": 2.0, "data.task": "e2e", "model.head": "causal_lm", "model.trainable": ".*"}
    )
    with pytest.raises(ValueError, match=r"config\.privacy\.evaluation_epsilon"):
        arm_settings(settings)
