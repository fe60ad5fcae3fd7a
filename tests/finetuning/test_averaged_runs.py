"""The program with `train.average_iterates`: the average is evaluated, saved, resumed exactly, and in the identity."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

from dp_rmt.finetuning import arms
from dp_rmt.finetuning.settings import Settings
from dp_rmt.models import load_pretrained
from dp_rmt.training.metrics import read_metrics
from dp_rmt.trees import merge_params

MakeConfig = Callable[..., Settings]
AVERAGED: dict[str, Any] = {"train.average_iterates": 0.7}


def run(config: Settings, workdir: Path, *, until: int | None = None) -> arms.Arm:
    (arm,) = arms.prepare(config, workdir)
    arms.train(arm, until=until)
    return arm


@pytest.mark.slow
def test_the_average_is_what_a_run_evaluates_and_saves(make_config: MakeConfig, tmp_path: Path) -> None:
    whole = run(make_config(AVERAGED), tmp_path / "whole")
    restored = whole.run.checkpoints(tmp_path / "whole").restore(whole.run.state)
    assert restored is not None
    state = restored[0]
    published = whole.run.published_params(state)
    batch = {name: values[:8] for name, values in whole.task.evaluations["dev"].items()}
    inputs = (batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
    module, saved = load_pretrained(tmp_path / "whole" / "model", num_labels=2, key=jax.random.key(9))
    logits = module.apply({"params": saved}, *inputs)
    np.testing.assert_array_equal(logits, whole.task.module.apply({"params": published}, *inputs))
    last = whole.task.module.apply({"params": merge_params(state.params, state.frozen)}, *inputs)
    assert float(np.abs(logits - last).max()) > 1e-5  # which is not the last iterate
    last_line = [line for line in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "eval/dev/loss" in line][-1]
    assert last_line["eval/dev/loss"] == whole.run.loop.evaluators["dev"](published)["loss"]

    run(make_config(AVERAGED), tmp_path / "parts", until=2)
    run(make_config(AVERAGED), tmp_path / "parts")
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "parts")]
    one, other = map(safetensors.numpy.load_file, files)
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)

    assert whole.run.identity["train.average_iterates"] == "0.7"
    (plain,) = arms.prepare(make_config(), tmp_path / "plain")
    assert "train.average_iterates" not in plain.run.identity
    with pytest.raises(ValueError, match=r"train\.average_iterates: there 0\.7, now 0\.5"):
        arms.prepare(make_config({"train.average_iterates": 0.5}), tmp_path / "whole")
