"""The command itself, in processes of its own: a wrong command line ends in one line, a run has a readable terminal."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from dp_rmt.finetuning.settings import Settings

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def commands(make_config: Callable[..., Settings], run_side_by_side: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Five commands, run side by side."""
    small = [
        f"--config.{name}={value}"
        for group in ("data", "model", "privacy", "train")
        for name, value in ((f"{group}.{key}", value) for key, value in getattr(make_config(), group).as_dict().items())
        if value is not None and not isinstance(value, dict)
    ] + ["--config.denoise=()"]
    arguments = {
        "unknown_key": ["--config=configs/base.py", "--config.privacy.epsilonn=3"],
        "wrong_type": ["--config=configs/base.py", "--config.train.num_steps=2.5"],
        "no_config_file": ["--config=configs/nothing.py"],
        "wrong_value": ["--config=configs/base.py", *small, "--config.privacy.expected_batch_size=500"],
        "good": ["--config=configs/base.py", *small, "--config.privacy.epsilon=inf"],
    }
    return run_side_by_side(["-m", "experiments.finetune"], "--workdir", arguments)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "unknown_key",
            r"config\.privacy\.epsilonn: there is no such key; did you mean 'epsilon'\? Choose from epsilon, delta",
        ),
        ("wrong_type", r"config\.train\.num_steps must be an integer or None, got '2\.5'"),
        ("no_config_file", r"finetune: .*'configs/nothing\.py'.*--config=configs/quickstart\.py"),
        (
            "wrong_value",
            r"finetune: config\.privacy .* on 120 training examples: .*expected_batch_size=500 is more than there are",
        ),
    ],
)
def test_a_mistake_ends_in_a_message_without_a_traceback(name: str, message: str, commands: dict[str, Any]) -> None:
    ended = commands[name]
    assert ended.code == 1
    assert re.search(message, ended.stderr)
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count("\n") <= 2
    assert ended.stdout == ""
    assert not ended.folder.exists()


def test_the_terminal_shows_progress_and_results_and_no_log(commands: dict[str, Any]) -> None:
    ended = commands["good"]
    assert ended.code == 0, ended.stderr
    assert ended.stdout.startswith("arm ")
    assert "one training example" in ended.stdout
    assert "NOT private" in ended.stdout
    assert ended.stdout.endswith(f"Report: {ended.folder / 'report.html'}\n")
    assert (ended.folder / "model" / "model.safetensors").exists()
    progress = [line for line in re.split(r"[\r\n]+", ended.stderr) if line]
    # Nothing but the plan and the progress bar, which is named after the config.
    assert progress[0] == "plan: 120 rows, batch 24, 3 steps, no noise, and no privacy"
    assert [line for line in progress[1:] if not line.startswith("base: ")] == []
    assert "3/3" in progress[-1]
    assert "dev/accuracy" in progress[-1]
