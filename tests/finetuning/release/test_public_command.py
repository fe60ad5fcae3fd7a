"""The command on a card: it gives the same settings again, but for what is not published."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import Any

import pytest

from dp_rmt.finetuning import command_line
from dp_rmt.finetuning.options import walk
from dp_rmt.finetuning.release.public_command import public_command
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.shorthand import completed, settings_from, started

SECRET = "a_word_that_is_not_published"
TYPED: dict[str, Any] = {
    "name": SECRET,
    "data.cache_dir": SECRET,
    "data.text_columns": (SECRET,),
    "data.label_column": SECRET,
    "data.labels": (SECRET, "other"),
    "data.drop_labels": (SECRET,),
    "data.dev_path": SECRET,
    "data.source_column": SECRET,
    "whitening.text": SECRET,
    "release.data_name": SECRET,
    "privacy.noise_seed": 1234567890123,
    "privacy.sampling_seed": 1234567890124,
}
PUBLIC: dict[str, Any] = {
    "model.tuning": "lora",
    "model.lora.targets": ("query",),
    "privacy.delta": 1e-6,
    "privacy.clip": "automatic",
    "train.num_steps": 7,
    "train.warmup_steps": 2,
    "denoise": (),
    "optimizer": ("muon", {"b1": 0.8}),
    "generation.method": "greedy",
    "data.length_groups": (8, 16),
}


def parsed(command: str, data: Path) -> Settings:
    """The settings that the program makes of a command."""
    words = shlex.split(command)
    assert words[:2] == ["dp-rmt", "finetune"]
    rest, assignments = command_line.split(words[2:])
    given = dict(word.removeprefix("--").split("=", 1) for word in rest)
    train = given["train"].replace("DATA", str(data))
    start = started(given["model"], train, float(given["epsilon"]))
    return completed(command_line.read(None, assignments, default=lambda: start))


@pytest.mark.parametrize("train", ["sst2", "e2e", "own"])
def test_the_command_gives_the_same_settings(train: str, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\na,b\n")
    settings = settings_from("roberta-base", str(tmp_path) if train == "own" else train, 3.0, PUBLIC)
    command = public_command(settings, "roberta-base")
    assert str(tmp_path) not in command
    assert parsed(command, tmp_path) == settings


def test_nothing_that_a_user_typed_is_in_it(tmp_path: Path) -> None:
    settings = Settings().changed({"data.path": SECRET, "model.path": SECRET, "data.task": "labelled_table", **TYPED})
    command = public_command(settings, None)
    assert SECRET not in command
    assert "123456789012" not in command
    assert "--model=MODEL --train=DATA" in command
    assert "--config.data.text_columns=TEXT_COLUMNS" in command


def test_every_option_of_free_text_is_left_out_unless_it_names_a_part() -> None:
    """Also those that are still to come: whatever takes any text is changed, and must not be seen."""
    shown = set()
    for key, *_ in walk(Settings):
        for value in (SECRET, (SECRET,)):
            with contextlib.suppress(ValueError):  # options of another type
                changed = Settings().changed({key: value})
                shown |= {key} if SECRET in public_command(changed, None) else set()
    assert shown == {"denoise", "optimizer", "model.lora.targets", "model.trainable"}
