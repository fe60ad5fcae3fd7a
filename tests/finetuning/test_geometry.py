"""`config.whitening` in the program: public rows alone, exact resume with the checkpoint's maps, refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dp_rmt.finetuning import assemble
from dp_rmt.finetuning.geometry import geometry_of
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.stages import check_transforms
from dp_rmt.geometry import coordinates_of
from dp_rmt.training.metrics import read_metrics

MakeConfig = Callable[..., Settings]
ADAM = ("adamw", {"b1": 0.5, "weight_decay": 0.0})
WHITENED: dict[str, Any] = {
    "optimizer": ADAM,
    "whitening": {"where": "before_clipping", "rank": 4, "rows": 30},
    "denoise": (("denoise_matrices", {"gate": "kappa"}),),
}


def test_no_row_of_the_data_is_looked_at(make_config: MakeConfig) -> None:
    settings = make_config(WHITENED)
    task = assemble.load_task(settings)
    shuffled = {name: np.roll(values, 1, axis=-1) for name, values in task.train.items()}
    other = dataclasses.replace(task, train=shuffled, evaluations={})
    one, two = geometry_of(settings, task), geometry_of(settings, other)
    assert one is not None
    assert two is not None
    assert one.top_shares == two.top_shares
    jax.tree.map(np.testing.assert_array_equal, one.coordinates, two.coordinates)
    paths = {leaf.path for leaf in one.coordinates.leaves}
    assert "encoder/layers/attention/query/kernel" in paths
    assert not any("embeddings" in path for path in paths)


def test_public_text_gives_other_moments_and_a_missing_file_is_named(make_config: MakeConfig, tmp_path: Path) -> None:
    settings = make_config(WHITENED)
    task = assemble.load_task(settings)
    text = tmp_path / "public.txt"
    words = "the film was a great and moving story of a great friendship , and it was a good day for all in the end"
    text.write_text(f"{words} {words}\n" * 3, encoding="utf-8")
    one = geometry_of(settings, task)
    two = geometry_of(settings.changed({"whitening.text": str(text)}), task)
    assert one is not None
    assert two is not None
    assert one.top_shares != two.top_shares
    with pytest.raises(FileNotFoundError, match=r"config\.whitening\.text=none\.txt: there is no such file"):
        geometry_of(settings.changed({"whitening.text": "none.txt"}), task)
    assert geometry_of(make_config(), task) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "where",
    [
        "before_clipping",
        pytest.param("before_optimizer", marks=pytest.mark.slow),
        pytest.param("after_optimizer", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(make_config: MakeConfig, tmp_path: Path, where: str) -> None:
    settings = make_config({**WHITENED, "whitening.where": where})
    task = assemble.load_task(settings)
    run = assemble.build_run(settings, task, name="run")
    finished = run.train(tmp_path / "whole")
    run.train(tmp_path / "parts", until=2)
    resumed = run.train(tmp_path / "parts")
    for one, two in zip(jax.tree.leaves(finished.params), jax.tree.leaves(resumed.params), strict=True):
        np.testing.assert_array_equal(one, two)
    first = read_metrics(tmp_path / "whole" / "metrics.jsonl")[0]
    assert set(first["geometry/top_share"]) == {
        leaf.path for leaf in coordinates_of((finished.denoise, finished.optimizer)).leaves
    }
    assert all(0 < share <= 1 for share in first["geometry/top_share"].values())
    assert run.identity["whitening.where"] == where
    statement = (tmp_path / "whole" / "privacy.md").read_text()
    assert "computed from random tokens" in statement


@pytest.mark.thorough
def test_the_gradient_of_a_run_is_clipped_in_its_coordinates(make_config: MakeConfig) -> None:
    """With maps a hundred times as large every norm is, too, so that all are clipped."""
    settings = make_config({**WHITENED, "denoise": (), "privacy.l2_clip_norm": 5.0})
    task = assemble.load_task(settings)
    run = assemble.build_run(settings, task, name="run")
    state, groups = run.state, run.loop.groups(run.loop.mechanism.sampling(0).indices(0))
    coordinates = coordinates_of(state.optimizer)
    scales = {id(axis_map.scale) for axis_map in coordinates.maps.values()}
    larger = dataclasses.replace(
        state, optimizer=jax.tree.map(lambda x: 100 * x if id(x) in scales else x + 0, state.optimizer)
    )
    _, large = run.loop.train_step(jax.tree.map(lambda x: x + 0, larger), groups)
    _, plain = run.loop.train_step(state, groups)
    assert float(plain["nonprivate/clipped_fraction"]) < 1
    assert float(large["nonprivate/grad_norm"]) > 20 * float(plain["nonprivate/grad_norm"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": ("kalman_filter", {"optimizer": ADAM, "kappa": 0.7})}, "kalman_filter looks ahead"),
        ({"optimizer": ("adamw", {"weight_decay": 0.1})}, "give weight_decay 0"),
        ({"optimizer": "adamw"}, "weight_decay 0.0001 would shrink"),
    ],
)
@pytest.mark.parametrize("where", ["before_clipping", "after_optimizer"])
def test_what_the_map_would_change_is_refused(where: str, changes: dict[str, Any], message: str) -> None:
    settings = Settings().changed({"whitening.where": where, "denoise": (), **changes})
    with pytest.raises(ValueError, match=message):
        check_transforms(settings)
