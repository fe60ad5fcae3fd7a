"""The privacy-utility-efficiency study: a tiny decoder memorises a few documents; record, table, picture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from dp_rmt.data import Document
from dp_rmt.finetuning import assemble
from dp_rmt.finetuning.settings import Settings
from dp_rmt.training.losses import completion_losses, token_losses
from experiments.studies.memorisation import measures
from experiments.studies.memorisation import study as memorisation_study
from experiments.studies.memorisation import table as memorisation_table

NAMES = ("ann", "bob", "cid", "dan", "eve", "fay", "gus", "hal", "ida", "jon")


def text(rng: np.random.Generator) -> str:
    first, second = rng.choice(NAMES, 2)
    digits = " ".join(map(str, rng.integers(10, size=4)))
    return f"{first} likes {second} , number {digits} ."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("documents"), np.random.default_rng(0)
    for split, count in (("train", 24), ("dev", 8), ("test", 30)):
        rows = [{"text": text(rng)} for _ in range(count)]
        if split == "train":
            rows += [{"text": "id 3 1 4 1", "canary": True}] * 4
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def llama(make_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = " ".join((*NAMES, "likes , number . id 0 1 2 3 4 5 6 7 8 9"))
    return make_llama(tmp_path_factory.mktemp("llama"), words, max_length=32)


@pytest.fixture
def config(make_config: Callable[..., Settings], folder: Path, llama: Path) -> Settings:
    changes = {
        "data.task": "documents",
        "data.path": str(folder),
        "data.sensitive": ("numbers",),
        "data.max_length": 16,
        "model.path": str(llama),
        "model.head": "causal_lm",
        "model.trainable": ".*",
        "model.lora.rank": 4,
        "train.eval_every": 100,
        "train.checkpoint_every": 100,
        "privacy.expected_batch_size": 12,
    }
    arms = {
        "full": {"privacy": {"epsilon": math.inf}, "train": {"num_steps": 80, "learning_rate": 3e-2}},
        "lora_4_noisy": {"model": {"tuning": "lora"}},
    }
    return make_config({**changes, "arms": arms})


def run(config: Settings, folder: Path) -> dict[str, dict]:
    """Runs the study in a folder and gives its records by name."""
    study = memorisation_study.Study(config, workdir=folder / "runs", num_secrets=200)
    memorisation_study.run_all(study, folder / "results", epsilons=[0.5], seeds=[0])
    return {path.stem: json.loads(path.read_text()) for path in (folder / "results").iterdir()}


@pytest.mark.slow
def test_a_model_that_memorises_shows_it_and_a_private_one_does_not(config, tmp_path: Path, capsys) -> None:
    records = run(config, tmp_path)
    assert sorted(records) == ["full_seed0", "lora_4_noisy_eps0.5_seed0"]
    full, private = records["full_seed0"], records["lora_4_noisy_eps0.5_seed0"]
    assert full["examples"] == {"train": 24, "canaries": 4, "test": 30}
    assert memorisation_table.memorised(full) > 0.5 > abs(memorisation_table.memorised(private))
    assert full["nonprivate"]["sensitive_drop_train_worst"] >= full["nonprivate"]["sensitive_drop_train"][0]
    assert full["nonprivate"]["membership"]["relative_loss"]["auc"][0] > 0.9
    low, high = private["nonprivate"]["membership"]["loss"]["auc"][1:]
    assert low < 0.5 < high or abs(low - 0.5) < 0.15
    (canary,) = full["canaries"].values()
    assert canary["planted"] == 4
    assert canary["ranked"] > 7 > 3 > next(iter(private["canaries"].values()))["ranked"]
    assert canary["all_secrets_bits"] == pytest.approx(4 * np.log2(10), abs=1e-3)
    assert full["utility"][0] < full["utility_base"][0]
    assert full["utility_base"] == private["utility_base"]
    assert full["cost"]["trained_parameters"] > private["cost"]["trained_parameters"]
    # A multiply-add forward and twice that backward, or more, for each token and parameter.
    assert full["cost"]["matrix_flops"] > 6 * 12 * 10 * (full["cost"]["trained_parameters"] - 32 * 16)
    assert full["cost"]["temp_bytes"] > 0
    assert (full["privacy"]["target_epsilon"], private["privacy"]["target_epsilon"]) == (None, 0.5)
    assert str(tmp_path) not in json.dumps(records)
    assert "loss on dev" in capsys.readouterr().out

    broken = full | {"cost": {}}
    (tmp_path / "results" / "full_seed0.json").write_text(json.dumps(broken))
    study = memorisation_study.Study(config, workdir=tmp_path / "runs", num_secrets=200, names=["full"])
    memorisation_study.measure_costs(study, tmp_path / "results", epsilons=[0.5], seeds=[0, 1])
    mended = json.loads((tmp_path / "results" / "full_seed0.json").read_text())
    assert mended["cost"]["matrix_flops"] == full["cost"]["matrix_flops"]
    assert mended["cost"].keys() == full["cost"].keys()
    records["full_seed0"] = mended

    modified = [path.stat().st_mtime_ns for path in sorted((tmp_path / "results").iterdir())]
    assert run(config, tmp_path) == records  # nothing is done twice
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "results").iterdir())] == modified

    listed = memorisation_table.read_records(tmp_path / "results")
    printed = memorisation_table.table(listed)
    assert f"| inf | full | 0.03 | 1 | {full['nonprivate']['sensitive_drop_train'][0]:.3f} |" in printed
    assert "| 0.5 | lora_4_noisy |" in printed
    memorisation_table.figure(listed, tmp_path / "images" / "a.png")
    assert (tmp_path / "images" / "a.png").stat().st_size > 10_000


@pytest.mark.slow
def test_rates_are_added_to_their_record(config, tmp_path: Path) -> None:
    study = memorisation_study.Study(config, workdir=tmp_path, num_secrets=200, names=["lora_4_noisy"])
    record = tmp_path / "rates.json"
    record.write_text(json.dumps({"full": {"best": 1.0}, "lora_4_noisy": {"best": 0.5, "loss on dev": {"0.5": 99.0}}}))
    memorisation_study.try_rates(study, [1e-3, 1e-2], record, epsilon=0.5, seed=0)
    found = json.loads(record.read_text())
    assert found["full"] == {"best": 1.0}
    losses = found["lora_4_noisy"]["loss on dev"]
    assert list(losses) == ["0.001", "0.01", "0.5"]
    assert losses["0.001"] != losses["0.01"] < losses["0.5"]
    assert losses[f"{found['lora_4_noisy']['best']:g}"] == min(losses.values())


@pytest.mark.slow
def test_losses_by_token_are_those_that_training_averages(config: Settings) -> None:
    task = assemble.load_task(config)
    rows = task.evaluations["dev"]
    by_token = measures.losses_by_token(jax.jit(token_losses(task.module)), task.params, rows, batch_size=5)
    assert by_token.shape == rows["input_ids"].shape
    assert not by_token[rows["loss_mask"] == 0].any()
    means = by_token.sum(axis=1) / rows["loss_mask"].sum(axis=1)
    np.testing.assert_allclose(means, completion_losses(task.module)(task.params, rows), rtol=1e-5)


@pytest.mark.slow
def test_a_canary_without_digits_is_refused(config: Settings) -> None:
    task = assemble.load_task(config)
    canary = Document("id ann", "train.jsonl, line 3", is_canary=True, spans=((3, 6),))
    with pytest.raises(ValueError, match=r"train.jsonl, line 3: the canary 'id ann' has no digit"):
        measures.canary_exposure(lambda *_: None, task.params, [canary], task.tokenizer, num_secrets=9, batch_size=9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.sensitive": ("emails",)}, "none of the 28 training documents has a sensitive character"),
        (
            {"data.sensitive": ("names",)},
            r"config.data.sensitive\[0\] must be one of attributes, .* got 'names'",
        ),
        ({"data.max_length": 5}, r"train.jsonl, line 25: the canary has 7 tokens, but max_length=5 is the context"),
        ({"model.head": "classification"}, "documents need 'causal_lm'"),
    ],
)
def test_bad_input_is_told_before_anything_trains(config, changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(config.changed(changes), tmp_path)
    assert not (tmp_path / "results").exists()


def test_arms_share_their_data_and_records_must_be_there(config: Settings, tmp_path: Path) -> None:
    other = config.changed({"arms": {**config.arms, "full": {"data": {"max_length": 12}}}})
    with pytest.raises(ValueError, match="the arms of this study share their data"):
        memorisation_study.Study(other, workdir=tmp_path, num_secrets=200)
    with pytest.raises(ValueError, match="--arms: 'lora' is none of the config's arms, full, lora_4_noisy"):
        memorisation_study.Study(config, workdir=tmp_path, num_secrets=200, names=["full", "lora"])
    with pytest.raises(SystemExit, match="holds no records"):
        memorisation_table.read_records(tmp_path)
