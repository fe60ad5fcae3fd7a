"""A run goes on, and is asked again, wherever its folder, its data and its model lie, and with other settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dp_rmt.finetuning import arms
from dp_rmt.finetuning.door import load_finetuned
from dp_rmt.finetuning.settings import Settings
from dp_rmt.training.ledger import only_writer
from dp_rmt.training.metrics import read_metrics


@pytest.fixture(scope="module")
def stopped(make_config: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Path]:
    """Settings and folder of a run that was stopped after two updates of three."""
    settings, folder = make_config(), tmp_path_factory.mktemp("first") / "run"
    (arm,) = arms.prepare(settings, folder)
    arms.train(arm, until=2)
    return settings, folder


def copies(settings: Settings, folder: Path, to: Path) -> tuple[Settings, Path]:
    """The run's folder, its data and its model elsewhere, and the settings that name them there."""
    for name, path in (("data", settings.data.path), ("model", settings.model.path), ("run", folder)):
        shutil.copytree(str(path), to / name)
    changes = {"data.path": str(to / "data"), "data.cache_dir": str(to / "cache"), "model.path": str(to / "model")}
    return settings.changed(changes), to / "run"


@pytest.mark.slow
def test_a_copied_folder_goes_on_with_copied_data_and_model(stopped: tuple[Settings, Path], tmp_path: Path) -> None:
    settings, folder = copies(*stopped, tmp_path)
    settings = settings.changed({"train.eval_every": 1, "train.checkpoint_every": 7, "train.eval_batch_size": 16})
    (arm,) = arms.prepare(settings, folder)
    arms.train(arm)
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl") if "learning_rate" in line] == [1, 2, 3]
    assert json.loads((folder / "config.json").read_text())["data"]["path"] == str(tmp_path / "data")


@pytest.mark.thorough
def test_other_data_or_another_model_are_refused(stopped: tuple[Settings, Path], tmp_path: Path) -> None:
    settings, folder = copies(*stopped, tmp_path)
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(
        ValueError, match=r"another experiment:\n  model.path.content: checkpoint '\w{64}', now '\w{64}'"
    ):
        arms.prepare(settings, folder)
    config.write_text(config.read_text()[:-1])
    train = tmp_path / "data" / "train.tsv"
    train.write_text(train.read_text().replace("\t1\n", "\t0\n", 1))
    with pytest.raises(ValueError, match=r"another experiment:\n  train_data: "):
        arms.prepare(settings, folder)
    assert json.loads((folder / "config.json").read_text())["data"]["path"] == str(stopped[0].data.path)


@pytest.mark.slow
@pytest.mark.parametrize("content", [None, "0" * 64])
def test_a_checkpoint_that_knows_no_content_compares_the_path(
    content: str | None, stopped: tuple[Settings, Path], tmp_path: Path
) -> None:
    settings, folder = copies(*stopped, tmp_path)
    for meta in (folder / "checkpoints").glob("*/meta/metadata"):
        record = json.loads(meta.read_text())
        record["identity"].pop("model.path.content")
        record["identity"] |= {} if content is None else {"model.path.content": content}
        meta.write_text(json.dumps(record))
        (meta.parents[1] / "sha256.json").unlink()
    differs = "model.path: " if content is None else "model.path.content: "
    with pytest.raises(ValueError, match=rf"another experiment:\n  {differs}"):
        arms.prepare(settings, folder)
    if content is None:
        arms.prepare(settings.changed({"model.path": str(stopped[0].model.path)}), folder)


@pytest.mark.parametrize(
    "changes",
    [{"train.num_steps": 4}, {"privacy.l2_clip_norm": 0.2}, {"data.max_length": 23}, {"arms": {"a": {}, "b": {}}}],
)
def test_what_the_noise_depends_on_stays(
    changes: dict[str, Any], stopped: tuple[Settings, Path], tmp_path: Path
) -> None:
    settings, folder = stopped
    before = (folder / "config.json").read_text()
    with pytest.raises(ValueError, match=rf"holds another experiment; .*\n  {next(iter(changes))}"):
        arms.prepare(settings.changed(changes), folder)
    assert (folder / "config.json").read_text() == before


@pytest.mark.slow
def test_an_arms_own_settings_may_change_as_a_runs(make_config: Callable[..., Settings], tmp_path: Path) -> None:
    both = {"a": {"train": {"eval_every": 1}}, "b": {}}
    arms.prepare(make_config({"arms": both}), tmp_path / "run")
    both["a"]["train"]["eval_every"] = 2
    arms.prepare(make_config({"arms": both}), tmp_path / "run")
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["arms"]["a"] == {"train": {"eval_every": 2}}
    both["a"]["train"] = {"learning_rate": 0.5}
    with pytest.raises(ValueError, match=r"arms.a.train.learning_rate: there None, now 0.5"):
        arms.prepare(make_config({"arms": both}), tmp_path / "run")


# ---- Asked again ----------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_a_stopped_run_is_asked_without_being_trained(stopped: tuple[Settings, Path], tmp_path: Path) -> None:
    """It answers with the last checkpoint, has its own scores again, and leaves the folder as it was."""
    settings, folder = copies(*stopped, tmp_path)
    shutil.rmtree(folder / "model")  # as a run that was stopped by a signal leaves it
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    model = load_finetuned(folder)
    last = [line for line in read_metrics(folder / "metrics.jsonl") if "eval/dev/accuracy" in line][-1]
    assert last["step"] == 2
    assert model.scores["dev/accuracy"] == last["eval/dev/accuracy"]
    assert model.scores["dev/loss"] == pytest.approx(last["eval/dev/loss"], rel=1e-6)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    changed = load_finetuned(folder, data={"path": settings.data.path, "max_length": 12}, eval_batch_size=8)
    assert (changed.settings.data.max_length, changed.settings.train.eval_batch_size) == (12, 8)
    assert changed.scores["dev/loss"] != model.scores["dev/loss"]
    jax.tree.map(np.testing.assert_array_equal, changed.params, model.params)


@pytest.mark.slow
def test_a_folder_without_checkpoints_is_asked_by_its_model(stopped: tuple[Settings, Path], tmp_path: Path) -> None:
    _, folder = copies(*stopped, tmp_path)
    with_checkpoints = load_finetuned(folder)
    shutil.rmtree(folder / "checkpoints")
    alone = load_finetuned(folder)
    jax.tree.map(np.testing.assert_array_equal, alone.params, dict(with_checkpoints.params))
    assert alone.predict(["a fine film", "a bad film"]) == with_checkpoints.predict(["a fine film", "a bad film"])
    shutil.rmtree(folder / "model")
    with pytest.raises(FileNotFoundError, match="has neither checkpoints nor a model"):
        load_finetuned(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 4}, r"config.train.num_steps was fixed by training: there 3, asked for 4"),
        ({"epsilon": 1.0}, r"config.privacy.epsilon was fixed by training"),
        ({"model": {"tuning": "bias"}}, r"config.model.t\w+ was fixed by training"),
        ({"data": {"task": "e2e"}}, r"'e2e' and config.model.head='classification' do not go together"),
    ],
)
def test_what_training_fixed_cannot_be_asked_otherwise(
    changes: dict[str, Any], message: str, stopped: tuple[Settings, Path]
) -> None:
    with pytest.raises(ValueError, match=message):
        load_finetuned(stopped[1], **changes)


def test_a_run_that_is_training_is_not_read(stopped: tuple[Settings, Path]) -> None:
    """Opening its checkpoints would remove the one that is being written."""
    with only_writer(stopped[1]), pytest.raises(BlockingIOError, match="another process trains in"):
        load_finetuned(stopped[1])
