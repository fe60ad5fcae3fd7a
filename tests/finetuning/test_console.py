"""The console script, in processes of its own and outside a checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dp_rmt
from dp_rmt.finetuning.command_line import read, split
from dp_rmt.finetuning.options import walk
from dp_rmt.finetuning.settings import Settings

ROOT = Path(dp_rmt.__file__).parents[1]
CONSOLE = """
import sys
from dp_rmt.finetuning import console
try:
    console.main()
finally:
    print("loaded", sorted({"jax", "numpy", "ml_collections"} & set(sys.modules)), file=sys.stderr)
"""


def dp_rmt_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    return subprocess.run(
        [sys.executable, "-c", CONSOLE, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetun"], "dp-rmt: there is no command 'finetun'\nusage: dp-rmt COMMAND"),
        (["finetune"], "dp-rmt finetune: give --config=FILE.py, or --model=..., --train=... and --epsilon="),
        (["finetune", "--model=a", "--train=sst2"], "dp-rmt finetune: give --epsilon=..."),
        (["finetune", "--model=a", "--train=b", "--epsilon=3"], "dp-rmt finetune: train='b': there is no such file"),
        (
            ["finetune", "--model=a", "--train=sst2", "--epsilon=3", "--config.train.num_step=3"],
            "config.train.num_step: there is no such key; did you mean 'num_steps'?",
        ),
        (
            ["finetune", "--model=a", "--train=sst2", "--epsilon=3", "--config.train.num_steps=few"],
            "config.train.num_steps must be an integer or None, got 'few'",
        ),
        (["finetune", "--workdr=a"], "Unknown command line flag 'workdr'. Did you mean: workdir ?"),
        (["finetune", "--config.train.num_steps"], "--config.train.num_steps has no value"),
        (["finetune", "--config=x.py", "--train=sst2"], "x.py"),
        (["report", "--workdirs=a"], "Unknown command line flag 'workdirs'. Did you mean: workdir ?"),
        (["sweep"], "dp-rmt sweep: --sweep is missing: give --sweep=... The file of the sweep"),
        (["push", "--folder=a"], "dp-rmt push: --repo is missing: give --repo=... Name on the hub"),
        (["predict", "--workdir=a", "--config.data.path"], "--config.data.path has no value"),
    ],
)
def test_a_typo_is_answered_before_anything_is_loaded(arguments: list[str], message: str, tmp_path: Path) -> None:
    """So that the answer takes a fraction of a second: JAX alone takes two seconds to load."""
    ended = dp_rmt_in(tmp_path, *arguments)
    assert ended.returncode != 0
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "loaded []\n" in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_has_every_command_and_every_setting_with_its_doc(tmp_path: Path) -> None:
    ended = dp_rmt_in(tmp_path, "--help")
    assert ended.returncode == 0
    assert ended.stdout.count("  dp-rmt ") == 10
    ended = dp_rmt_in(tmp_path, "finetune", "--help")
    assert ended.returncode == 0
    assert ended.stderr == "loaded []\n"
    shown = " ".join(ended.stdout.split())
    for key, _, field in walk(Settings):
        assert f"--config.{key}=" in shown
        assert field.metadata["doc"] in shown


def test_the_settings_of_a_file_are_changed_in_the_order_of_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "small.py"
    file.write_text('def get_config(name="a"):\n    return {"name": name, "arms": {"noisy": {"denoise": ()}}}\n')
    assert read(str(file), []).name == "a"
    argv = ["--workdir=w", "--config.privacy.epsilon=2", "--config.privacy.epsilon", "3"]
    argv += ["--config.arms.noisy.privacy.epsilon=4", "--config.arms.noisy.name=b", "rest"]
    rest, assignments = split(argv)
    assert rest == ["--workdir=w", "rest"]
    settings = read(f"{file}:c", assignments)
    assert (settings.name, settings.privacy.epsilon) == ("c", 3.0)
    assert settings.arms == {"noisy": {"denoise": (), "privacy": {"epsilon": 4.0}, "name": "b"}}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.arms.quiet.name=b", "config.arms.quiet.name: there is no such arm; choose from noisy"),
        ("--config.arms.noisy.nam=b", "config.arms.noisy.nam: there is no such key; did you mean 'name'?"),
        ("--config.denoise.enabled=False", "config.denoise has no keys below it, such as 'enabled'"),
        ("--config.privacy=3", "config.privacy must be a dictionary, got '3'"),
    ],
)
def test_a_wrong_assignment_is_named(argument: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "small.py"
    file.write_text('def get_config():\n    return {"arms": {"noisy": {}}}\n')
    with pytest.raises(ValueError) as caught:
        read(str(file), split([argument])[1])
    assert message in str(caught.value)


def test_a_file_of_settings_and_a_few_words_do_not_go_together(tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text("def get_config():\n    return {}\n")
    ended = dp_rmt_in(tmp_path, "finetune", "--config=small.py", "--train=sst2")
    assert ended.returncode == 1
    assert "--train is given in place of --config, not beside it: give --config.data.path" in ended.stderr


def test_a_file_without_settings_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match="the file has no function get_config"):
        read(str(tmp_path / "empty.py"), [])
    with pytest.raises(ValueError, match="--config is missing"):
        read(None, [])


@pytest.mark.slow  # `.ci/run` does the same with the wheel
def test_a_csv_file_is_fine_tuned_on_from_outside_a_checkout(
    model: Path, corpus: Path, run_side_by_side: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    rows = [line.split("\t") for line in (corpus / "train.tsv").read_text().splitlines()[1:]]
    lines = (f'"{text}",{("bad", "good")[int(label)]}\n' for text, label in rows)
    (tmp_path / "reviews.csv").write_text("text,label\n" + "".join(lines))
    given = [f"--train={tmp_path / 'reviews.csv'}", f"--model={model}", "--epsilon=4"]
    settings = {
        "train.num_steps": 2,
        "train.microbatch_size": 8,
        "data.max_length": 24,
        "data.length_groups": "()",
        "data.cache_dir": tmp_path / "cache",
        "privacy.expected_batch_size": 24,
        "privacy.accountant": "rdp",
        "denoise": "()",
    }
    given += [f"--config.{key}={value}" for key, value in settings.items()]
    ended = run_side_by_side(["-m", "dp_rmt.finetuning.console", "finetune"], "--workdir", {"run": given})["run"]
    assert ended.code == 0, ended.stderr
    assert "ε spent" in ended.stdout
    config = json.loads((ended.folder / "config.json").read_text())
    assert (config["data"]["task"], config["denoise"]) == ("labelled_table", [])
    again = dp_rmt_in(tmp_path, "report", f"--workdir={ended.folder}")
    assert again.returncode == 0, again.stderr
    assert again.stdout == ended.stdout
