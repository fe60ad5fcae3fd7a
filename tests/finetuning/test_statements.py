"""What a folder has released is not forgotten, whatever is deleted in it; and delta means something."""

from __future__ import annotations

import dataclasses
import json
import logging as python_logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
import safetensors.numpy
from absl import logging

from dp_rmt.accounting import Truncation, epsilon, largest_true_positive_rate
from dp_rmt.auditing import run_folder
from dp_rmt.finetuning import arms, assemble, statements
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.sweep.spending_table import spent_together
from dp_rmt.noise_addition import NOISE_SUPPORT
from dp_rmt.reporting.numbers import number
from dp_rmt.reporting.provenance import keyed_fingerprint
from dp_rmt.training.ledger import read_ledger
from dp_rmt.training.metrics import read_metrics
from dp_rmt.training.run_start import FILE as START

pytestmark = pytest.mark.thorough


MakeConfig = Callable[..., Settings]
FRESH = {"privacy.sampling_seed": None, "privacy.noise_seed": None, "privacy.accountant": "rdp"}


def run(config: Settings, workdir: Path, *, until: int | None = None) -> list[arms.Arm]:
    prepared = arms.prepare(config, workdir)
    for arm in prepared:
        arms.train(arm, until=until)
    return prepared


class Killed(BaseException):
    """Stands for SIGKILL: nothing that runs on an error or at the end may be reached."""


def kill_at(arm: arms.Arm, step: int) -> arms.Arm:
    """The arm, which dies when it is about to compute update step + 1."""
    compiled = arm.run.loop.train_step

    def train_step(state: Any, groups: Any) -> Any:
        if int(state.step) == step:
            raise Killed
        return compiled(state, groups)

    loop = dataclasses.replace(arm.run.loop, train_step=train_step)
    return dataclasses.replace(arm, run=dataclasses.replace(arm.run, loop=loop))


@pytest.fixture(scope="module")
def finished(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to its end, with seeds of its own."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    run(make_config(FRESH), workdir)
    return workdir


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def model_of(workdir: Path) -> bytes:
    return (workdir / "model" / "model.safetensors").read_bytes()


def test_a_second_run_after_the_checkpoints_were_deleted_is_refused_before_the_model_is_loaded(
    copy: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assemble, "load_task", lambda config: pytest.fail("the task was loaded"))
    before = model_of(copy)
    shutil.rmtree(copy / "checkpoints")
    printed = number(json.loads((copy / "privacy.json").read_text())["epsilon_pld"], "up")
    with pytest.raises(FileExistsError, match=r"says that 3 updates on 120 .*its checkpoints are gone") as no:
        arms.prepare(make_config(FRESH), copy)
    assert f"epsilon = {printed} at delta = 0.001" in str(no.value)
    (copy / "checkpoints").mkdir()
    with pytest.raises(FileExistsError, match="its checkpoints are gone"):
        arms.prepare(make_config(FRESH), copy)
    assert model_of(copy) == before


@pytest.mark.parametrize("left", ["privacy.json", "metrics.jsonl", "model"])
def test_without_ledger_and_checkpoints_the_results_of_a_run_are_not_overwritten(
    copy: Path, make_config: MakeConfig, left: str
) -> None:
    for path in [path for path in copy.iterdir() if path.name not in ("config.json", left)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FileExistsError, match=rf"results of a run \({left}.*neither its checkpoints nor its ledger"):
        arms.prepare(make_config(FRESH), copy)


def test_the_checkpoints_of_another_run_are_refused(copy: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    run(make_config(FRESH), tmp_path / "other", until=2)
    shutil.rmtree(copy / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", copy / "checkpoints")
    before = model_of(copy)
    with pytest.raises(FileExistsError, match="the checkpoints there are those of another run"):
        arms.prepare(make_config(FRESH), copy)
    assert model_of(copy) == before


@pytest.mark.slow
def test_checkpoints_that_are_put_back_are_gone_on_from(copy: Path, make_config: MakeConfig) -> None:
    before = (copy / "ledger.jsonl").read_bytes(), (copy / "privacy.json").read_bytes()
    (copy / "checkpoints").rename(copy / "elsewhere")
    with pytest.raises(FileExistsError):
        arms.prepare(make_config(FRESH), copy)
    (copy / "elsewhere").rename(copy / "checkpoints")
    run(make_config(FRESH), copy)
    assert ((copy / "ledger.jsonl").read_bytes(), (copy / "privacy.json").read_bytes()) == before


def test_a_run_killed_before_its_first_checkpoint_begins_again_with_the_same_noise(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """So that nothing more is spent than one run, and the ledger knows of one alone."""
    config = make_config({**FRESH, "train.checkpoint_every": 3})
    (arm,) = arms.prepare(config, tmp_path / "run")
    with pytest.raises(Killed):
        arms.train(kill_at(arm, 2))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [START]
    first = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["step"] == 1]
    (entry,) = {entry.run for entry in read_ledger(tmp_path / "run")}
    run(config, tmp_path / "run")
    again = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["step"] == 1]
    for line, same in zip(first, again, strict=True):
        assert {**line, "seconds": 0} == {**same, "seconds": 0}
    assert {entry.run for entry in read_ledger(tmp_path / "run")} == {entry}
    assert not (tmp_path / "run" / "checkpoints" / START).exists()


@pytest.mark.slow
def test_a_run_that_begins_again_wants_the_model_that_it_began_with(
    make_config: MakeConfig, model: Path, tmp_path: Path
) -> None:
    """The same noise on other gradients would cancel out."""
    own = shutil.copytree(model, tmp_path / "model")
    config = make_config({**FRESH, "model.path": str(own), "train.checkpoint_every": 3})
    (arm,) = arms.prepare(config, tmp_path / "run")
    with pytest.raises(Killed):
        arms.train(kill_at(arm, 1))
    tensors = safetensors.numpy.load_file(own / "model.safetensors")
    tensors["bert.embeddings.LayerNorm.bias"] = tensors["bert.embeddings.LayerNorm.bias"] + 1
    safetensors.numpy.save_file(tensors, own / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"belongs to another experiment:\n  model\.path\.content: "):
        arms.prepare(config, tmp_path / "run")


def test_the_statement_names_the_run_and_no_folder_of_the_machine_gets_into_a_record(finished: Path) -> None:
    record = json.loads((finished / "privacy.json").read_text())
    (*_, entry) = read_ledger(finished)
    about = record["about"]
    assert (about["task"], about["tuning"], about["version"]) == ("sst2", "full", entry.about.version)
    assert about["data_fingerprint"] == keyed_fingerprint(entry.run, entry.train_data)
    assert (record["date"], record["is_upper_bound"], record["num_steps"]) == (entry.date, False, 3)
    rate, power = record["detection"][1]
    assert power == largest_true_positive_rate(
        false_positive_rate=rate,
        noise_multiplier=entry.noise_multiplier,
        num_steps=3,
        sampling_probability=0.2,
        truncation=Truncation(num_examples=120, max_batch_size=entry.max_batch_size),
        noise_support=NOISE_SUPPORT,
    )
    assert 0.01 < power < 0.02
    assert 0 < record["delta_of_truncation"] < 0.01 * record["delta"]
    page = (finished / "privacy.md").read_text()
    assert entry.run not in page
    assert entry.train_data not in page
    shown = statements.privacy_record(finished)
    assert (shown["about"]["command"], shown["about"]["base_model"]) == (None, "model")


def test_no_secret_stands_in_the_ledger(finished: Path, make_config: MakeConfig) -> None:
    """Neither seed nor key, in decimal or in hexadecimal digits."""
    (arm,) = arms.prepare(make_config(FRESH), finished)
    restored = arm.run.checkpoints(finished).restore(arm.run.state)
    assert restored is not None
    text = (finished / "ledger.jsonl").read_text() + (finished / "privacy.json").read_text()
    words = [int(word) for word in jax.device_get(restored[0].noise.key).ravel()]
    for secret in [restored[1], *words]:
        assert str(secret) not in text
        assert f"{secret:x}" not in text


@pytest.mark.slow
def test_what_two_runs_spent_is_told_together(copy: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    run(make_config(FRESH), tmp_path / "second", until=2)
    text = spent_together([copy, tmp_path / "second"])
    multiplier = number(read_ledger(copy)[-1].noise_multiplier)
    assert [line.split()[1:] for line in text.splitlines()[1:3]] == [
        ["3", multiplier, "0.2", "120"],
        ["2", multiplier, "0.2", "120"],
    ]
    together = epsilon(
        noise_multiplier=read_ledger(copy)[-1].noise_multiplier,
        delta=1e-3,
        sampling_probability=0.2,
        num_steps=5,
        truncation=Truncation(120, read_ledger(copy)[-1].max_batch_size),
    )
    printed = re.search(r"ε = ([\d.]+), ", text)
    assert printed is not None
    assert float(printed[1]) == pytest.approx(together, rel=2e-3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty: no run there has used its data"):
        spent_together([tmp_path / "empty"])


def test_an_audit_keeps_what_the_run_has_spent_meanwhile(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The statement is read again before the bound is put into it."""
    path = copy / "privacy.json"

    def goes_on(*args: Any, **kwargs: Any) -> dict[str, float]:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"epsilon": 0.75, "num_steps": 9}))
        return {"epsilon": 0.1}

    monkeypatch.setattr(run_folder, "repeated_bound", goes_on)
    run_folder.audit_workdir(copy, num_runs=20, seed=0)
    record = json.loads(path.read_text())
    assert (record["epsilon"], record["num_steps"], record["audit"]["epsilon"]) == (0.75, 9, 0.1)


def test_a_delta_above_one_over_the_root_of_n_is_refused_before_the_model_is_loaded(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config({"privacy.delta": 0.0913, "model.path": str(tmp_path / "nowhere")})
    with pytest.raises(ValueError, match=r"delta=0.0913 is above 1 / sqrt\(N\) = 0.0913 of the 120.*Set config"):
        arms.prepare(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_delta_above_one_over_n_is_warned_of(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.get_absl_logger().addHandler(caplog.handler)
    with caplog.at_level(python_logging.WARNING):
        for delta in (0.009, 0.008):
            arms.prepare(make_config({"privacy.delta": delta, "privacy.accountant": "rdp"}), tmp_path / str(delta))
    logging.get_absl_logger().removeHandler(caplog.handler)
    (warning,) = {record.getMessage() for record in caplog.records if "at least 1 / N" in record.getMessage()}
    assert "delta=0.009 is at least 1 / N = 0.00833 of the 120 training examples" in warning
