"""The middle door before the first step: seeds, execution, what is found, refused and warned of."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging as python_logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import optax
import pytest
from absl import logging
from mlp_run import *  # noqa: F403  (its fixtures)
from mlp_run import EXECUTION, MECHANISM, flax_losses, lines, make_task, plain_losses, prepare, with_sgd

from dp_rmt import DPSGD
from dp_rmt.clipping.execution import Execution
from dp_rmt.noise_addition import noise_key
from dp_rmt.training import About, Seeds, Transforms


def test_seeds_are_drawn_for_each_run_unless_given(tmp_path: Path) -> None:
    runs = [prepare(seeds=Seeds()) for _ in range(2)]
    assert len({run.sampling_seed for run in runs}) == 2
    assert not np.array_equal(runs[0].state.noise.key, runs[1].state.noise.key)
    runs[0].train(tmp_path, until=1)
    assert json.loads((tmp_path / "privacy.json").read_text())["seeds_from"] == "os entropy"
    assert prepare(seeds=Seeds(noise=3)).guarantee.seeds_given


def test_nothing_has_to_be_said_of_the_execution(finished: SimpleNamespace, tmp_path: Path) -> None:
    """By default Flax layers are clipped by their rules, and other losses by vmap: the same but for rounding."""
    for losses in (flax_losses, plain_losses):
        run = prepare(make_task(losses), execution=Execution())
        assert (run.identity["clipping_method"], run.identity["microbatch_size"]) == ("auto", "auto")
        run.train(tmp_path / losses.__name__, until=2)
        found, expected = (
            [
                [line[f"nonprivate/{name}"] for line in of if "nonprivate/loss" in line][:2]
                for name in ("loss", "grad_norm")
            ]
            for of in (lines(tmp_path / losses.__name__), finished.lines)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-4)  # Adam divides by what may be small


def test_losses_without_flax_are_clipped_by_vmap(finished: SimpleNamespace, tmp_path: Path) -> None:
    state = prepare(make_task(plain_losses), execution=EXECUTION).train(tmp_path)
    for leaf, same in zip(*map(jax.tree.leaves, (state.params, finished.state.params)), strict=True):
        np.testing.assert_allclose(leaf, same, rtol=0, atol=1e-4)  # of up to 6 steps of 0.05


def test_what_is_frozen_stays_and_what_is_published_is_whole(tmp_path: Path) -> None:
    task = make_task(trainable="out")
    run = prepare(task)
    seen = []
    state = run.train(tmp_path, until=2, write_results=lambda *given: seen.append(given))
    assert list(state.params["params"]) == ["out"]
    published = run.published_params(state)
    np.testing.assert_array_equal(published["params"]["in"]["kernel"], task.params["params"]["in"]["kernel"])
    ((step, params, metrics),) = seen
    assert (step, metrics.path) == (2, tmp_path / "metrics.jsonl")
    jax.tree.map(np.testing.assert_array_equal, params, published)


def test_the_microbatch_size_is_found_by_compiling_or_rounded_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A power of two of at most a quarter of the expected batch of 12."""
    devices = jax.device_count()
    found = prepare(execution=Execution("vmap"))
    assert found.loop.microbatch_size == max(1, 1 << (12 // (4 * devices)).bit_length() - 1) * devices
    assert prepare(execution=Execution("vmap", 5)).loop.microbatch_size == -(-5 // devices) * devices
    monkeypatch.setattr("dp_rmt.training.microbatches.default_memory_budget", lambda: 1000)
    with pytest.raises(ValueError, match="one example at a time needs"):
        prepare(execution=Execution("vmap"))


def test_a_run_tells_of_its_model(tmp_path: Path) -> None:
    about = About(base_model="folder/mlp", task="signs", tuning="full", target_epsilon=9.0, texts_of="test")
    prepare(about=about, nonprivate_metrics=False, learning_rate=lambda step: 0.05).train(tmp_path, until=1)
    record = json.loads((tmp_path / "privacy.json").read_text())
    assert (record["about"]["base_model"], record["about"]["task"], record["about"]["tuning"]) == (
        "folder/mlp",
        "signs",
        "full",
    )
    assert (record["target_epsilon"], record["evaluation_data"], record["texts_of"]) == (9.0, ["dev", "test"], "test")
    assert record["nonprivate_metrics"] is False
    line = lines(tmp_path)[1]
    assert line["learning_rate"] == 0.05
    assert not any(name.startswith("nonprivate/") for name in line)


def no_noise(mechanism: DPSGD, noise_seed: int, mesh: Any) -> Transforms:
    return Transforms(optax.identity(), optax.identity(), optax.sgd(0.1))


def own_noise(mechanism: DPSGD, noise_seed: int, mesh: Any) -> Transforms:
    return Transforms(mechanism.noise(noise_key(1)), optax.identity(), optax.sgd(0.1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mechanism": dataclasses.replace(MECHANISM, num_examples=70)},
            "accounts for 70 examples and the task has 60",
        ),
        ({"delta": 0.2}, r"delta=0.2 is above 1 / sqrt\(N\) = 0.129 of the 60"),
        ({"delta": 0.0}, "delta must be above 0 and below 1"),
        ({"transforms": no_noise}, "noise is not that of the run's seed: let the function return Transforms"),
        ({"transforms": own_noise}, "noise is not that of the run's seed"),
        ({"seeds": Seeds(noise=2**128)}, r"must be in \[0, 2\^128\)"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(**options)


def test_fast_clipping_of_losses_that_it_does_not_know_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match=r"clipping_method='ghost' does not fit this model: .*give clipping_method='v"):
        prepare(make_task(plain_losses), execution=Execution("ghost", None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"x": np.ones((3, 2)), "y": np.ones(4)}}, "the first axis of each must be the examples"),
        ({"train": {}}, "the first axis of each must be the examples"),
        ({"train": {"x": np.ones(())}}, "the first axis of each must be the examples"),
        ({"lengths": (4,)}, "whose train data has an 'attention_mask'"),
        ({"params": {"w": [np.ones(2), np.ones(2)]}}, "params must be nested dicts"),
        ({"params": np.ones(2)}, "params must be nested dicts"),
    ],
)
def test_a_task_refuses_what_is_none(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(make_task(), **changes)


@contextlib.contextmanager
def warnings_of(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    found: list[str] = []
    logging.get_absl_logger().addHandler(caplog.handler)
    with caplog.at_level(python_logging.WARNING):
        yield found
    logging.get_absl_logger().removeHandler(caplog.handler)
    found += {record.getMessage() for record in caplog.records}


def test_a_denoiser_without_matrices_and_a_large_delta_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with warnings_of(caplog) as found:
        prepare(make_task(trainable="bias"), delta=0.02)
    assert any("has no matrix among what is trained" in message for message in found)
    assert any("delta=0.02 is at least 1 / N = 0.0167 of the 60 training examples" in message for message in found)
    caplog.clear()
    with warnings_of(caplog) as found:
        prepare()
    assert not found


def test_without_noise_nothing_is_promised(tmp_path: Path) -> None:
    mechanism = dataclasses.replace(MECHANISM, noise_multiplier=0.0, l2_clip_norm=float("inf"))
    prepare(mechanism=mechanism, transforms=with_sgd).train(tmp_path, until=1)
    record = json.loads((tmp_path / "privacy.json").read_text())
    assert (record["is_private"], record["epsilon"], record["l2_clip_norm"]) == (False, None, None)
