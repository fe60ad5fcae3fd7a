"""The plan of a run is right and printed before a model is loaded; the columns of one's own data say the task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from own_data import CELLS, FORMATS

from dp_rmt.data.readers import tables
from dp_rmt.finetuning import arms, assemble, defaults, shorthand
from dp_rmt.finetuning.command_line import read, split
from dp_rmt.finetuning.plan import build_mechanism, plan
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.shorthand import settings_from
from dp_rmt.finetuning.tasks import classification

QUICK = {"privacy.accountant": "rdp", "privacy.epsilon": 4.0}


def test_the_hubs_names_begin_alike_where_they_are_told_and_where_they_are_read() -> None:
    """They stand twice, because the readers load NumPy, and a mistyped word is to be answered at once."""
    assert shorthand.HUB == tables.HUB


def test_the_plan_has_the_numbers_of_the_run() -> None:
    settings = Settings().changed({**QUICK, "privacy.epsilon": 8.0})
    mechanism, delta = build_mechanism(settings, 600)
    assert (mechanism.expected_batch_size, mechanism.num_steps) == (64, 28)
    assert mechanism.epsilon(28, delta) == pytest.approx(8.0, rel=1e-3)
    said = plan(settings, 600)
    assert said == f"600 rows, batch 64, 28 steps, noise {mechanism.noise_multiplier:.3g}, epsilon 8, delta 0.0008791"
    assert mechanism.noise_generator == "threefry2x32"
    of_cipher, _ = build_mechanism(settings.changed({"privacy.noise_generator": "chacha20"}), 600)
    assert of_cipher == dataclasses.replace(mechanism, noise_generator="chacha20")
    without = plan(settings.changed({"privacy.epsilon": float("inf")}), 67_349)
    assert without == "67,349 rows, batch 1000, 202 steps, no noise, and no privacy"


def test_whole_microbatches_are_paid_for_and_no_more() -> None:
    """A batch that is filled up to whole microbatches is cut more rarely, so that less noise reaches the target."""
    settings = Settings().changed({"privacy": {"epsilon": 4.0}})
    planned, delta = build_mechanism(settings, 600)
    filled, _ = build_mechanism(settings.changed({"train.microbatch_size": 32}), 600)
    assert filled.max_batch_size == -(-planned.max_batch_size // 32) * 32 > planned.max_batch_size
    assert filled.noise_multiplier < planned.noise_multiplier
    for mechanism in (planned, filled):
        assert 4.0 * (1 - 1e-3) < mechanism.epsilon(mechanism.num_steps, delta) <= 4.0


@pytest.mark.parametrize("num_examples", [1, 2, 9, 10, 45, 46, 600, 9_999, 10_000, 67_349])
def test_the_default_batch_follows_the_data_and_always_fits(num_examples: int) -> None:
    size = defaults.expected_batch_size(None, num_examples)
    assert 1 <= size <= min(num_examples, 1000)
    assert size in (1000, 2 ** (size.bit_length() - 1))
    assert size == 1000 or num_examples < 10 or 2**-0.5 <= size / (num_examples / 10) <= 2**0.5
    assert defaults.expected_batch_size(7, num_examples) == 7


def test_no_length_given_is_three_epochs_from_a_command_line_too(tmp_path: Path) -> None:
    file = tmp_path / "c.py"
    file.write_text('def get_config():\n    return {"train": {"epochs": 5.0}}\n')
    for arguments in (
        ["--config.train.epochs=None"],
        ["--config.train.epochs", "None", "--config.train.num_steps=None"],
    ):
        settings = read(str(file), split(arguments)[1])
        (arm,) = arms.arm_settings(settings).values()
        assert build_mechanism(arm.changed(QUICK), 600)[0].num_steps == 28
    steps = read(str(file), split(["--config.train.epochs=None", "--config.train.num_steps=9"])[1])
    assert build_mechanism(steps.changed(QUICK), 600)[0].num_steps == 9


def test_it_is_printed_before_the_model_is_loaded_and_a_batch_that_is_too_large_ends_it_there(
    make_config: Callable[..., Settings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class LoadedError(Exception):
        pass

    def load(*args: Any, **options: Any) -> None:
        raise LoadedError

    monkeypatch.setattr(classification, "load_pretrained", load)
    monkeypatch.setattr(classification, "load_tokenizer", load)
    settings = make_config({**QUICK, "arms": {"a": {}, "b": {"privacy": {"epsilon": 2.0}}}})
    with pytest.raises(LoadedError):
        arms.prepare(settings, tmp_path / "run")
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(", noise")[0] for line in said] == [
        f"plan of {arm}: 120 rows, batch 24, 3 steps" for arm in "ab"
    ]
    assert [line.rpartition("epsilon ")[2] for line in said] == ["4, delta 0.001", "2, delta 0.001"]
    too_large = settings.changed({"arms": {"a": {}, "b": {"privacy": {"expected_batch_size": 1024}}}})
    with pytest.raises(ValueError, match=r"=1024 is more than there are. Lower it, or give None for 16, which follows"):
        arms.prepare(too_large, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("task", CELLS)
def test_columns_say_the_task(task: str, tmp_path: Path) -> None:
    cell = CELLS[task]
    settings = settings_from("m", list(cell.rows), 3.0, cell.settings)
    assert (settings.data.task, settings.data.path) == (cell.task, None)
    assert settings.model.head == ("classification" if cell.task == "labelled_table" else "causal_lm")
    file = FORMATS["json"](cell.rows, tmp_path)
    assert settings_from("m", file, 3.0, cell.settings).data.task == cell.task
    assert settings_from("m", file, 3.0, {"data": {"task": "documents"}}).data.task == "documents"


def test_without_settings_text_with_a_label_is_labelled_text() -> None:
    row = {"text": "a", "label": "b", "prompt": "c", "completion": "d"}
    assert settings_from("m", [row], 3.0).data.task == "labelled_table"
    assert settings_from("m", [row], 3.0, {"target_column": "text", "source_column": "a"}).data.task == "text_pairs"
    assert settings_from("m", [{"text": "a", "prompt": "c", "completion": "d"}], 3.0).data.task == "text_pairs"


def test_a_folder_of_texts_is_documents_and_what_says_nothing_is_asked_about(tmp_path: Path) -> None:
    (tmp_path / "texts" / "train").mkdir(parents=True)
    (tmp_path / "texts" / "train" / "a.txt").write_text("once")
    assert settings_from("m", tmp_path / "texts", 3.0).data.task == "documents"
    with pytest.raises(
        ValueError, match=r"the rows given \(list\): the columns 'a', 'b' do not say what to learn. Name"
    ):
        settings_from("m", [{"a": "x", "b": "y"}], 3.0)
    with pytest.raises(FileNotFoundError, match=r"there is no such file .* other data sets are named hub:NAME"):
        settings_from("m", "someone/reviews", 3.0)


def test_rows_are_for_tasks_of_ones_own_and_these_need_some() -> None:
    with pytest.raises(ValueError, match=r"config.data.task='sst2' reads its own files and takes no rows"):
        assemble.load_task(Settings(), [{"text": "a"}])
    with pytest.raises(
        ValueError, match=r"config.data.task='text_pairs' reads your own data: set .* or call dp_rmt.finetune"
    ):
        assemble.load_task(Settings().changed({"data.task": "text_pairs"}))


@pytest.mark.parametrize(
    "names", [{"source_column": "a"}, {"messages_column": "m", "source_column": "a", "target_column": "b"}]
)
def test_columns_that_do_not_go_together(names: dict[str, str]) -> None:
    settings = Settings().changed({"data": {"task": "text_pairs", **names}})
    with pytest.raises(ValueError, match="name both source_column and target_column, or messages_column alone"):
        assemble.load_task(settings, [{"a": "x"}])
