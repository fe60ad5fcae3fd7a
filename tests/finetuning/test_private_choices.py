"""The program with a clip norm that follows a quantile and with private evaluation data: trained, and asked again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from dp_rmt.finetuning.assemble import load_task, private_scores
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


def test_a_run_goes_on_with_the_same_evaluation_rows_alone(make_config: Callable[..., Settings]) -> None:
    """The content is compared where a run goes on: with other rows, the same noise would cancel in the difference."""
    settings = make_config({"privacy.evaluation_epsilon": 2.0})
    task = load_task(settings)
    dev = task.evaluations["dev"]

    def content(rows: dict[str, np.ndarray], **changes: int) -> str:
        changed = dataclasses.replace(task, evaluations={"dev": rows})
        scores = private_scores(settings.changed({"train": changes}), 3, 1e-3, changed)
        assert scores is not None
        return scores.content

    flipped = {**dev, "label": np.concatenate([dev["label"][:-1], 1 - dev["label"][-1:]])}
    others = [content({name: values[:-1] for name, values in dev.items()}), content(flipped)]
    others += [content(dev, eval_batch_size=settings.train.eval_batch_size + 1), content(dev)]
    assert len(set(others)) == 4
    assert content({name: values.copy() for name, values in dev.items()}) == others[-1]


def test_a_decoder_has_no_accuracy_to_give_noise(make_config: Callable[..., Settings]) -> None:
    settings = make_config(
        {"privacy.evaluation_epsilon": 2.0, "data.task": "e2e", "model.head": "causal_lm", "model.trainable": ".*"}
    )
    with pytest.raises(ValueError, match=r"config\.privacy\.evaluation_epsilon"):
        arm_settings(settings)
