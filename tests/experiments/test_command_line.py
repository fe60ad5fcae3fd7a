"""The command itself, in processes of its own: a wrong command line ends in one line, a run has a readable terminal."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from ml_collections import ConfigDict

import experiments

ROOT = Path(experiments.__file__).parents[1]


class Ended(NamedTuple):
    code: int
    stdout: str
    stderr: str
    workdir: Path


@pytest.fixture(scope="module")
def commands(
    make_config: Callable[..., ConfigDict], compilation_cache_dir: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Ended]]:
    """Four commands, run side by side."""
    small = [
        f"--config.{name}={value}"
        for group in ("data", "model", "privacy", "denoise", "train")
        for name, value in ((f"{group}.{key}", value) for key, value in make_config()[group].items())
        if value is not None
    ]
    arguments = {
        "unknown_key": ["--config=configs/base.py", "--config.privacy.epsilonn=3"],
        "wrong_type": ["--config=configs/base.py", "--config.train.num_steps=2.5"],
        "no_config_file": ["--config=configs/nothing.py"],
        "wrong_value": ["--config=configs/base.py", *small, "--config.privacy.expected_batch_size=500"],
        "good": ["--config=configs/base.py", *small, "--config.privacy.epsilon=inf"],
    }
    environment = {
        **os.environ,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # as in conftest.py, with its cache
        "JAX_COMPILATION_CACHE_DIR": compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    workdirs = {name: tmp_path_factory.mktemp("command_line") / name for name in arguments}
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-m", "experiments.finetune", *given, f"--workdir={workdirs[name]}"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        for name, given in arguments.items()
    }
    try:
        outputs = {name: process.communicate(timeout=300) for name, process in processes.items()}
        yield {name: Ended(processes[name].returncode, *outputs[name], workdirs[name]) for name in arguments}
    finally:
        for process in processes.values():
            process.kill()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unknown_key", r'--config\.privacy\.epsilonn=3 names .* Did you mean "epsilon".* configs/base\.py'),
        ("wrong_type", r"flag --config\.train\.num_steps=2\.5: invalid literal for int"),
        ("no_config_file", r"finetune: .*'configs/nothing\.py'.*--config=configs/quickstart\.py"),
        ("wrong_value", r"finetune: config\.privacy .* at most the 120 training examples, got 500"),
    ],
)
def test_a_mistake_ends_in_a_message_without_a_traceback(
    name: str, message: str, commands: dict[str, Ended]
) -> None:
    ended = commands[name]
    assert ended.code == 1
    assert re.search(message, ended.stderr)
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count("\n") <= 2
    assert ended.stdout == ""
    assert not ended.workdir.exists()


def test_the_terminal_shows_progress_and_results_and_no_log(commands: dict[str, Ended]) -> None:
    ended = commands["good"]
    assert ended.code == 0, ended.stderr
    assert ended.stdout.startswith("arm ")
    assert "one training example" in ended.stdout
    assert "NOT private" in ended.stdout
    assert ended.stdout.endswith(f"Report: {ended.workdir / 'report.html'}\n")
    assert (ended.workdir / "model" / "model.safetensors").exists()
    progress = [line for line in re.split(r"[\r\n]+", ended.stderr) if line]
    # Nothing but the progress bar, which is named after the config.
    assert [line for line in progress if not line.startswith("base: ")] == []
    assert "3/3" in progress[-1]
    assert "dev/accuracy" in progress[-1]
